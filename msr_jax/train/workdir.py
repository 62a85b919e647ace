"""The working directory of a run: made, held by one run at a time, its files written whole."""

import fcntl
import os
import shutil
import signal
import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from msr_jax.errors import UserError
from msr_jax.files import write_whole
from msr_jax.process import EXIT_STOPPED, ending_with, handling_sigterm
from msr_jax.train.distributed import any_process
from msr_jax.weights.model_folder import restore_set_aside


class Workdir:
    """A working directory that this process holds until `release` or its death, however it dies.

    The lock is the kernel's, on the file `.lock`; it reaches as far as the file system's locks do (one machine, or NFS).
    """

    def __init__(self, path: Path):
        """Raises UserError if it cannot be made, written to, or another run holds it."""
        self.path = path
        self.lock: IO[str] | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK):
                raise UserError(f"cannot write to --workdir {path}: permission denied")
            self.lock = lock = open(path / ".lock", "a+")
            self._hold(lock)
            restore_set_aside(path / "model")
            for left in path.glob(".model.*"):  # of a run that was killed while it wrote
                shutil.rmtree(left)
        except OSError as error:
            raise UserError(f"cannot write to --workdir {path}: {error.strerror}") from error

    def _hold(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            self.release()
            raise UserError(f"--workdir {self.path} is held by a run ({holder}); wait for it or use another") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()

    def release(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def write(self, name: str, text: str) -> None:
        """Write a file, whole or not at all. Raises UserError, as on a full disk."""
        write_whole(self.path / name, text)


class StopNote:
    """Notes SIGTERM inside `with` instead of dying of it; the processes of a run stop together."""

    def __init__(self) -> None:
        self.is_set = False
        self.pending: jax.Array | None = None
        self.handling = handling_sigterm(self._note)

    def _note(self, *_: Any) -> None:
        self.is_set = True

    _note.told = "SIGTERM: saving after the steps in flight"  # type: ignore[attr-defined]

    def nothing_to_save(self) -> AbstractContextManager[None]:
        """Inside, where no step has been taken yet, SIGTERM ends a run of one process at once."""
        if jax.process_count() > 1:  # the others would wait for this one
            return nullcontext()
        stop = ending_with(EXIT_STOPPED, "stopped by SIGTERM before a step; start again to continue")
        if self.is_set:
            stop(signal.SIGTERM, None)
        return handling_sigterm(stop)

    def is_agreed(self) -> bool:
        """Whether to stop, the same in every process; to be asked by all of them after every dispatch.

        Several processes learn of a signal to one of them a dispatch later: the answer travels behind the steps, and
        no device waits for it.
        """
        if jax.process_count() == 1:
            return self.is_set
        before, self.pending = self.pending, any_process(self.is_set)
        return before is not None and bool(np.asarray(before))

    def __enter__(self) -> "StopNote":
        self.handling.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.handling.__exit__(*error)
