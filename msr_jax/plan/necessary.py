"""What parameters alone make devices send in a step: each gathered once, each gradient summed once.

The least that a step can do with. What is computed again, and each micro-batch of several, may send again; more than that is the
compiler's doing, or a mistake.
"""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from msr_jax.train.sharding import MIN_SHARDED, parameter_sharding, sent_dtype


def necessary_bytes(
    mesh: Mesh,
    params: Any,
    frozen: Any,
    min_size: int = MIN_SHARDED,
    dtype: Any = np.float32,
    exact: Collection[str] = (),
    mask: Any = None,
) -> dict[str, float]:
    """Bytes that each device sends in a step, by the usual ring.

    Args:
      params: of the network that is trained; frozen: of others, as a tree.
      dtype, exact: as of `sharding.gathered`.
      mask: which of `params` have a gradient, as a tree of bools; None is all.

    Returns:
      {"gathers": of all that is split over fsdp, in the precision in which it is multiplied, "gradients": summed in float32,
      "narrow_gradients": in the precision of the gathers}.
    """
    found = {"gathers": 0.0, "gradients": 0.0, "narrow_gradients": 0.0}

    def add(path: tuple[Any, ...], leaf: Any, is_trained: bool) -> None:
        named = tuple(key for key in path if hasattr(key, "key"))
        size, sent = int(np.prod(leaf.shape)), np.dtype(sent_dtype(named, leaf, dtype, exact)).itemsize
        part = int(np.prod(parameter_sharding(mesh, leaf, min_size).shard_shape(leaf.shape)))
        found["gathers"] += sent * (size - part)
        if is_trained:
            # Into each device's part, then over the devices that hold the same part.
            others = mesh.size * part // size
            terms = size - part + 2 * part * (others - 1) / others
            found["gradients"] += 4 * terms
            found["narrow_gradients"] += sent * terms

    trained = jax.tree.map(lambda _: True, params) if mask is None else mask
    jax.tree_util.tree_map_with_path(add, params, trained)
    jax.tree_util.tree_map_with_path(lambda path, leaf: add(path, leaf, False), frozen)
    return found
