"""What commands share: settings of the process, which the import of the library never changes, and whole files."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

from msr_jax.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Write a text file and the folders above it, whole or not at all; UserError where that fails, as on a full disk."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


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
    # Other arenas than the main one do not hold large blocks. But where a process simulates several devices, their threads
    # would wait for each other at a single one: measured, a step then takes 1.5 times as long.
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        mallopt(arena_max, 1)
