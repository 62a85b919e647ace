"""The backbones by name. A new one is one module beside `unet1d` and one line in `BACKBONES`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from msr_jax.devices import platform
from msr_jax.errors import UserError
from msr_jax.models.bfloat16 import bfloat16_is_faster
from msr_jax.models.bs_roformer import make_bs_roformer
from msr_jax.models.interface import Backbone
from msr_jax.models.mel_band_roformer import make_mel_band_roformer
from msr_jax.models.slices import BITS
from msr_jax.models.unet1d import make_unet1d

# name: function(sizes, dtype) -> Backbone
BACKBONES = {"unet1d": make_unet1d, "bs_roformer": make_bs_roformer, "mel_band_roformer": make_mel_band_roformer}


def has_bfloat16_units() -> bool:
    """Whether the device multiplies bfloat16 faster than float32: GPUs, TPUs, and those CPUs where a measurement says so."""
    return platform() != "cpu" or bfloat16_is_faster()


def compute_dtype(dtype: str) -> jnp.dtype:
    """The precision that "float32" or "bfloat16" comes to on this device.

    "bfloat16" allows products to be coarse where that makes them fast. A device without units for it computes in
    float32 all the same: measured on a CPU with AVX2 alone, that is twice as fast.

    Raises:
      UserError: another name.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"compute_dtype must be float32 or bfloat16, not '{dtype}'")
    return jnp.dtype(dtype if dtype == "float32" or has_bfloat16_units() else "float32")  # float32 measures nothing


def cast_params(params: Any, dtype: str, looped: tuple[str, ...] = ()) -> Any:
    """Parameters for inference at `dtype`: matrices and kernels stored in it, so that no call has to convert them.

    A network of that dtype answers as with the float32 parameters, but for the conditioning vector, whose layers would
    compute in float32. Vectors (norms, biases, noise-level frequencies) stay float32.

    Args:
      looped: of the backbone; these parameters are stored as their bits on a CPU.
    """
    computed = compute_dtype(dtype)

    def cast(path: tuple, leaf: Any) -> Any:
        return stored("/".join(str(key.key) for key in path), leaf, computed, looped)

    return jax.tree_util.tree_map_with_path(cast, params)


def stored(name: str, leaf: Any, computed: jnp.dtype, looped: tuple[str, ...]) -> Any:
    """One parameter by the name of its path, for inference in `computed`, see `cast_params`."""
    if leaf.dtype == BITS:
        return leaf
    leaf = leaf.astype(stored_dtype(leaf.ndim, computed), copy=False)
    if leaf.dtype == jnp.bfloat16 and platform() == "cpu" and name.startswith(looped):
        return leaf.view(BITS)
    return leaf


def stored_dtype(axes: int, computed: jnp.dtype) -> jnp.dtype:
    """Of a parameter of so many axes, for inference in `computed`."""
    return computed if axes > 1 else jnp.dtype(jnp.float32)


def copy_shared(
    params: Mapping[str, Any], source: Mapping[str, Any], *, plain: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`params` with every array that `source` has under the same path and in the same shape taken from there.

    `plain`: parameters that began without `zero_init_output`; arrays that are zero in `params` but not there stay so.
    """

    def choose(own: Any, other: Any, begun: Any) -> Any:
        if isinstance(own, Mapping):
            other, begun = (tree if isinstance(tree, Mapping) else {} for tree in (other, begun))
            return {name: choose(value, other.get(name), begun.get(name)) for name, value in own.items()}
        if other is None or jnp.shape(other) != jnp.shape(own):
            return own
        return other if begun is None else jnp.where(jnp.any(own != 0) | jnp.all(begun == 0), other, own)

    return choose(params, source, plain)


def make_backbone(model: Mapping[str, Any], dtype: str = "float32", within: int | None = None) -> Backbone:
    """Build the backbone of a config's `model` section (`name` and the network's sizes); its functions are jitted.

    Args:
      dtype: "float32" or "bfloat16", the precision of matrix products and activations, see `compute_dtype`; parameters
        stay float32.
      within: samples of its own segment, for inference on longer ones, see `Backbone.within`.

    Raises:
      UserError: unknown name, unknown or contradictory sizes, unknown dtype.
    """
    sizes = dict(model)
    name = sizes.pop("name", None)
    sizes.pop("lora_rank", None)  # how it is trained, which is no part of it
    if name not in BACKBONES:
        raise UserError(f"there is no backbone '{name}'; known are {', '.join(BACKBONES)}")
    made = BACKBONES[name](sizes, compute_dtype(dtype))
    made = made.within(within) if within and made.within else made
    # Called on its own, each is one program instead of thousands; called inside a step, it is traced once per shape.
    fields = ("separate", "condition", "refine", *(("defer",) if made.defer else ()))
    compiled: dict[str, Any] = {field: jax.jit(getattr(made, field)) for field in fields}
    return made._replace(init=jax.jit(made.init, static_argnums=(1, 2)), **compiled)
