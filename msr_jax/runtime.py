"""What commands share: settings of the process, which the import of the library never changes, whole files, and the end."""

import ctypes
import errno
import hashlib
import logging
import os
import platform
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from msr_jax.errors import UserError

log = logging.getLogger("msr_jax")  # silent in a library's use; `msr` prints it
INTERRUPTED = 130  # exit code of Ctrl-C, as shells have it
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved and stopped on request; the launchers start it again
COMPILED_BYTES = 2 * 2**30
LONGEST = 200  # bytes of a name that gets more around it
HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # in names on a disk that machines share
# Seconds that the Python code has to end by itself after a signal; giving back the memory takes up to one more.
GRACE = 0.7
# What is there for a moment: files and folders of this process that are not whole yet, and empty folders made for them.
PASSING: set[Path] = set()
_ending = threading.Lock()


def _try_writing(folder: Path) -> None:
    """Make a folder; OSError unless files can be made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_place(path: Path) -> None:
    """Raises UserError unless a file can be written there; its folder is made."""
    try:
        _try_writing(path.parent)
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


def printable(name: str) -> str:
    r"""A file's name with what is not UTF-8 in it, which Python carries along, written out: "caf\xe9"."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def native(path: str | Path) -> bytes | str:
    """A path as C libraries take it: one that is not UTF-8 would not become so by way of text."""
    return os.fsencode(path) if os.name == "posix" else str(path)


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


@contextmanager
def handling_sigterm(handler: Callable[[int, Any], None] = TERMINATED) -> Iterator[None]:
    """Inside, SIGTERM has this handler; by default it is an exception, so that what is half-written is cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    threading.Thread(target=watch, daemon=True).start()
    try:
        with handling_sigterm():
            try:
                code = run()
            except Exception:
                time.sleep(0.05)  # `watch` tells
                if ends:  # a library's callback has swallowed the signal's exception, and then missed what it was to do
                    _end(*ends[-1])
                raise
        # Besides this thread and `watch` there may be one that computes, which Python would abort.
        if code and threading.active_count() > 2:
            _flush()
            os._exit(code)
        return code
    except KeyboardInterrupt:
        _end(f"{command}: interrupted", INTERRUPTED)
    except Ended as end:  # threads that compute would keep the process
        _end(f"{command}: {end.told}", end.code)
    finally:
        signal.set_wakeup_fd(-1)
    raise AssertionError("ended")


def _end(told: str, code: Any) -> NoReturn:
    if threading.current_thread() is threading.main_thread():  # one more would leave what is half-written
        for number in (signal.SIGINT, signal.SIGTERM):
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


@contextmanager
def saying(text: str, after: float = 1.0) -> Iterator[None]:
    """Log `text` if what is inside takes longer than so many seconds."""
    timer = threading.Timer(after, log.info, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _ToErrorOutput(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            print(
                self.format(record), file=sys.stderr, flush=True
            )  # the one of this moment: a progress bar has its own


def print_log() -> None:
    """Have what the package logs printed on the error output."""
    if not log.handlers:
        log.addHandler(_ToErrorOutput())
        log.setLevel(logging.INFO)
        log.propagate = False


def parse_shard(text: str) -> tuple[int, int]:
    """(K, N) of "K/N": every N-th piece of work from the K-th on. Raises UserError unless 1 ≤ K ≤ N."""
    k, _, n = text.partition("/")
    if not (k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise UserError(f"--shard must be K/N with K from 1 to N, not '{text}'")
    return int(k), int(n)


def home() -> Path:
    """Where the package keeps what it can make again: `MSR_HOME`, or the user's cache folder."""
    given = os.environ.get("MSR_HOME")
    if given:
        return Path(given)
    from platformdirs import user_cache_path

    return user_cache_path("msr_jax")


def keep_compiled_programs() -> None:
    """Have JAX keep compiled programs for the next process, at most `COMPILED_BYTES`.

    A folder for each processor and release of the compiler: a program of another one may use instructions that this one lacks.
    Whoever sets `JAX_COMPILATION_CACHE_DIR` decides alone.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    from importlib.metadata import version

    folder = home() / "compiled" / f"jaxlib-{version('jaxlib')}-{processor()}"
    try:
        _try_writing(folder)
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
