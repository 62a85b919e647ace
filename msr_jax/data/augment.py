"""Augmentations of single stems in the published recipe for MUSDB18: their ranges, and what each does to a signal.

Here is NumPy: pitch shift and time stretch, which run in the workers that load the data, and the definitions that the
compiled ones of `augment_step` are checked against.
"""

from collections.abc import Mapping

import librosa
import numpy as np

# Ranges, uniform, by stem: semitones, decibels of each band, amount, amplitude, rate.
RANGES = {
    "drums": {"pitch_shift": (-5, 5), "equaliser": (-9, 9), "distortion": (0.1, 0.6)},
    "bass": {"pitch_shift": (-2, 2), "equaliser": (-3, 6), "distortion": (0.1, 0.5)},
    "other": {"pitch_shift": (-4, 4), "noise": (0.001, 0.015), "time_stretch": (0.8, 1.25)},
    "vocals": {"pitch_shift": (-5, 5), "equaliser": (-9, 9), "distortion": (0.1, 0.7)},
}
# The released program writes each stem's options into one that all share, so that from the second item on a stem without
# an option of its own has that of the stem before it in the order drums, bass, other, vocals.
LEAKED = {
    "equaliser": RANGES["bass"]["equaliser"],
    "distortion": RANGES["bass"]["distortion"],
    "noise": RANGES["other"]["noise"],
    "time_stretch": RANGES["other"]["time_stretch"],
}
EFFECTS = ("pitch_shift", "time_stretch")  # those of the workers, in this order


def range_of(stem: str, effect: str, option_leak: bool) -> tuple[float, float] | None:
    """Range of an effect's parameter for a stem, None if it has no such effect; stems of other corpora count as "other"."""
    own = RANGES.get(stem, RANGES["other"]).get(effect)
    return LEAKED.get(effect) if own is None and option_leak else own


def pitch_shift(audio: np.ndarray, semitones: float, sample_rate: int) -> np.ndarray:
    """Pitch moved by phase vocoder and resampling, length kept: (samples, channels) float32 -> the same."""
    return librosa.effects.pitch_shift(audio.T, sr=sample_rate, n_steps=semitones).T.astype(np.float32)


def time_stretch(audio: np.ndarray, rate: float) -> np.ndarray:
    """Tempo times `rate` by phase vocoder, cut or padded to the length before: (samples, channels) float32 -> the same."""
    stretched = librosa.effects.time_stretch(audio.T, rate=rate).T[: len(audio)].astype(np.float32)
    return np.pad(stretched, ((0, len(audio) - len(stretched)), (0, 0)))


def stretch_and_shift(
    audio: np.ndarray,
    stem: str,
    rng: np.random.Generator,
    probability: Mapping[str, float],
    sample_rate: int,
    option_leak: bool = True,
) -> np.ndarray:
    """What workers do to a stem's crop (samples, channels), each with its probability: pitch shift, then time stretch.

    As released, time stretch comes last of all; here the compiled effects follow it, for which that makes no difference
    but to the noise, which is then not stretched.
    """
    for effect in EFFECTS:
        limits = range_of(stem, effect, option_leak)
        if limits is None or rng.random() >= probability.get(effect, 0.0):
            continue
        value = rng.uniform(*limits)
        if audio.any():  # silence stays silence, at no cost
            audio = pitch_shift(audio, value, sample_rate) if effect == "pitch_shift" else time_stretch(audio, value)
    return audio


def biquad(kind: str, freq: float, gain_db: float, q: float, sample_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator of a "low" or "high" shelf or a "peak" (Audio EQ Cookbook), with α = sin ω / 2Q for all."""
    a, omega = 10 ** (gain_db / 40), 2 * np.pi * freq / sample_rate
    cos, alpha = np.cos(omega), np.sin(omega) / (2 * q)
    if kind == "peak":
        b = np.array([1 + alpha * a, -2 * cos, 1 - alpha * a])
        den = np.array([1 + alpha / a, -2 * cos, 1 - alpha / a])
    else:
        sign, root = (1 if kind == "low" else -1), 2 * np.sqrt(a) * alpha
        up, down, cos = a + 1, a - 1, sign * cos
        b = a * np.array([up - down * cos + root, sign * 2 * (down - up * cos), up - down * cos - root])
        den = np.array([up + down * cos + root, sign * -2 * (down + up * cos), up + down * cos - root])
    return b / den[0], den / den[0]


def seven_band_eq(audio: np.ndarray, bands: np.ndarray, sample_rate: float = 44_100) -> np.ndarray:
    """Low shelf, five peaks and high shelf in series: (samples, channels) float32 -> the same.

    Args:
      bands: (7, 3): centre in Hz, gain in dB and Q of each filter, in this order.
    """
    from scipy import signal  # late: a third of the time that a training run imports for, and none calls this

    kinds = ("low", *["peak"] * 5, "high")
    for kind, (freq, gain_db, q) in zip(kinds, bands, strict=True):
        b, a = biquad(kind, freq, gain_db, q, sample_rate)
        # As released: starts as if the first sample had been there for ever, and rounds after every filter.
        state = signal.lfilter_zi(b, a)[:, None] * audio[:1].astype(np.float64)
        audio = signal.lfilter(b, a, audio.astype(np.float64), axis=0, zi=state)[0].astype(np.float32)
    return audio


def tanh_distortion(audio: np.ndarray, amount: float) -> np.ndarray:
    """Soft clipping at unchanged loudness: (samples, channels) float32 -> the same.

    Args:
      amount: 0 to 1; the share (99 %) of samples that lie above the knee.
    """
    threshold = np.percentile(np.abs(audio), 100 - 99 * amount)
    distorted = np.tanh(0.5 * audio.astype(np.float64) / (threshold + 1e-6))
    before, after = (
        np.sqrt(np.mean(np.square(audio, dtype=np.float64))),
        np.sqrt(np.mean(np.square(distorted))),
    )
    # Silence has no loudness to keep.
    return (distorted * (before / after) if before > 1e-9 else distorted).astype(np.float32)
