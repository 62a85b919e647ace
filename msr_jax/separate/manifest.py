"""What became of every song, a JSON object a line: what other tools join with their own tables."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from msr_jax.audio.io import seekable
from msr_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


BEGINNING = b'{"source": '  # of every line


class Manifest:
    """A JSONL file that grows by a line for each song, and is whole after any kill; several processes may write to one.

    A line has `source` (as it was named), `sha256` (of that file), `model`, `settings`, `stems` ({name: path}), `levels` ({name:
    RMS in dB below full scale, null for silence}), `gain_db` (of all stems that were written, 0 but for --peak scale; null where none
    was), `clipped` ({name: samples}, of the same), `seconds` (of audio), `work_seconds`, `kept` (stems that were there before) and
    `error` (null, or the sentence). `model` and `settings` are of the run that wrote the line, also for stems that it kept.
    Of several lines of a source the last one counts: it may have been made again.
    """

    def __init__(self, path: Path):
        """Raises UserError if it cannot be written, or is another kind of file."""
        self.path = path
        self.done: dict[str, set[tuple[str, ...]]] = {}  # by source, its stems' places, of lines since its last error
        self.errors: dict[str, str | None] = {}  # by source, of its last line
        self.owners: dict[str, tuple[str, str | None]] = {}  # by a stem's place, the source and its hash
        self.hashes: dict[str, str | None] = {}  # by source
        self.read = 0  # bytes
        with self._open() as file:
            if rest := self._catch_up(file):  # a line that a full disk or a kill cut off, or no line of ours
                if not BEGINNING.startswith(rest[: len(BEGINNING)]):
                    raise ValueError(rest)
                os.ftruncate(file, self.read)

    @contextmanager
    def _open(self) -> Iterator[int]:
        """The file, held against other processes; what is wrong with it is a UserError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                yield file
        except OSError as error:
            raise UserError(f"cannot write --manifest {self.path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--manifest {self.path} is no manifest of separated songs; name another file") from error

    def _catch_up(self, file: int) -> bytes:
        """Read the lines that were not read yet, this process's or another's; what comes after the last whole one is left."""
        size = os.fstat(file).st_size
        if size < self.read:  # somebody moved the file away, and another one began
            self.read = 0
        text = os.pread(file, size - self.read, self.read)
        whole = text[: text.rfind(b"\n") + 1]
        for row in [json.loads(line) for line in whole.decode().splitlines()]:
            self._note(row)
        self.read += len(whole)
        return text[len(whole) :]

    def has(self, source: str, stems: Mapping[str, Any]) -> bool:
        """Whether there is a line, without an error, of this source and stems in these places, and none later of another song's there."""
        if _places(stems) not in self.done.get(source, ()):
            return False
        owners = [self.owners[str(place)] for place in stems.values()]
        return all(owner == source or (of and of == self.hashes[source]) for owner, of in owners)

    def tells(self, row: Mapping[str, Any]) -> bool:
        """Whether a line says the same of the source: that it has these stems, or the same error."""
        source, error = row["source"], row["error"]
        return self.errors.get(source) == error if error else self.has(source, row["stems"])

    def other_owner(self, source: str, sha256: str | None, stems: Iterable[Any]) -> str | None:
        """Another source, and another file by its hash, that a line says one of these places to be of; others may have written it now."""
        with self._open() as file:
            self._catch_up(file)
        for place in map(str, stems):
            owner, of = self.owners.get(place, (source, None))
            if owner != source and sha256 and of and of != sha256:
                return owner
        return None

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line. Raises UserError, as on a full disk."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with self._open() as file:
            while line:
                line = line[os.write(file, line) :]
            self._catch_up(file)

    def _note(self, row: Mapping[str, Any]) -> None:
        self.errors[row["source"]] = row["error"]
        if row["error"] is None:
            self.hashes[row["source"]] = row.get("sha256")
            self.done.setdefault(row["source"], set()).add(_places(row["stems"]))
            self.owners |= dict.fromkeys(map(str, row["stems"].values()), (row["source"], row.get("sha256")))
        else:
            self.done.pop(row["source"], None)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if fcntl:
                with suppress(OSError):  # a disk of several hosts without locks: appending is all there is
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _places(stems: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(map(str, stems.values())))


def sha256_of(path: Path) -> str | None:
    """Of a file's bytes; None where they cannot be read, and of a pipe or a device, which may have no end."""
    try:
        path = seekable(path)
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, UserError):
        return None
