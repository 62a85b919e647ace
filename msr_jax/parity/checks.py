"""What the checks of fixtures share: one compared tensor, and how two are compared."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 5e-3
Arrays = Mapping[str, np.ndarray]


class Check(NamedTuple):
    """One compared tensor: its error, as `relative_error` or, of gradients, `relative_norm`, and how large that may be."""

    name: str
    error: float
    tolerance: float


def relative_error(actual: Any, reference: np.ndarray) -> float:
    """max|actual - reference| / max(1, max|reference|); infinite where shapes differ or a value is not finite."""
    actual = np.asarray(actual)
    if actual.shape != reference.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.abs(actual - reference).max(initial=0) / max(1.0, np.abs(reference).max(initial=0)))


def relative_norm(actual: Any, reference: np.ndarray) -> float:
    """‖actual - reference‖ / ‖reference‖, as gradients of the spectral loss are compared."""
    actual = np.asarray(actual, np.float64)
    if actual.shape != reference.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.linalg.norm(actual - reference) / max(float(np.linalg.norm(reference.astype(np.float64))), 1e-12))
