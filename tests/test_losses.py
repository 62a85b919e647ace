"""The error in dB counts quiet stems as loud ones, and silent ones not at all."""

import jax
import numpy as np
import pytest

from msr_jax.methods.losses import gain_db, log_mse, mse


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 3, 500, 2)).astype(np.float32)  # estimate and target (batch, time, channels)


def test_the_error_in_db_is_the_level_of_each_channel_s_error(pair):
    estimate, target = pair
    power = np.square(estimate - target, dtype=np.float64).mean(1)
    np.testing.assert_allclose(log_mse(estimate, target), 10 * np.log10(power + 0.1).mean(1), rtol=1e-5)


def test_half_the_error_of_a_loud_stem_gains_6_db_and_that_of_a_silent_one_nothing(pair):
    error = pair[0, :1]  # (1, time, channels)
    gained = lambda size: float(log_mse(size * error, 0 * error)[0] - log_mse(size / 2 * error, 0 * error)[0])
    assert gained(10.0) == pytest.approx(20 * np.log10(2), abs=0.05)
    assert gained(100.0) == pytest.approx(gained(10.0), abs=0.05)
    assert gained(1e-2) < 0.01  # below the floor


def test_silent_stems_can_have_a_higher_floor_than_the_others(pair):
    error, sound = 0.1 * pair[0, :1], pair[1, :1]  # (1, time, channels): power 0.01 and 1
    gained = lambda target: float((
        log_mse(target + error, target, floor=1e-6, floor_silent=0.1) - log_mse(target + error / 2, target, floor=1e-6, floor_silent=0.1)
    )[0])  # fmt: skip
    assert gained(sound) > 5.9 and gained(0 * sound) < 0.5


@pytest.mark.parametrize("level", [1.0, 100.0])
def test_a_stem_is_silent_from_30_db_below_the_mixture_on_whatever_its_level(pair, level):
    unit = pair[1, :1] / np.sqrt(np.square(pair[1, :1]).mean(1, keepdims=True))
    at = lambda target, error: log_mse(target + level * error * pair[0, :1], target, level, 1e-6, 0.1)[0]

    def gained(below):
        target = level * 10 ** (-below / 20) * unit
        return float(at(target, 0.01) - at(target, 0.005))

    assert gained(29.9) > 5.5 and gained(30.1) < 0.5


def test_the_gain_is_the_ratio_of_errors_of_the_stems_that_sound(pair):
    error, target = pair[0], pair[1] * np.array([1.0, 1.0, 0.0], np.float32)[:, None, None]
    assert float(gain_db(target + error, target + error / 2, target)) == pytest.approx(20 * np.log10(2), abs=0.01)
    # Nothing but the silent stem, or one 31 dB below the loudest, is nearer.
    silenced = np.where(target.any((1, 2), keepdims=True), target + error, 0)
    quiet = (
        pair[1] / np.sqrt(np.square(pair[1]).mean((1, 2), keepdims=True)) * np.array([1, 1, 10**-1.55])[:, None, None]
    )
    nearer = np.stack([*(quiet + error)[:2], quiet[2]])
    assert float(gain_db(quiet + error, nearer, quiet)) == pytest.approx(0, abs=1e-4)
    assert float(gain_db(target + error, silenced, target)) == pytest.approx(0, abs=1e-4)


def test_a_mixture_s_level_moves_the_error_in_db_by_a_constant(pair):
    estimate, target = pair[..., :1]
    error = np.array([1e-3, 0.1, 1.0])
    at = lambda level: np.array([log_mse(level * e * estimate, level * e * target, level)[0] for e in error])
    np.testing.assert_allclose(at(100.0) - at(1.0), 40.0, atol=1e-3)


def test_its_gradient_is_finite_where_the_estimate_is_exact(pair):
    target = pair[0]
    gradient = jax.grad(lambda x: log_mse(x, target).sum())(target)
    assert np.isfinite(gradient).all() and not np.any(gradient)
    assert not mse(target, target).any()
