#!/usr/bin/env bash
# flax: layers that hold a kernel per band begin with weights that are too small by the root of the number of bands.
#
# versions: flax 0.12.8, jax 0.10.2, numpy 2.4.6
# date: 2026-12-01
# guess: `DenseGeneral(features, batch_dims=(0,))` is one dense layer for each entry of that axis, each begun as `Dense`: outputs of
#   the size of the inputs. DenseGeneral turns its kernel to a matrix for the initialiser, so that it sees inputs and outputs.
# seen: the axis of batches is counted among the inputs. With 60 bands the outputs are 7.7 times too small (18 dB), and so they
#   are with `Einsum("tbi,bio->tbo")`. nnx.LinearGeneral does the same, nnx.Einsum too. `nn.vmap` over `nn.Dense` begins right.
# what helps: kernel_init=variance_scaling(1.0 * bands, "fan_in", "truncated_normal"), or `nn.vmap` with split params.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import sys

import flax
import flax.linen as nn
import jax
from flax import nnx

print("flax", flax.__version__, "jax", jax.__version__)
bands, size = 60, 64
x = jax.random.normal(jax.random.key(1), (bands, 500, size))
mapped = nn.vmap(nn.Dense, in_axes=0, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
run = lambda layer, x=x: layer.init_with_output(jax.random.key(0), x)[0]
einsum = "btf,bfo->bto"
outputs = {
    "nn.Dense for all": run(nn.Dense(size)),
    "nn.vmap of nn.Dense": run(mapped(size)),
    "nn.DenseGeneral, batch_dims": run(nn.DenseGeneral(size, axis=-1, batch_dims=(0,))),
    "nn.Einsum": run(nn.Einsum((bands, size, size), einsum, use_bias=False)),
    "nnx.LinearGeneral, batch_axis": nnx.LinearGeneral(size, size, axis=-1, batch_axis={0: bands}, rngs=nnx.Rngs(0))(x),
    "nnx.Einsum": nnx.Einsum(einsum, (bands, size, size), rngs=nnx.Rngs(0))(x),
}
spread = {title: float(y.std()) for title, y in outputs.items()}
for title, std in spread.items():
    print(f"{title}: standard deviation {std:.3f}")
right, small = list(spread.values())[:2], list(spread.values())[2:]
sys.exit(0 if all(abs(s - 1) < 0.05 for s in right) and all(abs(s * bands**0.5 - 1) < 0.05 for s in small) else 1)
PY
