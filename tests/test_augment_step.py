"""The compiled augmentations equal their definitions, have the released odds and ranges, and are what they are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.config import MUSDB_STEMS, musdb_data, unet_base
from msr_jax.data.augment import seven_band_eq, tanh_distortion
from msr_jax.data.augment_step import (
    EQ_CENTRES,
    _draw_bands,
    _transform_length,
    add_noise,
    distort,
    equalise,
    make_augment,
    mix_chunks,
)
from msr_jax.errors import UserError

RATE = 44_100
OFF = unet_base().data.augment.to_dict()
KEY = jax.random.key(0)


def batch(count=4, samples=3000, seed=0):
    x = np.random.default_rng(seed).standard_normal((count, 4, samples, 2))
    return jnp.asarray(0.1 * x, jnp.float32)


def augment(x, key=KEY, stems=MUSDB_STEMS, **changes):
    return np.asarray(jax.jit(make_augment({**OFF, **changes}, stems, RATE))(x, key))


def test_a_config_that_asks_for_nothing_gets_nothing():
    assert make_augment(OFF, MUSDB_STEMS, RATE) is None
    assert make_augment({**OFF, "pitch_shift": 1.0}, MUSDB_STEMS, RATE) is None  # that is the workers'
    with pytest.raises(UserError, match="mixup"):
        make_augment({**OFF, "mixup": (0.1, 0.1, 0.1)}, MUSDB_STEMS, RATE)


def test_the_released_recipe_is_a_pure_function_of_batch_and_key():
    released = jax.jit(make_augment(musdb_data().augment.to_dict(), MUSDB_STEMS, RATE))
    x = batch(2)
    one, two = released(x, KEY), released(x, KEY)
    assert one.shape == x.shape and one.dtype == jnp.float32 and np.isfinite(one).all()
    assert (one == two).all() and (one != released(x, jax.random.key(1))).any()


@pytest.mark.parametrize(
    ("name", "change"),
    [("channel_swap", lambda x: x[..., ::-1]), ("reversal", lambda x: x[:, :, ::-1]), ("polarity", lambda x: -x)],
)
def test_exact_augmentations_do_what_they_say_as_often_as_they_should(name, change):
    x = batch(200, 10)
    out = augment(x, **{name: 0.3})
    changed, same = ((out == np.asarray(wanted)).all((2, 3)) for wanted in (change(x), x))
    assert (changed ^ same).all()
    assert changed.mean() == pytest.approx(0.3, abs=0.06)


def test_the_equaliser_is_the_released_one():
    x = np.array(batch(2, 30_000))
    x[0, 0] += 0.4  # a constant offset: the state that the filters begin in counts
    bands = _draw_bands(KEY, np.array([(-9, 9)] * 4), (2, 4))
    got = np.asarray(jax.jit(equalise, static_argnums=2)(x, bands, RATE))
    for b in range(2):
        for s in range(4):
            expected = seven_band_eq(x[b, s], np.asarray(bands[b, s], np.float64), RATE)
            assert np.abs(got[b, s] - expected).max() < 2e-6


def test_transforms_have_a_large_power_of_two_in_their_length_and_are_hardly_longer():
    lengths = [_transform_length(n) for n in (1, 33, 1000, 154_350, 507_150)]
    assert lengths == [1, 35, 1008, 163_840, 516_096]
    for least in range(2000, 90_000, 97):
        length = _transform_length(least)
        power = length & -length
        assert least <= length < 1.12 * least and length // power <= 63


def test_bands_are_drawn_from_the_released_ranges():
    gains = np.array([(-9, 9), (-3, 6), (-3, 6), (-9, 9)])
    bands = np.asarray(_draw_bands(KEY, gains, (500, 4)))
    released = ((42, 95), (91, 204), (196, 441), (421, 948), (909, 2045), (1957, 4404), (4216, 9486))  # Hz
    assert released == EQ_CENTRES
    low, high = np.array(released).T
    assert (bands[..., 0] >= low - 0.01).all() and (bands[..., 0] <= high + 0.5).all()
    for stem, (least, most) in enumerate(gains):
        drawn = bands[:, stem, :, 1]
        assert least <= drawn.min() < least + 0.1 and most - 0.1 < drawn.max() <= most
    shelves, peaks = bands[:, :, [0, 6], 2], bands[:, :, 1:6, 2]
    assert shelves.min() >= 0.1 and shelves.max() <= 0.999 and peaks.min() >= 0.5 and peaks.max() <= 5


def test_equalised_noise_has_the_spectrum_of_the_filters():
    x = batch(1, 2**16)
    bands = jnp.broadcast_to(jnp.array([[f, 0.0, 0.7] for f in (60, 150, 300, 700, 1500, 3000, 6000)]), (1, 4, 7, 3))
    assert np.abs(equalise(x, bands, RATE) - x).max() < 1e-6  # no gain, no change
    bands = bands.at[0, 0, 6, 1].set(-9.0)
    power = lambda y: np.square(np.abs(np.fft.rfft(np.asarray(y)[0, 0, :, 0])))
    ratio = 10 * np.log10(power(equalise(x, bands, RATE)) / power(x))
    freq = np.fft.rfftfreq(2**16, 1 / RATE)
    assert np.median(ratio[freq > 15_000]) == pytest.approx(-9, abs=0.2)
    assert np.median(ratio[(freq > 100) & (freq < 1000)]) == pytest.approx(0, abs=0.2)


def test_distortion_is_the_released_one_and_adds_odd_harmonics_at_unchanged_loudness():
    x = batch(2, 5000)
    amount = jnp.array([[0.1, 0.3, 0.5, 0.7]] * 2)
    got = np.asarray(jax.jit(distort)(x, amount))
    for b in range(2):
        for s in range(4):
            assert np.abs(got[b, s] - tanh_distortion(np.asarray(x[b, s]), float(amount[b, s]))).max() < 2e-5
    tone = jnp.asarray(0.5 * np.sin(2 * np.pi * 100 * np.arange(4410) / 4410), jnp.float32)
    out = distort(jnp.tile(tone[None, None, :, None], (1, 1, 1, 2)), jnp.array([[0.5]]))[0, 0, :, 0]
    spectrum = np.abs(np.fft.rfft(np.asarray(out)))
    assert spectrum[300] > 0.02 * spectrum[100] and spectrum[200] < 1e-3 * spectrum[100]
    assert np.square(out).mean() == pytest.approx(np.square(tone).mean(), rel=1e-3)
    assert not distort(jnp.zeros((1, 1, 100, 2)), jnp.array([[0.5]])).any()


def test_noise_is_white_and_of_its_amplitude():
    noise = np.asarray(add_noise(jnp.zeros((1, 2, 2**15, 2)), jnp.array([[0.001, 0.015]]), KEY))[0]
    assert noise.std((1, 2)) == pytest.approx([0.001, 0.015], rel=0.02)
    thirds = [np.square(np.abs(part)).mean() for part in np.array_split(np.fft.rfft(noise[1, :, 0]), 3)]
    assert thirds == pytest.approx([np.mean(thirds)] * 3, rel=0.06)
    assert np.abs(np.corrcoef(noise[1].T)[0, 1]) < 0.02


def test_effects_come_to_the_stems_that_have_them_and_with_the_leak_to_all():
    x = batch(60, 400)
    touched = {}
    for leak in (False, True):
        touched[leak] = (augment(x, distortion=0.5, option_leak=leak) != np.asarray(x)).any((2, 3)).mean(0)
    assert touched[False] == pytest.approx(0.5 * np.array([1, 1, 0, 1]), abs=0.25)  # drums, bass, other, vocals
    assert touched[True] == pytest.approx([0.5] * 4, abs=0.25)


def test_loudness_is_a_gain_per_stem_in_its_range():
    x = batch(100, 10)
    gains = (augment(x, loudness=(0.5, 1.5)) / np.asarray(x))[..., 0, 0]
    assert 0.5 <= gains.min() < 0.53 and 1.47 < gains.max() <= 1.5
    assert gains.mean() == pytest.approx(1, abs=0.05) and len(np.unique(gains.round(4))) > 350


def test_mixup_averages_chunks_of_the_same_instrument_each_with_its_gain():
    x = jnp.asarray(np.eye(400, dtype=np.float32)[:, None, :, None].repeat(2, 1))  # chunk b sounds at sample b alone
    parts = np.asarray(mix_chunks(x, (0.2, 0.02), (0.5, 1.5), KEY))[..., 0]  # (b, s, place)
    index = np.arange(400)
    own, first, second = (parts[index, :, (index + k) % 400] for k in range(3))
    assert np.isclose(parts.sum(-1), own + first + second).all() and (own > 0).all()
    assert (first > 0).mean() == pytest.approx(0.2, abs=0.05) and (second > 0).mean() == pytest.approx(0.02, abs=0.02)
    count = 1 + (first > 0) + (second > 0)
    gains = np.concatenate([(part * count)[part > 0] for part in (own, first, second)])
    assert 0.5 <= gains.min() < 0.52 and 1.48 < gains.max() <= 1.5


def test_batches_of_one_and_of_mono_go_through():
    assert augment(batch(1), mixup=(1.0, 1.0), mixup_gain=(1.0, 1.0)) == pytest.approx(np.asarray(batch(1)), abs=1e-6)
    mono = batch(2)[..., :1]
    assert augment(mono, channel_swap=1.0, equaliser=1.0, distortion=1.0).shape == mono.shape
