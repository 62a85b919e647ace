#!/usr/bin/env bash
# jax: `jax.random.normal` in bfloat16 is made of 128 values, with no tails and a mean that is not 0.
#
# versions: jax and jaxlib 0.10.2, numpy 2.4.6; a CPU
# date: 2026-12-01
# guess: normal(key, shape, bfloat16) is normal(key, shape) rounded: values have 8 bits of precision, a million reach beyond 4.5,
#   and the mean is 0 within 1/sqrt(n).
# seen: the uniform number beneath is drawn in bfloat16, so there are 128 values in all. Nothing is above 2.52 or below -2.89,
#   where a million normal numbers have some 8,000 outside. The mean is -0.012, which is 12 standard errors; the fourth moment is 2.88.
#   `truncated_normal`, of which the usual initialisers are made, has 128 values and a mean of -0.016. float16 has 1,024 and ends at 3.5.
# who meets it: noise of a diffusion step drawn in the network's precision; networks initialised with a bfloat16 `param_dtype`.
# what helps: draw in float32 and round.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, "numpy", np.__version__)
count, key = 1 << 20, jax.random.key(0)


def look(title, draws):
    draws = np.asarray(draws.astype(jnp.float32), np.float64)
    values, mean, errors = len(np.unique(draws)), draws.mean(), draws.mean() / (draws.std() / count**0.5)
    ends = f"{draws.min():.2f} to {draws.max():.2f}"
    print(f"{title}: {values} values, {ends}, mean {mean:.4f} ({errors:.0f} standard errors)")
    return values, max(-draws.min(), draws.max()), abs(errors)


rounded = look("normal in float32, rounded", jax.random.normal(key, (count,)).astype(jnp.bfloat16))
drawn = look("normal in bfloat16", jax.random.normal(key, (count,), jnp.bfloat16))
init = jax.nn.initializers.lecun_normal()
kernel = look("lecun_normal in bfloat16", init(key, (1024, 1024), jnp.bfloat16))
sound = rounded[1] > 4.5 and rounded[2] < 4 and rounded[0] > 500
sys.exit(0 if sound and drawn[0] == 128 and drawn[1] < 3 and drawn[2] > 8 and kernel[0] == 128 and kernel[2] > 8 else 1)
PY
