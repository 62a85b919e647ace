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
    "complex64": "ComplexFloatStorage",
    "uint8": "UntypedStorage",
}


class Made:
    """An object in a pickle, as a program with that class would write it: the name that is called, its state, what lies in it."""

    def __init__(self, name, *args, state=None, items=None):
        self.name, self.args, self.state, self.items = name, args, state, items


class Named:
    """The class or function of this name itself, as an argument of `Made`."""

    def __init__(self, name):
        self.name = name


class Data:
    """A tensor's data alone, as an argument of `Made`."""

    def __init__(self, array):
        self.array, self.key = array, None


def _rebuild_tensor_v2(*_):
    raise AssertionError("a name in the pickle, never called here")


class _Torch(types.ModuleType):
    """Stands for torch while a pickle is written: pickling looks a name up before it writes it."""

    def named(self, name):
        """A class that pickles by this name."""
        module, own = name.rsplit(".", 1)
        if module not in sys.modules:
            self.before[module] = None
            sys.modules[module] = types.ModuleType(module)
        made = type(own, (), {"__module__": module})
        if not hasattr(sys.modules[module], own):
            setattr(sys.modules[module], own, made)
        return getattr(sys.modules[module], own)

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


class _Pickler(pickle.Pickler):
    def __init__(self, file, torch, storages, is_old):
        super().__init__(file, protocol=2)
        self.torch, self.storages, self.tail = torch, storages, (None,) if is_old else ()

    def reducer_override(self, value):
        if isinstance(value, Made):
            items = None if value.items is None else iter(value.items.items())
            args = tuple(self.torch.named(a.name) if isinstance(a, Named) else a for a in value.args)
            return self.torch.named(value.name), args, value.state, None, items
        if not isinstance(value, np.ndarray):
            return NotImplemented
        array = np.ascontiguousarray(value)
        stride = tuple(s // array.itemsize for s in array.strides)
        return self.torch._utils._rebuild_tensor_v2, (Data(array), 0, array.shape, stride, False, OrderedDict())

    def persistent_id(self, value):
        if isinstance(value, Data):
            if value.key is None:
                value.key = str(len(self.storages))
                self.storages.append(value)
            kind = getattr(self.torch, STORAGES[value.array.dtype.name])
            return ("storage", kind, value.key, "cpu", value.array.size, *self.tail)
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
