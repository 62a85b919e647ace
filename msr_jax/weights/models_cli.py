"""`msr models`: the public models that `--model NAME` fetches; `msr models NAME` tells all that is known of one."""

import argparse
import difflib

import yaml

from msr_jax.errors import UserError
from msr_jax.weights.registry import TABLE, folder_of, is_at_hand, page_of, read_table, terms_of, told_of

NETWORKS = {"bs_roformer": "BS", "mel_band_roformer": "Mel"}


def _listed() -> str:
    rows = [("name", "network", "Hz", "hop", "MB", "stems", "licence", "published figure")]
    for name, entry in read_table(TABLE).items():
        network = f"{NETWORKS[entry['model']['network']]} {entry['model']['dim']}/{entry['model']['depth']}"
        mark = "*" if is_at_hand(name) else ""
        size, stems = f"{entry['size'] / 1e6:.0f}", ", ".join(entry["stems"])
        times = str(entry["rate"]), str(entry["model"]["stft_hop_length"])
        rows.append((name + mark, network, *times, size, stems, entry.get("licence", ""), entry.get("figure", "")))
    widths = [max(len(row[k]) for row in rows) for k in range(6)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0, 0], strict=True)) for row in rows]
    told = "* is in the cache. An empty licence: no document says it; `msr models NAME` names the page to ask."
    return "\n".join([*(line.rstrip() for line in lines), "", told])


def _described(name: str) -> str:
    table = read_table(TABLE)
    if name not in table:
        near = ", ".join(difflib.get_close_matches(name, table, n=3, cutoff=0.4))
        raise UserError(f"there is no model '{name}'{near and '; near are '}{near}; `msr models` lists all")
    entry = table[name]
    facts = {
        "author": entry.get("author"),
        "page": page_of(entry),
        "file": entry["file"],
        "size": f"{entry['size']} bytes",
        "sha256": entry.get("sha256", "unknown: only the size is compared"),
        "licence": entry.get("licence", "not said by the documents that this table was made from"),
        "figure": entry.get("figure"),
        "figure from": entry.get("figure_source"),
        "in the cache": str(folder_of(name)) if is_at_hand(name) else "no",
    }
    lines = [f"{key}: {value}" for key, value in facts.items() if value]
    told = yaml.safe_dump(told_of(entry), sort_keys=False, default_flow_style=None).strip()
    return "\n".join([terms_of(name, entry), "", *lines, "", "as YAML:", told])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr models", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="of one of them")
    args = parser.parse_args(argv)
    print(_described(args.name) if args.name else _listed())
    return 0
