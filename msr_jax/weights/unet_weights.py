"""U-Nets in official checkpoints: their sizes and weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from msr_jax.config import unet_base
from msr_jax.config_fields import check_config, check_field
from msr_jax.errors import UserError
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.detect import U_NET, clean_names, prefixes_of
from msr_jax.weights.lightning import Checkpoint, check_real, plain
from msr_jax.weights.model_folder import FIELDS, check_tensors, parameter_shapes, unflatten
from msr_jax.weights.torch_names import from_torch
from msr_jax.weights.yaml_config import find_section

# Fields of the published configs that choose nothing here: the one value that the released models use.
FIXED = {
    "patch_blocks": 1,
    "use_nearest_upsample": False,
    "use_skip_scale": True,
    "use_attention_bottleneck": True,
}
# What no tensor tells, or tells only together with another: assumed on import where nothing tells it.
UNSEEN = ("attention_heads", "attention_features", "resnet_groups", "kernel_multiplier_downsample")


def published_sizes(hyper_parameters: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The U-Net's fields among published hyper-parameters, which `where` holds.

    Raises:
      UserError: a field has a value that the released models do not use, or that it cannot have.
    """
    for name, value in FIXED.items():
        if hyper_parameters.get(name, value) != value:
            raise UserError(f"{where} says {name} = {hyper_parameters[name]}; only {value} is supported")
    known = set(unet_base().model) - {"name", "zero_init_output", "remat"}
    shown = {k: v for k, v in hyper_parameters.items() if k in known and v is not None}
    return {k: check_field(f"model.{k}", v, f"{where}: ", model="unet1d") for k, v in shown.items()}


def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the tensor shapes of one U-Net (original names) tell of its sizes: all but the split of attention heads and groups."""
    count = lambda stem: len({k.split(".")[stem.count(".") + 1] for k in shapes if k.startswith(stem + ".")})
    levels = range(count("downsamples"))
    channels = shapes["to_mapping.0.weight"][0] // 4
    down = [shapes[f"downsamples.{i}.downsample.weight"] for i in levels]
    up = [shapes[f"upsamples.{i}.upsample.weight"] for i in reversed(levels)]
    attentions = [f"downsamples.{i}.transformer.attention.fn.to_q.weight" in shapes for i in levels]
    edge = shapes["to_in.module_list.0.block.block2.project.weight"][0]
    feed = [k for k in shapes if k.endswith("feed_forward.1.weight")]
    return {
        "channels": channels,
        "in_channels": shapes["to_in.module_list.0.block.block1.project.weight"][1],
        "patch_factor": channels // edge,
        "multipliers": [down[0][1] // channels, *(s[0] // channels for s in down)],
        "factors": [s[2] // 2 for s in up],
        "num_blocks": [count(f"downsamples.{i}.blocks") for i in levels],
        "attentions": attentions,
        "context_features": shapes["to_features.0.weight"][1],
        **({"attention_multiplier": shapes[feed[0]][0] // shapes[feed[0]][1]} if feed else {}),
    }


def untold(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model folder's config that `read_unet` would take for others where nothing tells them; {} if there are none."""
    base, sizes = unet_base(), config["model"]
    multiple = make_backbone(sizes).length_multiple
    assumed = {
        "stems": list(base.stems),
        "sample_rate": base.sample_rate,
        "segment": base.segment - base.segment % multiple,
    }
    if len(config["stems"]) != len(base.stems):
        assumed["stems"] = [f"stem_{k}" for k in range(len(config["stems"]))]
    found = {field: config[field] for field, value in assumed.items() if config[field] != value}
    return {field: sizes[field] for field in UNSEEN if sizes.get(field, base.model[field]) != base.model[field]} | found


def read_unet(
    checkpoint: Checkpoint, arch: str, sizes: Mapping[str, Any], where: str, recipe: Mapping[str, Any] | None = None
) -> tuple[dict, dict, list[str]]:
    """Config and weights by network, from an open checkpoint, and what was assumed, in words.

    Args:
      sizes: fields of the network that are told, as of `published_sizes`.
      recipe: fields of a model folder's config beside those, such as its stems, that are told.

    Raises:
      UserError: a tensor is missing, surplus or misshapen; or the file is of another kind than `arch`.
    """
    state = clean_names(checkpoint.state_dict)
    prefixes = prefixes_of(state, arch)
    groups = {net: {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for net, p in prefixes.items()}
    empty = [f"{net} ({prefixes[net]}…)" for net, tensors in groups.items() if "to_mapping.0.weight" not in tensors]
    if empty:
        raise UserError(f"{where} holds no network {empty[0]}, so it is no {arch} checkpoint")
    if arch == "unet_det" and len([k for k in state if k.endswith(U_NET) and not k.startswith("ema")]) > 1:
        raise UserError(f"{where} is not a deterministic checkpoint: it holds more than one network; leave --arch out")
    if "to_time.0.1.weight" in groups["deterministic"]:
        raise UserError(f"{where} holds a network that refines, where a {arch} checkpoint has the separator")
    config = unet_base()
    try:
        inferred = sizes_from_shapes({k: t.shape for k, t in groups["deterministic"].items()})
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{where} lacks tensors of a U-Net ({error}); it is no {arch} checkpoint, or is incomplete"
        ) from None
    hyper = find_section(plain(checkpoint.content.get("hyper_parameters")), "channels", "factors")
    told = {**published_sizes(hyper, f"the config inside {where}"), **sizes}
    unseen = [name for name in ("resnet_groups", "attention_heads") if name not in told]
    if not any(inferred["attentions"]) and not any("to_q" in name for name in groups["deterministic"]):
        unseen = unseen[:1]
    assumed = [f"{name} {config.model[name]}, which no tensor tells, as in the released models" for name in unseen]
    config.model.unlock()
    for found in (inferred, told):
        config.model.update({k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
    model = config.to_dict()
    model |= recipe or {}
    model["channels"] = inferred["in_channels"]
    if len(model["stems"]) != inferred["context_features"]:
        model["stems"] = [f"stem_{k}" for k in range(inferred["context_features"])]
        assumed.append(f"the names {', '.join(model['stems'])}")
    check_config({k: model[k] for k in FIELDS}, f"{where}: ", is_whole=False)
    backbone = make_backbone(model["model"])
    model["segment"] -= model["segment"] % backbone.length_multiple
    weights = {}
    for network, tensors in groups.items():
        expected = parameter_shapes(backbone, network)
        shown = from_torch({k: np.empty(t.shape, np.int8) for k, t in tensors.items()})
        try:
            check_tensors(shown, expected, f"{where} ({prefixes[network]}…)")
        except UserError as error:
            hint = f"; {' and '.join(unseen)} were assumed: --heads, --groups or --config tells them" if unseen else ""
            raise UserError(f"{error}{hint}") from error
        check_real(tensors, where)
        weights[network] = unflatten(from_torch({k: t.read().astype(np.float32) for k, t in tensors.items()}))
    return {k: model[k] for k in FIELDS}, weights, assumed
