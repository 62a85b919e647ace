#!/usr/bin/env bash
# optax and jax: a step of optax.contrib.prodigy gathers parameters that are split over devices, whole and in float32, on every one.
#
# versions: optax 0.2.8, jax and jaxlib 0.10.2, numpy 2.2.6; four simulated devices of a CPU
# date: 2026-11-29
# guess: an optimiser's update is elementwise but for sums to a scalar, so that a sharded state is updated where it lies, as by Adam,
#   and only scalars cross devices.
# seen: its inner product of gradients and way (optax.tree.vdot) flattens every array first. A matrix that is split along any axis but
#   the first has no sharding once it is flat, so the compiler gathers it. The same sum without flattening moves a scalar.
# what helps: sum((g * d).sum() for each leaf) in place of vdot.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv venv
venv/bin/pip install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.2.6
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 venv/bin/python - <<'PY'
import re
import sys

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import AxisType, NamedSharding, PartitionSpec

print("optax", optax.__version__, "jax", jax.__version__)
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec(None, "x"))
params = jax.device_put(jnp.ones((256, 512)), split)


def gathered(step, *args):
    """The largest array that the compiled step gathers, in elements."""
    text = jax.jit(step).lower(*args).compile().as_text()
    shapes = [m[1] for m in re.finditer(r"= (\S+) all-gather(?:-start)?\(", text)]
    sizes = [[int(n) for n in re.search(r"\[([\d,]*)\]", s)[1].split(",")] for s in shapes]
    return max((jnp.prod(jnp.array(s)).item() for s in sizes), default=0)


found = {}
for name, tx in (("adam", optax.adam(1e-3)), ("prodigy", optax.contrib.prodigy())):
    state = jax.tree.map(lambda x: jax.device_put(x, split if x.ndim == 2 else NamedSharding(mesh, PartitionSpec())), tx.init(params))
    found[name] = gathered(lambda g, s, p, tx=tx: tx.update(g, s, p), params, state, params)
found["vdot"] = gathered(lambda a, b: optax.tree.vdot(a, b), params, params)
found["sum of products"] = gathered(lambda a, b: (a * b).sum(), params, params)
print({name: f"{size} elements gathered" for name, size in found.items()})
sys.exit(0 if found["prodigy"] == found["vdot"] == params.size and found["adam"] == found["sum of products"] == 0 else 1)
PY
