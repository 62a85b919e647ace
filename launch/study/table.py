"""The study's table in Markdown: `python launch/study/table.py SCORES BASE NAME…`, folders of `msr evaluate` in SCORES.

Averages of every system, and its paired difference to BASE over tracks with a 95 % interval.
"""

import sys
from pathlib import Path

from msr_jax.errors import UserError
from msr_jax.evaluate.compare import compare, read_results
from msr_jax.evaluate.report import number


def line(name: str, base: dict, results: dict) -> str:
    values = results["aggregate"]
    stems = [*results["settings"]["stems"], "average"]
    cells = [number(values["si_sdri_active"][stem]) for stem in stems] + [number(values["sdr"]["average"])]
    for metric in ("si_sdri_active", "sdr"):
        if results is base:
            cells.append("")
            continue
        (found,) = [d for d in compare(base, results, [metric]) if d.stem == "average"]
        interval = "" if found.low is None else f" ({found.low:+.2f} to {found.high:+.2f})"
        cells.append("–" if found.mean is None else f"{found.mean:+.2f}{interval}")
    return f"| {name} | " + " | ".join([*cells, number(results["rtf"])]) + " |"


def main(folder: Path, names: list[str]) -> None:
    every = {name: read_results(folder / name) for name in names}
    base = every[names[0]]
    stems = [*base["settings"]["stems"], "average"]
    print(
        f"{len(base['tracks'])} tracks. SI-SDRi of active stems and SDR in dB; differences to {names[0]}, 95 % intervals.\n"
    )
    print(f"| | {' | '.join(stems)} | SDR | Δ SI-SDRi | Δ SDR | RTF |\n" + "|---" * (len(stems) + 5) + "|")
    for name, results in every.items():
        print(line(name, base, results))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
