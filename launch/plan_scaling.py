"""Tables of launch/README.md: memory, communication and predicted weak scaling of a config, by compilation alone.

    python launch/plan_scaling.py configs/unet_det.py --per-device 50 [--devices 1 8 64 256] [--keep FOLDER]

Each number of devices is a `msr train --dry-run` of its own, fully sharded (`mesh.fsdp` = all devices), kept in FOLDER
and not repeated. Minutes each for the official sizes; nothing is allocated.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from msr_jax.plan.chips import CHIPS
from msr_jax.plan.program import ASSUMED_UTILISATION, expected_time

CURVES = ("v5e", "v5p", "h100")


def plan(config: str, devices: int, per_device: int, folder: Path) -> dict[str, Any]:
    """The plan of one mesh, made in a process of its own (a process has one number of simulated devices)."""
    path = folder / f"{Path(config).stem}_{devices}.json"
    if not path.exists():
        command = [sys.executable, "-m", "msr_jax.cli", "train", "--dry-run", "--config", config, "--json", str(path)]
        settings = {"mesh.data": 1, "mesh.fsdp": devices, "data.batch": per_device * devices}
        command += ["--devices", str(devices), *(f"--config.{name}={value}" for name, value in settings.items())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def memory_table(plans: dict[int, dict[str, Any]]) -> list[str]:
    """Bytes of one device; the state should fall as 1/N."""
    first = _state(next(iter(plans.values())))
    lines = [
        "| devices | parameters + averages, MB | optimiser, MB | frozen, MB | state × devices / state on the fewest | step's arguments, MB | work space, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    base = next(iter(plans))
    for n, p in plans.items():
        b = p["bytes_per_device"]
        lines.append(
            f"| {n} | {_mb(b['parameters'] + b['averages'])} | {_mb(b['optimiser'])} | {_mb(b['frozen'])} | "
            f"{_state(p) * n / (first * base):.3f} | {_mb(b['arguments'])} | {b['activations'] / 1e9:.1f} |"
        )
    return lines


def collective_table(plans: dict[int, dict[str, Any]]) -> list[str]:
    """What a step sends; no gather may be larger than the largest parameter."""
    lines = ["| devices | collective | a step | results, MB | sent per device, MB |", "|---|---|---|---|---|"]
    for n, p in plans.items():
        for kind, row in p["collectives"].items():
            lines.append(
                f"| {n} | {kind} | {row['count']:.0f} | {_mb(row['result_bytes'])} | {_mb(row['sent_bytes'])} |"
            )
        if n > 1:
            gathers = f"largest gather {p['largest_gather']:,} elements, largest parameter {p['largest_parameter']:,}"
            lines.append(f"| {n} | {gathers} | | | |")
    return lines


def scaling_table(plans: dict[int, dict[str, Any]]) -> list[str]:
    """Seconds of a step and efficiency against one device, between communication fully hidden and not hidden at all."""
    lines = ["| devices | " + " | ".join(f"{chip}: s a step, efficiency" for chip in CURVES) + " |"]
    lines.append("|---|" + "---|" * len(CURVES))
    for n, p in plans.items():
        cells = []
        for chip in CURVES:
            e = expected_time(p, chip, n)
            alone = e["compute"]
            cells.append(
                f"{e['overlapped']:.3f} to {e['exposed']:.3f}, {alone / e['overlapped']:.0%} to {alone / e['exposed']:.0%}"
            )
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return lines


def _state(p: dict[str, Any]) -> int:
    return sum(p["bytes_per_device"][name] for name in ("parameters", "averages", "optimiser"))


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--per-device", type=int, required=True, help="examples per device, the same for every number")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--keep", type=Path, help="plans are kept here and not made again")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        plans = {n: plan(args.config, n, args.per_device, folder) for n in args.devices}
    one = next(iter(plans.values()))
    print(
        f"{args.config}: {one['parameters']:,} parameters trained, {args.per_device} × {one['crop']} samples per device\n"
    )
    for table in (memory_table, collective_table, scaling_table):
        print("\n".join(table(plans)) + "\n")
    rates = "; ".join(
        f"{c}: {CHIPS[c].flops / 1e12:.0f} TFLOP/s, {CHIPS[c].link / 1e9:.0f} GB/s in a host and {CHIPS[c].host_link / 1e9:.0f} between"
        for c in CURVES
    )
    print(
        f"Assumed: computing at {ASSUMED_UTILISATION:.0%} of the data-sheet bfloat16 rate; one-way rates per chip ({rates})."
    )


if __name__ == "__main__":
    main()
