"""Parameters that are read while they are written: a file of any size goes through with one tensor in memory at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}  # of the dtypes in a safetensors header


class Stacked:
    """A float32 parameter whose leading axes stack tensors that are read when they are asked for; elsewhere an array.

    `readers` give those tensors in the order of the leading axes, contiguous or not.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...], readers: list[Callable[[], np.ndarray]]):
        self.shape, self.readers = shape, readers

    def blocks(self) -> Iterator[np.ndarray]:
        """The parameter in parts that follow each other in memory."""
        for read in self.readers:
            yield np.ascontiguousarray(read(), np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.empty(self.shape, np.float32)
        parts = whole.reshape(len(self.readers), -1)
        for part, block in zip(parts, self.blocks(), strict=True):
            part[:] = block.reshape(-1)
        return whole if dtype is None else whole.astype(dtype, copy=False)


def write_tensors(path: Path, tensors: Mapping[str, Any], dtype: type) -> None:
    """A safetensors file of arrays and `Stacked` parameters in `dtype`; its own library holds all of them at once to write."""
    name, size = NAMES[np.dtype(dtype)], np.dtype(dtype).itemsize
    header, end = {}, 0
    for key, tensor in tensors.items():
        start, end = end, end + size * int(np.prod(tensor.shape, dtype=np.int64))
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)  # data begins at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for tensor in tensors.values():
            for block in tensor.blocks() if isinstance(tensor, Stacked) else (np.asarray(tensor),):
                file.write(np.ascontiguousarray(block, dtype).data)
