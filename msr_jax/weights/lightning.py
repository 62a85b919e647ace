"""Reads PyTorch and PyTorch-Lightning checkpoints without PyTorch and without executing anything in them.

Such a file is a zip with one pickle and raw little-endian tensor data beside it; before PyTorch 1.6 it was five pickles in a
row with the data behind them. What a pickle may do here stands in `unpickled`.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from msr_jax.errors import UserError
from msr_jax.weights.detect import networks_among
from msr_jax.weights.unpickled import LazyTensor, Placeholder, Storage, Unpickler

REAL = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}  # of safetensors
# What reading a damaged zip file raises: offsets beyond the file, unknown or broken compression, encryption.
ZIP_ERRORS = (OSError, EOFError, KeyError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)
BIG_ENDIAN = "load it with PyTorch and save its state_dict() on another"
JOIN = "join them into one safetensors file first"
# Where training checkpoints keep their state dict; the first that holds tensors counts. `module` is one inside of another.
WRAPPERS = ("state", "state_dict", "model_state_dict", "model", "ema")
DEEP = 64  # levels of nesting, beyond which nothing is a config
OLD_MAGIC = 0x1950A86A20F9469CFC6C  # what the first pickle of a file without a zip holds


class StoredTensor:
    """A tensor of a safetensors file; the same three things as of a `LazyTensor`."""

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], kind: str):
        self.path, self.name, self.shape = path, name, shape
        self.dtype = np.dtype(REAL[kind]).name if kind in REAL else kind

    def read(self) -> np.ndarray:
        with safe_open(self.path, "np") as file:  # anew each time: what was read of a mapped file would stay in memory
            return file.get_tensor(self.name)


class Checkpoint(NamedTuple):
    """An open checkpoint: `content` is the unpickled dict, with `LazyTensor` for tensors and `Placeholder` for the rest."""

    content: dict[str, Any]
    state_dict: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint; only names and shapes are read, tensors when they are asked for.

    The content tells the format, whatever the file's name ends in. The state dict is the file itself (the layout of released
    weights, in PyTorch's formats or in safetensors), or stands under one of `WRAPPERS` in a training checkpoint, or under
    another name if no second one has a network. A tensor that safetensors stores once under one of its names has all of them.

    Raises:
      UserError: missing, not a PyTorch file, damaged, or without a dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is a folder; name a file in it' if path.is_dir() else 'does not exist'}")
    if path.name.lower().endswith(".index.json"):
        raise UserError(f"{path} lists the parts that weights were cut into; {JOIN}")
    if (part := re.search(r"-(\d+)-of-(\d+)$", path.stem)) and int(part[2]) > 1:
        raise UserError(f"{path} is part {int(part[1])} of the {int(part[2])} that weights were cut into; {JOIN}")
    with path.open("rb") as file:
        start = file.read(64)
    # Eight bytes are the length of its header, of which no file uses more than five.
    if start[5:9] == b"\0\0\0{":
        return Checkpoint({}, _read_safetensors(path))
    if start[:4] == b"PK\x03\x04" or _ends_as_zip(path):
        content, data_of = _read_zip(path)
    elif start[:1] == b"\x80":
        content, data_of = _read_old(path)
    else:
        kind = "safetensors file" if path.suffix.lower() == ".safetensors" else "PyTorch checkpoint"
        raise UserError(f"{path} is not a {kind}{_looks_like(start)}; take the file of weights itself")
    state, content = _find_state(content, path)
    for tensor in state.values():
        tensor.data_of = data_of
    return Checkpoint(content, state)


def _ends_as_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except ZIP_ERRORS:  # one in several parts
        return False


def _looks_like(start: bytes) -> str:
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return " but a web page, such as a download that asks for a login gives"
    if text.startswith(b"version https://git-lfs"):
        return " but a pointer to one (Git LFS): the weights themselves have not been downloaded"
    if text.startswith((b"<?xml", b"{", b"[")):
        return f" but {'XML' if text[:1] == b'<' else 'JSON'}, such as the answer of a server that refuses a download"
    if start.startswith(b"\x1f\x8b"):
        return " but packed by gzip; unpack it first"
    return "" if start.strip(b"\0") else ", but empty or all zeros, as of a download that broke off"


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            state = {name: StoredTensor(path, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            told = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error})") from error
    # Names that share a tensor are dropped on writing, and told of: {dropped name: name that is kept}.
    return state | {name: state[kept] for name, kept in told.items() if kept in state and name not in state}


def _read_zip(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    try:
        archive = zipfile.ZipFile(path)
    except ZIP_ERRORS as error:
        raise UserError(
            f"{path} is not a PyTorch checkpoint in zip format, or is cut off ({error}); fetch it again"
        ) from error
    pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{path} is a zip file but no PyTorch checkpoint: it holds no data.pkl")
    folder = pickles[0].split("/")[0]
    if f"{folder}/byteorder" in archive.namelist() and _member(archive, f"{folder}/byteorder", path).strip() == b"big":
        raise UserError(f"{path} was written on a big-endian machine; {BIG_ENDIAN}")

    def data_of(key: str) -> bytes:
        try:
            return archive.read(f"{folder}/data/{key}")
        except ZIP_ERRORS as error:
            raise UserError(f"{path} is damaged: the data of a tensor cannot be read ({error})") from error

    return _unpickle(Unpickler(io.BytesIO(_member(archive, pickles[0], path))), path), data_of


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        return archive.read(name)
    except ZIP_ERRORS as error:
        kept = name.rsplit("/", 1)[-1]
        raise UserError(f"{path} is damaged: its {kept} cannot be read ({error}); fetch it again") from error


def _read_old(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    """The format before PyTorch 1.6: magic number, version, machine, content, names of the storages; then their data."""
    with path.open("rb") as file:
        if _unpickle(Unpickler(file), path) != OLD_MAGIC:
            raise UserError(f"{path} is a pickle but no PyTorch checkpoint; nothing in it was run")
        _unpickle(Unpickler(file), path)
        machine = _unpickle(Unpickler(file), path)
        unpickler = Unpickler(file)
        content, keys = _unpickle(unpickler, path), _unpickle(Unpickler(file), path)
        if isinstance(machine, dict) and machine.get("little_endian") is False:
            raise UserError(f"{path} was written on a big-endian machine; {BIG_ENDIAN}")
        if not isinstance(keys, list) or any(str(key) not in unpickler.itemsizes for key in keys):
            raise UserError(f"{path} has a damaged or foreign pickle inside, or data of a kind that is not known")
        places = {}
        for key in map(str, keys):  # each: its number of elements in eight bytes, and they
            size = int.from_bytes(file.read(8), "little") * unpickler.itemsizes[key]
            places[key] = (file.tell(), size)
            file.seek(size, io.SEEK_CUR)

    def data_of(key: str) -> bytes:
        start, size = places.get(key, (0, 0))
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    return content, data_of


def _unpickle(unpickler: Unpickler, path: Path) -> Any:
    try:
        return unpickler.load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a hostile or damaged pickle can fail in any way; it has not run anything
        raise UserError(f"{path} has a damaged or foreign pickle inside ({type(error).__name__}: {error})") from error


def _find_state(content: Any, path: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The state dict, and what else the file holds."""
    content = _mapping(content) or ({"": content} if isinstance(content, Placeholder) else {})
    holds_tensors = lambda name: _has_tensors(_mapping(content.get(name)))
    wrapped = (
        (name, _wrapped(content.get(name))) for name in sorted(WRAPPERS, key=lambda name: not holds_tensors(name))
    )
    name, state = next((pair for pair in wrapped if pair[1]), (None, {}))
    if not state and (tensors := {key: value for key, value in content.items() if isinstance(value, LazyTensor)}):
        return _named(tensors, path), {key: value for key, value in content.items() if key not in tensors}
    if not state:
        name, state = _only_network({key: found for key, value in content.items() if (found := _wrapped(value))}, path)
    if strange := [str(k) for k, v in state.items() if not isinstance(v, LazyTensor)]:
        raise UserError(f"{path}: the state_dict entry {strange[0]} is no tensor")
    if state:
        return _named(state, path), {key: value for key, value in content.items() if key != name}
    objects = [value for value in content.values() if isinstance(value, Placeholder)]
    if objects:
        is_module = lambda value: isinstance(value.state, dict) and "_modules" in value.state
        raise UserError(
            f"{path} holds an object of the class {max(objects, key=is_module).name} instead of a state_dict, and making it"
            " would run its code; where you trust it, save its state_dict() with PyTorch and import that"
        )
    raise UserError(
        f"{path} holds no state_dict, neither at its top nor one level below; where it has weights in it, save the network's"
        " state_dict() with PyTorch and import that"
    )


def _only_network(found: dict[Any, dict[Any, Any]], path: Path) -> tuple[Any, dict[Any, Any]]:
    """The one of several dicts of tensors, by their names in the file, that holds a network; ("", {}) of none."""
    networks = networks_among([f"{name}.{key}" for name, state in found.items() for key in state])
    wanted = [name for name in found if any(network.startswith(f"{name}.") for network in networks)]
    if len(found) == 1 or len(wanted) == 1:
        return (wanted or list(found))[0], found[(wanted or list(found))[0]]
    if found:
        shown = " and ".join(map(str, (wanted or list(found))[:2]))
        held = "a network, and nothing tells which is wanted" if wanted else "tensors, but none those of a network here"
        raise UserError(
            f"{path} holds no state_dict under a name that is known; {shown} both hold {held}; save the one that is wanted with"
            " PyTorch and import that"
        )
    return "", {}


def _mapping(value: Any) -> dict[Any, Any]:
    """What is a dict, or was one of a class of its own in the program that wrote it, or a list, by its places; else {}."""
    if isinstance(value, list | tuple) and not isinstance(value, Storage):
        return {str(place): item for place, item in enumerate(value)}
    value = value.items if isinstance(value, Placeholder) else value
    return value if isinstance(value, dict) else {}


def _wrapped(content: Any, depth: int = 3) -> dict[Any, Any] | None:
    """The dict that holds tensors: one that lies in this one under a name of a wrapper, not too deep, or itself."""
    content = {} if isinstance(content, list | tuple) else _mapping(content)
    if not content or not depth:
        return None
    found = (_wrapped(content.get(name), depth - 1) for name in (*WRAPPERS, "module"))
    return next((state for state in found if state), content if _has_tensors(content) else None)


def _has_tensors(content: dict[Any, Any]) -> bool:
    return any(isinstance(value, LazyTensor) for value in content.values())


def _named(state: dict[Any, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    if strange := [key for key in state if not isinstance(key, str)]:
        raise UserError(f"{path}: the state_dict entry {strange[0]!r} is no name of a tensor")
    return state


def check_real(tensors: Mapping[str, Any], where: str) -> None:
    """UserError unless all tensors are floating-point numbers: others are no weights, or quantised ones."""
    real = {np.dtype(dtype).name for dtype in REAL.values()}
    if strange := [name for name, tensor in tensors.items() if tensor.dtype not in real]:
        kind = tensors[strange[0]].dtype
        is_quantised = re.search(r"int|float[84]|^[IU]\d|^F[84]", kind, re.I)
        raise UserError(
            f"{where} holds {strange[0]} as {kind}, and weights are read in float16, bfloat16, float32 or float64 alone;"
            f" {'take the file that was not quantised' if is_quantised else 'convert it with PyTorch and save that'}"
        )


def plain(value: Any) -> Any:
    """A placeholder's data as plain dicts and lists, and None for what has none, contains itself or lies too deep.

    An `argparse.Namespace` is its state, and what OmegaConf wraps is what it wraps.
    """
    return _plain(value, {}, 0)


def _plain(value: Any, made: dict[int, Any], depth: int) -> Any:
    """`made`: what is there already of containers, by their ids; one that many refer to is gone through once."""
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if depth < DEEP and id(value) not in made:
        made[id(value)] = None  # while it is on the way: OmegaConf's nodes refer to their parents
        deeper = lambda inner: _plain(inner, made, depth + 1)
        if isinstance(value, Placeholder):
            state = value.state if isinstance(value.state, dict) else {}
            inner = next((state[name] for name in ("_content", "_val") if name in state), state or value.items)
            made[id(value)] = deeper(inner)
            if made[id(value)] == {}:
                made[id(value)] = None
        elif isinstance(value, dict):
            made[id(value)] = {str(k): deeper(v) for k, v in value.items()}
        elif isinstance(value, list | tuple):
            made[id(value)] = [deeper(v) for v in value]
    return made.get(id(value))
