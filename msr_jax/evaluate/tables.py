"""`msr tables`: the paper's three tables, from the models and data at hand, beside the published rows.

Tables 1 and 2 are quality on Slakh2100 and MUSDB18-HQ, table 3 is time and size. A row that cannot be run is named with
the reason; a published figure is marked as quoted.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from msr_jax.data.tracks import find_tracks, split_of
from msr_jax.errors import UserError
from msr_jax.evaluate.protocols import PROTOCOLS, protocol_text
from msr_jax.evaluate.published import DATA, PUBLISHED
from msr_jax.evaluate.report import headline, number, quoted
from msr_jax.evaluate.score import evaluate_tracks, summary
from msr_jax.evaluate.songs import check_all_stems
from msr_jax.evaluate.systems import model_runs, stamp_of
from msr_jax.files import write_whole
from msr_jax.machine import machine
from msr_jax.separate.engine import Separator

# Name in the paper, refinement, steps.
ROWS = (
    ("Det.", "none", None),
    ("Det. × 2", "det_x2", None),
    ("Det. + Diff.", "diffusion", None),
    ("Det. + CD, T = 1", "consistency", 1),
    ("Det. + CD, T = 2", "consistency", 2),
    ("Det. + CD, T = 4", "consistency", 4),
)


class Measured(NamedTuple):
    """A row that was run: averages in dB, seconds for a segment of the model, real time factor, parameters of the networks in
    use, tracks that were scored, and how long such a segment lasts in seconds."""

    system: str
    si_sdri: float | None
    sdr: float | None
    sir: float | None
    sar: float | None
    seconds: float
    rtf: float
    parameters: int
    tracks: int
    segment_seconds: float


def time_segment(separator: Separator, repeats: int) -> tuple[float, float, int]:
    """Median seconds of one segment on the first device, the first run left out; the same over its length; parameters in use."""
    shape = (
        (separator.segment,) if separator.config["channels"] == 1 else (separator.segment, separator.config["channels"])
    )
    audio = 0.1 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    times = []
    with jax.default_device(jax.local_devices()[0]):  # where it was scored, so that nothing is compiled again
        for _ in range(repeats + 1):
            started = time.perf_counter()
            separator.separate(audio, separator.sample_rate)
            times.append(time.perf_counter() - started)
    seconds = float(np.median(times[1:]))
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(separator.network.weights))
    return seconds, seconds * separator.sample_rate / separator.segment, count


def run_rows(
    channels: int, model: str, data: Path, args: argparse.Namespace
) -> tuple[list[Measured], list[tuple[str, str]], list[str]]:
    """Run every row that a model can: (rows, [(row, why it was not run)], tracks that could not be scored)."""
    measured, missing, faults = [], [], []
    for system, refine, steps in ROWS:
        try:
            estimators, plan, separator = model_runs(
                model, refine, steps, 0, args.protocol, args.bss_backend, dtype=args.dtype
            )
        except UserError as error:
            missing.append((system, str(error)))
            continue
        if plan.channels != channels:
            raise UserError(f"{model} is a model of {plan.channels} channel(s); {DATA[channels]} wants {channels}")
        tracks = find_tracks(data, plan.stems)[: args.tracks]
        check_all_stems(data, plan.stems)
        text = protocol_text(args.protocol, args.bss_backend)
        told = [str(model), system, args.protocol, text, args.bss_backend, args.dtype]
        stamp = lambda track, told=told: [told, stamp_of([track, Path(model)])]
        keep = args.out / DATA[channels] / system.replace(" ", "")
        scored, problems, _ = evaluate_tracks(tracks, estimators, plan, keep, stamp)
        if not scored:
            raise UserError(f"no track of {data} could be scored; {problems[0]['track']}: {problems[0]['reason']}")
        faults += [f"{system}, {p['track']}: {p['reason']}" for p in problems]
        results = summary(scored, problems, plan) | {"settings": {"channels": channels}}
        timed = time_segment(separator, args.repeats)
        lasts = separator.segment / separator.sample_rate
        measured.append(Measured._make([system, *headline(results), *timed, len(scored), lasts]))
        print(f"{DATA[channels]}: {system} is done ({len(scored)} tracks)")
    if not measured:
        raise UserError(f"{model} can run no row: {missing[0][1]}")
    return measured, missing, faults


def quality_table(channels: int, measured: list[Measured], missing: list[tuple[str, str]]) -> str:
    lines = [f"## Table {channels}: quality on {DATA[channels]} (dB, average over stems)", ""]
    lines += ["| system | SI-SDRi | SDR | SIR | SAR | |", "|---|---|---|---|---|---|"]
    for row in PUBLISHED[channels]:
        values = " | ".join(number(v) for v in (row.si_sdri, row.sdr, row.sir, row.sar))
        lines.append(f"| {row.system} | {values} | {quoted(row)} |")
    for own in measured:
        values = " | ".join(number(v) for v in (own.si_sdri, own.sdr, own.sir, own.sar))
        lines.append(f"| **{own.system}** | {values} | measured here, {own.tracks} tracks |")
    lines += [f"| **{system}** | – | – | – | – | not run: {reason} |" for system, reason in missing]
    return "\n".join(lines) + "\n"


def time_table(measured: dict[int, list[Measured]]) -> str:
    lines = ["## Table 3: time of one segment, parameters, real time factor", ""]
    lines += ["| data | system | seconds | RTF | parameters | |", "|---|---|---|---|---|---|"]
    millions = lambda n: "–" if n is None else f"{n / 1e6:.4g} M"
    for channels, name in DATA.items():
        for row in PUBLISHED[channels]:
            if row.seconds is not None or row.parameters is not None:
                cells = f"{number(row.seconds, 3)} | {number(row.rtf, 3)} | {millions(row.parameters)}"
                lines.append(f"| {name} | {row.system} | {cells} | {quoted(row)} |")
        for own in measured.get(channels, []):
            cells = f"{own.seconds:.3f} | {own.rtf:.3f} | {millions(own.parameters)}"
            lines.append(
                f"| {name} | **{own.system}** | {cells} | measured here, segments of {own.segment_seconds:.2f} s |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr tables", description=(__doc__ or "").partition("\n")[0])
    for name, data in (("slakh", DATA[1]), ("musdb", DATA[2])):
        parser.add_argument(f"--{name}-model", metavar="DIR", help=f"model folder for {data}")
        parser.add_argument(f"--{name}-data", metavar="DIR", type=Path, help=f"{data}, or tracks in its layout")
    parser.add_argument(
        "--out", required=True, metavar="DIR", type=Path, help="tables.md and tables.json; scores stay here"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="paper")
    parser.add_argument("--bss-backend", choices=["jax", "museval"], default="jax")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of a segment; the median counts")
    parser.add_argument("--tracks", type=int, metavar="N", help="the first N tracks only")
    args = parser.parse_args(argv)
    if args.repeats < 1 or (args.tracks is not None and args.tracks < 1):
        raise UserError("--repeats and --tracks must be at least 1")
    measured: dict[int, list[Measured]] = {}
    missing: dict[int, list[tuple[str, str]]] = {}
    splits: dict[int, str | None] = {}
    faults: list[str] = []
    for channels, name in ((1, "slakh"), (2, "musdb")):
        model, data = getattr(args, f"{name}_model"), getattr(args, f"{name}_data")
        if bool(model) != bool(data):
            raise UserError(f"--{name}-model and --{name}-data belong together")
        if not model:
            missing[channels] = [(row[0], f"neither --{name}-model nor --{name}-data was given") for row in ROWS]
            continue
        folder = split_of(data, args.split)
        splits[channels] = folder.name if folder != data else None
        done = run_rows(channels, model, folder, args)
        measured[channels], missing[channels], more = done
        faults += more
    settings: dict[str, Any] = {
        "protocol": args.protocol,
        "protocol_text": protocol_text(args.protocol, args.bss_backend),
        "bss_backend": args.bss_backend,
        "splits": [splits.get(c) for c in DATA],
        "tracks": args.tracks or "all",
        "repeats": args.repeats,
        "models": [args.slakh_model, args.musdb_model],
        "data": [str(d) if d else None for d in (args.slakh_data, args.musdb_data)],
        "dtype": args.dtype,
        "machine": machine(),
        "devices": sorted({d.device_kind for d in jax.local_devices()}),
    }
    quoted_note = (
        "Rows in bold were measured here, on the tracks and models below; all others are quoted and on other hardware."
    )
    parts = [quality_table(c, measured.get(c, []), missing[c]) for c in DATA]
    text = "\n".join([quoted_note + "\n", *parts, time_table(measured)])
    if faults:
        text += f"\nNot scored, in no average: {len(faults)}\n\n" + "\n".join(f"- {f}" for f in faults) + "\n"
    text += "\n" + "\n".join(f"- {k}: {v}" for k, v in settings.items()) + "\n"
    told = {
        "settings": settings,
        "measured": {DATA[c]: [r._asdict() for r in rows] for c, rows in measured.items()},
        "missing": {DATA[c]: dict(rows) for c, rows in missing.items()},
        "published": {DATA[c]: [r._asdict() for r in rows] for c, rows in PUBLISHED.items()},
        "problems": faults,
    }
    write_whole(args.out / "tables.json", json.dumps(told, indent=1, allow_nan=False) + "\n")
    write_whole(args.out / "tables.md", text)
    print(text)
    return 1 if faults else 0
