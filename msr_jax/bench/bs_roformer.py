"""The official BS-RoFormer on 3 s of stereo audio beside its peer, and once on its segment of 11 s without; see `roformers`."""

import argparse
from typing import Any

from msr_jax.bench.roformers import RATE, SECONDS, SHAPES, TINY_SAMPLES, compare

SHAPE = "bs_384_8"


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table; UserError as of `compare`."""
    rows = _named(compare(SHAPE, args, TINY_SAMPLES if args.tiny else SECONDS * RATE))
    if not args.tiny:
        long = SHAPES[SHAPE].segment
        rows += _named(compare(SHAPE, args, long, with_peer=False), f"_{long // RATE}s")
    return rows


def _named(rows: list[dict[str, Any]], suffix: str = "") -> list[dict[str, Any]]:
    """Rows under the names that this benchmark has always had."""
    name = lambda old: old.removeprefix(f"{SHAPE}_") if "peer" in old else old.replace(SHAPE, "bs_roformer") + suffix
    return [{**row, "name": name(row["name"])} for row in rows]
