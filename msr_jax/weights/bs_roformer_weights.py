"""BS-RoFormers in official checkpoints: their sizes, from tensors and from the configs beside them, and their weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from msr_jax.config import bsrf_base
from msr_jax.errors import UserError
from msr_jax.models.backbone import make_backbone
from msr_jax.models.bs_roformer import BSRoformer
from msr_jax.weights.lightning import Checkpoint, plain
from msr_jax.weights.model_folder import FIELDS, check_tensors, parameter_shapes, unflatten
from msr_jax.weights.roformer_names import published_network, published_shapes, stack_tensors
from msr_jax.weights.torch_names import PREFIXES

SIZES = set(BSRoformer.__dataclass_fields__) - {"timed", "conditioned", "dtype", "remat", "parent", "name"}
# Fields that choose another network than the one here, and the values that are this one.
FIXED = {
    "stft_adapter_type": ("conv2d",),
    "time_emb_type": ("Positional",),
    "use_context_time": (True, False),
    "model_type": ("bs_roformer", "bs_roformer_stems_in_out_stem_cond_random_stem"),
}


class _Yaml(yaml.SafeLoader):
    """Plain YAML, and tuples under the tag that the public training code writes; any other tag is refused."""


_Yaml.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A config of the public training code (sections model, audio, training, inference), or of the paper's program.

    Raises:
      UserError: unreadable, no mapping, or with a tag that would run something.
    """
    try:
        told = yaml.load(Path(path).read_text(), _Yaml)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        words = " ".join(str(error).split())
        raise UserError(f"--config {path} is not plain YAML, and nothing in it was run ({words})") from error
    if not isinstance(told, dict):
        raise UserError(f"--config {path} holds no fields")
    return told


def find_section(told: Any, *names: str) -> dict[str, Any]:
    """The first mapping inside nested mappings that has all of these fields, from the outside in; {} if there is none."""
    level = [told]
    while level:
        for value in level:
            if isinstance(value, Mapping) and all(name in value for name in names):
                return dict(value)
        level = [inner for value in level if isinstance(value, Mapping) for inner in value.values()]
    return {}


def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the tensor shapes of one network (published names) tell of its sizes: all but hop, window and the like."""

    def count(stem: str) -> int:
        return len({k[len(stem) :].split(".")[0] for k in shapes if k.startswith(stem)})

    if any(k.startswith("layers.") and k.endswith(".norm.gamma") and k.count(".") == 4 for k in shapes):
        raise UserError("its transformers have an output norm, as those of a Mel-band RoFormer: not this network")
    has_linear = "layers.0.0.layers.0.0.temperature" in shapes
    time = 1 if has_linear else 0
    block = f"layers.0.{time}.layers.0.0"
    heads = shapes[f"{block}.to_gates.weight"][0]
    dim, hidden = shapes["final_norm.gamma"][0], shapes.get("stft_feature_adapter.1.weight")
    band = [shapes[f"band_split.to_features.{b}.0.gamma"][0] for b in range(count("band_split.to_features."))]
    values = sum(band) // 2  # bins x channels; there are an odd number of bins
    channels = 1 if values % 2 else 2
    mlp = "mask_estimators.0.to_freqs.0.0."
    depth = count(mlp)
    return {
        "dim": dim,
        "depth": count("layers."),
        "stereo": channels == 2,
        "num_stems": count("mask_estimators."),
        "linear_transformer_depth": count("layers.0.0.layers.") if has_linear else 0,
        "time_transformer_depth": count(f"layers.0.{time}.layers."),
        "freq_transformer_depth": count(f"layers.0.{time + 1}.layers."),
        "freqs_per_bands": tuple(size // (2 * channels) for size in band),
        "heads": heads,
        "dim_head": shapes[f"{block}.to_qkv.weight"][0] // (3 * heads),
        "stft_n_fft": 2 * (values // channels - 1),
        "mask_estimator_depth": depth,
        **({"mlp_expansion_factor": shapes[f"{mlp}0.weight"][0] // dim} if depth > 1 else {}),
        **({"stft_adapter_hidden": hidden[0]} if hidden else {}),
    }


def told_sizes(told: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The network's fields among those of a published config; UserError for one that asks for another network."""
    for name, values in FIXED.items():
        if name in told and told[name] not in values:
            raise UserError(f"{where} says {name} = {told[name]}; only {values[-1]} is supported")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if k in SIZES and v is not None}


def prefixes_of(state: Mapping[str, Any], arch: str) -> dict[str, str]:
    """The prefix of each network in a state dict: `PREFIXES`, or none in the public weights of a separator."""
    bare = arch == "bsrf_det" and "final_norm.gamma" in state
    return {"deterministic": ""} if bare else PREFIXES[arch]


def _networks(
    state: Mapping[str, Any], prefixes: Mapping[str, str], arch: str, where: str
) -> Iterator[tuple[str, dict]]:
    for network, prefix in prefixes.items():
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if "band_split.to_features.0.1.weight" not in own:
            raise UserError(
                f"{where} holds no network {network} ({prefix}…), so it is no {arch} checkpoint; choose another --arch"
            )
        if ("to_mapping.0.weight" in own) == (network == "deterministic"):
            kind = "a refining" if network == "deterministic" else "no refining"
            raise UserError(f"{where} has {kind} network under {prefix}…, so it is no {arch} checkpoint; see --arch")
        yield network, own


def read_bs_roformer(checkpoint: Checkpoint, arch: str, told: Mapping[str, Any], where: str) -> tuple[dict, dict]:
    """Config and weights by network, from an open checkpoint.

    Args:
      told: the config beside it, as of `read_yaml`; {} if there is none.

    Raises:
      UserError: a tensor is missing, surplus or misshapen; the config contradicts them; or the file is of another kind.
    """
    state = checkpoint.state_dict
    prefixes = prefixes_of(state, arch)
    networks = dict(_networks(state, prefixes, arch, where))
    if arch == "bsrf_det" and any(not k.startswith(prefixes["deterministic"]) for k in state):
        raise UserError(
            f"{where} is not a deterministic checkpoint: it holds more than one network; choose another --arch"
        )
    inferred: dict[str, Any] = {}
    for tensors in networks.values():
        try:
            inferred = {**sizes_from_shapes({k: t.shape for k, t in tensors.items()}), **inferred}
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise UserError(
                f"{where} lacks tensors of a BS-RoFormer ({error}); it is no {arch} checkpoint, or is incomplete"
            ) from None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    inside = find_section(plain(checkpoint.content.get("hyper_parameters")) or {}, "dim", "stft_hop_length")
    beside = find_section(told, "dim", "depth") or (told.get("model") or {})
    model = _default_sizes(inferred, beside)
    for source, fields in ((f"the config inside {where}", inside), ("--config", beside)):
        for name, value in told_sizes(fields, source).items():
            if name in inferred and inferred[name] != value:
                raise UserError(f"{source} says {name} = {value}, but the weights of {where} have {inferred[name]}")
            model[name] = value
    config = bsrf_base()
    config.unlock()
    config.model = model
    config.channels = 2 if model["stereo"] else 1
    _read_recipe(config, told, arch)
    backbone = make_backbone(config.model.to_dict())
    backbone.check_length(config.segment)
    weights = {}
    for network, tensors in networks.items():
        net, shapes = published_network(config.model, network), parameter_shapes(backbone, network)
        check_tensors(tensors, published_shapes(net, shapes), f"{where} ({prefixes[network]}…)")
        weights[network] = unflatten(stack_tensors(net, {k: t.read for k, t in tensors.items()}, shapes))
    plain_config = config.to_dict()
    return {k: plain_config[k] for k in FIELDS}, weights


def _default_sizes(inferred: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes where no config says: those of the paper's program; or where a config leaves them out, its own defaults."""
    model = {**bsrf_base().model.to_dict(), "stft_win_length": inferred["stft_n_fft"], "remat": False}
    if beside:
        known = BSRoformer.__dataclass_fields__
        model |= {k: known[k].default for k in ("stft_hop_length", "stft_win_length", "stft_normalized", "zero_dc")}
        model |= {k: known[k].default for k in ("skip_connection", "attn_dropout", "ff_dropout")}
    return {**model, **inferred}


def _read_recipe(config: Any, told: Mapping[str, Any], arch: str) -> None:
    """Stems, rate and segment of the model, from a config of the public training code where there is one."""
    section = lambda name: found if isinstance(found := told.get(name), Mapping) else {}
    audio, training, inference = section("audio"), section("training"), section("inference")
    stems = [training["target_instrument"]] if training.get("target_instrument") else training.get("instruments")
    count = config.model["num_stems"]
    if stems is None:
        stems = config.stems if count == len(config.stems) else [f"stem_{k}" for k in range(count)]
    if len(stems) != count:
        raise UserError(f"--config names {len(stems)} stems ({', '.join(stems)}), but the weights have {count}")
    config.stems = tuple(stems)
    config.sample_rate = int(audio.get("sample_rate", config.sample_rate))
    config.segment = int(inference.get("chunk_size", audio.get("chunk_size", config.segment)))
