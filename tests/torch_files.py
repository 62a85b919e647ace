"""Writes PyTorch's file formats without PyTorch, for tests of the reader."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


def _rebuild_tensor_v2(*_):
    raise AssertionError("a name in the pickle, never called here")


class _Torch(types.ModuleType):
    """Stands for torch while a pickle is written: pickling looks a name up before it writes it."""

    def __enter__(self):
        self.before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
        utils = types.ModuleType("torch._utils")
        utils._rebuild_tensor_v2 = _rebuild_tensor_v2
        _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
        for name in STORAGES.values():
            setattr(self, name, type(name, (), {"__module__": "torch"}))
        self._utils = utils
        sys.modules |= {"torch": self, "torch._utils": utils}
        return self

    def __exit__(self, *_):
        for name, module in self.before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


class _Storage:
    def __init__(self, kind, key, array):
        self.kind, self.key, self.array = kind, key, array


class _Pickler(pickle.Pickler):
    def __init__(self, file, torch, storages, is_old):
        super().__init__(file, protocol=2)
        self.torch, self.storages, self.tail = torch, storages, (None,) if is_old else ()

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        array = np.ascontiguousarray(value)
        storage = _Storage(getattr(self.torch, STORAGES[array.dtype.name]), str(len(self.storages)), array)
        self.storages.append(storage)
        stride = tuple(s // array.itemsize for s in array.strides)
        return self.torch._utils._rebuild_tensor_v2, (storage, 0, array.shape, stride, False, OrderedDict())

    def persistent_id(self, value):
        if isinstance(value, _Storage):
            return ("storage", value.kind, value.key, "cpu", value.array.size, *self.tail)
        return None


def write_torch(path, content, is_old=False):
    """`torch.save(content, path)` for nested dicts of arrays; `is_old`: as before PyTorch 1.6, without a zip."""
    storages, body = [], io.BytesIO()
    with _Torch("torch") as torch:
        _Pickler(body, torch, storages, is_old).dump(content)
    if is_old:
        head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
        with open(path, "wb") as file:
            file.write(b"".join(pickle.dumps(part, 2) for part in head) + body.getvalue())
            file.write(pickle.dumps([storage.key for storage in storages], 2))
            for storage in storages:
                file.write(storage.array.size.to_bytes(8, "little") + storage.array.tobytes())
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body.getvalue())
        for storage in storages:
            archive.writestr(f"archive/data/{storage.key}", storage.array.tobytes())


def as_dtype(tensors, name):
    """The tensors in another precision, bfloat16 among them."""
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
    return {key: np.asarray(value).astype(dtype) for key, value in tensors.items()}
