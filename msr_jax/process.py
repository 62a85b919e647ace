"""A command as a process: its arguments, and its end by a signal, within two seconds and with nothing left half-written."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, NoReturn

from msr_jax.errors import UserError
from msr_jax.files import PASSING, clear
from msr_jax.messages import log

INTERRUPTED = 130  # exit code of Ctrl-C, as shells have it
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved and stopped on request; the launchers start it again
# Seconds that the Python code has to end by itself after a signal; giving back the memory takes up to one more.
GRACE = 0.7
_ending = threading.Lock()


def begin(argv: Sequence[str]) -> None:
    """What every command begins with: its output can print any name, and no argument is empty.

    Raises:
      UserError: an option, or a place, without a value; an empty path would be the folder that one is in.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for before, argument in zip(["", *argv], argv, strict=False):
        is_option = argument.startswith("--") and argument.endswith("=") and "." not in argument
        if not argument or is_option:
            place = argument.rstrip("=") or before
            raise UserError(
                f"an empty value is given{f' after {place}' if place else ''}; leave it out, or name something"
            )


def parse_shard(text: str) -> tuple[int, int]:
    """(K, N) of "K/N": every N-th piece of work from the K-th on. Raises UserError unless 1 ≤ K ≤ N."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise UserError(f"--shard must be K/N with K from 1 to N, not '{text}'")
    return int(k), int(n)


class Ended(SystemExit):
    """SIGTERM, as an exception: the exit code, and what to say."""

    def __init__(self, code: int, told: str):
        super().__init__(code)
        self.told = told


def ending_with(code: int, told: str) -> Callable[[int, object], None]:
    """A handler of SIGTERM that ends the process with an exit code; `run_as_process` knows it by its attributes."""

    def handle(number: int, frame: object) -> None:
        signal.signal(number, again)
        raise Ended(code, told)

    def again(number: int, frame: object) -> None:
        """One more on the way out would end the clearing half-way."""

    for handler in (handle, again):
        handler.code, handler.told = code, told  # type: ignore[attr-defined]
    return handle


TERMINATED = ending_with(128 + signal.SIGTERM, "ended by SIGTERM")
HUNG_UP = ending_with(128 + signal.SIGHUP, "ended by SIGHUP") if hasattr(signal, "SIGHUP") else None


@contextmanager
def handling_sigterm(handler: Callable[[int, Any], None] = TERMINATED) -> Iterator[None]:
    """Inside, SIGTERM has this handler; by default it is an exception, so that what is half-written is cleared away.

    So does SIGHUP, of a terminal that is closed, unless it is ignored (nohup).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, handler)}
    if HUNG_UP and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, HUNG_UP)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def run_as_process(command: str, run: Callable[[], int]) -> int:
    """Run a process's command so that Ctrl-C and SIGTERM end it within two seconds, whatever it is doing.

    Python answers a signal when the main thread comes back from the compiler, a compiled call or another thread; where that
    takes longer than `GRACE`, a thread of its own clears what is half-written and ends the process. A handler that
    `ending_with` did not make is left to do its work, as training saves; its attribute `told` is said at once.

    Returns:
      The exit code; does not return where a signal ended the command.
    """
    into, out = socket.socketpair()
    into.setblocking(False)
    ends: list[tuple[str, Any]] = []

    def watch() -> None:
        while data := out.recv(1):
            handler = signal.getsignal(data[0])
            code, told = (getattr(handler, name, None) for name in ("code", "told"))
            if handler is signal.default_int_handler:
                code, told = INTERRUPTED, "interrupted"
            if code is not None:
                ends.append((f"{command}: {told}", code))
                time.sleep(GRACE)
                _end(*ends[-1])
            elif told:
                log.info(told)

    signal.set_wakeup_fd(into.fileno(), warn_on_full_buffer=False)
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        with handling_sigterm():
            try:
                code = run()
            except Exception:
                time.sleep(0.05)  # `watch` tells
                if ends:  # a library's callback has swallowed the signal's exception, and then missed what it was to do
                    _end(*ends[-1])
                raise
        # There may be threads that compute, which Python would abort; it does not know of all of them.
        if code:
            _flush()
            os._exit(code)
        return code
    except KeyboardInterrupt:
        _end(f"{command}: interrupted", INTERRUPTED)
    except Ended as end:  # threads that compute would keep the process
        _end(f"{command}: {end.told}", end.code)
    finally:
        signal.set_wakeup_fd(-1)
        into.close()  # which ends `watch`, unless it gives the main thread its time after a signal
        watching.join(0.1)
        if not watching.is_alive():
            out.close()
    raise AssertionError("ended")


def _end(told: str, code: Any) -> NoReturn:
    if threading.current_thread() is threading.main_thread():  # one more would leave what is half-written
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            signal.signal(number, signal.SIG_IGN)
    _ending.acquire()
    with suppress(OSError, ValueError):
        print(told, file=sys.stderr, flush=True)
    for path in sorted(PASSING, key=lambda path: -len(path.parts)):
        clear(path)
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.terminate()
    if sys.stdout and sys.stdout.isatty():
        print("\x1b[?25h", end="")  # the cursor, which a progress bar hides
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError, UserError):
            stream.flush()


def end_with_parent() -> None:
    """To be called in a worker process: it ends when the one that started it does, however that ends, instead of waiting for ever."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
