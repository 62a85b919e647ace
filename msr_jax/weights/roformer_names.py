"""Where each tensor of a published BS- or Mel-Band RoFormer's state dict stands in our parameters, which stack what repeats."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from msr_jax.models.bs_roformer import BSRoformer
from msr_jax.models.mask_roformer import AXES, MaskRoformer
from msr_jax.models.mel_band_roformer import MelBandRoformer
from msr_jax.weights.model_folder import inputs_of
from msr_jax.weights.streamed import Stacked

NETWORKS: dict[str, type[MaskRoformer]] = {"bs_roformer": BSRoformer, "mel_band_roformer": MelBandRoformer}
T = TypeVar("T")
# The parameters of a block under the names of the published state dict.
ATTENTION = {
    "norm": "norm.gamma",
    "freqs": "rotary_embed.freqs",
    "to_qkv": "to_qkv.weight",
    "to_gates": "to_gates.weight",
    "to_gates_bias": "to_gates.bias",
    "to_out": "to_out.0.weight",
}
ATTENTION_BIAS = {"to_qkv_bias": "to_qkv.bias", "to_out_bias": "to_out.0.bias"}
LINEAR_ATTENTION = {
    "norm": "norm.gamma",
    "temperature": "temperature",
    "to_qkv": "to_qkv.0.weight",
    "to_out": "to_out.1.weight",
}
FEED_FORWARD = {
    "norm": "net.0.gamma",
    "to_hidden": "net.1.weight",
    "to_hidden_bias": "net.1.bias",
    "to_out": "net.4.weight",
    "to_out_bias": "net.4.bias",
}
FILM = {
    "to_scale_shift": "to_scale_shift.to_scale_shift.1.weight",
    "to_scale_shift_bias": "to_scale_shift.to_scale_shift.1.bias",
}


class Place(NamedTuple):
    """A published tensor is params[path][at] with its axes reversed (or not: an embedding)."""

    name: str
    path: tuple[str, ...]
    at: tuple[int, ...]
    is_reversed: bool = True


def _both(name: str, path: tuple[str, ...], index: tuple[int, ...] = ()) -> Iterator[Place]:
    """Weight and bias of a linear layer or convolution."""
    yield Place(f"{name}.weight", path, index)
    yield Place(f"{name}.bias", (*path[:-1], f"{path[-1]}_bias"), index)


def places(net: MaskRoformer) -> Iterator[Place]:
    """Every tensor of the network's published state dict."""
    bands = [(g, k) for g, (_, count) in enumerate(net.groups) for k in range(count)]
    for b, (g, k) in enumerate(bands):
        name, group = f"band_split.to_features.{b}", ("band_split", f"group_{g}")
        yield Place(f"{name}.0.gamma", (*group, "norm"), (k,))
        yield from _both(f"{name}.1", (*group, "to_features"), (k,))
    present = [axis for axis in AXES if getattr(net, f"{axis}_transformer_depth") or axis != "linear"]
    film = FILM if net.timed else {}
    for i in range(net.depth):
        for a, axis in enumerate(present):
            for j in range(getattr(net, f"{axis}_transformer_depth")):
                biased = {**ATTENTION, **(ATTENTION_BIAS if net.attention_bias else {})}
                attention = LINEAR_ATTENTION if axis == "linear" else biased
                for n, (block, names) in enumerate((("attention", attention), ("feed_forward", FEED_FORWARD))):
                    for ours, theirs in {**names, **film}.items():
                        path: tuple[str, ...] = ("layers", f"{axis}_{j}", block, ours)
                        yield Place(f"layers.{i}.{a}.layers.{j}.{n}.{theirs}", path, (i,))
            if net.has_output_norms:
                yield Place(f"layers.{i}.{a}.norm.gamma", ("layers", f"{axis}_norm"), (i,))
    if not net.has_output_norms:
        yield Place("final_norm.gamma", ("final_norm",), ())
    for s in range(net.num_stems):
        for b, (g, k) in enumerate(bands):
            for depth in range(net.mask_linears):
                path = ("mask_estimators", f"group_{g}", f"linear_{depth}")
                yield from _both(f"mask_estimators.{s}.to_freqs.{b}.0.{2 * depth}", path, (s, k))
    if net.timed:
        yield from _both("to_time.0.1", ("conditioning", "to_time"))
        for n in (0, 2):
            yield from _both(f"to_mapping.{n}", ("conditioning", f"to_mapping_{n}"))
        yield Place("stem_embedding.weight", ("conditioning", "stem_embedding"), (), False)
    if net.conditioned:
        for n in (1, 3, 5, 7):
            yield from _both(f"stft_feature_adapter.{n}", ("adapters", "stft", f"conv_{n}"))
        for n in (0, 2):
            yield from _both(f"band_split_feature_adapter.{n}", ("adapters", "band_split", f"linear_{n}"))
            for i in range(net.depth):
                for a, axis in enumerate(("time", "freq")):
                    path = ("adapters", axis, f"linear_{n}")
                    yield from _both(f"transformer_feature_adapters.{2 * i + a}.{n}", path, (i,))


def published_shapes(net: MaskRoformer, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the published state dict, from those of our parameters by path ("a/b/c")."""
    found = {}
    for place in places(net):
        shape = shapes["/".join(place.path)][len(place.at) :]
        found[place.name] = tuple(reversed(shape)) if place.is_reversed else shape
    return found


def stack_tensors(
    net: MaskRoformer, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Published state dict -> our flat parameters. `tensors` holds arrays, or functions that give one, called in turn."""
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    for place in places(net):
        tensor = tensors[place.name]
        tensor = tensor() if callable(tensor) else tensor
        params["/".join(place.path)][place.at] = tensor.T if place.is_reversed else tensor
    return params


def stack_lazily(
    net: MaskRoformer, readers: Mapping[str, Callable[[], np.ndarray]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Stacked]:
    """As `stack_tensors`, from functions that give the published tensors: each is called when its part is written."""
    parts: dict[str, list[Place]] = {path: [] for path in shapes}
    for place in places(net):
        parts["/".join(place.path)].append(place)

    def reader(place: Place) -> Callable[[], np.ndarray]:
        read = readers[place.name]
        return (lambda: read().T) if place.is_reversed else read

    ordered = lambda path: sorted(parts[path], key=lambda place: place.at)
    return {path: Stacked(shape, [reader(place) for place in ordered(path)]) for path, shape in shapes.items()}


def unstack_tensors(net: MaskRoformer, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `stack_tensors`. Published refiners have no `mask_scale`: it goes into the heads' last products."""
    tensors, scale = {}, net.mask_scale if net.conditioned else 1.0
    last = f"linear_{net.mask_linears - 1}"
    for place in places(net):
        tensor = params["/".join(place.path)][place.at]
        if scale != 1 and place.path[0] == "mask_estimators" and place.path[-1] in (last, f"{last}_bias"):
            value, gate = np.split(tensor, 2, axis=-1)
            tensor = np.concatenate([scale * value, gate], axis=-1)
        tensors[place.name] = np.ascontiguousarray(tensor.T if place.is_reversed else tensor)
    return tensors


def published_network(sizes: Mapping[str, Any], network: str) -> MaskRoformer:
    """The module that a network of a model folder is, from the `model` section of its config."""
    own = {k: v for k, v in sizes.items() if k not in ("name", "lora_rank")}
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
    timed, conditioned = inputs_of(network)
    return NETWORKS[sizes["name"]](**fields, timed=timed, conditioned=conditioned)


def is_numbered_by_pypi(names: Iterable[str]) -> bool:
    """Whether a state dict counts a layer's transformers as the PyPI package does in Mel-Band RoFormers.

    There the linear one has number 0 even where a network has none.
    """
    layer = {name.split(".")[2] for name in names if name.startswith("layers.0.")}
    return bool(layer) and "0" not in layer


def renumber(state: Mapping[str, T], by: int) -> dict[str, T]:
    """A state dict with the number of each layer's transformers moved: by -1 from the PyPI package's count, by 1 to it."""
    moved = lambda match: f"{match[1]}{int(match[2]) + by}."
    return {re.sub(r"^(layers\.\d+\.)(\d+)\.", moved, name): value for name, value in state.items()}
