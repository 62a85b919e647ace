"""`msr parity`: network fixtures of the published implementation against this one, in float32 at the highest precision."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax.errors import FlaxError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from msr_jax.errors import UserError
from msr_jax.parity.bs_roformer import check_bs_roformer
from msr_jax.parity.checks import Arrays, Check
from msr_jax.parity.mel_band_roformer import check_mel_band_roformer
from msr_jax.parity.unet import check_unet

# How the names of a family's fixtures begin, and what checks them.
FAMILIES: dict[tuple[str, ...], Callable[[Path, Arrays, Mapping[str, Any]], Iterator[Check]]] = {
    ("unet_",): check_unet,
    ("melrf_",): check_mel_band_roformer,
    ("bsrf_", "loss_", "demix_", "ckpt_"): check_bs_roformer,
}


def check_fixture(path: str | Path) -> list[Check]:
    """Compare every output of a network fixture, and the activations that it holds.

    Args:
      path: the fixture's .safetensors or .json, or their common name.

    Raises:
      UserError: not a fixture, one of a network that is not implemented, or one whose description and tensors do not fit.
    """
    path = Path(path)
    try:
        arrays: Arrays = load_file(path.with_suffix(".safetensors"))
        meta = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{path.with_suffix('')} is not a fixture: a .safetensors and a .json are needed ({error})"
        ) from error
    check = next((f for prefixes, f in FAMILIES.items() if path.stem.startswith(prefixes)), None)
    if check is None:
        known = ", ".join(f"{p}*" for prefixes in FAMILIES for p in prefixes)
        raise UserError(f"{path.name} is a fixture of no network that `msr parity` knows; known are {known}")
    try:
        with jax.default_matmul_precision("highest"):
            checks = list(check(path, arrays, meta))
    except (FlaxError, AttributeError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path.name}: its description and its tensors do not fit each other ({reason})") from error
    if not checks:
        raise UserError(f"{path} has no output that `msr parity` knows")
    return checks


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr parity", description=__doc__)
    parser.add_argument("fixtures", nargs="+", metavar="FIXTURE", help="path of a .safetensors file or of its .json")
    parser.add_argument("--outputs-only", action="store_true", help="leave out intermediate activations")
    args = parser.parse_args(argv)
    failed = 0
    for path in args.fixtures:
        print(path)
        for name, error, tolerance in check_fixture(path):
            if args.outputs_only and name.startswith("mid/"):
                continue
            failed += error > tolerance
            print(f"  {name:<44} {error:9.2e}  {'ok' if error <= tolerance else f'ABOVE {tolerance:g}'}")
    if failed:
        print(f"{failed} of the tensors differ by more than allowed", file=sys.stderr)
    return 1 if failed else 0
