"""Distances between waveforms, one value per example: mean square error, its logarithm, and L1 with a multi-resolution STFT."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from msr_jax.audio.stft import cut_frames, periodic_hann
from msr_jax.devices import per_example

Array = jax.Array
STFT_WINDOWS = (4096, 2048, 1024, 512, 256)
STFT_HOP = 147
STFT_MIN_FFT = 2048
SILENT = 1e-3  # power, 30 dB below that of the mixture


def mse(estimate: Array, target: Array) -> Array:
    """Mean square error over all axes but the first: (batch, …) twice -> (batch,)."""
    return jnp.square(estimate - target).mean(tuple(range(1, estimate.ndim)))


def log_mse(
    estimate: Array, target: Array, level: float = 1.0, floor: float = 0.1, floor_silent: float | None = None
) -> Array:
    """10 log10 (mean square error + floor · level²) in dB, mean over channels: (batch, time, channels) twice -> (batch,).

    The log-MSE of Heitkaemper et al. ("Demystifying TasNet", 2020) with a floor; in no recipe of the paper.

    Quiet stems and examples count more nearly as much as loud ones, as in the metrics. Errors far below the floor count
    as in the mean square: otherwise silent stems count most of all, and a network answers with silence wherever it is
    unsure. With `floor_silent` those, 30 dB below the mixture and more, have a floor of their own, so that the others' can
    be lower. For mixtures scaled to an RMS of `level`; a floor of 0.1 is 10 dB below them.
    """
    power = jnp.square(estimate - target).mean(1)  # (batch, channels)
    is_silent = jnp.square(target).mean(1) < SILENT * level**2
    own = jnp.where(is_silent, floor if floor_silent is None else floor_silent, floor)
    return 10 * jnp.log10(power + own * level**2).mean(1)


def gain_db(start: Array, refined: Array, target: Array) -> Array:
    """How much nearer to the target than `start` is `refined`, in dB: (batch, time, channels) three times -> scalar.

    The ratio of errors, of the stems that sound: 30 dB below the loudest of the batch at most. For the log, without gradient.
    """
    power = jnp.square(target).mean((1, 2))
    is_heard = power > SILENT * power.max()
    error = lambda x: 10 * jnp.log10(mse(x, target) + 1e-6 * power.max())
    ratios = jnp.where(is_heard, error(start) - error(refined), 0.0)
    return lax.stop_gradient(ratios.sum() / jnp.maximum(is_heard.sum(), 1))


def safe_modulus(z: Array) -> Array:
    """|z| of a complex array, with gradient 0 at 0 where that of the square root is infinite."""
    power = jnp.square(z.real) + jnp.square(z.imag)
    is_zero = power == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, power)))


def centred_stft(x: Array, window_length: int, n_fft: int, hop: int) -> Array:
    """Complex STFT of x (batch, …, time): (batch, …, frames, n_fft/2 + 1), frames = 1 + time // hop.

    Frames are centred by reflection; the periodic Hann window is centred in n_fft by zeros; not normalised.
    """
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(n_fft // 2, n_fft // 2)], mode="reflect")
    margin = (n_fft - window_length) // 2  # only the samples under the window are cut out
    count = 1 + (x.shape[-1] - n_fft) // hop
    frames = cut_frames(x[..., margin:], window_length, hop, count) * periodic_hann(window_length, window_length)
    # Zeros before the window only shift the phase, but equally for both signals' difference: put them all the same,
    # so that this is an STFT by anybody's definition.
    frames = jnp.pad(frames, [(0, 0)] * (frames.ndim - 1) + [(margin, n_fft - window_length - margin)])
    return per_example(jnp.fft.rfft, frames)


def multires_stft(
    difference: Array, windows: Sequence[int] = STFT_WINDOWS, hop: int = STFT_HOP, min_fft: int = STFT_MIN_FFT
) -> Array:
    """Mean modulus of the STFT of difference (batch, time, channels), summed over windows: (batch,)."""

    def channel(x: Array) -> Array:
        moduli: Any = (safe_modulus(centred_stft(x, w, max(w, min_fft), hop)) for w in windows)
        return sum(m.mean((1, 2)) for m in moduli)

    # Spectra are a hundred times larger than what they are made of. One channel at a time, and once more for the
    # gradient, so that not all have to be held. Not one example at a time: those are shared out over devices.
    return lax.map(jax.checkpoint(channel), jnp.moveaxis(difference.astype(jnp.float32), 2, 0)).mean(0)


def l1_multires_stft(estimate: Array, target: Array, hop: int = STFT_HOP) -> Array:
    """Mean |difference| of waveforms plus, per window, the mean modulus of the difference of complex STFTs.

    (batch, time, channels) twice -> (batch,). The loss of the BS-RoFormer track; unit weight for every term.
    """
    difference = (estimate - target).astype(jnp.float32)  # the STFT is linear: one transform serves both
    return jnp.abs(difference).mean((1, 2)) + multires_stft(difference, hop=hop)


Distance = Callable[[Array, Array], Array]
DISTANCES: dict[str, Distance] = {"mse": mse, "log_mse": log_mse, "l1_multires_stft": l1_multires_stft}


def make_distance(config: Mapping[str, Any]) -> Distance:
    """The distance that the config's `loss` names, for its `loss_hop` (samples), floors and `input_level` (0 counts as 1)."""
    if config["loss"] == "l1_multires_stft":
        return partial(l1_multires_stft, hop=config["loss_hop"])
    if config["loss"] == "log_mse":
        return partial(
            log_mse,
            level=config["input_level"] or 1.0,
            floor=config["loss_floor"],
            floor_silent=config["loss_floor_silent"],
        )
    return DISTANCES[config["loss"]]
