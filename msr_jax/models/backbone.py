"""What the rest of the package knows of a network: a backbone is a named tuple of functions over parameter trees.

A new backbone is one module beside `unet1d` and one line in `BACKBONES`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msr_jax.errors import UserError
from msr_jax.models.unet1d import UNet1d

Array = jax.Array


class Backbone(NamedTuple):
    """Functions of one network family.

    init(key, timed) -> params: nested dict of float32 arrays; `timed` adds the noise-level input.
    apply(params, x, label, tau=None, injected=None) -> (y, features): x, y (batch, time, channels) float32, label
      (batch, stems) one-hot, tau (batch,). The features of a deterministic network run on the mixture are what a
      refining network takes as `injected`.
    length_multiple: samples that `time` must be a multiple of.
    """

    init: Callable[..., Any]
    apply: Callable[..., tuple[Array, list[Array]]]
    length_multiple: int

    def check_length(self, samples: int) -> None:
        """Raises UserError unless a segment of so many samples goes through the network."""
        if samples <= 0 or samples % self.length_multiple:
            raise UserError(
                f"a segment of {samples} samples does not fit this network: take a multiple of {self.length_multiple}"
            )


def _make_unet1d(sizes: Mapping[str, Any], dtype: jnp.dtype) -> Backbone:
    fields = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in sizes.items()}
    unknown = sorted(set(fields) - set(UNet1d.__dataclass_fields__))
    if unknown:
        raise UserError(f"the model config has unknown fields: {', '.join(unknown)}")
    levels = {name: len(fields[name]) for name in ("factors", "num_blocks", "attentions") if name in fields}
    if "multipliers" in fields:
        levels["multipliers (less one)"] = len(fields["multipliers"]) - 1
    if len(set(levels.values())) > 1:
        raise UserError(f"the model config names different numbers of levels: {levels}")
    net = UNet1d(**fields, dtype=dtype)
    if net.channels % net.patch_factor:
        raise UserError(f"model.channels ({net.channels}) must be a multiple of patch_factor ({net.patch_factor})")

    def init(key: Array, timed: bool) -> Any:
        x = jnp.zeros((1, net.length_multiple, net.in_channels))
        label = jnp.zeros((1, net.context_features))
        return net.init(key, x, label, jnp.zeros((1,)) if timed else None)["params"]

    def apply(params: Any, x: Array, label: Array, tau: Array | None = None, injected: Sequence[Array] | None = None):
        return net.apply({"params": params}, x, label, tau, injected)

    return Backbone(init, apply, net.length_multiple)


BACKBONES = {"unet1d": _make_unet1d}


@cache
def has_bfloat16_units() -> bool:
    """Whether the default device multiplies bfloat16 faster than float32: GPUs, TPUs, and those CPUs that have AMX."""
    if jax.default_backend() != "cpu":
        return True
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def compute_dtype(dtype: str) -> jnp.dtype:
    """The precision that "float32" or "bfloat16" comes to on this device.

    "bfloat16" allows products to be coarse where that makes them fast. A device without units for it computes in
    float32 all the same: measured on a CPU with AVX2 alone, that is twice as fast.

    Raises:
      UserError: another name.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"compute_dtype must be float32 or bfloat16, not '{dtype}'")
    return jnp.dtype(dtype if has_bfloat16_units() else "float32")


def cast_params(params: Any, dtype: str) -> Any:
    """Parameters for inference at `dtype`: matrices and kernels stored in it, so that no call has to convert them.

    A network of that dtype answers as with the float32 parameters, but for the conditioning vector, whose layers would
    compute in float32. Vectors (norms, biases, noise-level frequencies) stay float32.
    """
    stored = compute_dtype(dtype)
    return jax.tree.map(lambda leaf: leaf.astype(stored) if leaf.ndim > 1 else leaf, params)


def make_backbone(model: Mapping[str, Any], dtype: str = "float32") -> Backbone:
    """Build the backbone of a config's `model` section (`name` and the network's sizes).

    Args:
      dtype: "float32" or "bfloat16", the precision of matrix products and activations, see `compute_dtype`; parameters
        stay float32.

    Raises:
      UserError: unknown name, unknown or contradictory sizes, unknown dtype.
    """
    sizes = dict(model)
    name = sizes.pop("name", None)
    if name not in BACKBONES:
        raise UserError(f"there is no backbone '{name}'; known are {', '.join(BACKBONES)}")
    return BACKBONES[name](sizes, compute_dtype(dtype))
