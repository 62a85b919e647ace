#!/usr/bin/env bash
# optax: `inject_hyperparams` around Adam makes bfloat16 parameters NaN at the first step; without it they train.
#
# versions: optax 0.2.8, jax 0.10.2, numpy 2.4.6
# date: 2026-12-01
# guess: it only makes the learning rate readable and settable. All numbers stay float32 unless `hyperparam_dtype` says otherwise.
# seen: without `hyperparam_dtype` every number is cast to the widest dtype among the parameters. b2 = 0.999 is 1.0 in bfloat16, so
#   the second moment stays 0, its correction divides 0 by 0, and the update is NaN. b1 = 0.9 becomes 0.8984. With one float32
#   parameter in the tree (a norm's scale) all is well again.
# what helps: hyperparam_dtype=jnp.float32.
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
bfloat16 = {"w": jnp.ones((4,), jnp.bfloat16)}
mixed = {**bfloat16, "scale": jnp.ones((4,))}
rate = optax.linear_schedule(1e-3, 0.0, 100)
cases = {
    "adam": (optax.adam(rate), bfloat16),
    "injected": (optax.inject_hyperparams(optax.adam)(rate), bfloat16),
    "injected, a float32 parameter beside": (optax.inject_hyperparams(optax.adam)(rate), mixed),
    "injected in float32": (optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(rate), bfloat16),
}
finite = {}
for title, (tx, params) in cases.items():
    updates, state = tx.update(jax.tree.map(lambda p: 0.01 * p, params), tx.init(params), params)
    b2 = float(state.hyperparams["b2"]) if hasattr(state, "hyperparams") else 0.999
    finite[title] = bool(jnp.isfinite(updates["w"]).all())
    print(f"{title}: b2 {b2:.4f}, update {float(updates['w'][0])}")
sys.exit(0 if [title for title, is_finite in finite.items() if not is_finite] == ["injected"] else 1)
PY
