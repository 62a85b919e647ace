"""Decoding of an uploaded file in a process of its own, with limits on its time, memory and output.

A file from a stranger may be made to keep a decoder busy or to fill a disk; the server only ever reads what this wrote.
Called as `python -m msr_jax.serve.decode SOURCE OUT LIMITS`: float32 samples, channels interleaved, in OUT; a JSON line on
standard output.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from msr_jax.audio.io import audio_info, read_blocks
from msr_jax.errors import UserError

BLOCK = 1 << 18  # samples that are read at a time


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


def decode(source: Path, out: Path, limits: Limits) -> Decoded:
    """Decode `source` into `out`, in a process that ends when it goes beyond `limits`.

    Raises:
      UserError: not audio, damaged, longer, wider or faster than the limits, or too slow to decode; it speaks of "the file",
        for its place is the server's own affair.
    """
    command = [sys.executable, "-m", "msr_jax.serve.decode", str(source), str(out), json.dumps(limits)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=2 * limits.seconds, check=False)
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError):
        answer = {}
    if "frames" not in answer:
        out.unlink(missing_ok=True)
        raise UserError(answer.get("error", "the file took more time or memory to decode than is allowed here"))
    return Decoded(out, answer["frames"], answer["channels"], answer["sample_rate"])


def _decode_here(source: Path, out: Path, limits: Limits) -> dict[str, int]:
    info = audio_info(source)
    if info.channels > limits.channels:
        raise UserError(f"the file has {info.channels} channels; at most {limits.channels} are taken here")
    if info.sample_rate > limits.rate:
        raise UserError(f"the file has {info.sample_rate} samples a second; at most {limits.rate} are taken here")
    most, frames = int(limits.minutes * 60 * info.sample_rate), 0
    with open(out, "wb") as sink:
        for block in read_blocks(source, BLOCK):
            frames += len(block)
            if frames > most:
                raise UserError(f"the file is longer than the {limits.minutes:g} minutes that are taken here")
            sink.write(block.tobytes())
    return {"frames": frames, "channels": info.channels, "sample_rate": info.sample_rate}


def _limit_this_process(limits: Limits) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits; the caller's deadline holds there too
        return
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    source, out, limits = Path(sys.argv[1]), Path(sys.argv[2]), Limits(*json.loads(sys.argv[3]))
    _limit_this_process(limits)
    try:
        answer: dict = _decode_here(source, out, limits)
    except UserError as error:
        answer = {"error": str(error).replace(str(source), "the file")}
    except MemoryError:
        answer = {"error": "the file takes more memory to decode than is allowed here"}
    print(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # threads that feed a decoder need not be waited for


if __name__ == "__main__":
    main()
