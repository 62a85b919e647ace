"""SDR, ISR, SIR and SAR by BSSEval v4, computed by museval's own code, and the released extra for silent frames."""

import importlib.util
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np

SILENT = 1.5e-5
EPSILON = 1e-8


class BssScores(NamedTuple):
    """(stems, frames) each, dB; NaN in frames where any reference or estimate is exactly silent, for all stems."""

    sdr: np.ndarray
    isr: np.ndarray
    sir: np.ndarray
    sar: np.ndarray


@cache
def museval_metrics() -> ModuleType:
    """museval's module `metrics`, without its package: that one imports a reader which fails where ffmpeg is missing.

    Its fallback for singular systems names `np.linalg.linalg`, which NumPy 2.4 no longer has; the module gets a NumPy
    that has it, and nobody else does.
    """
    package = importlib.util.find_spec("museval")
    path = Path(package.submodule_search_locations[0]) / "metrics.py"
    spec = importlib.util.spec_from_file_location("msr_jax._museval_metrics", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    linalg = SimpleNamespace(**vars(np.linalg))
    linalg.linalg = np.linalg
    module.np = SimpleNamespace(**{k: getattr(np, k) for k in dir(np) if k != "linalg"}, linalg=linalg)
    sys.modules[spec.name] = module
    return module


def bss_eval(estimates: np.ndarray, references: np.ndarray, sample_rate: int) -> BssScores:
    """BSSEval v4: distortion filters of 512 taps fitted once, frames of 1 s without overlap, the incomplete last left out.

    Args:
      estimates, references: (stems, channels, samples).
      sample_rate: Hz.

    Raises:
      ValueError: a reference or estimate is silent throughout; nothing is computed for any stem then.
    """
    swap = lambda x: np.ascontiguousarray(np.asarray(x, np.float64).swapaxes(1, 2))  # (stems, samples, channels)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        sdr, isr, sir, sar, _ = museval_metrics().bss_eval(
            swap(references), swap(estimates), window=sample_rate, hop=sample_rate
        )
    return BssScores(sdr, isr, sir, sar)


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
