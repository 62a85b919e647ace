"""Real Fourier transforms of the last axis, in the form that suits the processor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msr_jax.devices import per_example, platform

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


def rfft(frames: Array) -> Array:
    """Real FFT of the last axis as real numbers: (batch, …, n) -> (batch, …, n/2 + 1, 2)."""

    def fft(frames: Array) -> Array:
        z = jnp.fft.rfft(frames)
        return jnp.stack([z.real, z.imag], axis=-1)

    return _in_its_form(rfft_by_products, fft, frames)


def irfft(spectrum: Array, n: int) -> Array:
    """Inverse of `rfft`: (batch, …, n/2 + 1, 2) -> (batch, …, n)."""

    def fft(spectrum: Array) -> Array:
        return jnp.fft.irfft(lax.complex(spectrum[..., 0], spectrum[..., 1]), n)

    return _in_its_form(lambda z: irfft_by_products(z, n), fft, spectrum)


def _in_its_form(products: Callable[[Array], Array], fft: Callable[[Array], Array], x: Array) -> Array:
    if _BY_PRODUCTS.get():
        return products(x)
    # What only a CPU will run is spared the products' matrices, which take a third of a second to trace.
    chosen = fft if platform() == "cpu" else lambda x: lax.platform_dependent(x, tpu=products, default=fft)
    return per_example(chosen, x)


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
