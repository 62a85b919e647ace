"""What functions are traced for: the kind of processor, and the devices that hold the examples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

Array = jax.Array
FSDP = "fsdp"  # the axis of a mesh over which parameters are split
_PLATFORM: ContextVar[str] = ContextVar("platform", default="")


def platform() -> str:
    """ "cpu", "gpu" or "tpu": JAX's default backend, unless `traced_for` says otherwise."""
    return _PLATFORM.get() or jax.default_backend()


@contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Functions traced within take the forms of that platform: to plan on a laptop what an accelerator will run."""
    token = _PLATFORM.set(name)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def spread_over() -> int:
    """Devices that the examples of what is being traced are spread over; 1 within `jax.shard_map`, which has each device's own."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.are_all_axes_manual else mesh.size


def has_whole_parameters() -> bool:
    """Whether no parameter is split over the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.shape.get(FSDP, 1) == 1


def per_example(
    transform: Callable[..., Array], *x: Any, whole: tuple[Any, ...] = (), is_kernel: bool = False
) -> Array:
    """transform(*whole, *x) for trees x of (batch, …), where examples do not meet: each device of the mesh in use transforms its own.

    Left to itself the compiler gathers all examples on every device for an FFT. `whole`: trees that every device has all of.
    `is_kernel`: it holds a kernel, of which JAX does not know over which axes its results vary.
    """
    devices = spread_over()
    if devices == 1 or len(x[0]) % devices:
        return transform(*whole, *x)
    batch = PartitionSpec(jax.sharding.get_abstract_mesh().axis_names)
    specs = (*(PartitionSpec() for _ in whole), *(batch for _ in x))
    return jax.shard_map(transform, in_specs=specs, out_specs=batch, check_vma=not is_kernel)(*whole, *x)


def first_example(examples: int) -> Array | int:
    """Number of the first of a device's examples within the batch, in `per_example`, where the device has so many; else 0."""
    mesh = jax.sharding.get_abstract_mesh()
    return lax.axis_index(mesh.axis_names) * examples if not mesh.empty and mesh.are_all_axes_manual else 0
