"""Unpickles what PyTorch writes, without PyTorch and without executing anything in it.

A pickle can name any function and have it called; here the only names that mean anything are the few that describe tensors,
and every other name becomes an inert placeholder that is never imported.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

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
# No weights are of these kinds, but a tensor of one may lie beside them; bytes of an element, by which old files go on.
ODD_STORAGES = {
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
    "UntypedStorage": 1,
}
PLAIN_TENSORS = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")


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


class Storage(NamedTuple):
    """What a pickle says of a tensor's data: its dtype (None for one that cannot be read), name and number of elements."""

    dtype: np.dtype | None
    kind: str
    member: str
    size: int


class LazyTensor:
    """A tensor's place in the file; `read()` gives the array. `odd` says of one that cannot be read how it is stored."""

    def __init__(
        self, storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], odd: str | None = None
    ):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
        self.odd = odd or (storage.kind if storage.dtype is None else None)
        self.dtype = self.odd or str(storage.dtype)
        self.data_of: Callable[[str], bytes]  # the bytes of a storage by its name, once the whole of the file is known

    def read(self) -> np.ndarray:
        """The array, in the dtype of the file. Raises UserError for one that is odd, or reaches outside its storage."""
        dtype, _, member, count = self.storage
        if self.odd or dtype is None:
            raise UserError(f"the checkpoint holds a tensor as {self.dtype}, and such are not read ({member})")
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


def _tensor(storage: Storage, offset: int, size: tuple, stride: tuple, odd: str | None = None) -> LazyTensor:
    return LazyTensor(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)), odd)


def _rebuild_tensor(
    storage: Any, offset: int, size: tuple, stride: tuple, _grad: Any = None, _hooks: Any = None, meaning: Any = None
) -> LazyTensor:
    """`meaning`: {"neg": True} where the numbers are the negative of the tensor's, and such."""
    odd = [str(name) for name, value in dict(meaning or {}).items() if value]
    return _tensor(storage, offset, size, stride, f"a {odd[0]} view" if odd else None)


def _rebuild_typed(storage: Any, offset: int, size: tuple, stride: tuple, _grad: Any, _hooks: Any, dtype: Any, *_: Any):
    """Of a dtype that has no storage of its own, as float8 and unsigned integers: "torch.float8_e4m3fn"."""
    return _tensor(storage, offset, size, stride, str(getattr(dtype, "name", dtype)).removeprefix("torch."))


def _rebuild_quantised(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> LazyTensor:
    return _tensor(storage, offset, size, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_with_attributes(function: Any, kind: Any, args: tuple, _state: Any) -> Any:
    """A tensor that attributes were set on, which are dropped; one of a class of its own stays unknown."""
    name = getattr(kind, "name", "")
    if function in REBUILD.values() and name in PLAIN_TENSORS:
        return function(*args)
    return _unknown(name or "torch._tensor._rebuild_from_type_v2")(*args)


REBUILD: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    ("torch._utils", "_rebuild_qtensor"): _rebuild_quantised,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}


def _unknown(name: str) -> type[Placeholder]:
    """A class made here, never imported: calling it runs `Placeholder.__new__` and nothing else."""
    return type("Placeholder", (Placeholder,), {"name": name})


class Unpickler(pickle.Unpickler):
    KNOWN: ClassVar = {
        **REBUILD,
        ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_attributes,
        ("collections", "OrderedDict"): OrderedDict,
    }

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin-1")  # as Python 2 wrote, too
        self.itemsizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return self.KNOWN.get((module, name)) or _unknown(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # in old files, a class with its source beside it
            return pid[1]
        kind, storage_type, key, _, count, *view = pid
        name = str(getattr(storage_type, "name", "")).rsplit(".", 1)[-1]
        if kind != "storage" or view not in ([], [None]):
            raise UserError(f"the checkpoint holds data of a kind that is not known ({name or kind})")
        dtype = STORAGE_DTYPES.get(name)
        if size := ODD_STORAGES.get(name) if dtype is None else dtype.itemsize:
            self.itemsizes[str(key)] = size
        return Storage(dtype, name.removesuffix("Storage"), str(key), int(count))
