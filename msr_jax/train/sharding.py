"""The device mesh, and one rule for where parameters and batches lie on it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from msr_jax.errors import UserError

AXES = ("data", "fsdp")
MIN_SHARDED = 2**16  # elements; smaller arrays are cheaper whole


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """Mesh over all devices with the axes data and fsdp; a size of -1 takes what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    count = jax.device_count()
    shape = [sizes[axis] for axis in AXES]
    known = int(np.prod([s for s in shape if s != -1]))
    if shape.count(-1) == 1 and known > 0 and count % known == 0:
        shape[shape.index(-1)] = count // known
    if int(np.prod(shape)) != count or min(shape) < 1:
        raise UserError(f"mesh {dict(zip(AXES, shape, strict=True))} does not fit {count} devices; one size may be -1")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def parameter_sharding(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Split the largest axis that fsdp divides; small arrays are replicated."""
    ways = mesh.shape["fsdp"]
    if ways > 1 and np.prod(leaf.shape) >= MIN_SHARDED:
        for axis in sorted(range(len(leaf.shape)), key=lambda a: -leaf.shape[a]):
            if leaf.shape[axis] % ways == 0:
                return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))
    return NamedSharding(mesh, P())


def tree_sharding(mesh: Mesh, tree: Any) -> Any:
    """`parameter_sharding` of every leaf; optimiser state and averages follow their parameter's shape."""
    return jax.tree.map(lambda leaf: parameter_sharding(mesh, leaf), tree)


def stacked_batch_sharding(mesh: Mesh) -> NamedSharding:
    """For leaves (steps, accumulate, batch, …): the batch over all devices."""
    return NamedSharding(mesh, P(None, None, AXES))
