"""Audio that libsndfile does not know (AAC and ALAC in mp4, Opus in WebM, WMA, FLAC in Ogg, …), by PyAV or the program ffmpeg.

Both are FFmpeg. PyAV comes by pip, in the extra `media`; the program is used where it is installed and PyAV is not. What a
file is, its first bytes tell, and FFmpeg never guesses: some of its formats are lists that name other files to be opened.
"""

import errno
import math
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from msr_jax.audio.headers import id3_end
from msr_jax.errors import UserError

# FFmpeg's name of a format, by what the files begin with.
SIGNATURES = {
    bytes.fromhex("1a45dfa3"): "matroska",
    bytes.fromhex("3026b2758e66cf11"): "asf",
    b"OggS": "ogg",
    b"caff": "caf",
    b"MAC ": "ape",
    b"wvpk": "wv",
    b"TTA1": "tta",
    b"FLV\1": "flv",
    b"#!AMR": "amr",
    bytes.fromhex("0b77"): "ac3",
    bytes.fromhex("fff1"): "aac",
    bytes.fromhex("fff9"): "aac",
    bytes.fromhex("fff0"): "aac",
    bytes.fromhex("fff8"): "aac",
}
MP4_ATOMS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
SPEAKERS = "FL FR FC LFE BL BR FLC FRC BC SL SR TC TFL TFC TFR TBL TBC TBR".split()  # by bit of the mask
TELLS_LENGTH = ("mov", "matroska", "asf")  # formats whose header has a length that is no estimate
TICK = 1e-3  # seconds: what lengths in mp4 are mostly counted in
PADDING = 4096  # samples: what an encoder of mp4 may fill its last frames with
SHORT = 0.2  # seconds by which a whole file may be shorter than its header says


class MediaInfo(NamedTuple):
    """A stream of audio; `mask` as `AudioInfo.mask`, `seconds` None where the header does not tell; `about` may be an estimate."""

    channels: int
    sample_rate: int
    mask: int
    seconds: float | None
    about: float | None = None


def media_format(file: BinaryIO) -> str | None:
    """FFmpeg's name of a file's format; None for one that is none of those read here."""
    file.seek(id3_end(file))
    head = file.read(12)
    if head[4:8] in MP4_ATOMS:
        return "mov"
    return next((name for signature, name in SIGNATURES.items() if head.startswith(signature)), None)


@contextmanager
def open_media(path: Path, kind: str, stream: int = 0) -> Iterator[tuple[MediaInfo, Iterator[np.ndarray]]]:
    """A stream of a media file: what it is, and its audio in blocks (any, channels) float32.

    Args:
      kind: as `media_format` gives.
      stream: number among the file's streams of audio.

    Raises:
      UserError: no such stream, nothing to decode it with, damaged, or shorter than its header says; the last while reading.
    """
    if find_spec("av"):
        opened = _by_pyav(path, kind, stream)
    elif shutil.which("ffmpeg"):
        opened = _by_ffmpeg(path, kind, stream)
    else:
        raise UserError(f"{path} needs PyAV or ffmpeg to be read: pip install 'msr_jax[media]', or install ffmpeg")
    with opened as (info, blocks, packets):
        yield info, _measured(path, kind, info, blocks, packets)


def _measured(
    path: Path, kind: str, info: MediaInfo, blocks: Iterator[np.ndarray], packets: dict[str, float]
) -> Iterator[np.ndarray]:
    """The blocks without what an encoder of mp4 has filled the last frames with; an error if they end early.

    `packets`: when all blocks are taken, "end" is the second at which the last one ends. The length in a header of mp4 is often in
    thousandths of a second; where it may be, the packets decide within one of these.
    """
    wanted = None if info.seconds is None else round(info.seconds * info.sample_rate)
    slack, done = 0, 0
    held: list[np.ndarray] = []
    if info.seconds is not None and abs(info.seconds - TICK * round(info.seconds / TICK)) * info.sample_rate <= 0.51:
        slack = math.ceil(TICK * info.sample_rate)
    for block in blocks:
        if wanted is not None and kind == "mov":
            room = max(0, wanted - slack - done)
            held.append(block[room:])
            block = block[:room]
            if sum(map(len, held)) > PADDING + slack:  # more than padding: the length was none
                block, held, wanted = np.concatenate([block, *held]), [], None
        done += len(block)
        if len(block):
            yield block
    if wanted is not None and held:
        end = round(packets["end"] * info.sample_rate) if "end" in packets else wanted
        length = end if abs(end - wanted) <= slack else wanted
        block = np.concatenate(held)[: max(0, length - done)]
        done += len(block)
        if len(block):
            yield block
    if wanted is not None and done < wanted - SHORT * info.sample_rate:
        raise UserError(f"{path} is cut off: its header promises {wanted} samples, {done} could be read")


class _Quiet:
    """A file that answers a place which it does not have as C does: PyAV prints the traceback of what a file raises."""

    def __init__(self, file: BinaryIO):
        self.name, self.read, self.tell, self.file = "", file.read, file.tell, file

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self.file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return -errno.EINVAL


@contextmanager
def _by_pyav(path: Path, kind: str, stream: int) -> Iterator[tuple[MediaInfo, Iterator[np.ndarray], dict[str, float]]]:
    import av

    def told(error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or str(error)
        return UserError(f"{path} is damaged or cut off ({reason[:1].lower()}{reason[1:]})")

    # For tags that are not UTF-8; PyAV has the option up to 18.
    lenient: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
    # By an open file: a name that is not UTF-8 could not be given.
    with open(path, "rb") as file:
        try:
            container = av.open(cast(Any, _Quiet(file)), "r", format=kind, **lenient)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise told(error) from error
        with closing(container):
            if len(container.streams.audio) <= stream:
                raise UserError(f"{path} has {len(container.streams.audio)} streams of audio, not {stream + 1}")
            source, resampler = container.streams.audio[stream], av.AudioResampler(format="flt")
            packets: dict[str, float] = {}

            def decode() -> Generator[Any, None, None]:
                try:
                    for packet in container.demux(source):
                        if packet.pts is not None and packet.duration and packet.time_base:
                            packets["end"] = float((packet.pts + packet.duration) * packet.time_base)
                        for frame in packet.decode():
                            yield from resampler.resample(frame)
                    yield from resampler.resample(None)
                except (av.FFmpegError, OSError, ValueError) as error:
                    raise told(error) from error

            frames = decode()
            first = next(frames, None)
            if first is None:
                raise UserError(f"{path} holds no audio samples")
            names = [channel.name for channel in first.layout.channels]
            mask = sum(1 << SPEAKERS.index(name) for name in names) if set(names) <= set(SPEAKERS) else 0
            seconds = None
            if kind in TELLS_LENGTH and source.duration and source.time_base:
                seconds = float(source.duration * source.time_base)
            elif kind in TELLS_LENGTH and container.duration:
                seconds = container.duration / av.time_base
            about = container.duration / av.time_base if container.duration else seconds
            info = MediaInfo(len(names), first.sample_rate, mask, seconds, about)
            # Else they may end with the interpreter, where PyAV has no errors to be caught any more.
            with closing(frames):
                yield info, (frame.to_ndarray().reshape(-1, len(names)) for frame in chain([first], frames)), packets


@contextmanager
def _by_ffmpeg(
    path: Path, kind: str, stream: int
) -> Iterator[tuple[MediaInfo, Iterator[np.ndarray], dict[str, float]]]:
    command = [
        "ffmpeg",
        "-nostdin",
        "-v",
        "error",
        "-xerror",
        "-f",
        kind,
        "-i",
        f"file:{path}",
        "-map",
        f"0:a:{stream}",
    ]
    command += ["-bitexact", "-map_metadata", "-1", "-c:a", "pcm_f32le", "-f", "wav", "-"]
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as program:
        assert program.stdout is not None
        pipe = program.stdout

        def check() -> None:
            code = program.wait()
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            # What it says of a file that ends early is no failure to it.
            if code or any("prematurely" in line for line in lines):
                raise UserError(f"{path} cannot be read by ffmpeg ({lines[-1] if lines else f'exit code {code}'})")

        def blocks() -> Iterator[np.ndarray]:
            width = 4 * info.channels
            while data := pipe.read(width << 16):
                yield np.frombuffer(data[: len(data) // width * width], np.float32).reshape(-1, info.channels)
            check()

        try:
            fmt = b""
            pipe.read(12)
            while (head := pipe.read(8)) and head[:4] != b"data":
                body = pipe.read(struct.unpack("<I", head[4:])[0])
                fmt = body if head[:4] == b"fmt " else fmt
            if not fmt:
                check()
                raise UserError(f"{path} holds no audio samples")
            channels, rate = struct.unpack("<HI", fmt[2:8])
            mask = struct.unpack("<I", fmt[20:24])[0] if len(fmt) >= 24 else 0
            info = MediaInfo(channels, rate, mask, None)
            yield info, blocks(), {}
        finally:
            program.kill()
