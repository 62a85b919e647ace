"""The model folder: `config.json` and one safetensors file per network, tensors named by their parameter path."""

import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from msr_jax.config_fields import check_config
from msr_jax.errors import UserError
from msr_jax.files import clear, passing
from msr_jax.machine import give_back_memory
from msr_jax.models.backbone import compute_dtype, make_backbone, stored, stored_dtype
from msr_jax.models.interface import Backbone
from msr_jax.weights.streamed import write_tensors

FORMAT = 1
# Bytes, after which a file is opened anew: what was read of a mapped file stays in memory until it is closed.
MAPPED = 2**26
ALIGNED = 64  # bytes, which JAX asks of memory that it takes over
BUNDLED = Path(__file__).parents[1] / "bundled"  # the model that ships with the package
SET_ASIDE = ".old"  # how the name of a folder ends that is being replaced
NETWORKS = ("deterministic", "det_x2", "diffusion", "consistency", "target")
# The fields of a config that a model needs to run; those of its training stay with the training.
FIELDS = ("stems", "sample_rate", "channels", "segment", "input_level", "model", "diffusion", "consistency")
# One that a folder may have: the refinement that it takes where none is named ("none" or a network's name); without, the
# best that it holds.
DEFAULT_REFINE = "default_refine"
# Others: how a song is cut where nobody says otherwise, in segments a chunk and as a fraction of a chunk.
DEFAULT_SEGMENTS, DEFAULT_OVERLAP = "default_segments", "default_overlap"
DEFAULTS = (DEFAULT_REFINE, DEFAULT_SEGMENTS, DEFAULT_OVERLAP)
# In the config of a model that was loaded with some of its stems: their numbers among all.
STEM_NUMBERS, ALL_STEMS = "stem_numbers", "all_stems"
OF_STEMS = ("mask_estimators/", "conditioning/stem_embedding")  # parameters whose first axis is the stems, in RoFormers


class Model(NamedTuple):
    """A model in memory: the config's fields as plain values, and the parameters of each network in the folder."""

    config: dict[str, Any]
    weights: dict[str, Any]


class _Shaped(NamedTuple):
    shape: tuple[int, ...]


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": array}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def unflatten(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": array} -> nested dict."""
    params: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, leaf = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = tensor
    return params


def inputs_of(network: str) -> tuple[bool, bool]:
    """Whether a network takes a noise level, and whether it takes the features of another."""
    return network not in ("deterministic", "det_x2"), network != "deterministic"


def parameter_shapes(backbone: Backbone, network: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a network by its path; nothing is computed."""
    params = jax.eval_shape(lambda: backbone.init(jax.random.key(0), *inputs_of(network)))
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def check_tensors(
    tensors: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    advice: str = "take the config that these weights were made with",
) -> None:
    """Raises UserError, which ends in the advice, unless names and shapes are the expected ones."""
    wrong = [
        f"{k} is {tensors[k].shape}, not {s}" for k, s in expected.items() if k in tensors and tensors[k].shape != s
    ]
    for found, what in (
        ([k for k in expected if k not in tensors], "lacks"),
        ([k for k in tensors if k not in expected], "holds what the config does not know:"),
        (wrong, "contradicts the config:"),
    ):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(f"{where} {what} {', '.join(found[:3])}{more}; {advice}")


def save_model(
    folder: str | Path, config: Mapping[str, Any], weights: Mapping[str, Any], dtype: type = np.float32
) -> None:
    """Write a model folder, whole or not at all; an older model folder of that name is replaced.

    Args:
      config: at least the keys of `FIELDS`, plain values.
      weights: parameters by network name, among `NETWORKS`; float32 arrays, or `Stacked` ones that are read only now.
      dtype: of the files: float32, or float16 for half the size.

    Raises:
      UserError: the place cannot be written, or holds something that is no model folder.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no model folder; name another place")
    restore_set_aside(folder)  # of a process that was killed between the two renamings below
    beside, replaced = passing(folder), folder.with_name(f".{folder.name}.{os.getpid()}{SET_ASIDE}")
    kept = {
        "format": FORMAT,
        "networks": [n for n in NETWORKS if n in weights],
        **{k: config[k] for k in (*FIELDS, *DEFAULTS) if k in FIELDS or k in config},
    }
    try:
        beside.mkdir(parents=True)
        for name in kept["networks"]:
            write_tensors(beside / f"{name}.safetensors", flatten(weights[name]), dtype)
        (beside / "config.json").write_text(json.dumps(kept, indent=1) + "\n")
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(beside, folder)
    except OSError as error:
        raise UserError(f"cannot write the model folder {folder}: {error.strerror or error}") from error
    finally:
        if replaced.exists() and not folder.exists():  # ended between the two
            with suppress(OSError):
                os.replace(replaced, folder)
        clear(beside)
    for left in _set_aside(folder):
        shutil.rmtree(left, ignore_errors=True)


def restore_set_aside(folder: Path) -> None:
    """Put back the model folder that a process had set aside to replace it, if it was killed before there was another."""
    for left in _set_aside(folder):
        if not folder.exists():
            with suppress(OSError):  # what is wrong with the place is said where it is written to
                os.replace(left, folder)


def _set_aside(folder: Path) -> list[Path]:
    """Older model folders of that place, whole, which were to be replaced."""
    with suppress(OSError):
        return sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*{SET_ASIDE}"))
    return []


def find_model(folder: str | Path) -> Path:
    """The model folder itself, or `model` inside the working directory of a training run.

    Raises:
      UserError: there is neither.
    """
    folder = Path(folder)
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
            return place
    reason = "holds no config.json with weights beside it" if folder.is_dir() else "is no folder"
    raise UserError(f"{folder} {reason}; name a model folder, or the --workdir of a training run that has saved")


def is_whole(folder: Path) -> bool:
    """Whether a model folder is there, and none of its files was cut off: the header of each tells its length."""
    try:
        place = find_model(folder)
        for name in json.loads((place / "config.json").read_text())["networks"]:
            with safe_open(place / f"{name}.safetensors", "np"):
                pass
    except (UserError, FileNotFoundError, SafetensorError, ValueError, LookupError, TypeError):
        return False
    except OSError:  # it is there and not for this user, which is said where it is read
        pass
    return True


def choose_stems(config: Mapping[str, Any], stems: Sequence[str]) -> list[int]:
    """Numbers of the named stems among those of a model's config, in the model's order; UserError for none, or a name that is none."""
    known = list(config["stems"])
    if not stems:
        raise UserError(f"no stem is named; name some of the model's, {', '.join(known)}, or leave stems out for all")
    if wrong := [stem for stem in stems if stem not in known]:
        raise UserError(f"the model has no stem '{wrong[0]}'; its stems are {', '.join(known)}, spelled so")
    if len(set(stems)) < len(stems):
        raise UserError(f"a stem is named twice among {', '.join(stems)}; name each once")
    return [number for number, stem in enumerate(known) if stem in stems]


def _aligned(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tensor in `dtype`, read-only, where JAX computes on a CPU with it as it lies there, without a copy of its own."""
    size = tensor.size * dtype.itemsize
    raw = np.empty(size + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    made = raw[start : start + size].view(dtype).reshape(tensor.shape)
    made[...] = tensor
    made.flags.writeable = False
    return made


def _read(path: Path, keys: Iterable[str], rows: Mapping[str, list[int]]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a safetensors file by name; of those in `rows`, these rows alone."""
    left = iter(keys)
    while True:
        with safe_open(path, "np") as file:
            read = 0
            for key in left:
                part = file.get_slice(key)
                tensor = np.stack([part[row] for row in rows[key]]) if key in rows else part[...]
                yield key, tensor
                read += tensor.nbytes
                if read > MAPPED:
                    break
            else:
                return


def load_model(folder: str | Path, stems: Sequence[str] | None = None, dtype: str = "float32") -> Model:
    """Read a model folder (or a training run's working directory) into read-only arrays, one tensor after another.

    Args:
      dtype: parameters come in float32, as they are trained, or as `cast_params` would give them for inference at "bfloat16".
      stems: names of those that are wanted. A network that has a head for each of its stems comes without the others' heads,
        which are not read; its config then has these stems alone, under `STEM_NUMBERS` which ones of the model's they are, and
        those under `ALL_STEMS`.

    Raises:
      UserError: no such folder, unreadable or foreign config, a default refinement that is not there, a stem that the model
        has not, a tensor missing, surplus, misshapen or of another type.
    """
    folder = find_model(folder)
    again = f"remove {folder} and fetch or save the model again"
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not readable as JSON ({error}); {again}") from error
    missing = (
        [k for k in ("format", "networks", *FIELDS) if k not in config] if isinstance(config, dict) else ["format"]
    )
    if missing:
        raise UserError(f"{folder / 'config.json'} lacks {', '.join(missing)}; it is not a config of a model folder")
    if config["format"] != FORMAT:
        raise UserError(
            f"{folder} has format {json.dumps(config['format'])}, this version reads format {FORMAT}; upgrade msr_jax"
        )
    if not isinstance(config["networks"], list) or not set(map(str, config["networks"])) <= set(NETWORKS):
        networks = json.dumps(config["networks"])
        raise UserError(
            f"{folder / 'config.json'} has networks {networks}; they must be a list of {', '.join(NETWORKS)}"
        )
    if "deterministic" not in config["networks"]:
        raise UserError(f"{folder / 'config.json'} names no deterministic network, which every model has")
    refinements = ["none", *(n for n in config["networks"] if n in ("det_x2", "diffusion", "consistency"))]
    if config.get(DEFAULT_REFINE, "none") not in refinements:
        raise UserError(
            f"{folder / 'config.json'} has {DEFAULT_REFINE} {json.dumps(config[DEFAULT_REFINE])}; "
            f"with its networks it can be {', '.join(refinements)}"
        )
    segments, overlap = config.get(DEFAULT_SEGMENTS, 1), config.get(DEFAULT_OVERLAP, 0.5)
    if type(segments) is not int or segments < 1 or type(overlap) not in (int, float) or not 0 <= overlap <= 0.5:
        raise UserError(
            f"{folder / 'config.json'} has {DEFAULT_SEGMENTS} {json.dumps(segments)} and {DEFAULT_OVERLAP} "
            f"{json.dumps(overlap)}; they must be a whole number from 1 on, and from 0 to 0.5"
        )
    check_config({k: config[k] for k in FIELDS}, f"{folder / 'config.json'}: ", is_whole=False)
    backbone = make_backbone(config["model"])
    numbers = None if stems is None else choose_stems(config, stems)
    has_heads = "num_stems" in config["model"]
    weights = {}
    computed = compute_dtype(dtype)
    for name in config["networks"]:
        path = folder / f"{name}.safetensors"
        try:
            with safe_open(path, "np") as file:
                shapes = {key: _Shaped(tuple(file.get_slice(key).get_shape())) for key in file.keys()}
                kinds = {key: file.get_slice(key).get_dtype() for key in shapes}
                check_tensors(shapes, parameter_shapes(backbone, name), str(path))
                odd = [key for key, kind in kinds.items() if kind not in ("F32", "F16")]
                if odd:
                    kind = kinds[odd[0]]
                    raise UserError(f"{path} holds {kind} in {odd[0]}; parameters must be float32 or float16")
                heads = [key for key in shapes if has_heads and key.startswith(OF_STEMS)] if numbers is not None else []
            tensors = {}
            for key, tensor in _read(path, shapes, {key: numbers or [] for key in heads}):
                aligned = _aligned(tensor, stored_dtype(tensor.ndim, computed))
                tensors[key] = stored(key, aligned, computed, backbone.looped)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read ({error}); {again}") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
        weights[name] = unflatten(tensors)
    give_back_memory()
    if numbers is not None and has_heads:
        config = {
            **config,
            "stems": [config["stems"][k] for k in numbers],
            STEM_NUMBERS: numbers,
            ALL_STEMS: config["stems"],
        }
        config["model"] = {**config["model"], "num_stems": len(numbers)}
    return Model(config, weights)
