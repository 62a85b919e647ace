"""SIR and SAR of frames whose reference is silent: an extra of the released evaluation, which BSSEval cannot score."""

import numpy as np

from msr_jax.metrics.si_sdr import SILENT

EPSILON = 1e-8


def silent_frame_scores(
    estimates: np.ndarray, references: np.ndarray, sample_rate: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The released SIR and SAR (dB) of frames whose reference is silent: for each stem, two arrays over such frames.

    A least-squares projection on the references at lag 0 stands for BSSEval's filters.

    Args:
      estimates, references: (stems, channels, samples).
    """
    stems, channels, samples = references.shape
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in range(stems)]
    for start in range(0, samples - sample_rate + 1, sample_rate):
        r = references[..., start : start + sample_rate].astype(np.float64)
        e = estimates[..., start : start + sample_rate].astype(np.float64)
        for j in range(stems):
            # Over samples and channels, as released; the silence of windows and chunks counts samples alone.
            if np.linalg.norm(r[j]) / r[j].size >= SILENT:
                continue
            sir, sar = [], []
            for c in range(channels):
                s = r[:, c]  # (stems, samples)
                weights = np.linalg.solve(s @ s.T + EPSILON * np.eye(stems), s @ e[j, c])
                projected = weights @ s
                target = (e[j, c] @ s[j]) / (s[j] @ s[j] + EPSILON) * s[j]
                energy = lambda x: np.square(x).sum() + EPSILON
                sir.append(10 * np.log10(energy(target) / energy(projected - target)))
                sar.append(10 * np.log10(energy(projected) / energy(e[j, c] - projected)))
            found[j][0].append(float(np.mean(sir)))
            found[j][1].append(float(np.mean(sar)))
    return [(np.array(sir), np.array(sar)) for sir, sar in found]
