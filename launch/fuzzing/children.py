"""Commands in forked children: everything is imported once, by the parent, which never starts JAX's backend itself."""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ALLOWED = (0, 1, 2, 75, 130, 143)  # done, done but for some, bad input, stopped, interrupted, terminated
CRASHED = 70  # of a child that raised what nobody caught
TICK = os.sysconf("SC_CLK_TCK")
Work = Callable[[], int | None]


class Outcome(NamedTuple):
    """How a child ended: exit code (negative: the signal), what it printed, seconds, whether the limit ended it, CPU seconds,
    and whether it was killed at its moment."""

    code: int
    text: str
    seconds: float
    hung: bool
    computed: float = 0.0
    killed: bool = False

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


class _Clock:
    """Tells a process that hangs from one that a busy machine does not let run."""

    def __init__(self, pid: int, limit: float):
        self.pid, self.limit, self.began = pid, limit, time.monotonic()
        self.start()

    def start(self) -> None:
        """Something was done: all begins anew."""
        self.first = self.used()
        self.since, self.then = time.monotonic(), self.first + self.delayed()

    def is_over(self) -> bool:
        """Whether it computed for longer than the limit, or waited for as long without computing, or wanting to, for a second."""
        if time.monotonic() - self.since < self.limit:
            return False
        used, wanted = self.used(), self.used() + self.delayed()
        if used - self.first > self.limit or abs(wanted - self.then) < 1:
            return True
        self.since, self.then = time.monotonic(), wanted
        return False

    def used(self) -> float:
        """CPU seconds of the process and of those that it has waited for."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(map(int, fields[11:15])) / TICK

    def delayed(self) -> float:
        """Seconds that its threads wanted to run, and others ran; less once a thread has ended."""
        total = 0
        for path in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
            try:
                total += int(path.read_text().split()[1])
            except OSError:
                pass
        return total / 1e9


class Child:
    """A forked process that runs `work` in `folder`, its output in a file.

    `largest` is the size in bytes of files that it may write, as on a full disk; `env` is set before it runs.
    """

    def __init__(
        self,
        work: Work,
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
            os.environ.update(env or {})
            os._exit(_run(work, folder, told, largest))

    def kill(self) -> None:
        """SIGKILL for the process and its children."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def wait(self, limit: float) -> Outcome:
        """Its end, or that of `limit` seconds in which it computes, or does nothing."""
        clock = _Clock(self.pid, limit)
        return self._wait(clock.is_over)

    def kill_at(self, moment: float, limit: float) -> Outcome:
        """Its end, or a SIGKILL after `moment` CPU seconds, which come at the same place however busy the machine is."""
        clock, number = _Clock(self.pid, limit), ~self.pid << 3 | 2  # Linux's clock of a process; /proc takes longer

        def is_moment() -> bool:
            try:
                return time.clock_gettime(number) > moment
            except OSError:
                return False

        return self._wait(clock.is_over, is_moment)

    def _wait(self, is_over: Callable[[], bool], is_moment: Callable[[], bool] = lambda: False) -> Outcome:
        moment = hung = False
        while True:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if not (moment or hung) and ((moment := is_moment()) or (hung := is_over())):
                self.kill()
            time.sleep(0.005)
        self.kill()  # what it left running
        text = self.told.read_bytes().decode(errors="replace") if self.told.exists() else ""
        code = os.waitstatus_to_exitcode(status)
        hung, killed = (here and code == -signal.SIGKILL for here in (hung, moment))
        return Outcome(code, text, time.monotonic() - self.began, hung, used.ru_utime + used.ru_stime, killed)


def _run(work: Work, folder: Path, told: Path, largest: int) -> int:
    """Exit code of `work` in this process."""
    out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    code: object = 0
    try:
        os.chdir(folder)
        # Python ignores the signal that comes with it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest or resource.RLIM_INFINITY, resource.RLIM_INFINITY))
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


def run(work: Work, folder: Path, limit: float, largest: int = 0) -> Outcome:
    """Run `work` in a child, in `folder`, to its end; its output stays beside the folder."""
    return Child(work, folder, _told(folder), largest).wait(limit)


def run_each(jobs: Sequence[tuple[Work, Path, int]], place: Path, limit: float) -> list[Outcome | None]:
    """Run (work, folder, largest) after each other in one child: how each ended, None for one that took the child with it.

    After such an end the next child goes on with the next job; backends start, and programs compile, once for many.
    """
    ends: list[Outcome | None] = []
    while len(ends) < len(jobs):
        codes, first = place / "codes", len(ends)
        codes.write_text("")

        def work(first: int = first, codes: Path = codes) -> int:
            for job, folder, largest in jobs[first:]:
                code = _run(job, folder, _told(folder), largest)
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                with open(codes, "a") as file:
                    file.write(f"{code}\n")
            return 0

        child = Child(work, place, place / "child.txt")
        clock, seen = _Clock(child.pid, limit), 0

        def is_over(codes: Path = codes, clock: _Clock = clock) -> bool:
            nonlocal seen
            if (size := codes.stat().st_size) != seen:
                seen = size
                clock.start()
            return clock.is_over()

        child._wait(is_over)
        done = [int(line) for line in codes.read_text().split()]
        for code, (_, folder, _) in zip(done, jobs[first:], strict=False):
            ends.append(Outcome(code, _told(folder).read_bytes().decode(errors="replace"), 0.0, False))
        if len(ends) < len(jobs):
            ends.append(None)
    return ends


def _told(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.txt"
