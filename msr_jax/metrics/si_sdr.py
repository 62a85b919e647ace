"""Scale-invariant SDR and its improvement over the mixture, as the released evaluation computes them (paper, metrics).

Windows of 4 s, 2 s apart; a window counts only if at least two reference stems are active in it. Two conventions for
silent reference stems: "active" leaves them out, "msdm" takes them in (the mixture's attenuation).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

EPSILON = 1e-8
WINDOW_SECONDS, HOP_SECONDS = 4, 2
SILENT = 1.5e-5


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """SI-SDR in dB over the last axis (samples), no mean removed: (…, samples) twice -> (…)."""
    estimate, reference = estimate.astype(np.float64), reference.astype(np.float64)
    inner = (estimate * reference).sum(-1, keepdims=True) + EPSILON
    scaled = inner / (np.square(reference).sum(-1, keepdims=True) + EPSILON) * reference
    error = np.square(scaled - estimate).sum(-1) + EPSILON
    return 10 * np.log10((np.square(scaled).sum(-1) + EPSILON) / error)


def is_silent(audio: np.ndarray) -> np.ndarray:
    """The released silence test on (…, channels, samples): ‖x‖₂ / samples < 1.5e-5, so quiet passages count as silent."""
    return np.linalg.norm(audio.astype(np.float64), axis=(-2, -1)) / audio.shape[-1] < SILENT


def windows(samples: int, sample_rate: int) -> Iterator[slice]:
    """Windows of a signal: [2i, 2i + 4) s for i below ceil((samples - 2 s) / 2 s), the last cut at the end."""
    hop, length = HOP_SECONDS * sample_rate, WINDOW_SECONDS * sample_rate
    for i in range(max(0, -(-(samples - hop) // hop))):
        yield slice(i * hop, min(i * hop + length, samples))


class WindowScores(NamedTuple):
    """Scores of the windows that count: (windows, stems) each; `start` (windows,) in samples."""

    start: np.ndarray
    si_sdri: np.ndarray  # dB, silent references included
    si_sdr: np.ndarray  # dB
    sdr: np.ndarray  # dB, 10 log10((‖s‖² + 1e-5) / (‖s - ŝ‖² + 1e-5))
    si_snr: np.ndarray  # dB, SI-SDR with the means removed
    output_rms: np.ndarray  # dB, 20 log10(rms of the estimate + 1e-10)
    silent: np.ndarray  # bool


def score_windows(estimates: np.ndarray, references: np.ndarray, sample_rate: int) -> WindowScores:
    """Scores of one segment or track.

    Args:
      estimates, references: (stems, channels, samples); the mixture is the sum of the references.
      sample_rate: Hz.
    """
    rows: list[tuple[Any, ...]] = []
    for window in windows(references.shape[-1], sample_rate):
        reference, estimate = references[..., window], estimates[..., window]
        silent = is_silent(reference)
        if (~silent).sum() < 2:
            continue
        mixture = np.broadcast_to(reference.sum(0, dtype=np.float64), reference.shape)
        score = si_sdr(estimate, reference).mean(-1)
        improvement = score - si_sdr(mixture, reference).mean(-1)
        energy = np.square(reference, dtype=np.float64).sum(-1) + 1e-5
        error = np.square(reference.astype(np.float64) - estimate).sum(-1) + 1e-5
        centred = [x - x.mean(-1, keepdims=True) for x in (estimate, reference)]
        rms = np.sqrt(np.square(estimate, dtype=np.float64).mean((1, 2)))
        rows.append(
            (
                window.start,
                improvement,
                score,
                (10 * np.log10(energy / error)).mean(-1),
                si_sdr(*centred).mean(-1),
                20 * np.log10(rms + 1e-10),
                silent,
            )
        )
    stems = references.shape[0]
    if not rows:
        empty = np.zeros((0, stems))
        return WindowScores(np.zeros(0, int), *(empty,) * 5, empty.astype(bool))
    return WindowScores(*(np.stack(column) for column in zip(*rows, strict=True)))


def stem_means(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mean over the kept entries of (windows, stems): (stems,), NaN for a stem that keeps none."""
    count = kept.sum(0)
    return np.where(count, np.where(kept, scores, 0).sum(0) / np.maximum(count, 1), np.nan)
