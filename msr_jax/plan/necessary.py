"""What parameters alone make devices send: each gathered once, each gradient summed once. What a program sends beside it is
the compiler's doing, or a mistake."""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from msr_jax.train.sharding import MIN_SHARDED, parameter_sharding, sent_dtype


def necessary_bytes(
    mesh: Mesh,
    trained: Any,
    frozen: Any,
    min_size: int = MIN_SHARDED,
    dtype: Any = np.float32,
    exact: Collection[str] = (),
) -> dict[str, float]:
    """Bytes that each device sends in a step, by the usual ring.

    Args:
      trained: parameters with a gradient; frozen: those without, be it of several networks.
      dtype, exact: as of `sharding.gathered`.

    Returns:
      {"gathers": of all that is split over fsdp, in the precision in which it is multiplied, "gradients": summed in float32,
      "narrow_gradients": in the precision of the gathers}.
    """
    split = mesh.size // mesh.shape["data"]
    found = {"gathers": 0.0, "gradients": 0.0, "narrow_gradients": 0.0}

    def add(path: tuple[Any, ...], leaf: Any, is_trained: bool) -> None:
        size, sent = int(np.prod(leaf.shape)), np.dtype(sent_dtype(path, leaf, dtype, exact)).itemsize
        ways = 1 if parameter_sharding(mesh, leaf, min_size).is_fully_replicated else split
        found["gathers"] += size * sent * (ways - 1) / ways
        if is_trained:
            # Into each device's part, then over the devices that hold the same part.
            others = mesh.size // ways
            terms = size * (ways - 1) / ways + 2 * size / ways * (others - 1) / others
            found["gradients"] += 4 * terms
            found["narrow_gradients"] += sent * terms

    for tree, is_trained in ((trained, True), (frozen, False)):
        jax.tree_util.tree_map_with_path(lambda path, leaf, kind=is_trained: add(_named(path), leaf, kind), tree)
    return found


def _named(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys of a path that are names."""
    return tuple(key for key in path if hasattr(key, "key"))
