#!/usr/bin/env bash
# jax: a compiled program that came out of the compilation cache cannot be serialised for another process.
#
# versions: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6
# date: 2026-11-30
# guess: `serialize_executable.serialize` gives the same of a compiled program whether it was compiled now or taken from JAX's
#   own persistent cache; either loads in another process.
# seen: on a CPU, what was compiled now loads and runs. What the cache gave back serialises without an error, to fewer bytes, loads
#   without an error, and at its first call raises "Function … not found".
# what helps: a name of its own for the function that is compiled, as the cache knows programs by that too; or to look whether
#   the cache was hit (the event "/jax/compilation_cache/cache_hits") and not to serialise then.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$PWD/cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
cat > keep.py <<'PY'
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.serialize_executable import serialize

hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
)
x = jnp.ones((64, 64))
hits.clear()
program = jax.jit(lambda x: jnp.tanh(x @ x.T) + jnp.sin(x).sum()).lower(x).compile()
data = serialize(program)[0]
Path(sys.argv[1]).write_bytes(data)
print("from the cache" if hits else "compiled now", len(data), "bytes")
PY
cat > run.py <<'PY'
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.serialize_executable import deserialize_and_load

x = jnp.ones((64, 64))
program = deserialize_and_load(Path(sys.argv[1]).read_bytes(), jax.tree.structure(((x,), {})), jax.tree.structure(0))
try:
    print("runs:", float(program(x)[0, 0]))
except jax.errors.JaxRuntimeError as error:
    print("loads, and then:", str(error)[:90])
    sys.exit(3)
PY
venv/bin/python -c 'import jax, jaxlib, numpy; print("jax", jax.__version__, "jaxlib", jaxlib.__version__, "numpy", numpy.__version__)'
venv/bin/python keep.py first
venv/bin/python run.py first
venv/bin/python keep.py second
status=0
venv/bin/python run.py second || status=$?
test "$status" = 3
