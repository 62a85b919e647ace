"""What the augmentations promise beyond equality with the published ones."""

import numpy as np
import pytest

from msr_jax.data.augment import (
    biquad,
    pitch_shift,
    range_of,
    seven_band_eq,
    stretch_and_shift,
    tanh_distortion,
    time_stretch,
)

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


def strongest(audio):
    """Frequency in Hz of the strongest partial of (samples, channels)."""
    spectrum = np.abs(np.fft.rfft(audio[:, 0] * np.hanning(len(audio))))
    return spectrum.argmax() * RATE / len(audio)


@pytest.fixture
def tone():
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    return np.stack([wave, 0.5 * wave], 1).astype(np.float32)


@pytest.mark.parametrize("semitones", [-5, -1.3, 3])
def test_pitch_shift_moves_the_pitch_and_keeps_length_and_level(tone, semitones):
    out = pitch_shift(tone, semitones, RATE)
    assert out.shape == tone.shape and out.dtype == np.float32
    assert strongest(out) == pytest.approx(440 * 2 ** (semitones / 12), abs=2)
    middle = slice(RATE // 4, RATE // 2)
    assert np.square(out[middle]).mean() == pytest.approx(np.square(tone[middle]).mean(), rel=0.2)


@pytest.mark.parametrize("rate", [0.8, 1.25])
def test_time_stretch_moves_events_and_keeps_pitch_and_length(tone, rate):
    tone[RATE // 2 :] = 0
    out = time_stretch(tone, rate)
    assert out.shape == tone.shape and out.dtype == np.float32
    assert strongest(out[: RATE // 4]) == pytest.approx(440, abs=5)
    loud = np.flatnonzero(np.abs(out[:, 0]) > 0.1)
    assert loud[-1] / RATE == pytest.approx(0.5 / rate, abs=0.03)


def test_ranges_are_those_of_the_stem_or_those_that_leaked():
    assert range_of("bass", "pitch_shift", False) == (-2, 2)
    assert range_of("other", "equaliser", False) is None and range_of("other", "equaliser", True) == (-3, 6)
    assert range_of("drums", "time_stretch", False) is None and range_of("drums", "time_stretch", True) == (0.8, 1.25)
    assert range_of("piano", "noise", False) == range_of("other", "noise", False) == (0.001, 0.015)


def test_workers_apply_each_effect_as_often_as_asked(monkeypatch, tone):
    calls = []
    monkeypatch.setattr(
        "msr_jax.data.augment.pitch_shift", lambda x, value, rate: (calls.append(("pitch", value)), x)[1]
    )
    monkeypatch.setattr("msr_jax.data.augment.time_stretch", lambda x, value: (calls.append(("time", value)), x)[1])
    rng, odds = np.random.default_rng(0), {"pitch_shift": 0.3, "time_stretch": 0.1}
    for _ in range(1000):
        stretch_and_shift(tone[:10], "bass", rng, odds, RATE)
    pitch, time = ([value for name, value in calls if name == kind] for kind in ("pitch", "time"))
    assert len(pitch) == pytest.approx(300, abs=50) and len(time) == pytest.approx(100, abs=30)
    assert -2 <= min(pitch) < -1.9 and 1.9 < max(pitch) <= 2 and 0.8 <= min(time) and max(time) <= 1.25
    calls.clear()
    for _ in range(100):
        stretch_and_shift(tone[:10], "bass", rng, odds, RATE, option_leak=False)
    assert {name for name, _ in calls} == {"pitch"}
