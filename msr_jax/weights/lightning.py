"""Reads PyTorch and PyTorch-Lightning checkpoints without PyTorch and without executing anything in them.

Such a file is a zip with one pickle and raw little-endian tensor data beside it; before PyTorch 1.6 it was five pickles in a
row with the data behind them. A pickle can name any function and have it called; here the only names that mean anything are
the few that describe tensors, and every other name becomes an inert placeholder that is never imported.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from msr_jax.errors import UserError

STORAGE_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
REAL = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}  # of safetensors
# What reading a damaged zip file raises: offsets beyond the file, unknown or broken compression, encryption.
ZIP_ERRORS = (OSError, EOFError, KeyError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)
# Where training checkpoints keep their state dict; the first that holds tensors counts. `module` is one inside of another.
WRAPPERS = ("state", "state_dict", "model_state_dict", "model", "ema")
OLD_MAGIC = 0x1950A86A20F9469CFC6C  # what the first pickle of a file without a zip holds


class Placeholder:
    """Stands for an object of a class that is not ours to make: keeps its arguments and state, does nothing."""

    name = "?"
    args: tuple[Any, ...]
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any):
        self = object.__new__(cls)
        self.args, self.items, self.state = args, {}, None
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        try:
            self.items[key] = value
        except TypeError:  # an unhashable key
            pass

    def append(self, item: Any) -> None:
        self.items[len(self.items)] = item

    def extend(self, items: Any) -> None:
        for item in items:
            self.append(item)

    add = append

    def __call__(self, *args: Any, **kwargs: Any) -> "Placeholder":
        return type(self)(*args)

    def __hash__(self) -> int:
        return id(self)


class LazyTensor:
    """A tensor's place in the file; `read()` gives the array."""

    def __init__(
        self, storage: tuple[np.dtype, str, int], offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
        self.dtype = storage[0].name
        self.data_of: Callable[[str], bytes]  # the bytes of a storage by its name, once the whole of the file is known

    def read(self) -> np.ndarray:
        """The array, in the dtype of the file. Raises UserError when the view reaches outside its storage."""
        dtype, member, count = self.storage
        data = np.frombuffer(self.data_of(member), np.uint8)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        empty = 0 in self.shape
        if (
            data.nbytes != count * dtype.itemsize
            or min(self.offset, *self.stride, 0) < 0
            or (not empty and last >= count)
        ):
            raise UserError(f"the checkpoint is damaged: a tensor reaches outside its data ({member})")
        strides = [s * dtype.itemsize for s in self.stride]
        flat = data.view(dtype)[self.offset :]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


def _rebuild_tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> LazyTensor:
    return LazyTensor(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Unpickler(pickle.Unpickler):
    KNOWN: ClassVar = {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("collections", "OrderedDict"): OrderedDict,
    }

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin-1")  # as Python 2 wrote, too
        self.itemsizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        # A class made here, never imported: calling it runs `Placeholder.__new__` and nothing else.
        return type("Placeholder", (Placeholder,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # in old files, a class with its source beside it
            return pid[1]
        kind, storage_type, key, _, count, *view = pid
        name = getattr(storage_type, "name", "").rsplit(".", 1)[-1]
        if kind != "storage" or name not in STORAGE_DTYPES or view not in ([], [None]):
            raise UserError(f"the checkpoint holds data of a kind that is not known ({name or kind})")
        self.itemsizes[str(key)] = STORAGE_DTYPES[name].itemsize
        return STORAGE_DTYPES[name], str(key), int(count)


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

    The state dict is the file itself (the layout of released weights, in PyTorch's formats or in safetensors), or stands under
    one of `WRAPPERS` in a training checkpoint. A tensor that safetensors stores once under one of its names has all of them.

    Raises:
      UserError: missing, not a PyTorch file, damaged, or without a dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is a folder; name a file in it' if path.is_dir() else 'does not exist'}")
    with path.open("rb") as file:
        start = file.read(64)
    if path.suffix == ".safetensors":
        return Checkpoint({}, _read_safetensors(path))
    if start[:4] == b"PK\x03\x04" or _ends_as_zip(path):
        content, data_of = _read_zip(path)
    elif start[:1] == b"\x80":
        content, data_of = _read_old(path)
    else:
        if path.name.endswith(".index.json"):
            raise UserError(
                f"{path} lists the parts that weights were cut into; join them into one safetensors file first"
            )
        raise UserError(f"{path} is not a PyTorch checkpoint{_looks_like(start)}; take the file of weights itself")
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
    if start[8:9] == b"{":
        return "; it looks like safetensors, give it that ending"
    return ""


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

    def data_of(key: str) -> bytes:
        try:
            return archive.read(f"{folder}/data/{key}")
        except ZIP_ERRORS as error:
            raise UserError(f"{path} is damaged: the data of a tensor cannot be read ({error})") from error

    try:
        described = archive.read(pickles[0])
    except ZIP_ERRORS as error:
        raise UserError(f"{path} is damaged: its data.pkl cannot be read ({error}); fetch it again") from error
    return _unpickle(_Unpickler(io.BytesIO(described)), path), data_of


def _read_old(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    """The format before PyTorch 1.6: magic number, version, machine, content, names of the storages; then their data."""
    with path.open("rb") as file:
        if _unpickle(_Unpickler(file), path) != OLD_MAGIC:
            raise UserError(f"{path} is a pickle but no PyTorch checkpoint; nothing in it was run")
        _unpickle(_Unpickler(file), path)
        machine = _unpickle(_Unpickler(file), path)
        unpickler = _Unpickler(file)
        content, keys = _unpickle(unpickler, path), _unpickle(_Unpickler(file), path)
        if not isinstance(keys, list) or (isinstance(machine, dict) and machine.get("little_endian") is False):
            raise UserError(f"{path} has a damaged or foreign pickle inside, or was written on a big-endian machine")
        places = {}
        for key in map(str, keys):  # each: its number of elements in eight bytes, and they
            size = int.from_bytes(file.read(8), "little") * unpickler.itemsizes.get(key, 0)
            places[key] = (file.tell(), size)
            file.seek(size, io.SEEK_CUR)

    def data_of(key: str) -> bytes:
        start, size = places.get(key, (0, 0))
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    return content, data_of


def _unpickle(unpickler: _Unpickler, path: Path) -> Any:
    try:
        return unpickler.load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a hostile or damaged pickle can fail in any way; it has not run anything
        raise UserError(f"{path} has a damaged or foreign pickle inside ({type(error).__name__}: {error})") from error


def _find_state(content: Any, path: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The state dict, and what else the file holds."""
    inside = content.values() if isinstance(content, dict) else [content]
    content = content if isinstance(content, dict) else {}
    holds_tensors = lambda name: isinstance(content.get(name), dict) and _has_tensors(content[name])
    for name in sorted(WRAPPERS, key=lambda name: not holds_tensors(name)):
        if state := _wrapped(content.get(name)):
            if strange := [str(k) for k, v in state.items() if not isinstance(v, LazyTensor)]:
                raise UserError(f"{path}: the state_dict entry {strange[0]} is no tensor")
            return _named(state, path), {k: value for k, value in content.items() if k != name}
    tensors = {name: value for name, value in content.items() if isinstance(value, LazyTensor)}
    if tensors:
        return _named(tensors, path), {name: value for name, value in content.items() if name not in tensors}
    if objects := [value.name for value in inside if isinstance(value, Placeholder)]:
        raise UserError(
            f"{path} holds an object of the class {objects[0]} instead of a state_dict, and making it would run its code; "
            "where you trust it, save its state_dict() with PyTorch and import that"
        )
    raise UserError(f"{path} holds no state_dict; this is not a checkpoint with weights in it")


def _wrapped(content: Any, depth: int = 3) -> dict[Any, Any] | None:
    """The dict that holds tensors: one that lies in this one under a name of a wrapper, not too deep, or itself."""
    if not isinstance(content, dict) or not depth:
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
        raise UserError(
            f"{where} holds {strange[0]} as {tensors[strange[0]].dtype}, and weights are read in float16, bfloat16, float32 or"
            " float64 alone; take the file that was not quantised"
        )


def plain(value: Any) -> Any:
    """A placeholder's data as plain dicts and lists (an `argparse.Namespace` is its state); what has none becomes None."""
    if isinstance(value, Placeholder):
        return plain(value.state if value.state is not None else value.items) or None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else None
