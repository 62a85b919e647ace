"""BS- and Mel-Band RoFormers in checkpoints: their sizes, from tensors and from the configs beside them, and their weights."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from msr_jax.config import bsrf_base
from msr_jax.errors import UserError
from msr_jax.models.backbone import make_backbone
from msr_jax.models.mask_roformer import INNER
from msr_jax.models.mel_band_roformer import MelBandRoformer, mel_bands
from msr_jax.weights.detect import BAND_SPLIT, clean_names, family_of, prefixes_of
from msr_jax.weights.lightning import Checkpoint, check_real, plain
from msr_jax.weights.model_folder import FIELDS, check_tensors, parameter_shapes, unflatten
from msr_jax.weights.roformer_names import (
    NETWORKS,
    is_numbered_by_pypi,
    published_network,
    published_shapes,
    renumber,
    stack_lazily,
)
from msr_jax.weights.yaml_config import find_section, find_sections, read_recipe, told_recipe, told_sizes

FAMILIES = {"bsrf": "bs_roformer", "melrf": "mel_band_roformer"}
# Of mel bands, (Hz, n_fft) that are in use, for weights without a YAML.
LAYOUTS = ((44_100, 2048), (44_100, 4096), (48_000, 2048), (48_000, 4096), (32_000, 2048), (24_000, 2048))
# What no tensor tells and the stems depend on: assumed and said on import, and named on export where it is not what is assumed.
UNSEEN = ("stft_hop_length", "stft_win_length", "stft_normalized", "zero_dc", "skip_connection")
SHARED_BIAS = r"shared_(qkv|out)_bias|linear_\d+_bias_\d+"
DAMAGED = "the file is damaged, or of a variant that this package does not have"


class Imported(NamedTuple):
    """A checkpoint as a model folder takes it, and what was assumed of it, in words."""

    config: dict[str, Any]
    weights: dict[str, Any]
    assumed: list[str]


class Given(NamedTuple):
    """A tensor that is not in the file, in the place of one that is."""

    value: np.ndarray
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def read(self) -> np.ndarray:
        return self.value


def _count(shapes: Mapping[str, Any], stem: str) -> int:
    return len({k[len(stem) :].split(".")[0] for k in shapes if k.startswith(stem)})


def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the tensor shapes of one network (published names) tell of its sizes: all but its bands, hop, window and the like."""
    has_linear = "layers.0.0.layers.0.0.temperature" in shapes
    time = 1 if has_linear else 0
    block = f"layers.0.{time}.layers.0.0"
    heads = shapes[f"{block}.to_gates.weight"][0]
    dim, hidden = shapes[f"{block}.norm.gamma"][0], shapes.get("stft_feature_adapter.1.weight")
    mlp = "mask_estimators.0.to_freqs.0.0."
    linears = _count(shapes, mlp)
    return {
        "dim": dim,
        "depth": _count(shapes, "layers."),
        "num_stems": _count(shapes, "mask_estimators."),
        "linear_transformer_depth": _count(shapes, "layers.0.0.layers.") if has_linear else 0,
        "time_transformer_depth": _count(shapes, f"layers.0.{time}.layers."),
        "freq_transformer_depth": _count(shapes, f"layers.0.{time + 1}.layers."),
        "heads": heads,
        "dim_head": shapes[f"{block}.to_qkv.weight"][0] // (3 * heads),
        "attention_bias": f"{block}.to_qkv.bias" in shapes,
        "mask_estimator_depth": linears if "final_norm.gamma" in shapes else linears - 1,
        **({"mlp_expansion_factor": shapes[f"{mlp}0.weight"][0] // dim} if linears > 1 else {}),
        **({"stft_adapter_hidden": hidden[0]} if hidden else {}),
    }


def _band_values(shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    count = _count(shapes, "band_split.to_features.")
    return [shapes[f"band_split.to_features.{b}.0.gamma"][0] for b in range(count)]


def _cut_bands(values: list[int], told: Mapping[str, Any]) -> dict[str, Any]:
    """The bands of a BS-RoFormer, from how many values a frame of each has; what fits two ways is as told, else stereo."""
    cut = lambda channels: {
        "stereo": channels == 2,
        "freqs_per_bands": tuple(size // (2 * channels) for size in values),
        "stft_n_fft": 2 * (sum(values) // (2 * channels) - 1),
    }
    fitting = [cut(channels) for channels in (2, 1) if all(size % (2 * channels) == 0 for size in values)]
    agreeing = [bands for bands in fitting if all(told.get(field, value) == value for field, value in bands.items())]
    return (agreeing or fitting or [cut(1)])[0]


def _mel_bands(values: list[int], told: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The bands of a Mel-Band RoFormer: the layout that has so many values a frame; the config's, where one tells it."""
    layouts: tuple[tuple[int, int], ...] = LAYOUTS
    if "sample_rate" in told or "stft_n_fft" in told:
        rate = told.get("sample_rate", MelBandRoformer.sample_rate)
        layouts = ((rate, told.get("stft_n_fft", MelBandRoformer.stft_n_fft)),)
    found: list[tuple[int, tuple[int, ...]]] = []
    for rate, n_fft in layouts:
        try:
            widths = [width for _, width in mel_bands(rate, n_fft, len(values))]
        except UserError:  # a layout that cannot have so many bands
            continue
        for channels in (2, 1):
            differing = [b for b, width in enumerate(widths) if 2 * channels * width != values[b]]
            if not differing:
                sizes = {"num_bands": len(values), "sample_rate": rate, "stft_n_fft": n_fft}
                return {**sizes, "stereo": channels == 2}
            found.append((differing[0], (2 * channels * widths[differing[0]], rate, n_fft)))
    tried = " and ".join(f"{rate} Hz with an n_fft of {n_fft}" for rate, n_fft in layouts[:2])
    if len(layouts) > 1 or not found:
        raise UserError(
            f"{where}: its {len(values)} mel bands are not those of {tried}; give the weights' YAML by --config, which"
            " tells model.sample_rate and model.stft_n_fft"
        )
    band, (expected, *_) = max(found)
    raise UserError(
        f"{where}: its {len(values)} mel bands are not those of {tried}, which the config tells: band {band} has"
        f" {values[band]} values a frame, not {expected}"
    )


def _networks(
    state: Mapping[str, Any], prefixes: Mapping[str, str], arch: str, where: str
) -> Iterator[tuple[str, dict]]:
    for network, prefix in prefixes.items():
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if BAND_SPLIT not in own:
            raise UserError(
                f"{where} holds no network {network} ({prefix}…), so it is no {arch} checkpoint; leave --arch out"
            )
        if ("to_mapping.0.weight" in own) == (network == "deterministic"):
            kind = "a refining" if network == "deterministic" else "no refining"
            raise UserError(
                f"{where} has {kind} network under {prefix}…, so it is no {arch} checkpoint; leave --arch out"
            )
        yield network, own


def _spread(tensors: dict[str, Any]) -> dict[str, Any]:
    """With biases that all blocks of attention share, and that stand at the top of the file, in each block instead."""
    shared = {name: tensor for name, tensor in tensors.items() if re.fullmatch(SHARED_BIAS, name)}
    own = {name: tensor for name, tensor in tensors.items() if name not in shared}
    for weight in [name for name in tensors if shared and name.endswith((".to_qkv.weight", ".to_out.0.weight"))]:
        bias = f"{weight.removesuffix('weight')}bias"
        found = [tensor for tensor in shared.values() if tensor.shape == (tensors[weight].shape[0],)]
        if bias not in own and found:
            own[bias] = found[0]
    return own


def _completed(tensors: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """With what a file may leave out: rotary tables, which follow from the width of a head."""
    table = 10000.0 ** (-np.arange(0, sizes["dim_head"], 2) / sizes["dim_head"])
    blocks = [name.removesuffix("to_gates.weight") for name in tensors if name.endswith(".to_gates.weight")]
    missing = [f"{block}rotary_embed.freqs" for block in blocks if f"{block}rotary_embed.freqs" not in tensors]
    return tensors | dict.fromkeys(missing, Given(table.astype(np.float32)))


def read_roformer(
    checkpoint: Checkpoint, arch: str, told: Mapping[str, Any], where: str, teller: str = "--config"
) -> Imported:
    """Config and weights by network, from an open checkpoint; the weights are read when they are written.

    Args:
      told: the config beside it, as of `read_yaml`; {} if there is none.
      where, teller: what the checkpoint and that config are called in errors.

    Raises:
      UserError: a tensor is missing, surplus or misshapen; the config contradicts them; or the file is of another kind.
    """
    name = FAMILIES[arch.split("_")[0]]
    state = clean_names(checkpoint.state_dict)
    prefixes = prefixes_of(state, arch)
    if not arch.startswith(family := family_of(state)):
        raise UserError(f"{where} holds a {FAMILIES[family]} and is no {arch} checkpoint; leave --arch out")
    networks = dict(_networks(state, prefixes, arch, where))
    if arch.endswith("_det") and any(not k.startswith(prefixes["deterministic"]) for k in state):
        raise UserError(f"{where} is not a deterministic checkpoint: it holds more than one network; leave --arch out")
    is_pypi = is_numbered_by_pypi(networks["deterministic"])
    inside = find_section(plain(checkpoint.content.get("hyper_parameters")) or {}, "dim", "stft_hop_length")
    told = find_sections(told, name) if told else {}
    sources = {
        source: told_sizes(section, name, source)
        for source, section in ((f"the config inside {where}", inside), (teller, told.get("model", {})))
    }
    recipe = told_recipe(told)
    if told and not sources[teller] and not recipe:
        raise UserError(
            f"{teller} tells nothing of {where}: neither fields of a {name}, such as model.dim, nor training.instruments,"
            " audio.sample_rate or audio.chunk_size; give the YAML that belongs to these weights"
        )
    # One that has both is a whole call of the network, which has its defaults in what the call leaves out.
    is_whole = lambda section: "dim" in section and "depth" in section
    inferred: dict[str, Any] = {}
    for network, tensors in networks.items():
        own = _spread(renumber(tensors, -1) if is_pypi else tensors)
        shapes = {k: t.shape for k, t in own.items()}
        try:
            inferred = {**sizes_from_shapes(shapes), **inferred}
            values = _band_values(shapes)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise UserError(f"{where} lacks tensors of a RoFormer ({error}); {DAMAGED}") from None
        networks[network] = _completed(own, inferred)
    if name == "mel_band_roformer":
        inferred |= _mel_bands(values, sources[teller], where)
    else:
        inferred |= _cut_bands(values, {**sources[f"the config inside {where}"], **sources[teller]})
    model = {"name": name, **_unseen_sizes(name, inferred, is_whole(sources[teller]), is_pypi), **inferred}
    for source, told_by in sources.items():
        for field, value in told_by.items():
            if field in inferred and inferred[field] != value:
                raise UserError(f"{source} says {field} = {value}, but the weights of {where} have {inferred[field]}")
            model[field] = value
    is_hop_told = any("stft_hop_length" in told_by for told_by in sources.values())
    if not is_hop_told and model["stft_hop_length"] > model["stft_win_length"]:
        raise UserError(
            f"{where}: nothing tells how far the frames of its STFT are apart, and {model['stft_hop_length']} samples, as in"
            f" most public weights, is more than a frame of {model['stft_win_length']}; give the weights' YAML by --config"
        )
    config = _base_config(model)
    read_recipe(config, told, teller)
    try:
        backbone = make_backbone(config.model.to_dict())
        backbone.check_length(config.segment)
    except UserError as error:
        raise UserError(f"{where}{f' with {teller}' if told else ''}: {error}") from error
    weights = {}
    for network, tensors in networks.items():
        net, expected = published_network(config.model, network), parameter_shapes(backbone, network)
        prefix = f" ({prefixes[network]}…)" if prefixes[network] else ""
        check_real(tensors, where)
        check_tensors(tensors, published_shapes(net, expected), f"{where}{prefix}", DAMAGED)
        weights[network] = unflatten(stack_lazily(net, {k: t.read for k, t in tensors.items()}, expected))
    assumed = []
    if not is_hop_told:
        assumed.append(
            f"an STFT hop of {model['stft_hop_length']} samples, which no tensor tells; give the weights' YAML by --config"
            " if it has another"
        )
    told_fields = {field for told_by in sources.values() for field in told_by}
    unseen = [field for field in UNSEEN[1:] if field not in told_fields]
    # The numbers of the tensors tell whose weights they are, but where there is linear attention.
    if "zero_dc" in unseen and name == "mel_band_roformer" and model["linear_transformer_depth"]:
        unseen.remove("zero_dc")
        assumed.append(
            f"zero_dc = {str(model['zero_dc']).lower()}, as the public training code has it; weights of the PyPI package have"
            " false, which their YAML must say"
        )
    elif is_pypi and "zero_dc" in unseen:
        unseen.remove("zero_dc")
    if unseen and not any(is_whole(told_by) for told_by in sources.values()):
        listed = ", ".join(f"{field} {json.dumps(model[field])}" for field in unseen)
        assumed.append(f"{listed}, which no tensor tells either, as in most public weights")
    words = {"stems": f"the stems' names {', '.join(config.stems)}", "segment": f"chunks of {config.segment} samples"}
    if name != "mel_band_roformer":  # whose bands tell the rate
        words["sample_rate"] = f"songs of {config.sample_rate} Hz"
    if missing := [text for field, text in words.items() if field not in recipe]:
        assumed.append(f"{', '.join(missing)}, which nothing tells")
    if model.get("sample_rate", config.sample_rate) != config.sample_rate:
        assumed.append(
            f"songs of {config.sample_rate} Hz, as audio.sample_rate says, though the mel bands are laid out for"
            f" {model['sample_rate']} Hz (model.sample_rate)"
        )
    plain_config = config.to_dict()
    return Imported({k: plain_config[k] for k in FIELDS}, weights, assumed)


def _base_config(model: Mapping[str, Any]) -> Any:
    """A config of a network of these sizes: the method's settings, and stems, rate and chunk where nothing tells them."""
    config = bsrf_base()
    config.unlock()
    config.model = model
    config.channels = 2 if model["stereo"] else 1
    config.sample_rate = model.get("sample_rate", config.sample_rate)  # that mel bands are laid out for
    if model["num_stems"] != len(config.stems):
        config.stems = tuple(f"stem_{k}" for k in range(model["num_stems"]))
    return config


def untold(config: Mapping[str, Any], is_pypi: bool = False) -> dict[str, dict[str, Any]]:
    """The sections of the YAML without which `read_roformer` would take a model's separator for another; {} if there is none.

    Args:
      config: of a model folder with a RoFormer.
      is_pypi: whether its tensors are to be numbered as the PyPI package does in Mel-Band RoFormers.
    """
    net, name = published_network(config["model"], "deterministic"), config["model"]["name"]
    values = [2 * net.channels * width for width in net.band_widths]
    try:
        seen = _mel_bands(values, {}, "") if name == "mel_band_roformer" else _cut_bands(values, {})
    except UserError:  # a layout that is in no use
        seen = {}
    bands = ("sample_rate", "stft_n_fft") if name == "mel_band_roformer" else ("stereo",)
    is_seen = all(seen.get(field) == getattr(net, field) for field in ("stereo", *bands))
    sizes = {field.name: getattr(net, field.name) for field in fields(net) if field.name not in INNER}
    assumed, base = _unseen_sizes(name, sizes, False, is_pypi), _base_config(sizes)
    model = {field: sizes[field] for field in UNSEEN if sizes[field] != assumed[field]}
    audio = {"sample_rate": "sample_rate", "segment": "chunk_size"}
    sections = {
        "model": model | ({} if is_seen else {field: sizes[field] for field in bands}),
        "audio": {told: config[field] for field, told in audio.items() if config[field] != base[field]},
        "training": {} if list(config["stems"]) == list(base.stems) else {"instruments": list(config["stems"])},
    }
    return {section: told for section, told in sections.items() if told}


def _unseen_sizes(name: str, inferred: Mapping[str, Any], is_told: bool, is_pypi: bool) -> dict[str, Any]:
    """Sizes that no tensor shows: the network's defaults where a YAML may tell others, else those of most public weights."""
    sizes = {field.name: field.default for field in fields(NETWORKS[name]) if field.name not in INNER}
    if is_pypi:  # that program knows no such step
        sizes["zero_dc"] = False
    if not is_told:
        sizes |= {"stft_hop_length": 441, "stft_win_length": inferred["stft_n_fft"]}
        sizes |= {"attn_dropout": 0.1, "ff_dropout": 0.1}
    return sizes
