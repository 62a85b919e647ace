"""`msr import`: an official checkpoint into a model folder, without executing anything in it."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from msr_jax.config import unet_base
from msr_jax.errors import UserError
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.lightning import Checkpoint, plain, read_checkpoint
from msr_jax.weights.model_folder import FIELDS, check_tensors, parameter_shapes, save_model, unflatten
from msr_jax.weights.torch_names import DUPLICATES, PREFIXES, from_torch

# Fields of the published configs that choose nothing here: the one value that the released models use.
FIXED = {
    "patch_blocks": 1,
    "use_nearest_upsample": False,
    "use_skip_scale": True,
    "use_attention_bottleneck": True,
}


def published_sizes(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The U-Net's fields among published hyper-parameters.

    Raises:
      UserError: a field has a value that the released models do not use.
    """
    for name, value in FIXED.items():
        if hyper_parameters.get(name, value) != value:
            raise UserError(f"the checkpoint says {name} = {hyper_parameters[name]}; only {value} is supported")
    known = set(unet_base().model) - {"name", "zero_init_output", "remat"}
    return {k: v for k, v in hyper_parameters.items() if k in known and v is not None}


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


def read_model(checkpoint: Checkpoint, arch: str, sizes: Mapping[str, Any], where: str) -> tuple[dict, dict, list[str]]:
    """Config, weights by network, and remarks on what was ignored, from an open checkpoint.

    Raises:
      UserError: a tensor is missing, surplus or misshapen; or the file is of another kind than `arch`.
    """
    state, prefixes = checkpoint.state_dict, PREFIXES[arch]
    groups = {net: {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for net, p in prefixes.items()}
    empty = [f"{net} ({prefixes[net]}…)" for net, tensors in groups.items() if "to_mapping.0.weight" not in tensors]
    if empty:
        raise UserError(f"{where} holds no network {empty[0]}, so it is no {arch} checkpoint; choose another --arch")
    timed = "to_time.0.1.weight" in groups["deterministic"]
    if timed or (arch == "unet_det" and any(not k.startswith("model.unet.") for k in state)):
        raise UserError(
            f"{where} is not a deterministic checkpoint: it holds more than one network; choose another --arch"
        )
    config = unet_base()
    try:
        inferred = sizes_from_shapes({k: t.shape for k, t in groups["deterministic"].items()})
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{where} lacks tensors of a U-Net ({error}); it is no {arch} checkpoint, or is incomplete"
        ) from None
    hyper = plain(checkpoint.content.get("hyper_parameters")) or {}
    config.model.unlock()
    config.model.update({k: tuple(v) if isinstance(v, list) else v for k, v in inferred.items()})
    config.model.update({k: tuple(v) if isinstance(v, list) else v for k, v in published_sizes(hyper).items()})
    config.model.update({k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()})
    model = config.to_dict()
    backbone = make_backbone(model["model"])
    model["segment"] -= model["segment"] % backbone.length_multiple
    weights, ignored = {}, []
    for network, tensors in groups.items():
        expected = parameter_shapes(backbone, network)
        shown = from_torch({k: np.empty(t.shape, np.int8) for k, t in tensors.items()})
        check_tensors(shown, expected, f"{where} ({prefixes[network]}…)")
        weights[network] = unflatten(from_torch({k: t.read().astype(np.float32) for k, t in tensors.items()}))
    used = tuple(prefixes.values())
    for copy, original in DUPLICATES.get(arch, {}).items():
        pairs = [(k, original + k.removeprefix(copy)) for k in state if k.startswith(copy)]
        same = all(b in state and np.array_equal(state[a].read(), state[b].read()) for a, b in pairs)
        ignored.append(f"{copy}* ({len(pairs)} tensors, {'the same as' if same else 'DIFFERENT from'} {original}*)")
        used += (copy,)
    rest: dict[str, int] = {}
    for name in state:
        if not name.startswith(used):
            group = ".".join(name.split(".")[:2])
            rest[group] = rest.get(group, 0) + 1
    ignored += [f"{group}.* ({n} tensors of no known network)" for group, n in rest.items()]
    ignored += [k for k in checkpoint.content if k not in ("state_dict", "hyper_parameters")]
    return {k: model[k] for k in FIELDS}, weights, ignored


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr import", description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint of the original program")
    parser.add_argument("--arch", required=True, choices=list(PREFIXES), help="which model it holds")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="model folder to write")
    parser.add_argument("--config", metavar="FILE.json", help="sizes of the network under the published field names")
    parser.add_argument("--heads", type=int, help="attention heads, where neither checkpoint nor config says")
    parser.add_argument("--groups", type=int, help="groups of the norms, where neither checkpoint nor config says")
    args = parser.parse_args(argv)
    sizes: dict[str, Any] = {}
    if args.config:
        try:
            told = json.loads(Path(args.config).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--config {args.config} cannot be read as JSON ({error})") from error
        told = told.get("config", told) if isinstance(told, dict) else {}
        sizes = published_sizes(told.get("unet", told))
    if args.groups:
        sizes["resnet_groups"] = args.groups
    checkpoint = read_checkpoint(args.checkpoint)
    if args.heads:
        width = [
            t.shape[0] for k, t in checkpoint.state_dict.items() if k.endswith("bottleneck.attention.fn.to_q.weight")
        ]
        if not width or args.heads < 1 or width[0] % args.heads:
            raise UserError(f"--heads {args.heads} does not divide the attention's {width[0] if width else 0} features")
        sizes |= {"attention_heads": args.heads, "attention_features": width[0] // args.heads}
    config, weights, ignored = read_model(checkpoint, args.arch, sizes, args.checkpoint)
    save_model(args.out, config, weights)
    for network in weights:
        print(f"read {network} from {PREFIXES[args.arch][network]}*")
    for item in ignored:
        print(f"ignored {item}")
    print(f"wrote {args.out}")
    return 0
