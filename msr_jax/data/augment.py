"""Augmentations of single stems in the published recipe for MUSDB18, with their parameters given (see its data section)."""

import numpy as np
from scipy import signal


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
