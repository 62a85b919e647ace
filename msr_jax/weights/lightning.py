"""Reads PyTorch and PyTorch-Lightning checkpoints without PyTorch and without executing anything in them.

Such a file is a zip with one pickle and raw little-endian tensor data beside it. A pickle can name any function and have
it called; here the only names that mean anything are the few that describe tensors, and every other name becomes an
inert placeholder that is never imported.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
WRAPPERS = ("state", "state_dict", "model_state_dict")  # where training checkpoints keep their state dict


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
        self.archive: Any = None  # the open file, once the whole of it is known

    def read(self) -> np.ndarray:
        """The array, in the dtype of the file. Raises UserError when the view reaches outside its storage."""
        dtype, member, count = self.storage
        with self.archive.open(member) as file:
            data = np.frombuffer(file.read(), np.uint8)
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

    def __init__(self, data: bytes, folder: str):
        super().__init__(io.BytesIO(data))
        self.folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        # A class made here, never imported: calling it runs `Placeholder.__new__` and nothing else.
        return type("Placeholder", (Placeholder,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        kind, storage_type, key, _, count = pid
        name = getattr(storage_type, "name", "").rsplit(".", 1)[-1]
        if kind != "storage" or name not in STORAGE_DTYPES:
            raise UserError(f"the checkpoint holds data of a kind that is not known ({name or kind})")
        return STORAGE_DTYPES[name], f"{self.folder}/data/{key}", int(count)


class StoredTensor:
    """A tensor of a safetensors file; the same two things as of a `LazyTensor`."""

    def __init__(self, file: Any, name: str):
        self.file, self.name = file, name
        self.shape = tuple(file.get_slice(name).get_shape())

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


class Checkpoint(NamedTuple):
    """An open checkpoint: `content` is the unpickled dict, with `LazyTensor` for tensors and `Placeholder` for the rest."""

    content: dict[str, Any]
    state_dict: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint; only names and shapes are read, tensors when they are asked for.

    The state dict is the file itself (the layout of released weights, in PyTorch's format or in safetensors), or stands under
    one of `WRAPPERS` in a training checkpoint.

    Raises:
      UserError: missing, not a zip-format PyTorch file, damaged, or without a dict of tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, "np")
            return Checkpoint({}, {name: StoredTensor(file, name) for name in file.keys()})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error})") from error
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a PyTorch checkpoint in zip format, or is cut off ({error}); save it again with torch.save"
        ) from error
    pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{path} is a zip file but no PyTorch checkpoint: it holds no data.pkl")
    try:
        content = _Unpickler(archive.read(pickles[0]), pickles[0].split("/")[0]).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a hostile or damaged pickle can fail in any way; it has not run anything
        raise UserError(f"{path} has a damaged or foreign pickle inside ({type(error).__name__}: {error})") from error
    content = content if isinstance(content, dict) else {}
    state = next((content[name] for name in WRAPPERS if name in content), None)
    if state is None and content and all(isinstance(value, LazyTensor) for value in content.values()):
        state, content = content, {}
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds no state_dict; this is not a training checkpoint of the original program")
    strange = [str(k) for k, v in state.items() if not isinstance(v, LazyTensor)]
    if strange:
        raise UserError(f"{path}: the state_dict entry {strange[0]} is no tensor")
    for tensor in state.values():
        tensor.archive = archive
    return Checkpoint(content, state)


def plain(value: Any) -> Any:
    """A placeholder's data as plain dicts and lists (an `argparse.Namespace` is its state); what has none becomes None."""
    if isinstance(value, Placeholder):
        return plain(value.state if value.state is not None else value.items) or None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else None
