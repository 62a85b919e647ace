"""Real Fourier transforms of the last axis, in the form that suits the processor, on the devices that hold the examples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

Array = jax.Array
_BY_PRODUCTS: ContextVar[bool] = ContextVar("by_products", default=False)


@contextmanager
def transforms_by_products() -> Iterator[None]:
    """Functions traced within take the FFT as matrix products, as TPUs do: for programs that may hold nothing else."""
    token = _BY_PRODUCTS.set(True)
    try:
        yield
    finally:
        _BY_PRODUCTS.reset(token)


def spread_over() -> int:
    """Devices that the examples of what is being traced are spread over; 1 within `jax.shard_map`, which has each device's own."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.are_all_axes_manual else mesh.size


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


def rfft(frames: Array) -> Array:
    """Real FFT of the last axis as real numbers: (batch, …, n) -> (batch, …, n/2 + 1, 2)."""

    def fft(frames: Array) -> Array:
        z = jnp.fft.rfft(frames)
        return jnp.stack([z.real, z.imag], axis=-1)

    if _BY_PRODUCTS.get():
        return rfft_by_products(frames)
    return per_example(lambda x: lax.platform_dependent(x, tpu=rfft_by_products, default=fft), frames)


def irfft(spectrum: Array, n: int) -> Array:
    """Inverse of `rfft`: (batch, …, n/2 + 1, 2) -> (batch, …, n)."""

    def fft(spectrum: Array) -> Array:
        return jnp.fft.irfft(lax.complex(spectrum[..., 0], spectrum[..., 1]), n)

    products = lambda z: irfft_by_products(z, n)
    if _BY_PRODUCTS.get():
        return products(spectrum)
    return per_example(lambda z: lax.platform_dependent(z, tpu=products, default=fft), spectrum)


def rfft_by_products(frames: Array) -> Array:
    """The real FFT as two matrix products, without complex numbers: (…, n) -> (…, n/2 + 1, 2)."""
    cosines, sines = _dft_matrices(frames.shape[-1])
    multiply = lambda m: jnp.matmul(frames, m, precision=lax.Precision.HIGHEST)
    return jnp.stack([multiply(cosines), -multiply(sines)], axis=-1)


def irfft_by_products(spectrum: Array, n: int) -> Array:
    """The inverse of `rfft_by_products`: (…, n/2 + 1, 2) -> (…, n)."""
    cosines, sines = (m.T for m in _dft_matrices(n))
    twice = np.full((n // 2 + 1, 1), 2 / n, np.float32)  # every bin but the first and the last stands for two
    twice[0] = twice[-1] = 1 / n
    multiply = lambda z, m: jnp.matmul(z, m * twice, precision=lax.Precision.HIGHEST)
    return multiply(spectrum[..., 0], cosines) - multiply(spectrum[..., 1], sines)


def _dft_matrices(n: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of 2π·sample·bin/n, each (n, n/2 + 1) float32; the phase is reduced exactly, in integers."""
    angle = 2 * np.pi * (np.arange(n)[:, None] * np.arange(n // 2 + 1) % n) / n
    sines = np.sin(angle)
    sines[:, -1] = 0  # exactly: the imaginary part of the last bin must not count
    return np.cos(angle).astype(np.float32), sines.astype(np.float32)
