"""Det×2: a second deterministic network on top of the frozen first, the control for what refinement by noise brings.

It is the refining network without a noise level: it takes the first network's estimate and features, as diffusion does at
σ → 0, and answers with the stem itself (paper, section on the comparison with a second deterministic model).
"""

from collections.abc import Callable
from typing import Any

import jax

from msr_jax.methods.losses import Distance
from msr_jax.models.backbone import Backbone

Array = jax.Array


def estimate_again(backbone: Backbone, params: Any, first: Any, mixture: Array, label: Array) -> tuple[Array, Array]:
    """Both networks' estimates of the stem: mixture (batch, time, channels), label (batch, stems) -> two of mixture's shape."""
    estimate, features = backbone.apply(first, mixture, label)
    return estimate, backbone.apply(params, estimate, label, None, features)[0]


def det_x2_loss(backbone: Backbone, distance: Distance) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """loss_fn(params, frozen, mixture, target, label, key) -> (mean distance of the second estimate, no metrics)."""

    def loss_fn(params, frozen, mixture, target, label, key):
        _, estimate = estimate_again(backbone, params, frozen["deterministic"], mixture, label)
        return distance(estimate, target).mean(), {}

    return loss_fn
