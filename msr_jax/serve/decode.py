"""Decoding of an uploaded file in a process of its own, with limits on its time, memory and output.

A file from a stranger may be made to keep a decoder busy or to fill a disk; the server only ever reads what this wrote: float32
samples, channels interleaved, in a file, and lines of JSON on a pipe. Processes are forked from one that has loaded what they need,
for loading takes longer than a song.
"""

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from msr_jax.audio.io import AudioInfo, audio_info, read_blocks
from msr_jax.errors import UserError

BLOCK = 1 << 17  # samples that are read at a time
LOOK = 0.5  # seconds between two looks at whether anybody still waits
MOST_BYTES = 1 << 16  # of a message
# Windows forks nothing and loads it all for each file.
_FORKS = "forkserver" in multiprocessing.get_all_start_methods()
_context: Any = multiprocessing.get_context("forkserver" if _FORKS else "spawn")


class Limits(NamedTuple):
    """What a song may be: minutes, channels and Hz; and what decoding it may take: seconds of CPU, bytes of memory."""

    minutes: float = 20.0
    channels: int = 8
    rate: int = 192_000
    seconds: int = 120
    memory: int = 3 << 30


class Decoded(NamedTuple):
    """A song on the disk: float32 samples, channels interleaved; `frames` is samples per channel, rate in Hz."""

    path: Path
    frames: int
    channels: int
    sample_rate: int


def get_ready() -> None:
    """Start the process that others are forked from."""
    if _FORKS:
        from multiprocessing.forkserver import ensure_running

        _context.set_forkserver_preload(["__main__", __name__])
        ensure_running()


def check(source: Path, limits: Limits) -> None:
    """Refuse what a file's header shows already, before it waits for its turn.

    Raises:
      UserError: not audio, or longer, wider or faster than the limits; it speaks of "the file", for its place is the server's own
        affair.
    """
    for _ in _answers(_check_here, (source, limits), limits, threading.Event()):
        return


def decode(source: Path, out: Path, limits: Limits, stop: threading.Event) -> Iterator[tuple[Decoded, int]]:
    """Decode `source` into `out`, in a process that ends when it goes beyond `limits`, or at `stop`.

    Yields:
      (the song, how many of its frames are in the file), the last time with all of them. A file whose header does not tell its length
      gives this last one alone; what an mp3 lacks of its header's length is zeros.

    Raises:
      UserError: as `check`; or it is damaged, or too slow to decode.
    """
    for answer in _answers(_decode_here, (source, out, limits), limits, stop):
        song = Decoded(out, int(answer["frames"]), int(answer["channels"]), int(answer["sample_rate"]))
        yield song, int(answer["ready"])
        if answer["ready"] == song.frames:
            return


def _answers(
    work: Callable[..., Iterator[dict[str, int]]], arguments: tuple, limits: Limits, stop: threading.Event
) -> Iterator[dict[str, int]]:
    """What `work` yields in a process of its own; a UserError if it ends, which it only may when nobody asks any more."""
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_process, args=(theirs, work, arguments, limits), daemon=True)
    process.start()
    theirs.close()
    end = time.monotonic() + 2 * limits.seconds
    try:
        while time.monotonic() < end and not stop.is_set():
            if not ours.poll(LOOK):
                continue
            answer = json.loads(ours.recv_bytes(MOST_BYTES))
            if "error" in answer:
                raise UserError(answer["error"])
            yield answer
    except (EOFError, OSError, ValueError, KeyError):  # its limits ended it, or what it says makes no sense
        pass
    finally:
        process.kill()
        process.join()
        ours.close()
    raise UserError("the file took more time or memory to decode than is allowed here")


def _info(source: Path, limits: Limits) -> AudioInfo:
    info = audio_info(source)
    if info.channels > limits.channels:
        raise UserError(f"the file has {info.channels} channels; at most {limits.channels} are taken here")
    if info.sample_rate > limits.rate:
        raise UserError(f"the file has {info.sample_rate} samples a second; at most {limits.rate} are taken here")
    _check_length(info.frames or 0, info, limits)
    return info


def _check_length(frames: int, info: AudioInfo, limits: Limits) -> None:
    if frames > limits.minutes * 60 * info.sample_rate:
        raise UserError(f"the file is longer than the {limits.minutes:g} minutes that are taken here")


def _check_here(source: Path, limits: Limits) -> Iterator[dict[str, int]]:
    _info(source, limits)
    yield {}


def _decode_here(source: Path, out: Path, limits: Limits) -> Iterator[dict[str, int]]:
    info, frames = _info(source, limits), 0
    told = {"channels": info.channels, "sample_rate": info.sample_rate}
    with open(out, "wb") as sink:
        if info.frames is not None:
            os.truncate(out, 4 * info.channels * info.frames)
        for block in read_blocks(source, BLOCK):
            frames += len(block)
            _check_length(frames, info, limits)
            sink.write(block.tobytes())
            sink.flush()
            if info.frames is not None and frames < info.frames:
                yield {"frames": info.frames, "ready": frames, **told}
    whole = frames if info.frames is None else info.frames
    yield {"frames": whole, "ready": whole, **told}


def _limit_this_process(limits: Limits) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits; the caller's deadline holds there too
        return
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _process(pipe: Connection, work: Callable[..., Iterator[dict[str, int]]], arguments: tuple, limits: Limits) -> None:
    _limit_this_process(limits)
    say = lambda answer: pipe.send_bytes(json.dumps(answer).encode())
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # decoders complain there
        os.dup2(silent, stream)
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        try:
            for answer in work(*arguments):
                say(answer)
        except UserError as error:
            say({"error": str(error).replace(str(arguments[0]), "the file")})
        except MemoryError:
            say({"error": "the file takes more memory to decode than is allowed here"})
    os._exit(0)  # threads that feed a decoder need not be waited for
