"""The augmentations that are cheap enough for the training step: jitted, over all stems of a batch at once.

Order as released: channel swap, time reversal, polarity, equaliser, distortion, noise, mixup, loudness. Each has a coin of
its own for each stem of each example.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msr_jax.data.augment import range_of
from msr_jax.devices import per_example
from msr_jax.errors import UserError

Array = jax.Array
EQ_CENTRES = ((42, 95), (91, 204), (196, 441), (421, 948), (909, 2045), (1957, 4404), (4216, 9486))  # Hz
SETTLE_SECONDS = 0.5
PARTNERS = 2  # further chunks that a stem may be averaged with


def make_augment(
    augment: Mapping[str, Any], stems: Sequence[str], sample_rate: int
) -> Callable[[Array, Array], Array] | None:
    """The augmentation of a batch, or None if the config asks for nothing that is done here.

    Args:
      augment: the config's `data.augment`: probabilities `channel_swap`, `reversal`, `polarity`, `equaliser`,
        `distortion`, `noise`; `mixup` (probability of a first and, independently, of a second further chunk);
        `mixup_gain` and `loudness`, ranges of gains; `option_leak`.

    Returns:
      augment(stems (b, s, t, c) float32, key) -> the same shape; pure, to be jitted by the caller.

    Raises:
      UserError: more than two probabilities of mixup.
    """
    a = dict(augment)
    if len(a["mixup"]) > PARTNERS:
        raise UserError(f"data.augment.mixup has at most {PARTNERS} probabilities, not {len(a['mixup'])}")
    limits = {}
    for effect in ("equaliser", "distortion", "noise"):
        ranges = [range_of(stem, effect, a["option_leak"]) for stem in stems]
        chance = [a[effect] if found else 0.0 for found in ranges]
        limits[effect] = np.array(chance), np.array([found or (0.0, 0.0) for found in ranges])
    fixed = [f for f in ("channel_swap", "reversal", "polarity") if a[f]]
    drawn = [f for f in ("equaliser", "distortion", "noise") if limits[f][0].any()]
    is_mixed = any(a["mixup"]) or tuple(a["mixup_gain"]) != (1.0, 1.0)
    is_scaled = tuple(a["loudness"]) != (1.0, 1.0)
    if not (fixed or drawn or is_mixed or is_scaled):
        return None

    def apply(x: Array, key: Array) -> Array:
        names = (*fixed, *drawn, "mixup", "loudness")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        shape = x.shape[:2]
        for name in fixed:
            on = jax.random.bernoulli(keys[name], a[name], shape)[..., None, None]
            other = {"channel_swap": x[..., ::-1], "reversal": x[:, :, ::-1], "polarity": -x}[name]
            x = jnp.where(on, other, x)
        for name in drawn:
            chance, ranges = limits[name]
            key_coin, key_value, key_more = jax.random.split(keys[name], 3)
            on = jax.random.bernoulli(key_coin, chance, shape)[..., None, None]
            if name == "equaliser":
                changed = equalise(x, _draw_bands(key_value, ranges, shape), sample_rate)
            else:
                value = _uniform(key_value, ranges, shape)
                changed = distort(x, value) if name == "distortion" else add_noise(x, value, key_more)
            x = jnp.where(on, changed, x)
        if is_mixed:
            x = mix_chunks(x, tuple(a["mixup"]), tuple(a["mixup_gain"]), keys["mixup"])
        if is_scaled:
            low, high = a["loudness"]
            x = x * jax.random.uniform(keys["loudness"], shape, minval=low, maxval=high)[..., None, None]
        return x

    return apply


def _uniform(key: Array, ranges: np.ndarray, shape: tuple[int, ...]) -> Array:
    """Uniform in the range of each stem: `ranges` (s, 2) -> `shape` (b, s, …)."""
    low, high = (jnp.asarray(edge, jnp.float32).reshape(-1, *[1] * (len(shape) - 2)) for edge in ranges.T)
    return low + (high - low) * jax.random.uniform(key, shape)


def _mel(freq):
    return 2595 * np.log10(1 + np.asarray(freq) / 700)


def _draw_bands(key: Array, gains: np.ndarray, shape: tuple[int, ...]) -> Array:
    """Centre (uniform in mel), gain and Q of seven filters: (b, s, 7, 3)."""
    key_centre, key_gain, key_q = jax.random.split(key, 3)
    low, high = (jnp.asarray(edge, jnp.float32) for edge in _mel(EQ_CENTRES).T)
    mel = low + (high - low) * jax.random.uniform(key_centre, (*shape, 7))
    centre = 700 * (10 ** (mel / 2595) - 1)
    gain = _uniform(key_gain, gains, (*shape, 7))
    is_shelf = np.array([True, *[False] * 5, True])
    q_low, q_high = jnp.where(is_shelf, 0.1, 0.5), jnp.where(is_shelf, 0.999, 5.0)
    return jnp.stack([centre, gain, q_low + (q_high - q_low) * jax.random.uniform(key_q, (*shape, 7))], -1)


def _biquads(bands: Array, sample_rate: float) -> tuple[Array, Array]:
    """Low shelf, five peaks, high shelf (Audio EQ Cookbook, α = sin ω / 2Q): numerators and denominators (3, …, 7).

    Not as k0, k1, k2, whose sum is far smaller than they are for a low band and would be lost in float32, but as that
    sum, k0 + k2 and k0 - k2.
    """
    gain, omega, q = 10 ** (bands[..., 1] / 40), 2 * np.pi * bands[..., 0] / sample_rate, bands[..., 2]
    cos, alpha, versine = jnp.cos(omega), jnp.sin(omega) / (2 * q), 2 * jnp.square(jnp.sin(omega / 2))
    sign = np.array([1.0, *[0.0] * 5, -1.0])
    up, down, root = gain + 1, gain - 1, 2 * jnp.sqrt(gain) * alpha
    shelf_b = 4 * gain * jnp.where(sign > 0, gain, 1) * versine, 2 * gain * (up - down * sign * cos), 2 * gain * root
    shelf_a = 4 * jnp.where(sign > 0, 1, gain) * versine, 2 * (up + down * sign * cos), 2 * root
    peak_b, peak_a = (2 * versine, 2.0, 2 * alpha * gain), (2 * versine, 2.0, 2 * alpha / gain)
    choose = lambda shelf, peak: jnp.stack([jnp.where(sign != 0, s, p) for s, p in zip(shelf, peak, strict=True)])
    return choose(shelf_b, peak_b), choose(shelf_a, peak_a)


def _transform_length(least: int) -> int:
    """The first length of at least `least` that is 2^k times a number of at most 64 without prime factors above 7.

    FFTs of such lengths are quick everywhere. On a TPU the power of two decides: of 485,100 samples, smooth as they are, eight
    transforms ask for terabytes.
    """
    block = 1 << max(0, (least - 1).bit_length() - 6)
    smooth = (n for n in range(-(-least // block), 65) if 2**6 * 3**3 * 5**2 * 7**2 % n == 0)
    return block * next(smooth)


def equalise(x: Array, bands: Array, sample_rate: float) -> Array:
    """Seven filters in series, in the frequency domain: (b, s, t, c) float32 -> the same.

    The recursive filters' transfer function is taken at the frequencies of an FFT. Before the signal its first sample is
    held, which is the steady state that the released filters begin in, and keeps the end from wrapping into the start.

    Args:
      bands: (b, s, 7, 3): centre in Hz, gain in dB and Q.
    """
    time = x.shape[2]
    length = _transform_length(time + int(SETTLE_SECONDS * sample_rate))
    held = jnp.concatenate([jnp.repeat(x[:, :, :1], length - time, 2), x], 2)
    omega = 2 * np.pi * np.arange(length // 2 + 1) / length
    versine, sine = (jnp.asarray(f, jnp.float32) for f in (2 * np.square(np.sin(omega / 2)), np.sin(omega)))

    def at_frequencies(k):
        """k0 z + k1 + k2 z⁻¹ on the unit circle: (3, b, s, 7) -> (b, s, 7, frequencies)."""
        total, even, odd = k[..., None]
        return jax.lax.complex(total - even * versine, odd * sine)

    b, a = _biquads(bands, sample_rate)
    response = jnp.prod(at_frequencies(b) / at_frequencies(a), axis=2)
    spectrum = per_example(lambda x: jnp.fft.rfft(x, axis=2), held) * response[..., None]
    filtered = per_example(lambda z: jnp.fft.irfft(z, length, axis=2), spectrum)
    return filtered[:, :, length - time :].astype(x.dtype)


def _order_statistic(magnitude: Array, rank: Array) -> Array:
    """The value of 0-based `rank` (b, s) among the last axis of (b, s, n) ≥ 0, by bisection on the bits of a float."""
    bits = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)  # ordered as the floats are

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = (bits <= middle[..., None]).sum(-1) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    start = jnp.zeros(rank.shape, jnp.int32), jnp.full(rank.shape, 0x7F7FFFFF, jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, start)[1], jnp.float32)


def distort(x: Array, amount: Array) -> Array:
    """Soft clipping at unchanged loudness: (b, s, t, c) float32 -> the same; `amount` (b, s) as in `tanh_distortion`."""
    flat = x.reshape(*x.shape[:2], -1)
    rank = jnp.round((1 - 0.99 * amount) * (flat.shape[-1] - 1)).astype(jnp.int32)
    threshold = _order_statistic(jnp.abs(flat), rank)[..., None, None]
    distorted = jnp.tanh(0.5 * x / (threshold + 1e-6))
    rms = lambda y: jnp.sqrt(jnp.square(y).mean((2, 3), keepdims=True))
    before, after = rms(x), rms(distorted)
    return jnp.where(before > 1e-9, distorted * (before / jnp.maximum(after, 1e-30)), distorted)


def add_noise(x: Array, amplitude: Array, key: Array) -> Array:
    """White Gaussian noise of the given RMS (b, s) added to (b, s, t, c)."""
    return x + amplitude[..., None, None] * jax.random.normal(key, x.shape)


def mix_chunks(x: Array, chances: tuple[float, ...], gain: tuple[float, float], key: Array) -> Array:
    """Average a stem with up to two further chunks of its instrument, each chunk under a gain of its own: (b, s, t, c).

    The further chunks are those of the next examples of the batch: as likely as any other, and read anyway. (Where a
    batch is too small to have one, as one of two has no second, the stem itself takes its place.)
    """
    key_gain, key_coin = jax.random.split(key)
    shape = x.shape[:2]
    gains = jax.random.uniform(key_gain, (1 + len(chances), *shape), minval=gain[0], maxval=gain[1])
    total, count = x * gains[0][..., None, None], jnp.ones(shape)
    for k, chance in enumerate(chances, 1):
        on = jax.random.bernoulli(jax.random.fold_in(key_coin, k), chance, shape).astype(x.dtype)
        total = total + (on * gains[k])[..., None, None] * jnp.roll(x, -k, 0)
        count = count + on
    return total / count[..., None, None]
