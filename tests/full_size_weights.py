"""Every official checkpoint at full size, of random numbers, through `msr import` and `msr export`: a table.

    python tests/full_size_weights.py FOLDER_OF_PARITY_FILES [--only NAME …]

Time and peak memory of the two commands, each in a process of its own, and whether what comes out equals what went in to
the bit. The folder holds the key lists `*/keys_*.json`. Needs the extra `torch`, and a few times 4 GB of disk.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from msr_jax.weights.lightning import read_checkpoint
from msr_jax.weights.torch_names import DUPLICATES

STAGES = {"det": "det", "diff": "diffusion", "cd": "consistency"}
FAMILIES = {"unet": "unet", "bs_roformer": "bsrf"}


def kind_of(keys: Path) -> tuple[str, str]:
    """(--arch of the import, --format of the export) of a key list."""
    family, name = FAMILIES[keys.parent.name], keys.stem.removeprefix("keys_")
    is_public = name.startswith("msst")
    return f"{family}_{'det' if is_public else STAGES[name.split('_')[0]]}", "msst" if is_public else "dicose"


def write_random(keys: Path, arch: str, path: Path) -> None:
    """A checkpoint of random numbers with these names and shapes, copies of networks written once as PyTorch does."""
    import torch

    told = json.loads(keys.read_text())
    listed = told.get("state_dict", told)
    state: dict[str, Any] = {}
    for name, entry in listed.items():
        state[name] = torch.randn(entry["shape"], dtype=getattr(torch, entry.get("dtype", "float32")))
    for copy, original in DUPLICATES.get(arch, {}).items():
        state |= {name: state[original + name.removeprefix(copy)] for name in state if name.startswith(copy)}
    is_public = keys.stem.startswith("keys_msst")
    torch.save(state if is_public else {"state_dict": state, "pytorch-lightning_version": "2.3.1"}, path)


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result from a process of its own. A child counts its parent's memory at its start into its peak, so
    this process must stay small.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def measured(*words: str) -> tuple[float, int]:
    """(seconds, peak bytes) of one `msr` command."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "msr_jax.cli", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"msr {' '.join(words)} ended with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def is_equal(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same tensors."""
    a, b = read_checkpoint(first).state_dict, read_checkpoint(second).state_dict
    return set(a) == set(b) and all(np.array_equal(a[name].read(), b[name].read()) for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="names of key lists, such as unet/keys_det_full")
    args = parser.parse_args()
    found = {f"{p.parent.name}/{p.stem}": p for p in sorted(args.folder.glob("*/keys_*.json"))}
    if not found or not set(args.only) <= set(found):
        raise SystemExit(f"{args.folder} holds the key lists {', '.join(found) or '(none)'}")
    print(
        "| checkpoint | file, GB | import, s | its peak, GB | export, s | its peak, GB | equal |\n|---|---|---|---|---|---|---|"
    )
    differing = 0
    for name, keys in found.items():
        if args.only and name not in args.only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            place, (arch, kind) = Path(scratch), kind_of(keys)
            apart(write_random, keys, arch, place / "in.ckpt")
            size = (place / "in.ckpt").stat().st_size
            took, peak = measured("import", str(place / "in.ckpt"), "--arch", arch, "-o", str(place / "model"))
            back, peak_back = measured("export", str(place / "model"), "--format", kind, "-o", str(place / "out.ckpt"))
            is_same = apart(is_equal, place / "in.ckpt", place / "out.ckpt")
            differing += not is_same
            print(
                f"| {name} | {size / 1e9:.2f} | {took:.1f} | {peak / 1e9:.2f} | {back:.1f} | {peak_back / 1e9:.2f} | {'yes' if is_same else 'NO'} |",
                flush=True,
            )
    if differing:
        raise SystemExit(f"{differing} checkpoints came back changed")


if __name__ == "__main__":
    main()
