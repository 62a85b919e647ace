"""Files that are whole or not there: written beside their place and renamed; what is half-written is known, and cleared."""

import errno
import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from msr_jax.errors import UserError

LONGEST = 200  # bytes of a name that gets more around it
HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # in names on a disk that machines share
# What is there for a moment: files and folders of this process that are not whole yet, and empty folders made for them.
PASSING: set[Path] = set()


def try_writing(folder: Path) -> None:
    """Make a folder; OSError unless files can be made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_place(path: Path) -> None:
    """Raises UserError unless a file can be written there; its folder is made."""
    try:
        try_writing(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file and the folders above it, whole or not at all; UserError where that fails, as on a full disk."""
    beside = passing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        clear(beside)


def passing(path: Path) -> Path:
    """Name beside `path` to write it under until it is whole; `clear` it in the end, renamed or not.

    What processes that are gone left of it is cleared.
    """
    beside = path.with_name(f".{short_name(path.name)}.{HOST}.{os.getpid()}.tmp")
    clear_left_over(path.parent, [path.name])
    if beside not in PASSING:  # of an earlier process with this one's number, as in containers
        clear(beside)
    PASSING.add(beside)
    return beside


def short_name(name: str) -> str:
    """The name, or where what is added to it (as by `passing`) might not fit into most file systems' 255 bytes, its checksum."""
    told = os.fsencode(name)
    return name if len(told) <= LONGEST else f"{zlib.crc32(told):08x}"


def clear(path: Path) -> None:
    """Remove what is only half there, if it is: a file, a folder that `passing` named, or another that is empty."""
    with suppress(OSError):
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif path.suffix == ".tmp":
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rmdir()
    PASSING.discard(path)


def clear_left_over(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove from a folder what `passing` named, for these names or for all, in processes of this machine that were killed."""
    wanted = None if names is None else {short_name(name) for name in names}
    with suppress(OSError):  # whoever writes there says what is wrong with the folder
        for path in folder.glob(".*.tmp"):
            found = re.fullmatch(rf"\.(.+)\.{HOST}\.(\d+)\.tmp", path.name)
            if found and (wanted is None or found[1] in wanted) and not _is_running(int(found[2])):
                clear(path)


def _is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def printable(name: str) -> str:
    r"""A file's name with what is not UTF-8 in it, which Python carries along, written out: "caf\xe9"."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def native(path: str | Path) -> bytes | str:
    """A path as C libraries take it: one that is not UTF-8 would not become so by way of text."""
    return os.fsencode(path) if os.name == "posix" else str(path)
