"""`msr bench NAME --json FILE`: speed and memory beside the peers, as ratios from one run."""

import argparse
import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any

from msr_jax.errors import UserError

BENCHMARKS = {"unet": "msr_jax.bench.unet", "bs_roformer": "msr_jax.bench.bs_roformer"}  # each has run(options) -> rows

# Fields that some benchmarks add to a row, and what the table calls them.
MORE = {"rtf": "RTF", "flops": "FLOP", "share_of_matmul_rate": "of the matmul rate"}


def machine() -> str:
    """The processor, the cores that this process may use, and the operating system."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {platform.system()}, Python {platform.python_version()}"


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':<26}{'seconds':>10}{'speed-up':>10}{'peak GB':>9}")
    for row in rows:
        ratio = "–" if row["speedup_over_peer"] is None else f"{row['speedup_over_peer']:.2f}"
        extra = "".join(f"  {label} {row[key]:.3g}" for key, label in MORE.items() if row.get(key) is not None)
        print(f"{row['name']:<26}{row['seconds']:>10.3f}{ratio:>10}{row['peak_memory_bytes'] / 1e9:>9.2f}{extra}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr bench", description=__doc__)
    parser.add_argument("name", choices=list(BENCHMARKS))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write machine and rows here as well")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement; the median counts")
    parser.add_argument("--no-peer", action="store_true", help="leave out PyTorch; ratios are then empty")
    parser.add_argument("--tiny", action="store_true", help="a network of toy size, to see that the benchmark runs")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError("--repeats must be at least 1")
    rows = importlib.import_module(BENCHMARKS[args.name]).run(args)
    print_table(rows)
    if args.json:
        beside = args.json.with_name(f".{args.json.name}.{os.getpid()}.tmp")
        try:
            beside.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1, allow_nan=False) + "\n")
            os.replace(beside, args.json)
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {error.strerror}") from error
    return 0
