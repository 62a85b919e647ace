"""`msr export`: a model folder as checkpoints that the original programs load strictly, or as a program of its own."""

import argparse
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from msr_jax.config import bsrf_base, unet_base
from msr_jax.errors import UserError
from msr_jax.files import check_place, clear, passing
from msr_jax.messages import saying
from msr_jax.weights import roformer_weights, unet_weights
from msr_jax.weights.model_folder import Model, find_model, flatten, load_model
from msr_jax.weights.programs import check_stablehlo, export_onnx, export_stablehlo
from msr_jax.weights.roformer_names import NETWORKS, published_network, renumber, unstack_tensors
from msr_jax.weights.streamed import write_tensors
from msr_jax.weights.torch_names import DUPLICATES, PREFIXES, to_torch

LIGHTNING_VERSION = "2.3.1"  # the original program refuses a file that names none
FORMATS = {
    "dicose": "the paper's program: a Lightning checkpoint with every network that --arch names",
    "msst": "the public training code and its relatives, of RoFormers alone: the separator's bare state dict",
    "safetensors": "the same bare state dict in safetensors; needs no PyTorch",
    "pypi": "the PyPI package BS-RoFormer 0.4.1, which numbers the tensors of a Mel-Band RoFormer its own way",
    "stablehlo": "the separator (mixture to stems) as a compiled-anywhere program; runs without this package",
    "onnx": "the same for onnxruntime and its like",
}
PROGRAMS = {"stablehlo": export_stablehlo, "onnx": export_onnx}
FAMILIES = {
    "unet1d": "unet",
    "bs_roformer": "bsrf",
    "mel_band_roformer": "melrf",
}  # the first word of --arch, by backbone


def arch_of(model: Model) -> str:
    """The kind of checkpoint that holds everything in the folder."""
    family = FAMILIES[_published(model)]
    if "consistency" in model.weights:
        return f"{family}_consistency"
    return f"{family}_diffusion" if "diffusion" in model.weights else f"{family}_det"


def _published(model: Model) -> str:
    """The backbone's name. Raises UserError if no published program has it."""
    name = model.config["model"]["name"]
    if name not in FAMILIES:
        raise UserError(
            f"no published program has the backbone '{name}', so that none reads its weights; it exports as {' or '.join(PROGRAMS)}"
        )
    return name


def published_tensors(model: Model, network: str) -> dict[str, Any]:
    """Published state dict of one network of the folder, without prefix."""
    params = flatten(model.weights[network])
    if _published(model) in NETWORKS:
        return unstack_tensors(published_network(model.config["model"], network), params)
    return to_torch(params)


def pypi_tensors(model: Model) -> dict[str, Any]:
    """State dict of the separator as the PyPI package BS-RoFormer 0.4.1 takes it.

    Raises:
      UserError: the package has no network of the separator's kind or with its settings.
    """
    sizes = model.config["model"]
    kind = NETWORKS.get(_published(model))
    if kind is None:
        raise UserError(
            "the package BS-RoFormer has RoFormers alone; this model's separator is a U-Net: --format dicose"
        )
    unknown = {"skip_connection": False, "attention_bias": False, "mlp_expansion_factor": 4}  # to the package
    for field, value in unknown.items():
        if sizes.get(field, getattr(kind, field)) != value:
            raise UserError(f"the package BS-RoFormer has no {field}, which is {sizes[field]} here: take --format msst")
    if sizes["name"] == "bs_roformer" and sizes["linear_transformer_depth"]:
        raise UserError("the package's BSRoformer has no linear attention: take --format msst")
    tensors = published_tensors(model, "deterministic")
    return renumber(tensors, 1) if _is_shifted(sizes) else tensors


def _is_shifted(sizes: Mapping[str, Any]) -> bool:
    """Whether the package counts the tensors of this RoFormer in its own way."""
    return sizes["name"] == "mel_band_roformer" and not sizes["linear_transformer_depth"]


def state_dict(model: Model, arch: str) -> dict[str, Any]:
    """Every entry of the original checkpoint of that kind: name -> float32 array; duplicates are the same object.

    Raises:
      UserError: the folder lacks a network that the kind holds, or is of the other track.
    """
    if arch.split("_")[0] != arch_of(model).split("_")[0]:
        raise UserError(
            f"the model folder holds no network of the kind {arch}; leave --arch out, or see {arch_of(model)}"
        )
    weights = dict(model.weights)
    if arch.endswith("_consistency") and "consistency" in weights:
        weights.setdefault("target", weights["consistency"])  # needed for training alone; the student starts it anew
    model = model._replace(weights=weights)
    state: dict[str, Any] = {}
    for network, prefix in PREFIXES[arch].items():
        if network not in weights:
            raise UserError(f"a {arch} checkpoint holds a {network} network, and the model folder has none")
        state |= {prefix + k: v for k, v in published_tensors(model, network).items()}
    for copy, original in DUPLICATES.get(arch, {}).items():
        state |= {copy + k.removeprefix(original): v for k, v in state.items() if k.startswith(original)}
    return state


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError("export to PyTorch needs the extra `torch`: pip install 'msr_jax[torch]'") from error
    return torch


def _save_torch(state: dict[str, Any], is_lightning: bool) -> Callable[[Path], None]:
    torch = _import_torch()
    shared: dict[int, Any] = {}  # an array that stands twice is written once
    with warnings.catch_warnings():  # of arrays that cannot be written to, which nothing here does
        warnings.simplefilter("ignore", UserWarning)
        tensors = {k: shared.setdefault(id(v), torch.from_numpy(v)) for k, v in state.items()}
    whole = {"state_dict": tensors, "pytorch-lightning_version": LIGHTNING_VERSION} if is_lightning else tensors

    def write(path: Path) -> None:
        # Opened here, as PyTorch has no words for what is wrong with a file that it opens itself, such as a full disk. On
        # the way out it still fails to end the file, which is not what went wrong.
        try:
            with path.open("wb") as file:
                torch.save(whole, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    return write


def _remarks(model: Model, config: Path, file_format: str, arch: str) -> Iterator[str]:
    """What no tensor of the written file tells, and other lines on what is not in it.

    Args:
      config: the file in the model folder, as the user may name it.
      arch: the kind of checkpoint that the file is.
    """
    left = [network for network in model.weights if network not in PREFIXES[arch]]
    if file_format == "dicose" and left:
        yield f"left out {', '.join(left)}, for which a published {arch} checkpoint has no place"
    sizes, level = model.config["model"], model.config["input_level"]
    if sizes["name"] in NETWORKS:
        is_pypi = file_format == "pypi"
        if sections := roformer_weights.untold(model.config, is_pypi and _is_shifted(sizes)):
            yield f"no tensor tells what follows; give it with the weights, as a YAML (msr import also takes {config} by --config):"
            yield yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, default_flow_style=None).rstrip()
        if is_pypi and sizes.get("zero_dc"):
            yield "the package keeps the lowest bin, which this model leaves out (model.zero_dc): what it gives differs there"
    elif fields := unet_weights.untold(model.config):
        told = ", ".join(f"{field} {json.dumps(value, ensure_ascii=False)}" for field, value in fields.items())
        yield f"no tensor tells {told}; msr import takes them from {config} by --config"
    if not arch.endswith("_det"):
        base = (bsrf_base() if sizes["name"] in NETWORKS else unet_base()).to_dict()
        if other := [section for section in ("diffusion", "consistency") if model.config[section] != base[section]]:
            yield f"no tensor tells how to refine ({', '.join(other)}); msr import takes that from {config} by --config"
    # What a RoFormer's separator gives follows the level of the mixture by itself.
    if level and (sizes["name"] not in NETWORKS or not arch.endswith("_det")):
        yield (
            f"no tensor tells input_level: the program must scale each mixture to an RMS of {level}, and the stems back;"
            f" msr import takes it from {config} by --config"
        )


def main(argv: list[str]) -> int:
    listed = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser = argparse.ArgumentParser(prog="msr export", description=__doc__)
    parser.add_argument("model", metavar="DIR", help="model folder, or the working directory of a training run")
    parser.add_argument("--format", required=True, choices=list(FORMATS), help=listed)
    parser.add_argument(
        "--arch",
        choices=list(PREFIXES),
        help="of dicose; default: the kind that holds all networks of the folder, but for det_x2, which no published one holds",
    )
    parser.add_argument("-o", "--out", required=True, metavar="FILE")
    args = parser.parse_args(argv)
    if args.arch and args.format != "dicose":
        raise UserError(f"--arch goes with --format dicose; {args.format} holds the separator alone")
    if args.format in ("dicose", "msst", "pypi"):
        _import_torch()  # before a large model is read
    elif args.format == "stablehlo":
        check_stablehlo()
    out = Path(args.out)
    check_place(out)  # before a model is traced for minutes
    model = load_model(args.model)
    if args.format in PROGRAMS:
        with saying(f"tracing the network for --format {args.format}"):
            blob = PROGRAMS[args.format](model)
        write, what = (lambda path: path.write_bytes(blob)), f"{len(blob) / 1e6:.1f} MB"
    else:
        is_whole = args.format == "dicose"
        arch = (args.arch or arch_of(model)) if is_whole else f"{FAMILIES[_published(model)]}_det"
        if is_whole:
            state = state_dict(model, arch)
        elif args.format == "msst" and arch == "unet_det":
            raise UserError(
                "the public training code has RoFormers alone; this model's separator is a U-Net: --format dicose"
            )
        else:
            state = pypi_tensors(model) if args.format == "pypi" else published_tensors(model, "deterministic")
        write = (
            _save_torch(state, is_whole)
            if args.format != "safetensors"
            else partial(write_tensors, tensors=state, dtype=np.float32)
        )
        what = f"{len(state)} tensors"
    beside = passing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.replace(beside, out)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        clear(beside)
    print(f"wrote {out} ({what})")
    if args.format not in PROGRAMS:
        config = find_model(args.model) / "config.json"
        for line in _remarks(model, config, args.format, arch):
            print(line)
    return 0
