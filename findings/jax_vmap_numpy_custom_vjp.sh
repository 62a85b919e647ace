#!/usr/bin/env bash
# jax: a NumPy array that a function under `jit` closes over cannot be mapped over a function with a gradient of its own.
#
# versions: jax 0.10.2, numpy 2.4.6
# date: 2026-11-30
# guess: `jit` and `vmap` take NumPy arrays wherever they take JAX's, closed over or given.
# seen: `vmap` of a `custom_vjp` function over a NumPy array that the traced function closes over raises an AssertionError,
#   "non-canonical constant of type ndarray". Without `vmap`, without `jit`, without the custom gradient, or as an argument it works.
# what helps: `jnp.asarray` before the map.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import sys
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, "numpy", np.__version__)
plain = lambda x, w: x @ w
own = jax.custom_vjp(plain)
own.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, bar: (bar @ saved[1].T, saved[0].T @ bar))
x, w = np.ones((3, 2, 4), np.float32), np.ones((3, 4, 5), np.float32)
cases = {
    "custom gradient, mapped, under jit": lambda: jax.jit(lambda x: jax.vmap(own)(x, w))(x),
    "the same without jit": lambda: jax.vmap(own)(x, w),
    "the same without vmap": lambda: jax.jit(lambda x: own(x, w[0]))(x[0]),
    "the same without the custom gradient": lambda: jax.jit(lambda x: jax.vmap(plain)(x, w))(x),
    "the same as an argument": lambda: jax.jit(jax.vmap(own))(x, w),
    "the same through jnp.asarray": lambda: jax.jit(lambda x: jax.vmap(own)(x, jnp.asarray(w)))(x),
}
failed = []
for name, run in cases.items():
    try:
        print(name, "->", run().shape)
    except AssertionError as error:
        print(name, "-> AssertionError:", str(error).split(":")[0])
        failed.append(name)
sys.exit(0 if failed == [next(iter(cases))] else 1)
PY
