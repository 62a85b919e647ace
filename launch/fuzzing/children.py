"""Commands in forked children: everything is imported once, by the parent, which never starts JAX's backend itself."""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ALLOWED = (0, 1, 2, 75, 130, 143)  # done, done but for some, bad input, stopped, interrupted, terminated
CRASHED = 70  # of a child that raised what nobody caught


class Outcome(NamedTuple):
    """How a child ended: exit code (negative: the signal), what it printed, seconds, and whether the limit ended it."""

    code: int
    text: str
    seconds: float
    hung: bool

    def fault(self) -> str | None:
        """What must not have happened, in a few words; None if nothing did."""
        if self.hung:
            return f"no end within {self.seconds:.0f} s"
        if "Traceback (most recent call last)" in self.text:
            last = [line for line in self.text.splitlines() if line and not line.startswith(" ")]
            return f"traceback: {last[-1] if last else ''}"
        if self.code not in ALLOWED:
            return f"exit code {self.code}"
        return None


class Child:
    """A forked process that runs `work` in `folder`, its output in a file.

    `largest` is the size in bytes of files that it may write, as on a full disk; `env` is set before it runs.
    """

    def __init__(
        self,
        work: Callable[[], int | None],
        folder: Path,
        told: Path,
        largest: int = 0,
        env: dict[str, str] | None = None,
    ):
        self.told, self.began = told, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()  # so that its own children end with it
            out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os._exit(_run(work, folder, largest, env or {}))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process; SIGKILL goes to its children too."""
        try:
            (os.killpg if number == signal.SIGKILL else os.kill)(self.pid, number)
        except ProcessLookupError:
            pass

    def wait(self, limit: float) -> Outcome:
        """Its end, or that of `limit` seconds."""
        hung = False
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if not hung and time.monotonic() - self.began > limit:
                hung = True
                self.kill()
            time.sleep(0.002)
        self.kill()  # what it left running
        text = self.told.read_bytes().decode(errors="replace")
        return Outcome(os.waitstatus_to_exitcode(status), text, time.monotonic() - self.began, hung)


def _run(work: Callable[[], int | None], folder: Path, largest: int, env: dict[str, str]) -> int:
    code: object = 0
    try:
        os.environ.update(env)
        os.chdir(folder)
        if largest:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (largest, largest)
            )  # Python ignores the signal that comes with it
        code = work()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = CRASHED
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass
    return code if isinstance(code, int) else 0 if code is None else 1


def run(
    work: Callable[[], int | None], folder: Path, limit: float, largest: int = 0, env: dict[str, str] | None = None
) -> Outcome:
    """Run `work` in a child, in `folder`, to its end; its output stays beside the folder."""
    return Child(work, folder, folder.parent / f"{folder.name}.txt", largest, env).wait(limit)
