"""Public figures of accelerators, for utilisation and for plans; makers' data sheets, dense bfloat16, per chip."""

from typing import NamedTuple


class Chip(NamedTuple):
    """FLOP/s in bfloat16 with float32 accumulation, memory in bytes and bytes/s, and bytes/s that a chip sends to others.

    `link`: inside a slice (TPU) or a host (GPU), one way; `host_link`: between hosts, per chip, one way: for TPUs the
    same, as slices span hosts; for GPUs one 400 Gbit/s port each (200 for A100), as the makers' reference systems have.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    host_link: float
    per_host: int


T, G = 1e12, 1e9
CHIPS = {
    "v4": Chip(275 * T, 32 * G, 1228 * G, 150 * G, 150 * G, 4),
    "v5e": Chip(197 * T, 16 * G, 819 * G, 100 * G, 100 * G, 4),
    "v5p": Chip(459 * T, 95 * G, 2765 * G, 300 * G, 300 * G, 4),
    "v6e": Chip(918 * T, 32 * G, 1640 * G, 224 * G, 224 * G, 4),
    "a100": Chip(312 * T, 80 * G, 2039 * G, 300 * G, 25 * G, 8),
    "h100": Chip(989 * T, 80 * G, 3350 * G, 450 * G, 50 * G, 8),
    "h200": Chip(989 * T, 141 * G, 4800 * G, 450 * G, 50 * G, 8),
    "b200": Chip(2250 * T, 180 * G, 8000 * G, 900 * G, 50 * G, 8),
}
# What JAX calls them (`device_kind`), in lower case.
KINDS = {
    "tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5": "v5p", "tpu v5p": "v5p", "tpu v6 lite": "v6e",
    "tpu v6e": "v6e",
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Data-sheet bfloat16 FLOP/s of a device by JAX's name for it; None if it is not in the table."""
    kind = device_kind.lower()
    name = KINDS.get(kind) or next((chip for chip in CHIPS if f" {chip}" in f" {kind}"), None)
    return CHIPS[name].flops if name else None
