#!/usr/bin/env bash
# optax: adaptive gradient clipping takes each pair of channels of a 1-D convolution for a unit, against what its source says.
#
# versions: optax 0.2.8, jax 0.10.2, numpy 2.4.6
# date: 2026-12-01
# guess: as for 2-D kernels, a unit of a kernel (taps, in, out) is all that leads to one output. The docstring of the norm says so:
#   "Rank-3 or 4: Axes (0, 1, 2)"; that of `adaptive_grad_clip` says it knows convolutions.
# seen: of three axes only the first is summed. A unit is the three taps between one input and one output. A spike in one of 64 inputs is
#   clipped to an eighth of what it may be, and the same kernel with a height of 1 (1, taps, in, out) is clipped otherwise.
# what helps: axis=(0, 1), for the 1-D kernels alone (`optax.masked` or `optax.partition`).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import sys

import jax
import jax.numpy as jnp
import optax

print("optax", optax.__version__, "jax", jax.__version__)
kernel = jnp.ones((3, 64, 32))
spike = jnp.zeros((3, 64, 32)).at[:, 0].set(100.0)  # one input's gradient is large
clip = lambda g, w, **options: optax.adaptive_grad_clip(0.01, **options).update(g, optax.EmptyState(), w)[0]
norm = lambda g: float(jnp.linalg.norm(g.reshape(-1, 32)[:, 0]) / jnp.linalg.norm(kernel.reshape(-1, 32)[:, 0]))
of_three = norm(clip(spike, kernel))
of_four = norm(clip(spike[None], kernel[None])[0])
told = norm(clip(spike, kernel, axis=(0, 1)))
print("of one output, gradient's norm by weight's norm after clipping to 0.01:")
print(f"(3, 64, 32) {of_three:.5f}, (1, 3, 64, 32) {of_four:.5f}, (3, 64, 32) with axis=(0, 1) {told:.5f}")
near = lambda a, b: abs(a / b - 1) < 1e-3
sys.exit(0 if near(of_four, 0.01) and near(told, 0.01) and near(of_three, 0.01 / 8) else 1)
PY
