"""The device mesh, and one rule for where parameters and batches lie on it.

Everything is compiled by `jax.jit` for global arrays that carry a `NamedSharding`: one program for one device, eight, or
a pod, in which XLA places the communication. `jax.pmap`, which this succeeds, gives every device its own program and
every array a leading device axis, and can only replicate parameters.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from msr_jax.devices import FSDP
from msr_jax.errors import UserError

AXES = ("data", FSDP)
# A wider fsdp is two axes of the mesh, of so many devices and the rest: networks are 384 or 768 wide, and what no axis of an
# array divides by 256 can still be split along two.
WIDEST = 128
MIN_SHARDED = 2**16  # elements; the config's value for smaller arrays being cheaper whole


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over all devices (JAX's own unless others are given) with the axes data and fsdp (past `WIDEST`, fsdp_inner too); a size of -1 takes what is left.

    Devices are in the order of their processes, so that each process holds one block of every batch and the same example
    meets the same noise however many processes there are.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    shape = [sizes[axis] for axis in AXES]
    known = int(np.prod([s for s in shape if s != -1]))
    if shape.count(-1) == 1 and known > 0 and count % known == 0:
        shape[shape.index(-1)] = count // known
    if int(np.prod(shape)) != count or min(shape) < 1:
        raise UserError(f"mesh {dict(zip(AXES, shape, strict=True))} does not fit {count} devices; one size may be -1")
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    axes: tuple[str, ...] = AXES
    if shape[1] > WIDEST and shape[1] % WIDEST == 0:
        shape, axes = [shape[0], WIDEST, shape[1] // WIDEST], (*AXES, "fsdp_inner")
    # Auto, spelled: the compiler decides inside a program. (`jax.make_mesh` would default to Explicit.)
    return Mesh(np.array(devices).reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes))


def parameter_sharding(mesh: Mesh, leaf: Any, min_size: int = MIN_SHARDED) -> NamedSharding:
    """THE rule: split the largest axis that fsdp divides; arrays below `min_size` elements are replicated.

    Where fsdp is two axes of the mesh and no axis of the array takes both, the largest that takes one, and another that
    takes the other.
    """
    outer, inner = mesh.shape["fsdp"], mesh.shape.get("fsdp_inner", 1)
    if outer * inner == 1 or np.prod(leaf.shape) < min_size:
        return NamedSharding(mesh, P())
    spec: list[Any] = [None] * len(leaf.shape)
    largest_first = sorted(range(len(leaf.shape)), key=lambda a: -leaf.shape[a])
    for axis in largest_first:
        if leaf.shape[axis] % (outer * inner) == 0:
            spec[axis] = ("fsdp", "fsdp_inner") if inner > 1 else "fsdp"
            break
    else:
        if inner > 1:
            for name, ways in (("fsdp", outer), ("fsdp_inner", inner)):
                free = [a for a in largest_first if spec[a] is None and leaf.shape[a] % ways == 0]
                if free:
                    spec[free[0]] = name
    while spec and spec[-1] is None:  # so that equal shardings compare equal
        spec.pop()
    return NamedSharding(mesh, P(*spec))


def tree_sharding(mesh: Mesh, tree: Any, min_size: int = MIN_SHARDED) -> Any:
    """`parameter_sharding` of every leaf; optimiser state and averages follow their parameter's shape."""
    return jax.tree.map(lambda leaf: parameter_sharding(mesh, leaf, min_size), tree)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes that carry their sharding, as compiling and restoring take them."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For leaves (batch, …): the batch over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


def stacked_batch_sharding(mesh: Mesh) -> NamedSharding:
    """For leaves (steps, accumulate, batch, …): the batch over all devices."""
    return NamedSharding(mesh, P(None, None, mesh.axis_names))


def sent_dtype(path: tuple[Any, ...], leaf: Any, dtype: Any, exact: Collection[str] = ()) -> Any:
    """The precision in which a parameter crosses devices: matrices in `dtype`, in which they are multiplied, but for those
    under a name in `exact`; vectors, however many are stacked, as they are.
    """
    names = [str(key.key) for key in path]
    is_vector = leaf.ndim < 2 or names[-1].endswith("bias") or names[-1] in ("norm", "freqs")
    return leaf.dtype if is_vector or not set(exact).isdisjoint(names) else dtype


def gathered(
    mesh: Mesh, tree: Any, min_size: int = MIN_SHARDED, dtype: Any = jax.numpy.float32, exact: Collection[str] = ()
) -> Any:
    """Inside a compiled program: parameters split over fsdp made whole where they are used, their gradients split again.

    Said outright, because a compiler left to itself may move activations instead: it then gathers parameters before
    they are used, sums gradients into each device's part, and nothing else crosses devices but what a batch is averaged by.
    Each crosses in its `sent_dtype`.
    """
    if mesh.shape["fsdp"] == 1:
        return tree

    def gather_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
        split = parameter_sharding(mesh, leaf, min_size)
        if split.is_fully_replicated:
            return leaf
        sent = sent_dtype(path, leaf, dtype, exact)
        constrain = jax.lax.with_sharding_constraint

        def gather_whole(x: Any) -> Any:
            return constrain(constrain(x.astype(sent), split), replicated(mesh))

        whole = jax.custom_vjp(gather_whole)
        whole.defvjp(lambda x: (gather_whole(x), None), lambda _, g: (constrain(g, split).astype(leaf.dtype),))
        return whole(leaf)

    return jax.tree_util.tree_map_with_path(gather_leaf, tree)


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays, the same in every process, as global arrays; each device is sent its own part only."""
    place = lambda array, sharding: jax.make_array_from_callback(
        np.shape(array), sharding, lambda index: np.asarray(array)[index]
    )
    return jax.tree.map(place, tree, shardings)


def gather(tree: Any) -> Any:
    """Global arrays as whole host arrays, in every process; all must call it. One leaf after the other lies whole in memory."""
    return jax.tree.map(
        lambda leaf: (
            np.asarray(leaf)
            if leaf.is_fully_addressable or leaf.is_fully_replicated
            else multihost_utils.process_allgather(leaf, tiled=True)
        ),
        tree,
    )
