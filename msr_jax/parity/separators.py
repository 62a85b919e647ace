"""Fixtures of separators that mask the spectrum: outputs, activations, losses and gradients of either family."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from msr_jax.methods.losses import STFT_HOP, STFT_WINDOWS, multires_stft
from msr_jax.models.mask_roformer import MaskRoformer
from msr_jax.parity.checks import GRADIENT_TOLERANCE, TOLERANCE, Arrays, Check, relative_error, relative_norm
from msr_jax.weights.model_folder import check_tensors, flatten, unflatten
from msr_jax.weights.roformer_names import (
    is_numbered_by_pypi,
    published_shapes,
    renumber,
    stack_tensors,
    unstack_tensors,
)

FRAMES = {"stft": 3, "stft_adapter": 3, "masked_stft": 4}  # the axis of frames; else 1, and 2 of what is over time


def last(x: np.ndarray | jax.Array) -> jax.Array:
    """(…, channels, time) -> (…, time, channels), and back."""
    return jnp.asarray(x).swapaxes(-1, -2)


def state_of(arrays: Arrays) -> Arrays:
    """The published state dict that a fixture carries."""
    return {k.removeprefix("state_dict/"): v for k, v in arrays.items() if k.startswith("state_dict/")}


def params_of(net: MaskRoformer, state: Arrays, where: str) -> Any:
    """Our parameters of a published state dict, in either numbering; UserError for tensors that are not the network's."""
    state = renumber(state, -1) if is_numbered_by_pypi(state) else state
    init = lambda: net.init(jax.random.key(0), method=lambda module: module.band_split)["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(nn.meta.unbox(jax.eval_shape(init))).items()}
    check_tensors(state, published_shapes(net, shapes), where)
    return unflatten(stack_tensors(net, state, shapes))


def separate(net: MaskRoformer, params: Any, mixture: np.ndarray) -> tuple[jax.Array, dict, dict]:
    """Stems (batch, stems, time, channels), features, and what the network sows, for (batch[, channels], time)."""
    mixture = mixture[:, None] if mixture.ndim == 2 else mixture
    run = jax.jit(lambda p, x: net.apply({"params": p}, x, method="separate", mutable=["intermediates"]))
    (stems, features), sown = run(params, last(mixture))
    return stems, features, sown["intermediates"]


def activations(features: Mapping[str, Any], sown: Mapping[str, Any]) -> dict[str, Any]:
    """Activations under the fixtures' names, in the fixtures' order of axes."""
    named = {}
    if "stft" in features:
        named["stft"] = features["stft"].transpose(0, 3, 2, 1, 4)
        named["band_split"] = features["band_split"]
    for i, (time, freq) in enumerate(zip(features["time"], features["freq"], strict=True)):
        named |= {f"layer{i}_time": time.swapaxes(1, 2), f"layer{i}_freq": freq}
    named["final_norm"] = sown["final_norm"][0]
    return named


def compare_mid(arrays: Arrays, named: Mapping[str, Any], frames: Any) -> Iterator[Check]:
    """Checks of the activations that a fixture holds; of some `frames` alone, or "all"."""
    for name, value in named.items():
        if f"mid/{name}" not in arrays:
            continue
        axis = 2 if name.endswith("_time") or _is_time_adapter(name) else FRAMES.get(name, 1)
        if frames != "all" and np.ndim(value) > 2:
            value = np.take(np.asarray(value), frames, axis)
        yield Check(f"mid/{name}", relative_error(value, arrays[f"mid/{name}"]), TOLERANCE)


def _is_time_adapter(name: str) -> bool:
    return name.startswith("transformer_adapter") and int(name.removeprefix("transformer_adapter")) % 2 == 0


def check_gradients(
    net: MaskRoformer, params: Any, arrays: Arrays, config: Mapping[str, Any], length: int
) -> Iterator[Check]:
    """The training loss on a fixture's target, over the first `length` samples, and the gradient of every parameter."""
    as_channels = lambda x: jnp.moveaxis(x, 1, 2).reshape(len(x), x.shape[2], -1)
    given, wanted = arrays["in/mixture"], arrays["in/target"]
    mixture = last(given.reshape(len(given), net.channels, -1))
    target = last(wanted.reshape(len(wanted), net.num_stems, net.channels, -1))

    def loss(params: Any) -> tuple[jax.Array, tuple]:
        stems, _ = net.apply({"params": params}, mixture, method="separate")
        difference = as_channels(stems - target)[:, :length]
        l1 = jnp.abs(difference).mean()
        spectral = multires_stft(
            difference,
            config.get("multi_stft_resolutions_window_sizes", STFT_WINDOWS),
            config.get("multi_stft_hop_size", STFT_HOP),
            net.stft_n_fft,
        ).mean()
        return l1 + config.get("multi_stft_resolution_loss_weight", 1.0) * spectral, (l1, spectral)

    (total, (l1, spectral)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for name, value in (("total", total), ("l1", l1), ("mrstft", spectral)):
        yield Check(f"out/{name}", relative_error(np.reshape(value, 1), arrays[f"out/{name}"]), TOLERANCE)
    ours = unstack_tensors(net, flatten(jax.device_get(grads)))
    ours = renumber(ours, 1) if is_numbered_by_pypi(state_of(arrays)) else ours
    for name in (key.removeprefix("out/grad/") for key in arrays if key.startswith("out/grad/")):
        error = relative_norm(ours[name], arrays[f"out/grad/{name}"]) if name in ours else float("inf")
        yield Check(f"out/grad/{name}", error, GRADIENT_TOLERANCE)
