"""This machine: the user's cache folder, processor and memory; settings that the import of the library never changes."""

import ctypes
import hashlib
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

from msr_jax.errors import UserError
from msr_jax.files import clear, try_writing
from msr_jax.messages import log

COMPILED_BYTES = 2 * 2**30


def home() -> Path:
    """Where the package keeps what it can make again: `MSR_HOME`, or the user's cache folder.

    Raises:
      UserError: neither is there, as for a user of a container who has no `HOME` and no entry in the list of users.
    """
    given = os.environ.get("MSR_HOME")
    if given:
        return Path(given)
    from platformdirs import user_cache_path

    try:
        folder = user_cache_path("msr_jax")
    except RuntimeError:
        folder = Path("~")
    if folder.parts[:1] == ("~",):  # as other releases of platformdirs have it: a folder of that name in this one
        raise UserError("there is no home directory here; MSR_HOME names a place for what is kept")
    return folder


def keep_compiled_programs() -> None:
    """Have JAX keep compiled programs for the next process, at most `COMPILED_BYTES`.

    A folder for each processor and release of the compiler: a program of another one may use instructions that this one lacks.
    Whoever sets `JAX_COMPILATION_CACHE_DIR` decides alone.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    from importlib.metadata import version

    try:
        folder = home() / "compiled" / f"jaxlib-{version('jaxlib')}-{processor()}"
    except UserError as error:
        log.info(f"compiled programs are not kept: {error}")
        return
    try:
        try_writing(folder)
    except OSError as error:
        log.info(
            f"compiled programs are not kept: {folder} cannot be written ({error.strerror}); MSR_HOME names another place"
        )
        return
    _clear_half_kept(folder)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    for name, value in (
        ("COMPILATION_CACHE_MAX_SIZE", COMPILED_BYTES),
        ("PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0.2),
    ):
        os.environ[f"JAX_{name}"] = os.environ.get(f"JAX_{name}") or str(value)
    if "jax" in sys.modules:  # it has read them: a module with a backbone of one's own was imported first
        config = sys.modules["jax"].config
        config.update("jax_compilation_cache_dir", str(folder))
        config.update("jax_compilation_cache_max_size", int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]))
        seconds = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
        config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def _clear_half_kept(folder: Path) -> None:
    """Remove programs that a killed process or a full disk left half-written: JAX writes the `-atime` of one after it.

    JAX would warn of them at every start, never write them anew, and fail to make room for others.
    """
    kept = [path for path in folder.glob("*-cache") if not path.with_name(f"{path.name[:-6]}-atime").exists()]
    if kept:
        from filelock import FileLock, Timeout

        with suppress(OSError, Timeout), FileLock(folder / ".lockfile", timeout=0):  # JAX's: nobody writes
            for path in kept:
                if not path.with_name(f"{path.name[:-6]}-atime").exists():
                    clear(path)


def processor() -> str:
    """Eight characters that tell one kind of processor from another; Linux lists their features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = {line.partition(":")[0].strip(): line for line in lines}  # of one core
        kind = "".join(told.get(name, "") for name in ("model name", "flags", "Features"))
    except OSError:
        kind = f"{platform.machine()} {platform.processor()}"
    return hashlib.sha256(kind.encode()).hexdigest()[:8]


def cores() -> int:
    """Cores that this process may use; where the system does not tell (macOS), those that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """The processor, the cores that this process may use, and the operating system."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {cores()} cores, {platform.system()}, Python {platform.python_version()}"


def give_back_memory() -> None:
    """Hand back to the system what `keep_freed_memory` has kept: after work that will not come again, such as compiling."""
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def keep_freed_memory() -> None:
    """Let the C allocator keep freed memory for the next use; does nothing outside Linux with glibc.

    XLA on a CPU takes and frees its work space at every call, and glibc hands blocks of that size back to the system,
    which must then clear each page again: measured, that doubles the time of a training step of a small network.
    The cost: the process does not shrink after a peak.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # names of <malloc.h>
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    # Other arenas than the main one do not hold large blocks. A single one is not enough: its threads wait for each other, and
    # after compiling has left it in pieces a large network takes 1.2 times as long. Where a process simulates several devices,
    # a step takes 1.5 times as long.
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        mallopt(arena_max, 2)
