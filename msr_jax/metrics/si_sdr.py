"""Scale-invariant SDR and its improvement over the mixture, as the released evaluation computes them (paper, metrics).

Windows of 4 s, 2 s apart; a window counts only if at least two reference stems are active in it. Two conventions for
silent reference stems: "active" leaves them out, "msdm" takes them in (the mixture's attenuation).
"""

from typing import NamedTuple

import numpy as np

EPSILON = 1e-8
WINDOW_SECONDS, HOP_SECONDS = 4, 2  # a window is two hops: every sample is read once
SILENT = 1.5e-5  # norm over samples


def _si_sdr(inner: np.ndarray, reference: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """SI-SDR in dB from ⟨ŝ, s⟩, ‖s‖² and ‖ŝ‖², of any one shape."""
    scale = (inner + EPSILON) / (reference + EPSILON)
    # ‖αs - ŝ‖² multiplied out; in float64 its rounding stays far below ε.
    error = np.maximum(scale**2 * reference - 2 * scale * inner + estimate, 0)
    return 10 * np.log10((scale**2 * reference + EPSILON) / (error + EPSILON))


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """SI-SDR in dB over the last axis (samples), no mean removed: (…, samples) twice -> (…).

    >>> round(float(si_sdr(np.array([2.0, 0.2]), np.array([1.0, 0.0]))), 2)  # whatever the scale, an error of a tenth
    20.0
    """
    estimate, reference = estimate.astype(np.float64), reference.astype(np.float64)
    return _si_sdr((estimate * reference).sum(-1), np.square(reference).sum(-1), np.square(estimate).sum(-1))


def is_silent(audio: np.ndarray, threshold: float = SILENT) -> np.ndarray:
    """The released silence test on (…, channels, samples): ‖x‖₂ / samples < 1.5e-5, the norm being over all channels.

    A norm grows with √samples, so quiet passages count as silent too.
    """
    return np.linalg.norm(audio.astype(np.float64), axis=(-2, -1)) / audio.shape[-1] < threshold


def windows(samples: int, sample_rate: int) -> list[slice]:
    """Windows of a signal: [2i, 2i + 4) s for i below ceil((samples - 2 s) / 2 s), the last cut at the end.

    >>> windows(7, 1)
    [slice(0, 4, None), slice(2, 6, None), slice(4, 7, None)]
    """
    hop, length = HOP_SECONDS * sample_rate, WINDOW_SECONDS * sample_rate
    return [slice(i * hop, min(i * hop + length, samples)) for i in range(max(0, -(-(samples - hop) // hop)))]


class WindowScores(NamedTuple):
    """Scores of the windows that count: (windows, stems) each; `start` (windows,) in samples."""

    start: np.ndarray
    si_sdri: np.ndarray  # dB, silent references included
    si_sdr: np.ndarray  # dB
    sdr: np.ndarray  # dB, 10 log10((‖s‖² + 1e-5) / (‖s - ŝ‖² + 1e-5))
    si_snr: np.ndarray  # dB, SI-SDR with the means removed
    output_rms: np.ndarray  # dB, 20 log10(rms of the estimate + 1e-10)
    silent: np.ndarray  # bool


def _products(estimates: np.ndarray, references: np.ndarray, hop: int) -> np.ndarray:
    """Inner products, hop by hop, of all estimates, all references, the mixture and a constant 1.

    Returns:
      (hops, channels, 2 · stems + 2, 2 · stems + 2) float64.
    """
    stems, channels, samples = references.shape
    found = np.empty((-(-samples // hop), channels, 2 * stems + 2, 2 * stems + 2))
    for k in range(len(found)):
        cut = slice(k * hop, min((k + 1) * hop, samples))
        x = np.ones((channels, 2 * stems + 2, cut.stop - cut.start))
        x[:, :stems] = estimates[..., cut].swapaxes(0, 1)
        x[:, stems : 2 * stems] = references[..., cut].swapaxes(0, 1)
        np.sum(x[:, stems : 2 * stems], 1, out=x[:, 2 * stems])
        np.matmul(x, x.swapaxes(1, 2), out=found[k])
    return found


def score_windows(estimates: np.ndarray, references: np.ndarray, sample_rate: int) -> WindowScores:
    """Scores of one segment or track.

    Args:
      estimates, references: (stems, channels, samples); the mixture is the sum of the references.
      sample_rate: Hz.
    """
    stems, samples = len(references), references.shape[-1]
    places = windows(samples, sample_rate)
    if not places:
        empty = np.zeros((0, stems))
        return WindowScores(np.zeros(0, int), *(empty,) * 5, empty.astype(bool))
    hops = _products(estimates, references, HOP_SECONDS * sample_rate)
    p = hops[:-1] + hops[1:]  # (windows, channels, …)
    count = np.array([w.stop - w.start for w in places])[:, None, None]
    e, s, m = np.arange(stems), np.arange(stems, 2 * stems), np.full(stems, 2 * stems)
    ee, ss, mm, es, ms = (p[..., i, j] for i, j in ((e, e), (s, s), (m, m), (e, s), (m, s)))
    mean_e, mean_s = p[..., e, -1] / count, p[..., s, -1] / count
    score = _si_sdr(es, ss, ee)
    centred = _si_sdr(es - count * mean_e * mean_s, ss - count * mean_s**2, ee - count * mean_e**2)
    error = np.maximum(ss - 2 * es + ee, 0)
    silent = np.sqrt(ss.sum(1)) / count[:, 0] < SILENT
    scores = (
        (score - _si_sdr(ms, ss, mm)).mean(1),
        score.mean(1),
        (10 * np.log10((ss + 1e-5) / (error + 1e-5))).mean(1),
        centred.mean(1),
        20 * np.log10(np.sqrt((ee / count).mean(1)) + 1e-10),
        silent,
    )
    kept = (~silent).sum(1) >= 2
    return WindowScores(np.array([w.start for w in places])[kept], *(x[kept] for x in scores))
