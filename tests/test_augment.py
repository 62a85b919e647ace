"""What the augmentations promise beyond equality with the published ones."""

import numpy as np
import pytest

from msr_jax.data.augment import biquad, seven_band_eq, tanh_distortion

RATE = 44_100


def response_db(coefficients, freq):
    b, a = coefficients
    z = np.exp(-2j * np.pi * freq / RATE * np.arange(3))
    return 20 * np.log10(abs((b @ z) / (a @ z)))


@pytest.mark.parametrize(
    ("kind", "at_gain", "at_zero"), [("low", 1.0, 22_000.0), ("high", 22_000.0, 1.0), ("peak", 1000.0, 1.0)]
)
def test_filters_give_their_gain_where_they_should(kind, at_gain, at_zero):
    coefficients = biquad(kind, 1000.0, -7.0, 0.7, RATE)
    assert response_db(coefficients, at_gain) == pytest.approx(-7.0, abs=0.05)
    assert response_db(coefficients, at_zero) == pytest.approx(0.0, abs=0.05)


@pytest.fixture
def noise():
    return (0.1 * np.random.default_rng(0).standard_normal((5000, 2))).astype(np.float32)


def test_an_equaliser_without_gain_changes_nothing(noise):
    bands = np.array([[f, 0.0, 0.7] for f in (60, 150, 300, 700, 1500, 3000, 6000)])
    assert np.abs(seven_band_eq(noise, bands) - noise).max() < 1e-6


def test_the_equaliser_starts_in_the_steady_state():
    bands = np.array([[f, 6.0, 0.7] for f in (60, 150, 300, 700, 1500, 3000, 6000)])
    out = seven_band_eq(np.full((300, 1), 0.1, np.float32), bands)
    assert np.abs(out - out[0]).max() < 1e-5
    assert out[0, 0] == pytest.approx(0.1 * 10 ** (6 / 20), rel=1e-4)  # the low shelf's gain


def test_distortion_keeps_the_loudness_and_lowers_the_peaks(noise):
    out = tanh_distortion(noise, 0.6)
    assert out.dtype == np.float32
    assert np.square(out).mean() == pytest.approx(np.square(noise).mean(), rel=1e-4)
    assert np.abs(out).max() < 0.8 * np.abs(noise).max()


def test_distortion_leaves_silence_silent():
    assert not tanh_distortion(np.zeros((100, 2), np.float32), 0.3).any()
