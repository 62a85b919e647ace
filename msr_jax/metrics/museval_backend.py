"""SDR, ISR, SIR and SAR by BSSEval v4 as museval's own code computes them: the reference for `bss_eval`."""

import importlib.util
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


@cache
def museval_metrics() -> ModuleType:
    """museval's module `metrics`, without its package: that one imports a reader which fails where ffmpeg is missing.

    Its fallback for singular systems names `np.linalg.linalg`, which NumPy 2.4 no longer has; the module gets a NumPy
    that has it, and nobody else does.
    """
    package: Any = importlib.util.find_spec("museval")
    path = Path(package.submodule_search_locations[0]) / "metrics.py"
    spec: Any = importlib.util.spec_from_file_location("msr_jax._museval_metrics", path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    linalg = SimpleNamespace(**vars(np.linalg))
    linalg.linalg = np.linalg
    module.np = SimpleNamespace(**{k: getattr(np, k) for k in dir(np) if k != "linalg"}, linalg=linalg)
    sys.modules[spec.name] = module
    return module


def museval_bss_eval(estimates: np.ndarray, references: np.ndarray, sample_rate: int) -> tuple[np.ndarray, ...]:
    """SDR, ISR, SIR, SAR in dB, (stems, frames) each, of (stems, channels, samples) twice; see `bss_eval`."""
    swap = lambda x: np.ascontiguousarray(np.asarray(x, np.float64).swapaxes(1, 2))  # (stems, samples, channels)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return museval_metrics().bss_eval(swap(references), swap(estimates), window=sample_rate, hop=sample_rate)[:4]
