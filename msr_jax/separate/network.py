"""The networks as compiled programs: on all devices at hand, in batches that fit into memory, kept for the next start."""

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msr_jax.errors import UserError
from msr_jax.files import write_whole
from msr_jax.machine import give_back_memory, processor
from msr_jax.messages import log, saying
from msr_jax.separate.gather import Calls, waited_for

KEPT = 32  # programs that are kept beside each other
SOURCES = ("devices.py", "audio/*.py", "methods/*.py", "models/*.py", "separate/*.py")  # that a program is traced from
MAX_BATCH = 64  # examples a call on an accelerator, per device: more is no faster
# Calls at a time on a CPU, and the bytes that they may take together: operations are short, and cores that one call leaves idle
# work for another. Measured on two cores: two calls are 1.35 times as fast for a small network and 1.1 to 1.4 for a large one,
# four no faster than two. On more cores it is not measured.
ABREAST, ABREAST_BYTES = min(4, max(2, (os.cpu_count() or 1) // 2)), 1_200_000_000

CONFIG: Any = jax.config  # whose fields have no types
AXIS = "devices"  # of the mesh that a call's mixtures are spread over
EVERYWHERE, EACH = PartitionSpec(), PartitionSpec(AXIS)
PLACES = (EVERYWHERE, EACH, EACH, EVERYWHERE)  # of a function's arguments

# (weights, mixture (batch, time, channels), place (batch, 2) integers, seed) -> stems (batch, stems, time, channels)
Function = Callable[[Any, Any, Any, Any], Any]


def local_devices() -> list[jax.Device]:
    """Those that a song is spread over: this process's, or the one that this thread computes on by default."""
    return jax.local_devices() if CONFIG.jax_default_device is None else list(jnp.zeros(()).devices())


def spread(function: Function, mesh: Mesh) -> Function:
    """The same for all devices of a mesh: each takes its part of the batch, and computes it as if it were alone."""
    if mesh.size == 1:
        return function
    spread_out: Function = jax.shard_map(function, mesh=mesh, in_specs=PLACES, out_specs=EACH, check_vma=False)
    return spread_out


def free_memory(device: jax.Device) -> int:
    """Bytes that are free on a device; of a CPU, what the system and the container have."""
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return int(limit - stats.get("bytes_in_use", 0))
    page = os.sysconf("SC_PAGE_SIZE")
    free = [page * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    with suppress(OSError, ValueError):  # "max" where a container has no limit
        limits = [int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current")]
        free.append(max(0, limits[0] - limits[1]))
    return min(free)


class Network:
    """Runs any number of mixtures through the networks. Several threads may use it.

    Every device takes as many at a time, and computes them as if it were alone: what comes out does not depend on the number
    of devices. A batch that memory does not hold is halved, and that is said.
    """

    def __init__(
        self,
        function: Callable[[bool], Function],
        weights: Any,
        stems: int,
        batch_size: int | None = None,
        memory: int | None = None,
        settings: Mapping[str, Any] | None = None,
        name: str = "the network",
        mixtures: int = 2,
    ):
        """
        Args:
          function: makes what runs; its argument is whether stems are refined one by one.
          weights: parameters as it takes them.
          stems: examples that a mixture becomes, at most.
          batch_size: examples per call and device; below `stems`, they are refined one by one. None takes `mixtures`
            of them on a CPU, and on an accelerator as many as `memory` holds, 64 examples at most.
          memory: bytes that a call may take on a device besides weights; None takes half of what is free.
          settings: what the program is made from beside this package's sources; None keeps none.
          name: what is said to be compiled.
          mixtures: that a call on a CPU takes where no batch size is named.
        """
        self.function, self.stems, self.settings, self.name = function, stems, settings, name
        self.devices = local_devices()
        self.mesh = Mesh(np.array(self.devices), (AXIS,))
        self.weights = jax.device_put(weights, self._placed(EVERYWHERE))
        self.is_one_cpu = len(self.devices) == 1 and self.devices[0].platform == "cpu"
        self.is_growing = batch_size is None and self.devices[0].platform != "cpu"
        self.batch_size = batch_size or mixtures * stems
        self.memory = memory if memory is not None else free_memory(self.devices[0]) // 2
        self._programs: dict[tuple[int, ...], Any] = {}  # by examples, samples and channels
        self._bytes: dict[tuple[int, ...], int] = {}  # that a call of each takes: asking takes 8 ms
        self._read: dict[tuple[int, ...], Path] = {}  # files of those that were kept
        self._compiling = threading.Lock()
        self._calls = Calls()

    def _mixtures(self, batch_size: int) -> int:
        return max(1, batch_size // self.stems)

    def mixtures_at_once(self, samples: int, channels: int) -> int:
        """What keeps all devices busy: a call's, or on a CPU those of all that run abreast. This compiles, as memory decides."""
        batch_size, _ = self._fitting((samples, channels))
        abreast = self._abreast(batch_size, (samples, channels))
        return self._mixtures(batch_size) * (abreast if self.is_one_cpu else len(self.devices))

    def _abreast(self, batch_size: int, shape: tuple[int, ...]) -> int:
        """Calls that run at a time: elsewhere than on a CPU one, and another that is on its way there."""
        if not self.is_one_cpu:
            return 2
        return max(1, min(ABREAST, min(self.memory, ABREAST_BYTES) // max(1, self._bytes[batch_size, *shape])))

    def lengths(self) -> list[int]:
        """Samples of the mixtures that there are programs for."""
        return sorted({samples for _, samples, _ in self._programs})

    def __call__(self, mixtures: np.ndarray, places: np.ndarray, seed: int) -> np.ndarray:
        """Mixtures (n, time, channels) and each one's place in its song (n, 2) -> stems (n, stems, time, channels).

        Those of several threads share calls.

        Raises:
          UserError: memory does not hold a single example.
        """
        shape = mixtures.shape[1:]
        batch_size, _ = self._fitting(shape)
        size = self._mixtures(batch_size) * len(self.devices)
        run, examples = partial(self._run, shape, seed), list(zip(mixtures, places, strict=True))
        return np.stack(self._calls(examples, (shape, seed), run, size, self._abreast(batch_size, shape)))

    def _run(self, shape: tuple[int, ...], seed: int, examples: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """One call for all of the examples, the batch filled up; several, if memory turns out not to hold it."""
        done: list[np.ndarray] = []
        while (at := sum(map(len, done))) < len(examples):
            batch_size, program = self._fitting(shape)
            size = self._mixtures(batch_size) * len(self.devices)
            chosen = examples[at : at + size]
            mixtures, places = (np.stack([pair[k] for pair in chosen]) for k in (0, 1))
            filled = np.resize(np.arange(len(chosen)), size)
            try:
                stems = program(self.weights, mixtures[filled], places[filled], np.uint32(seed))
                done.append(np.asarray(stems)[: len(chosen)])
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    self._halve(batch_size, "memory does not hold")
                elif not self._forget(batch_size, shape, program):
                    raise
        return np.concatenate(done)

    def _fitting(self, shape: tuple[int, ...]) -> tuple[int, Any]:
        """The batch size, and the program for mixtures of a shape (time, channels) that takes no more than `memory`."""
        with waited_for(), self._compiling:  # in this order: who is held at the program's end holds no lock
            while True:
                batch_size = self.batch_size
                program = self._programs.get((batch_size, *shape))
                if program is not None:
                    return batch_size, program
                program = self._compile(batch_size, shape)
                needed = self._bytes[batch_size, *shape] = _bytes_of_call(program)
                if needed > self.memory and batch_size > 1 and batch_size >= self.stems:
                    self._halve(batch_size, f"a call takes {needed / 1e9:.3g} GB of the {self.memory / 1e9:.3g} GB for")
                    continue
                if needed > self.memory:
                    log.info(
                        f"a call takes {needed / 1e9:.3g} GB, more than the {self.memory / 1e9:.3g} GB for it; there is no smaller one"
                    )
                self._programs[batch_size, *shape] = program
                if not self.is_growing:
                    return batch_size, program
                self.is_growing = False
                times = min(self.memory // max(1, needed), MAX_BATCH // batch_size)
                if times > 1:
                    self.batch_size = batch_size * 2 ** (int(times).bit_length() - 1)

    def _halve(self, batch_size: int, why: str) -> None:
        if batch_size == 1 or batch_size < self.stems:
            raise UserError(
                f"{why} a single stem of a chunk; take fewer --segments, give more --memory, or another device"
            )
        self.batch_size = min(self.batch_size, batch_size // 2)
        log.info(f"{why} {batch_size} stems at a time; going on with {self.batch_size}")

    def _forget(self, batch_size: int, shape: tuple[int, ...], program: Any) -> bool:
        """Drop a program that was read from a file, which may be why it fails; whether it was, or another thread has dropped it."""
        with self._compiling:
            key = batch_size, *shape
            if self._programs.get(key) is not program:
                return True
            path = self._read.pop(key, None)
            if path:
                del self._programs[key]
                path.unlink(missing_ok=True)
        return path is not None

    def _compile(self, batch_size: int, shape: tuple[int, ...]) -> Any:
        count = self._mixtures(batch_size) * len(self.devices)
        arguments = (
            self.weights,
            jax.ShapeDtypeStruct((count, *shape), np.float32),
            jax.ShapeDtypeStruct((count, 2), np.int32),
            jax.ShapeDtypeStruct((), np.uint32),
        )
        kept = self._kept(batch_size, shape)
        program = kept and _read(kept, arguments, self.devices)
        if kept and program:
            self._read[batch_size, *shape] = kept
            return program
        with saying(f"compiling {self.name}" + ("; it is kept for the next time" if kept else "")):
            function = spread(self.function(batch_size < self.stems), self.mesh)
            placed = tuple(self._placed(spec) for spec in PLACES)
            named = lambda *inputs: function(*inputs)
            # What JAX's own cache gives back cannot be kept here, as its functions are missing then: under a new name it has none.
            named.__name__ = f"separate_{version('msr_jax')}_{secrets.token_hex(8) if kept else ''}"
            jitted = jax.jit(named, in_shardings=placed, out_shardings=self._placed(EACH))
            program = jitted.lower(*arguments).compile()
            give_back_memory()
        if kept:
            _write(kept, program)
        return program

    def _placed(self, spec: PartitionSpec) -> Any:
        if len(self.devices) == 1:
            return jax.sharding.SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, spec)

    def _kept(self, batch_size: int, shape: tuple[int, ...]) -> Path | None:
        """The file of a program, beside those that JAX keeps; None where nothing is kept."""
        folder = CONFIG.jax_compilation_cache_dir
        if self.settings is None or not folder or "://" in folder:
            return None
        told = {
            "settings": self.settings,
            "batch": [batch_size, *shape],
            "devices": [device.device_kind for device in self.devices],
            "jax": [jax.__version__, jax.lib.__version__, str(CONFIG.jax_default_matmul_precision)],
            "processor": [processor(), os.environ.get("XLA_FLAGS", "")],
            "sources": _sources(),
        }
        text = json.dumps(told, sort_keys=True, default=str)
        return Path(folder) / f"separate-{hashlib.sha256(text.encode()).hexdigest()}.program"


def _bytes_of_call(program: Any) -> int:
    """What one device holds during a call, besides weights."""
    told = program.memory_analysis()
    return told.temp_size_in_bytes + told.output_size_in_bytes if told else 0


def _sources() -> str:
    """A hash of what programs are traced from: a kept one belongs to the very sources."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for pattern in SOURCES:
        for path in sorted(package.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path, arguments: tuple, devices: Sequence[jax.Device]) -> Any:
    """A program that `_write` wrote; None where there is none, it is another user's, or this JAX does not take it."""
    from jax.experimental.serialize_executable import deserialize_and_load

    try:
        is_own = not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
        digest, payload = (text := path.read_bytes())[:32], text[32:]
        if not is_own or hashlib.sha256(payload).digest() != digest:
            return None
        structures = jax.tree.structure((arguments, {})), jax.tree.structure(0)
        program = deserialize_and_load(payload, *structures, execution_devices=devices)
    except Exception:  # whatever is wrong with it: it can be made again
        return None
    with suppress(OSError):
        os.utime(path)
    return program


def _write(path: Path, program: Any) -> None:
    """Keep a program for `_read`, and drop those that were not used for the longest time; what fails is not kept."""
    from jax.experimental.serialize_executable import serialize

    with suppress(Exception):  # not every compiler's programs can be kept
        payload, _, _ = serialize(program)
        write_whole(path, hashlib.sha256(payload).digest() + payload)
        kept = sorted(path.parent.glob("separate-*.program"), key=lambda p: p.stat().st_mtime)
        for old in kept[:-KEPT]:
            old.unlink()
