#!/usr/bin/env bash
# jax on NVIDIA GPUs: a scan whose body convolves keeps a second copy of all its kernels, in the parameters' precision.
#
# versions: jax, jax-cuda13-plugin, jax-cuda13-pjrt 0.10.2 (the compiler alone; no GPU and no driver)
# date: 2026-11-30
# guess: kernels (k, in, out) in float32, converted to bfloat16 where a scan's body uses them, need work space for one at a time.
# seen: the order of axes that cuDNN wants goes back through the conversion and the loop to the parameters: every kernel is turned
#   before the loop, in float32, and the turned copies lie beside the parameters for as long as the loop runs.
# what helps: `jax.experimental.layout.with_layout_constraint` on each kernel, before its conversion: it is turned where it is used.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv venv
venv/bin/pip install --quiet jax==0.10.2
venv/bin/pip install --quiet --no-deps jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2
JAX_PLATFORMS=cpu venv/bin/python - <<'PY' 2>&1 | grep -v '^[WI][0-9]'
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

print("jax", jax.__version__, "jax-cuda13-pjrt", version("jax-cuda13-pjrt"))
CHIP = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 } }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 28 patch: 1 } device_description_str: "NVIDIA H200" """
ask = dict(platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=CHIP)
whole = NamedSharding(Mesh(np.array(topologies.get_topology_desc(**ask).devices), ("x",)), PartitionSpec())
LAYERS, TAPS, WIDTH, FRAMES, TURNS = 12, 3, 512, 64, 4


def work_space(constrained, kept_as):
    def run(kernels, batches):
        def body(total, x):  # x (batch, frames, width)
            for kernel in kernels:
                kernel = with_layout_constraint(kernel, Layout((0, 1, 2))) if constrained else kernel
                narrow, axes = kernel.astype(jnp.bfloat16), ("NWC", "WIO", "NWC")
                x = jnp.tanh(lax.conv_general_dilated(x, narrow, (1,), "SAME", dimension_numbers=axes))
            return total + x.astype(jnp.float32).sum(), None

        return lax.scan(body, 0.0, batches)[0]

    kernels = [jax.ShapeDtypeStruct((TAPS, WIDTH, WIDTH), kept_as, sharding=whole)] * LAYERS
    batches = jax.ShapeDtypeStruct((TURNS, 2, FRAMES, WIDTH), jnp.bfloat16, sharding=whole)
    return jax.jit(run).lower(kernels, batches).compile().memory_analysis().temp_size_in_bytes


ok = True
for kept_as in (jnp.float32, jnp.bfloat16):
    parameters = LAYERS * TAPS * WIDTH * WIDTH * jnp.dtype(kept_as).itemsize
    plain, held = (work_space(constrained, kept_as) / parameters for constrained in (False, True))
    print(f"kernels in {jnp.dtype(kept_as).name}: work space {plain:.2f} of the parameters, {held:.2f} with the constraint")
    ok &= plain > 1 and held < 0.3
sys.exit(0 if ok else 1)
PY
