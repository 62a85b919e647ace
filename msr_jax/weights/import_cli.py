"""`msr import`: a checkpoint of another program into a model folder, without executing anything in it."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from msr_jax.config_fields import check_config
from msr_jax.errors import UserError
from msr_jax.weights.detect import beside, clean_names, detect_arch, prefixes_of, refuse_foreign
from msr_jax.weights.hub import fetch
from msr_jax.weights.lightning import Checkpoint, read_checkpoint
from msr_jax.weights.model_folder import FIELDS, save_model
from msr_jax.weights.registry import refuse_url
from msr_jax.weights.roformer_weights import FAMILIES, Imported, read_roformer
from msr_jax.weights.torch_names import DUPLICATES, PREFIXES
from msr_jax.weights.unet_weights import published_sizes, read_unet
from msr_jax.weights.yaml_config import read_yaml

BACKBONES = {**FAMILIES, "unet": "unet1d"}  # by the first word of --arch
# What a model folder's config tells of the weights beside the sizes of their networks.
RECIPE = ("stems", "sample_rate", "segment", "input_level", "diffusion", "consistency")


def read_model(
    checkpoint: Checkpoint, arch: str, told: dict[str, Any], where: str, recipe: Mapping[str, Any] | None = None
) -> Imported:
    """Config and weights by network, from an open checkpoint and what is told of its sizes.

    Args:
      recipe: the fields `RECIPE` of a model folder's config, where that is what tells them.

    Raises:
      UserError: a tensor is missing, surplus or misshapen; or the file is of another kind than `arch`.
    """
    if arch.startswith("unet"):
        return Imported(*read_unet(checkpoint, arch, told, where, recipe))
    found = read_roformer(checkpoint, arch, told, where)
    return found._replace(config={**found.config, **(recipe or {})})


def ignored_entries(checkpoint: Checkpoint, arch: str) -> list[str]:
    """What of a checkpoint is not read, each with a remark."""
    state, ignored = clean_names(checkpoint.state_dict), []
    used = tuple(prefixes_of(state, arch).values())
    for copy, original in DUPLICATES.get(arch, {}).items():
        pairs = [(k, original + k.removeprefix(copy)) for k in state if k.startswith(copy)]
        same = all(b in state and _is_same(state[a], state[b]) for a, b in pairs)
        ignored.append(f"{copy}* ({len(pairs)} tensors, {'the same as' if same else 'DIFFERENT from'} {original}*)")
        used += (copy,)
    rest: dict[str, int] = {}
    for name in [*(name for name in state if not name.startswith(used)), *beside(checkpoint.state_dict)]:
        group = ".".join(name.split(".")[:2])
        rest[group] = rest.get(group, 0) + 1
    ignored += [f"{group}.* ({n} tensors of no known network)" for group, n in rest.items()]
    return ignored + [str(k) for k in checkpoint.content if k != "hyper_parameters"]


def _is_same(a: Any, b: Any) -> bool:
    place = lambda t: [getattr(t, name, t) for name in ("storage", "offset", "shape", "stride")]
    return place(a) == place(b) or np.array_equal(a.read(), b.read())


def _folder_config(path: str) -> dict[str, Any]:
    """The config of a model folder, checked; {} where the file is something else."""
    try:
        told = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError):  # YAML, or what its own reader refuses
        return {}
    if not isinstance(told, dict) or not set(FIELDS) <= set(told):
        return {}
    told = {field: told[field] for field in FIELDS}
    check_config(told, f"--config {path}: ", is_whole=False)
    return told


def _told(path: str | None, arch: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `--config` says in the form that the architecture's reader takes, and the fields `RECIPE` if it is a model folder's."""
    if not path:
        return {}, {}
    if Path(path).is_fifo():
        raise UserError(f"--config {path} is a pipe, which can be read only once; save it to a file")
    family = arch.split("_")[0]
    folder = _folder_config(path)
    if folder and folder["model"]["name"] != BACKBONES[family]:
        name = folder["model"]["name"]
        raise UserError(
            f"--config {path} is of a model folder with a {name}; the checkpoint holds a {BACKBONES[family]}"
        )
    recipe = {field: folder[field] for field in RECIPE if folder}
    if family != "unet":
        audio = {"sample_rate": folder["sample_rate"], "chunk_size": folder["segment"]} if folder else {}
        sections = {"model": folder.get("model"), "audio": audio, "training": {"instruments": folder.get("stems")}}
        return (sections if folder else read_yaml(path)), recipe
    try:
        told = folder.get("model") or json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read as JSON ({error})") from error
    told = told.get("config", told) if isinstance(told, dict) else {}
    told = told.get("unet", told)
    if not isinstance(told, dict):
        raise UserError(f"--config {path} holds no mapping of a U-Net's sizes")
    return published_sizes(told, f"--config {path}"), recipe


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr import", description=__doc__)
    parser.add_argument(
        "checkpoint",
        metavar="FILE",
        help="a checkpoint (.ckpt, .pt, .pth, .bin, .safetensors), or hf:OWNER/REPO[/FILE]",
    )
    parser.add_argument(
        "--arch", choices=list(PREFIXES), help="which model it holds, where its tensors are not to tell"
    )
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="model folder to write")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="what no tensor tells: the YAML of public weights, all of it or some fields under `model:`; sizes of a U-Net as JSON;"
        " or the config.json of the model folder that the weights were exported from",
    )
    parser.add_argument("--heads", type=int, help="attention heads (U-Net), where neither checkpoint nor config says")
    parser.add_argument("--groups", type=int, help="groups of the norms (U-Net), where neither says")
    args = parser.parse_args(argv)
    where = str(args.checkpoint)
    refuse_url(where)
    checkpoint = read_checkpoint(fetch(args.checkpoint) if args.checkpoint.startswith("hf:") else args.checkpoint)
    state = clean_names(checkpoint.state_dict)
    refuse_foreign(state, where)
    arch = args.arch or detect_arch(state, where)
    if not arch.startswith("unet") and (args.heads or args.groups):
        raise UserError(
            "--heads and --groups are for U-Nets; the sizes of a RoFormer stand in its tensors and --config"
        )
    told, recipe = _told(args.config, arch)
    if args.groups:
        told["resnet_groups"] = args.groups
    if args.heads:
        width = [
            t.shape[0] for k, t in checkpoint.state_dict.items() if k.endswith("bottleneck.attention.fn.to_q.weight")
        ]
        if not width or args.heads < 1 or width[0] % args.heads:
            raise UserError(f"--heads {args.heads} does not divide the attention's {width[0] if width else 0} features")
        told |= {"attention_heads": args.heads, "attention_features": width[0] // args.heads}
    found = read_model(checkpoint, arch, told, where, recipe)
    save_model(args.out, found.config, found.weights)
    prefixes = prefixes_of(state, arch)
    print(f"found a {arch} checkpoint, stems {', '.join(found.config['stems'])}")
    for network in found.weights:
        print(f"read {network} from {prefixes[network] or 'the names as they are'}*")
    for item in found.assumed:
        print(f"assumed {item}")
    for item in ignored_entries(checkpoint, arch):
        print(f"ignored {item}")
    print(f"wrote {args.out}")
    return 0
