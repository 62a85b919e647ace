"""Public figures of accelerators, for utilisation and for plans; makers' data sheets, dense bfloat16, per chip."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """What NVIDIA's compiler asks of a chip beside its memory: makers' architecture guides; sizes in bytes."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # float32 units of one
    shared: int  # memory of one
    shared_per_block: int  # at most
    l2: int
    clock: float  # GHz
    installed: int  # memory as the driver counts it, bytes


class Chip(NamedTuple):
    """FLOP/s in bfloat16 with float32 accumulation, memory in bytes and bytes/s, and bytes/s that a chip sends to others.

    `link`: inside a slice (TPU) or a host (GPU), one way; `host_link`: between hosts, per chip, one way: for TPUs the
    same, as slices span hosts; for GPUs one 400 Gbit/s port each (200 for A100), as the makers' reference systems have.
    A TPU's memory is in units of 2³⁰, as its compiler counts: of a v5e's 16 it gives a program 15.75.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    host_link: float
    per_host: int
    gpu: Gpu | None = None


T, G, KB, MB, GIB = 1e12, 1e9, 2**10, 2**20, 2**30
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * KB, 163 * KB, 40 * MB, 1.41, 85 * 10**9)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * KB, 227 * KB, 50 * MB, 1.98, 85 * 10**9)
H200 = Gpu("NVIDIA H200", (9, 0), 132, 128, 228 * KB, 227 * KB, 50 * MB, 1.98, 150 * 10**9)
B200 = Gpu("NVIDIA B200", (10, 0), 148, 128, 228 * KB, 227 * KB, 126 * MB, 1.965, 191 * 10**9)
CHIPS = {
    "v4": Chip(275 * T, 32 * GIB, 1228 * G, 150 * G, 150 * G, 4),
    "v5e": Chip(197 * T, 16 * GIB, 819 * G, 100 * G, 100 * G, 4),
    "v5p": Chip(459 * T, 95 * GIB, 2765 * G, 300 * G, 300 * G, 4),
    "v6e": Chip(918 * T, 32 * GIB, 1640 * G, 224 * G, 224 * G, 4),
    "a100": Chip(312 * T, 80 * G, 2039 * G, 300 * G, 25 * G, 8, A100),
    "h100": Chip(989 * T, 80 * G, 3350 * G, 450 * G, 50 * G, 8, H100),
    "h200": Chip(989 * T, 141 * G, 4800 * G, 450 * G, 50 * G, 8, H200),
    "b200": Chip(2250 * T, 180 * G, 8000 * G, 900 * G, 50 * G, 8, B200),
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.gpu is None)
GPUS = tuple(name for name, chip in CHIPS.items() if chip.gpu is not None)
# Slices of the flat TPUs that can be had; those of the others have three sizes, each 1, 2 or a multiple of 4.
FLAT_SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
LARGEST_SLICE = {"v4": 4096, "v5p": 8960}  # chips
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


def gpu_description(chip: Chip) -> str:
    """The text by which XLA's compiler for NVIDIA knows a GPU that is not there (`GpuTargetConfigProto`)."""
    gpu = chip.gpu
    if gpu is None:
        raise ValueError("only GPUs are described by a text")
    major, minor = gpu.capability
    # Instructions of one architecture alone, which Hopper's and Blackwell's matrix units need.
    extension = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: {48 * KB}
  shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared_per_block}
  threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: {gpu.units}
  block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.installed} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 1 }}
device_description_str: "{gpu.name}"
"""
