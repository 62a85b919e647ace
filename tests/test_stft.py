"""The STFT: its defining sum, its inverse, and the two ways of computing it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.audio.fft import irfft_by_products, rfft_by_products
from msr_jax.audio.stft import istft, overlap_add, periodic_hann, stft


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_every_bin_is_the_windowed_sum_over_a_centred_frame():
    x, n_fft, hop, window = noise(100), 16, 5, 12
    w = np.zeros(n_fft)
    w[2:14] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(12) / 12)
    padded = np.concatenate([x[8:0:-1], x, x[-2:-10:-1]])
    frames = np.stack([padded[m * hop : m * hop + n_fft] * w for m in range(1 + 100 // hop)])
    expected = frames @ np.exp(-2j * np.pi * np.arange(n_fft)[:, None] * np.arange(9) / n_fft)
    z = np.asarray(stft(x, n_fft, hop, window))
    np.testing.assert_allclose(z[..., 0] + 1j * z[..., 1], expected, atol=1e-5)
    np.testing.assert_allclose(stft(x, n_fft, hop, window, normalized=True), z / 4, atol=1e-6)


@pytest.mark.parametrize("samples", [100, 101, 104])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_inverse_gives_the_samples_back_to_the_last_one(samples, normalized):
    x = noise(2, samples)
    args = (16, 5, 16)
    back = istft(stft(x, *args, normalized), *args, samples, normalized)
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_where_no_window_reaches_there_is_silence_and_gradients_are_finite():
    x = np.random.default_rng(0).standard_normal(269).astype(np.float32)
    back = lambda x: istft(stft(x, 64, 30, 48), 64, 30, 48, 269)  # frames every 30 samples, of which 48 are seen
    np.testing.assert_allclose(back(x)[:264], x[:264], atol=1e-4)
    assert not back(x)[264:].any()
    assert np.isfinite(jax.grad(lambda x: jnp.square(back(x)).sum())(x)).all()


def test_matrix_products_are_the_fft_and_ignore_what_it_ignores():
    x = noise(3, 64)
    z = np.fft.rfft(x)
    np.testing.assert_allclose(rfft_by_products(x), np.stack([z.real, z.imag], -1), atol=2e-5)
    spectrum = noise(3, 33, 2)  # with imaginary parts in the first and the last bin
    expected = np.fft.irfft(spectrum[..., 0] + 1j * spectrum[..., 1], 64)
    np.testing.assert_allclose(irfft_by_products(jnp.asarray(spectrum), 64), expected, atol=1e-6)


def test_overlap_add_puts_every_frame_at_its_hop():
    frames = noise(4, 7)
    expected = np.zeros(3 * 3 + 7)
    for k, frame in enumerate(frames):
        expected[3 * k : 3 * k + 7] += frame
    summed = np.asarray(overlap_add(jnp.asarray(frames), 3))
    np.testing.assert_allclose(summed[: len(expected)], expected, atol=1e-6)
    assert not summed[len(expected) :].any()


def test_no_gather_or_scatter_is_in_the_gradient():
    graph = str(jax.make_jaxpr(jax.grad(lambda x: stft(x, 16, 5, 16).sum()))(jnp.zeros(100)))
    assert "scatter" not in graph and "gather" not in graph


def test_the_window_is_periodic_and_centred():
    np.testing.assert_allclose(periodic_hann(4, 8), [0, 0, 0, 0.5, 1, 0.5, 0, 0], atol=1e-7)
