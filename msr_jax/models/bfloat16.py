"""Whether bfloat16 pays on this CPU: by a measurement, which is kept."""

import json
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msr_jax.errors import UserError
from msr_jax.files import write_whole
from msr_jax.machine import processor

PRODUCT = 512  # rows and columns of the products that `bfloat16_is_faster` times
TURNS = 8
# Times as fast: units for it are twice as fast and more, and without them a busy machine measures up to 1.1.
CLEARLY = 1.4


@cache
def bfloat16_is_faster() -> bool:
    """Whether this CPU's products in bfloat16, accumulated in float32, take clearly less time than those in float32.

    Measured once, in a tenth of a second, and kept beside JAX's compiled programs where it keeps any: so every
    start computes in the same precision.
    """
    folder = jax.config.values.get("jax_compilation_cache_dir")
    key = f"jax {jax.__version__}, processor {processor()}"
    kept = Path(folder) / "bfloat16.json" if folder and "://" not in folder else None
    known: dict[str, float] = {}
    if kept is not None:
        with suppress(OSError, ValueError):
            known = dict(json.loads(kept.read_text()))
    if not isinstance(known.get(key), int | float):
        known[key] = round(_product_seconds_ratio(), 2)
        if kept is not None:
            with suppress(UserError):  # a folder that cannot be written: the next start measures again
                write_whole(kept, json.dumps(known, indent=1) + "\n")
    return known[key] >= CLEARLY


def _product_seconds_ratio() -> float:
    """Seconds of a product in float32 over those in bfloat16; the best of each, in turns."""
    cpu = jax.devices("cpu")[0]
    ones = np.ones((PRODUCT, PRODUCT), np.float32)
    runs: dict[Any, tuple[Any, jax.Array, list[float]]] = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.device_put(ones.astype(dtype), cpu)
        multiply = jax.jit(lambda x: lax.dot(x, x, preferred_element_type=jnp.float32)).lower(x).compile()
        jax.block_until_ready(multiply(x))
        runs[dtype] = (multiply, x, [])
    for _ in range(TURNS):
        for multiply, x, seconds in runs.values():
            started = time.perf_counter()
            jax.block_until_ready(multiply(x))
            seconds.append(time.perf_counter() - started)
    fine, coarse = (min(seconds) for _, _, seconds in runs.values())
    return fine / coarse
