"""`msr import`: a checkpoint of another program into a model folder, without executing anything in it."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from msr_jax.errors import UserError
from msr_jax.weights.detect import beside, clean_names, detect_arch, prefixes_of, refuse_foreign
from msr_jax.weights.hub import fetch
from msr_jax.weights.lightning import Checkpoint, read_checkpoint
from msr_jax.weights.model_folder import save_model
from msr_jax.weights.roformer_weights import Imported, read_roformer
from msr_jax.weights.torch_names import DUPLICATES, PREFIXES
from msr_jax.weights.unet_weights import published_sizes, read_unet
from msr_jax.weights.yaml_config import read_yaml


def read_model(checkpoint: Checkpoint, arch: str, told: dict[str, Any], where: str) -> Imported:
    """Config and weights by network, from an open checkpoint and what is told of its sizes.

    Raises:
      UserError: a tensor is missing, surplus or misshapen; or the file is of another kind than `arch`.
    """
    if arch.startswith("unet"):
        return Imported(*read_unet(checkpoint, arch, told, where))
    return read_roformer(checkpoint, arch, told, where)


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


def _told(args: argparse.Namespace, arch: str) -> dict[str, Any]:
    """What `--config` says, in the form that the architecture's reader takes."""
    if not args.config:
        return {}
    if not arch.startswith("unet"):
        return read_yaml(args.config)
    try:
        told = json.loads(Path(args.config).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--config {args.config} cannot be read as JSON ({error})") from error
    told = told.get("config", told) if isinstance(told, dict) else {}
    told = told.get("unet", told)
    if not isinstance(told, dict):
        raise UserError(f"--config {args.config} holds no mapping of a U-Net's sizes")
    return published_sizes(told, f"--config {args.config}")


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
        "--config", metavar="FILE", help="what no tensor tells: the YAML of public weights, or sizes of a U-Net as JSON"
    )
    parser.add_argument("--heads", type=int, help="attention heads (U-Net), where neither checkpoint nor config says")
    parser.add_argument("--groups", type=int, help="groups of the norms (U-Net), where neither says")
    args = parser.parse_args(argv)
    where = str(args.checkpoint)
    checkpoint = read_checkpoint(fetch(args.checkpoint) if args.checkpoint.startswith("hf:") else args.checkpoint)
    state = clean_names(checkpoint.state_dict)
    refuse_foreign(state, where)
    arch = args.arch or detect_arch(state, where)
    if not arch.startswith("unet") and (args.heads or args.groups):
        raise UserError(
            "--heads and --groups are for U-Nets; the sizes of a RoFormer stand in its tensors and --config"
        )
    told = _told(args, arch)
    if args.groups:
        told["resnet_groups"] = args.groups
    if args.heads:
        width = [
            t.shape[0] for k, t in checkpoint.state_dict.items() if k.endswith("bottleneck.attention.fn.to_q.weight")
        ]
        if not width or args.heads < 1 or width[0] % args.heads:
            raise UserError(f"--heads {args.heads} does not divide the attention's {width[0] if width else 0} features")
        told |= {"attention_heads": args.heads, "attention_features": width[0] // args.heads}
    found = read_model(checkpoint, arch, told, where)
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
