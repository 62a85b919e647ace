"""Reading, writing and resampling of audio files; everything that libsndfile knows, mp3 among it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from msr_jax.errors import UserError

FORMATS = {".wav": "WAV", ".flac": "FLAC"}


class AudioInfo(NamedTuple):
    """What the header of an audio file says; `frames` is samples per channel."""

    frames: int
    channels: int
    sample_rate: int
    subtype: str


def audio_info(path: str | Path) -> AudioInfo:
    """Header of an audio file.

    Raises:
      UserError: missing, a folder, empty, not audio, or plainly shorter on disk than its header says.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name an audio file")
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is an empty file")
    try:
        with soundfile.SoundFile(path) as file:
            info = AudioInfo(file.frames, file.channels, file.samplerate, file.subtype)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as audio ({_reason(error)})") from error
    if info.frames == 0:
        raise UserError(f"{path} holds no audio samples")
    declared = _declared_wav_bytes(path)
    if declared and declared > path.stat().st_size:
        raise UserError(
            f"{path} is cut off: its header promises {declared} bytes of audio, the file has {path.stat().st_size}"
        )
    return info


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".")


def _declared_wav_bytes(path: Path) -> int:
    """Bytes that the data chunk of a RIFF file promises; 0 if it is none or leaves them open. libsndfile reads on silently."""
    with open(path, "rb") as file:
        if file.read(4) != b"RIFF":
            return 0
        file.seek(12)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                return 0 if size in (0, 0xFFFFFFFF) else size
            file.seek(size + size % 2, os.SEEK_CUR)
    return 0


def read_blocks(path: str | Path, block: int) -> Iterator[np.ndarray]:
    """Yield a file's audio in blocks (≤ block, channels), float32.

    Raises:
      UserError: as `audio_info`; and, while reading, for a file that ends early or holds NaN or infinite samples.
    """
    info = audio_info(path)
    done = 0
    try:
        with soundfile.SoundFile(path) as file:
            while done < info.frames:
                data = file.read(min(block, info.frames - done), dtype="float32", always_2d=True)
                if len(data) == 0:
                    break
                if not np.isfinite(data).all():
                    at = done + int(np.argmin(np.isfinite(data).all(1)))
                    raise UserError(
                        f"{path} holds a NaN or infinite sample at sample {at} ({at / info.sample_rate:.2f} s)"
                    )
                done += len(data)
                yield data
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or cut off after sample {done} ({_reason(error)})") from error
    # The length of an mp3 is an estimate where its header does not say; other formats know theirs.
    if done < info.frames and info.subtype != "MPEG_LAYER_III":
        raise UserError(f"{path} is cut off: its header promises {info.frames} samples, {done} could be read")


def read_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """A whole file as ((samples, channels) float32 in [-1, 1] for integer formats, sample rate in Hz).

    Raises:
      UserError: as `read_blocks`.
    """
    return np.concatenate(list(read_blocks(path, 1 << 20))), audio_info(path).sample_rate


class AudioWriter:
    """Writes a file block by block under a temporary name; `close` gives it its own. Use in `with`: an error discards it.

    Integer formats clip what lies beyond ±1. WAV is 32-bit float unless a subtype says otherwise, FLAC 24-bit.
    """

    def __init__(self, path: str | Path, sample_rate: int, channels: int, subtype: str | None = None):
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        if suffix not in FORMATS:
            raise UserError(f"cannot write {path}: the name must end in {' or '.join(FORMATS)}")
        subtype = subtype or {"WAV": "FLOAT", "FLAC": "PCM_24"}[FORMATS[suffix]]
        self.beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = soundfile.SoundFile(self.beside, "w", sample_rate, channels, subtype, format=FORMATS[suffix])
        except (OSError, soundfile.LibsndfileError, RuntimeError, ValueError) as error:
            self.beside.unlink(missing_ok=True) if self.path.parent.is_dir() else None
            raise UserError(f"cannot write {path}: {_reason(error)}") from error

    def write(self, audio: np.ndarray) -> None:
        """Append (samples, channels) float32."""
        try:
            self.file.write(audio)
        except (OSError, soundfile.LibsndfileError, RuntimeError) as error:
            raise UserError(f"cannot write {self.path}: {_reason(error)}") from error

    def finish(self) -> None:
        """Close the temporary file and give it its name."""
        self.file.close()
        os.replace(self.beside, self.path)

    def discard(self) -> None:
        """Remove the temporary file."""
        self.file.close()
        self.beside.unlink(missing_ok=True)

    def __enter__(self) -> "AudioWriter":
        return self

    def __exit__(self, kind, value, trace) -> None:
        self.discard() if kind else self.finish()


def write_audio(path: str | Path, audio: np.ndarray, sample_rate: int, subtype: str | None = None) -> None:
    """Write (samples, channels) float32 as WAV or FLAC, whole or not at all.

    Raises:
      UserError: another suffix, or the place cannot be written.
    """
    with AudioWriter(path, sample_rate, audio.shape[1], subtype) as writer:
        writer.write(audio)


def resample(audio: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Resample (samples, channels) float32 from one rate in Hz to another, by soxr at high quality."""
    if rate_in == rate_out:
        return audio
    return soxr.resample(audio, rate_in, rate_out, quality="HQ").astype(np.float32)
