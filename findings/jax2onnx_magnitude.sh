#!/usr/bin/env bash
# jax2onnx: the magnitude of a spectrum is converted to the magnitudes of its real and imaginary parts.
#
# versions: jax2onnx 0.17.1, onnx 1.23.2, onnxruntime 1.32.0, jax 0.10.2
# date: 2026-12-01
# guess: ONNX has no complex numbers at hand, so a program with `jnp.fft.rfft` is either refused (as `irfft` is) or right.
# seen: `jnp.abs(jnp.fft.rfft(x))` is converted without an error or warning of Python's. The file says that its output has a number a bin; it gives
#   two, |re| and |im|. A loss or feature that sums over bins, or z * conj(z), comes out of another size or shape. `jnp.angle`, and
#   sqrt(z.real**2 + z.imag**2), are right.
# what helps: real and imaginary parts written out; compare what an export gives with JAX, shape first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 onnx-ir==1.1.0 onnxscript==0.7.2 \
  flax==0.12.8 equinox==0.13.8
venv/bin/pip install --quiet --no-deps jax2onnx==0.17.1
JAX_PLATFORMS=cpu venv/bin/python - 2>/dev/null <<'PY'
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnxruntime

print("jax2onnx", version("jax2onnx"), "onnxruntime", onnxruntime.__version__, "jax", jax.__version__)
x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def by_hand(x):
    z = jnp.fft.rfft(x)
    return jnp.sqrt(z.real**2 + z.imag**2)


def run(title, f):
    want, model = np.asarray(f(x)), jax2onnx.to_onnx(f, [jax.ShapeDtypeStruct(x.shape, x.dtype)])
    told = tuple(d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x})[0]
    print(f"{title}: JAX {want.shape}, the file says {told}, it gives {found.shape}, first {found.ravel()[:2]}")
    return found, want


found, want = run("abs", lambda x: jnp.abs(jnp.fft.rfft(x)))
right, _ = run("by hand", by_hand)
z = np.fft.rfft(x)
parts = np.abs(np.stack([z.real, z.imag], -1))
is_parts = found.shape == parts.shape and np.allclose(found, parts, atol=1e-5)
sys.exit(0 if is_parts and np.allclose(right, want, atol=1e-5) else 1)
PY
