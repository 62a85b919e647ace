"""Reading, writing and resampling of audio files; everything that libsndfile knows, mp3 among it."""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from msr_jax.errors import UserError
from msr_jax.runtime import clear, passing

FORMATS = {".wav": "WAV", ".flac": "FLAC"}
MPEG_FRAME = 1152  # samples that one frame of an mp3 holds at the most
WAV_BYTES = 2**32 - 2**16  # a WAV file counts its bytes in 32 bits
WIDTH = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "DOUBLE": 8}  # bytes of a sample; 4 for the others
# Its notes on a file's header: the only place where libsndfile says that the file is shorter than the header promises.
PROMISES = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.M)
OPEN_ENDED = (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000)  # what programs write for a length they did not know yet


class AudioInfo(NamedTuple):
    """What the header of an audio file says; `frames` is samples per channel, None where the header does not tell."""

    frames: int | None
    channels: int
    sample_rate: int
    subtype: str


def audio_info(path: str | Path) -> AudioInfo:
    """Header of an audio file.

    Raises:
      UserError: missing, a folder, empty, not audio, or plainly shorter on disk than its header says.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name an audio file")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is an empty file")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    try:
        with soundfile.SoundFile(path) as file:
            info = AudioInfo(frames := file.frames, file.channels, file.samplerate, file.subtype)
            is_ogg, notes = file.format == "OGG", file.extra_info
    except (RuntimeError, TypeError) as error:  # TypeError: a name that ends in .raw
        raise UserError(f"{path} cannot be read as audio ({_reason(error)})") from error
    if info.frames == 0:
        raise UserError(f"{path} holds no audio samples")
    for promised, found in PROMISES.findall(notes):
        if int(promised) > int(found) and int(promised) not in OPEN_ENDED:
            raise UserError(f"{path} is cut off: its header promises {promised} bytes, the file has {found}")
    if is_ogg and _ogg_is_cut(path):
        raise UserError(f"{path} is cut off: its last page is missing or incomplete")
    is_streamed = frames > 2**60 or (_is_mpeg(info) and not _mp3_start(path)[1])
    return info._replace(frames=None) if is_streamed else info


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", None) or getattr(error, "strerror", None) or error).rstrip(".")


def _is_mpeg(info: AudioInfo) -> bool:
    return info.subtype.startswith("MPEG")


def _ogg_is_cut(path: Path) -> bool:
    """Whether the last page of an Ogg file is not the end of its stream; libsndfile takes the last whole page for it."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**17))  # a page has at most 65,307 bytes
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:
        return True
    return 27 + page[26] + sum(page[27 : 27 + page[26]]) > len(page)


def _mp3_start(path: Path) -> tuple[int, bool]:
    """Bytes of tags before the sound of an mp3, and whether its first frame says how many frames there are."""
    with open(path, "rb") as file:
        tag = file.read(10)
        start = 0
        if tag[:3] == b"ID3" and len(tag) == 10:
            start = 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        file.seek(start)
        head = file.read(4096)
    at = max(head.find(b"Xing"), head.find(b"Info"))
    return start, at >= 0 and len(head) > at + 7 and bool(head[at + 7] & 1)


def _open(path: Path, info: AudioInfo) -> soundfile.SoundFile:
    """Open for reading, so that a file of unknown length can be read to its true end."""
    if info.frames is not None or not _is_mpeg(info):
        file = soundfile.SoundFile(path)
        if info.frames is None:
            file.seekable = lambda: False  # else soundfile seeks after every block, beyond the end too, and fails
        return file
    # By name libsndfile would stop where it estimates the end to be; from a pipe it reads on. It cannot skip tags there.
    start = _mp3_start(path)[0]
    out, into = os.pipe()

    def feed() -> None:
        with suppress(BrokenPipeError), open(path, "rb") as source, open(into, "wb") as sink:
            source.seek(start)
            shutil.copyfileobj(source, sink)

    threading.Thread(target=feed, daemon=True).start()
    return soundfile.SoundFile(out, closefd=True)


def read_blocks(path: str | Path, block: int) -> Iterator[np.ndarray]:
    """Yield a file's audio in blocks (≤ block, channels), float32.

    Raises:
      UserError: as `audio_info`; and, while reading, for a file that ends early or holds NaN or infinite samples.
    """
    path, info = Path(path), audio_info(path)
    done = 0
    try:
        with _open(path, info) as file:
            while len(data := file.read(block, dtype="float32", always_2d=True)):
                if not np.isfinite(data).all():
                    at = done + int(np.argmin(np.isfinite(data).all(1)))
                    seconds = f"{at / info.sample_rate:.2f} s"
                    raise UserError(f"{path} holds a NaN or infinite sample at sample {at} ({seconds})")
                done += len(data)
                yield data
    except RuntimeError as error:
        raise UserError(f"{path} is damaged or cut off after sample {done} ({_reason(error)})") from error
    if done == 0:
        raise UserError(f"{path} holds no audio samples")
    # The last frame of an mp3 may be left out without a word; other formats are exact.
    if info.frames is not None and done < info.frames - (MPEG_FRAME if _is_mpeg(info) else 0):
        raise UserError(f"{path} is cut off: its header promises {info.frames} samples, {done} could be read")


def read_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """A whole file as ((samples, channels) float32 in [-1, 1] for integer formats, sample rate in Hz).

    Raises:
      UserError: as `read_blocks`.
    """
    return np.concatenate(list(read_blocks(path, 1 << 20))), audio_info(path).sample_rate


class AudioWriter:
    """Writes a file block by block beside its place; leaving the `with` gives it its name, an error discards it.

    Integer formats clip what lies beyond ±1; `clipped` counts such samples. WAV is 32-bit float unless a subtype says
    otherwise (RF64, its form for large files, where `frames` say that 4 GB do not do), FLAC 24-bit.

    Raises:
      UserError: another suffix, the place cannot be written, or a WAV file of unknown length passes 4 GB.
    """

    def __init__(
        self, path: str | Path, sample_rate: int, channels: int, subtype: str | None = None, frames: int | None = None
    ):
        self.path = Path(path)
        self.clipped = 0
        suffix = self.path.suffix.lower()
        if suffix not in FORMATS:
            raise UserError(f"cannot write {path}: the name must end in {' or '.join(FORMATS)}")
        if self.path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
        kind = FORMATS[suffix]
        self.subtype = subtype or {"WAV": "FLOAT", "FLAC": "PCM_24"}[kind]
        # Samples per channel that fit.
        self.room = WAV_BYTES // (WIDTH.get(self.subtype, 4) * channels) if kind == "WAV" else None
        if self.room and frames and frames > self.room:
            kind, self.room = "RF64", None
        self.beside = passing(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = soundfile.SoundFile(self.beside, "w", sample_rate, channels, self.subtype, format=kind)
        except (OSError, RuntimeError, ValueError) as error:
            clear(self.beside)
            raise UserError(f"cannot write {path}: {_reason(error)}") from error

    def write(self, audio: np.ndarray) -> None:
        """Append (samples, channels) float32."""
        if self.subtype not in ("FLOAT", "DOUBLE"):
            self.clipped += int(np.count_nonzero(np.abs(audio) > 1))
        if self.room is not None and self.file.tell() + len(audio) > self.room:
            raise UserError(f"cannot write {self.path}: a WAV file of unknown length ends at 4 GB; write FLAC")
        try:
            self.file.write(audio)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {self.path}: {_reason(error)}; is the disk full?") from error

    def close(self) -> None:
        """Everything onto the disk, still beside its place."""
        try:
            self.file.close()
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {self.path}: {_reason(error)}; is the disk full?") from error

    def __enter__(self) -> "AudioWriter":
        return self

    def __exit__(self, kind, value, trace) -> None:
        try:
            self.close()
            if kind is None:
                os.replace(self.beside, self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        finally:
            clear(self.beside)


def write_audio(path: str | Path, audio: np.ndarray, sample_rate: int, subtype: str | None = None) -> None:
    """Write (samples, channels) float32 as WAV or FLAC, whole or not at all.

    Raises:
      UserError: another suffix, or the place cannot be written.
    """
    with AudioWriter(path, sample_rate, audio.shape[1], subtype, len(audio)) as writer:
        writer.write(audio)


def resample(audio: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Resample (samples, channels) float32 from one rate in Hz to another, by soxr at high quality."""
    if rate_in == rate_out:
        return audio
    return soxr.resample(audio, rate_in, rate_out, quality="HQ").astype(np.float32)
