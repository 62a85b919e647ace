"""`msr bench NAME --json FILE`: speed and memory beside the peers, as ratios from one run."""

import argparse
import importlib
import json
import math
from pathlib import Path
from typing import Any

from msr_jax.errors import UserError
from msr_jax.files import check_place, write_whole
from msr_jax.machine import machine

# Each has run(options) -> rows.
BENCHMARKS = {
    "unet": "msr_jax.bench.unet",
    "bs_roformer": "msr_jax.bench.bs_roformer",
    "roformers": "msr_jax.bench.roformers",
    "evaluate": "msr_jax.bench.evaluate",
    "train": "msr_jax.bench.train",
    "dispatch": "msr_jax.bench.dispatch",
    "data": "msr_jax.bench.data",
    "separate": "msr_jax.bench.separate",
    "song": "msr_jax.bench.song",
}
# Options that not all take.
OPTIONS = {
    "config": ("train",),
    "batch": ("train",),
    "seconds": ("roformers", "bs_roformer", "separate", "song"),
    "against": ("unet", "bs_roformer", "roformers", "separate"),
    "tracks": ("separate",),
}
# Fields that some benchmarks add to a row, and what the table calls them.
MORE = {
    "speedup_over_older": "over older",
    "rtf": "RTF",
    "flops": "FLOP",
    "share_of_matmul_rate": "of the matmul rate",
    "first_stem_seconds": "first stem s",
    "si_sdri": "SI-SDRi dB",
}


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':<32}{'seconds':>10}{'speed-up':>10}{'peak GB':>9}")
    for row in rows:
        ratio = "–" if row["speedup_over_peer"] is None else f"{row['speedup_over_peer']:.2f}"
        extra = "".join(f"  {label} {row[key]:.3g}" for key, label in MORE.items() if row.get(key) is not None)
        print(f"{row['name']:<32}{row['seconds']:>10.4g}{ratio:>10}{row['peak_memory_bytes'] / 1e9:>9.2f}{extra}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr bench", description=__doc__)
    parser.add_argument("name", choices=list(BENCHMARKS))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write machine and rows here as well")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement; the median counts")
    parser.add_argument("--no-peer", action="store_true", help="leave out the other program; ratios are then empty")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that the benchmark runs")
    parser.add_argument("--config", metavar="FILE.py", help="train: a training config; default: the official U-Net's")
    parser.add_argument("--batch", type=int, help="train: examples per step over all devices; default 50")
    parser.add_argument(
        "--seconds",
        type=float,
        help="of audio; roformers: default the segment of each network; separate: default 180; song: 60",
    )
    parser.add_argument(
        "--against",
        metavar="COMMIT|FOLDER",
        help="unet, bs_roformer, roformers, separate: an older build: a commit, sources, or an environment with it",
    )
    parser.add_argument(
        "--tracks", metavar="FOLDER", type=Path, nargs="+", help="separate: of tracks, for its songs and to be scored"
    )
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError("--repeats must be at least 1")
    if args.seconds is not None and not 0.1 <= args.seconds < math.inf:
        raise UserError("--seconds must be at least 0.1")
    if args.batch is not None and args.batch < 1:
        raise UserError("--batch must be at least 1")
    for option, names in OPTIONS.items():
        if getattr(args, option) and args.name not in names:
            raise UserError(f"--{option} goes with {', '.join(names)}, not with {args.name}")
    if args.json:
        check_place(args.json)
    rows = importlib.import_module(BENCHMARKS[args.name]).run(args)
    print_table(rows)
    if args.json:
        write_whole(args.json, json.dumps({"machine": machine(), "rows": rows}, indent=1, allow_nan=False) + "\n")
    return 0
