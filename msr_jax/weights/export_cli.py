"""`msr export`: a model folder as a checkpoint that the original program loads strictly."""

import argparse
import os
from pathlib import Path
from typing import Any

from msr_jax.errors import UserError
from msr_jax.weights.model_folder import Model, flatten, load_model
from msr_jax.weights.torch_names import DUPLICATES, PREFIXES, to_torch

LIGHTNING_VERSION = "2.3.1"  # the original program refuses a file that names none


def arch_of(model: Model) -> str:
    """The kind of checkpoint that holds everything in the folder."""
    if "consistency" in model.weights:
        return "unet_consistency"
    return "unet_diffusion" if "diffusion" in model.weights else "unet_det"


def state_dict(model: Model, arch: str) -> dict[str, Any]:
    """Every entry of the original checkpoint of that kind: name -> float32 array; duplicates are the same object.

    Raises:
      UserError: the folder lacks a network that the kind holds.
    """
    weights = dict(model.weights)
    if arch == "unet_consistency" and "consistency" in weights:
        weights.setdefault("target", weights["consistency"])  # needed for training alone; the student starts it anew
    state = {}
    for network, prefix in PREFIXES[arch].items():
        if network not in weights:
            raise UserError(f"a {arch} checkpoint holds a {network} network, and the model folder has none")
        state |= {prefix + k: v for k, v in to_torch(flatten(weights[network])).items()}
    for copy, original in DUPLICATES.get(arch, {}).items():
        state |= {copy + k.removeprefix(original): v for k, v in state.items() if k.startswith(original)}
    return state


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr export", description=__doc__)
    parser.add_argument("model", metavar="DIR", help="model folder, or the working directory of a training run")
    parser.add_argument("--format", required=True, choices=["dicose"], help="dicose: the original program's checkpoint")
    parser.add_argument(
        "--arch", choices=list(PREFIXES), help="default: the kind that holds all networks of the folder"
    )
    parser.add_argument("-o", "--out", required=True, metavar="FILE.ckpt")
    args = parser.parse_args(argv)
    try:
        import torch
    except ImportError as error:
        raise UserError("export to PyTorch needs the extra `torch`: pip install 'msr_jax[torch]'") from error
    model = load_model(args.model)
    out = Path(args.out)
    shared: dict[int, torch.Tensor] = {}  # an array that stands twice is written once
    tensors = {
        k: shared.setdefault(id(v), torch.from_numpy(v))
        for k, v in state_dict(model, args.arch or arch_of(model)).items()
    }
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": tensors, "pytorch-lightning_version": LIGHTNING_VERSION}, beside)
        os.replace(beside, out)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
    print(f"wrote {out} ({len(tensors)} tensors)")
    return 0
