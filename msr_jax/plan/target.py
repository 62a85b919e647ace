"""What a plan is made for: the devices of `--target KIND:SHAPE`, as the vendors' compilers describe them without a chip."""

import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from msr_jax.devices import traced_for
from msr_jax.errors import UserError, first_line
from msr_jax.plan.chips import CHIPS, FLAT_SLICES, LARGEST_SLICE, TPUS, Chip, gpu_description

MOST_DEVICES = 8960
MOST_CPUS = 1024
EXAMPLES = "v5e:8x8, v5p:2x2x1, v6e:2x2, h200:8, h100:2x8, a100:8, cpu:8"
# libtpu looks for the machine's own chips and their slice unless told that there are none, and lets one process in at a
# time, for the sake of the chips.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """name: as given; kind: in `CHIPS`, or "cpu"; platform: "tpu", "gpu" or "cpu"; devices: to make a mesh of;
    hosts: that they are in; compiler: its name and version.
    """

    name: str
    kind: str
    platform: str
    devices: tuple[Any, ...]
    hosts: int
    compiler: str

    @property
    def chip(self) -> Chip | None:
        """Its public figures; None for CPUs."""
        return CHIPS.get(self.kind)


def find_target(name: str) -> Target:
    """The devices of a target: "v5e:8x8" (a slice's topology), "h100:2x8" (hosts × GPUs) or "h200:8", "cpu:8".

    Must come before JAX is first used where CPUs are the target, as their number is then set.

    Raises:
      UserError: no such kind or topology, or the package that brings the compiler is missing.
    """
    kind, _, shape = name.lower().partition(":")
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(r"[0-9]{1,5}(x[0-9]{1,5})*", shape):
        raise UserError(
            f"--target is KIND:SHAPE with a kind among {', '.join(CHIPS)}, cpu, such as {EXAMPLES}; not '{name}'"
        )
    sizes = [int(size) for size in shape.split("x")]
    count = math.prod(sizes)
    most = MOST_CPUS if kind == "cpu" else MOST_DEVICES
    if not 1 <= count <= most:
        raise UserError(f"--target {name} has {count} devices; a plan is made for 1 to {most}")
    jax.config.update("jax_platforms", "cpu")  # the machine's own chips are not what is planned for, and stay free
    if kind == "cpu":
        return _cpus(name, sizes)
    return _tpus(name, kind, shape) if kind in TPUS else _gpus(name, kind, sizes)


def _cpus(name: str, sizes: list[int]) -> Target:
    if len(sizes) != 1:
        raise UserError(f"--target {name}: simulated CPU devices are written cpu:N")
    try:
        jax.config.update("jax_num_cpu_devices", sizes[0])
    except RuntimeError:  # JAX has been used: with as many as there are
        if jax.device_count() < sizes[0]:
            raise UserError(
                f"--target {name}: this process has started with {jax.device_count()} CPU devices"
            ) from None
    return Target(name, "cpu", "cpu", tuple(jax.devices("cpu")[: sizes[0]]), 1, f"jaxlib {version('jaxlib')}")


def _tpus(name: str, kind: str, shape: str) -> Target:
    _check_slice(name, kind, shape)
    for variable, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--target {name} needs the TPU's compiler, which is not here: pip install 'msr_jax[tpu]'")
    try:
        options: dict[str, Any] = {}
        if set(shape) == {"1", "x"} or shape == "2x4":  # one host of one chip, or of eight; else of four
            options["chips_per_host_bounds"] = (2, 4, 1) if shape == "2x4" else (1, 1, 1)
        if kind == "v4":  # a chip's two cores are one device, as JAX has them on a v4; libtpu's default is one each
            options["chip_config_name"] = "megacore"
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices
    except Exception as error:  # whatever libtpu throws for a slice that it does not know
        raise UserError(
            f"--target {name} is no slice that libtpu knows ({first_line(error)}); such are {EXAMPLES}"
        ) from error
    hosts = max(1, len({getattr(device, "process_index", 0) for device in devices}))
    return Target(name, kind, "tpu", tuple(devices), hosts, f"libtpu {version('libtpu')}")


def _check_slice(name: str, kind: str, shape: str) -> None:
    """libtpu describes slices of any size, also such as do not exist."""
    if kind in LARGEST_SLICE:
        sizes = [int(size) for size in shape.split("x")]
        if len(sizes) != 3 or any(size > 2 and size % 4 for size in sizes) or math.prod(sizes) > LARGEST_SLICE[kind]:
            raise UserError(
                f"--target {name}: a slice of {kind} has three sizes, each 1, 2 or a multiple of 4, and at most "
                f"{LARGEST_SLICE[kind]} chips, such as {kind}:2x2x1"
            )
    elif shape not in FLAT_SLICES:
        raise UserError(f"--target {name}: slices of {kind} are {', '.join(FLAT_SLICES)}")


def _gpus(name: str, kind: str, sizes: list[int]) -> Target:
    most = CHIPS[kind].per_host
    if len(sizes) > 2:
        raise UserError(f"--target {name}: GPUs are written {kind}:N, or {kind}:HOSTSxN")
    hosts, each = sizes if len(sizes) == 2 else (1, sizes[0])
    if each > most:
        needed = -(-each // most) if hosts == 1 else hosts
        near = f"{kind}:{needed}x{each // needed if hosts == 1 and each % needed == 0 else most}"
        raise UserError(f"--target {name}: a host has at most {most} of these GPUs; several hosts are written {near}")
    plugin = next((p for p in ("cuda13", "cuda12") if importlib.util.find_spec(f"jax_{p}_plugin")), None)
    if plugin is None:
        raise UserError(f"--target {name} needs NVIDIA's compiler, which is not here: pip install 'msr_jax[cuda]'")
    topology = f"1x{hosts}x{each}"
    try:
        devices = topologies.get_topology_desc(
            platform="cuda", topology_name=topology, topology=topology, target_config=gpu_description(CHIPS[kind])
        ).devices
    except Exception as error:
        raise UserError(
            f"--target {name}: the CUDA plugin cannot compile here ({first_line(error)}); pip install 'msr_jax[cuda]' brings one"
        ) from error
    return Target(name, kind, "gpu", tuple(devices), hosts, _cuda_version(plugin))


def _cuda_version(plugin: str) -> str:
    parts = [f"jax-{plugin}-pjrt {version(f'jax-{plugin}-pjrt')}"]
    for package in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            parts.append(f"cuDNN {version(package)}")
            break
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


@contextmanager
def tracing(target: Target) -> Iterator[None]:
    """What is traced within takes the target's forms, whatever the machine has.

    For the CPU, as a stand-in: the forms that all accelerators share. JAX itself asks the default device whether cuDNN's
    attention serves it; that is answered for the target too.
    """
    with ExitStack() as stack:
        stack.enter_context(traced_for("accelerator" if target.platform == "cpu" else target.platform))
        gpu = target.chip.gpu if target.chip else None
        if gpu is not None:
            from jax._src.cudnn import fused_attention_stablehlo as cudnn

            asked = lambda capability: tuple(int(part) for part in capability.split("."))
            at_least, equal = (lambda c: gpu.capability >= asked(c)), (lambda c: gpu.capability == asked(c))
            stack.enter_context(_replaced(cudnn, "check_compute_capability", at_least))
            stack.enter_context(_replaced(cudnn, "is_cuda_compute_capability_equal", equal))
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, function: Callable[[str], bool]) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, own)
