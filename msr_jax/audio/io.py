"""Reading, writing and resampling of audio files: all that libsndfile knows, mp3 among it, and what `media` adds."""

import io
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from msr_jax.audio.headers import Spliced, find_samples
from msr_jax.audio.media import media_format, open_media
from msr_jax.audio.mpeg import find_frames
from msr_jax.audio.speakers import FROM_VORBIS, MASKS, flac_mask, write_mask
from msr_jax.audio.tags import Tags, write_tags
from msr_jax.errors import UserError
from msr_jax.files import PASSING, clear, native, passing

# suffix: (libsndfile's format, its subtype where none is named)
FORMATS = {
    ".wav": ("WAV", "FLOAT"),
    ".flac": ("FLAC", "PCM_24"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
}
# Rates in Hz of those that have few, and channels of those that have few.
RATES = {
    ".mp3": (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
    ".opus": (8000, 12_000, 16_000, 24_000, 48_000),
}
VORBIS_HIGHEST = 192_000  # Hz; libsndfile's Vorbis encoder ends the process somewhat above
CHANNELS = {".flac": 8, ".mp3": 2}
COMPRESSION = {"MP3": 0.1, "VORBIS": 0.2}  # of 0 to 1: near the best that they have, since stems are worked on
MPEG_FRAME = 1152  # samples that one frame of an mp3 holds at the most
WAV_BYTES = 2**32 - 2**25  # a WAV file counts its bytes in 32 bits; room for tags
WIDTH = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "DOUBLE": 8}  # bytes of a sample; 4 for the others
ROUNDED = ("PCM_16", "PCM_24")  # here, for libsndfile would round WAV's down


class AudioInfo(NamedTuple):
    """What the header of an audio file says.

    `frames` is samples per channel, None where the header does not tell; `mask` has a bit for each speaker, by the order of
    WAVEFORMATEXTENSIBLE, 0 where none are named; `about` is samples per channel, roughly, where `frames` is None and that is known.
    """

    frames: int | None
    channels: int
    sample_rate: int
    subtype: str
    mask: int = 0
    about: int | None = None


def _readable(path: str | Path) -> Path:
    """The path of a file that can be opened and holds something; UserError where it is none."""
    path = seekable(Path(path))
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "is a link to what does not exist" if path.is_symlink() else "does not exist"
        raise UserError(f"{path} {what}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is a folder; name an audio file")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is a pipe or a device, in which one cannot go back; save the audio as a file first")
    if status.st_size == 0:
        raise UserError(f"{path} is an empty file")
    return path


_copies: dict[tuple[int, int], Any] = {}  # of pipes, by device and number of the pipe: temporary files


def seekable(path: Path) -> Path:
    """The path itself; for a pipe that is open already (`/dev/stdin`, `<(…)`), that of a copy of what comes out of it.

    The copy lasts as long as the process. A pipe that has a name is none of these: nobody may be there to write into it.

    Raises:
      UserError: the pipe cannot be read, or the disk for temporary files is full.
    """
    if not str(path).startswith(("/dev/stdin", "/dev/fd/", "/proc/self/fd/")):
        return path
    try:
        status = os.stat(path)
        if not stat.S_ISFIFO(status.st_mode):
            return path
        pipe = status.st_dev, status.st_ino
        if pipe not in _copies:
            copy = tempfile.NamedTemporaryFile(prefix=f"{path.name}-", suffix=".audio")
            PASSING.add(Path(copy.name))
            with open(path, "rb") as source:
                shutil.copyfileobj(source, copy)
            copy.flush()
            _copies[pipe] = copy
        return Path(_copies[pipe].name)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def audio_info(path: str | Path) -> AudioInfo:
    """Header of an audio file.

    Raises:
      UserError: missing, a folder, a pipe with a name, empty, not audio, or plainly shorter on disk than its header says.
    """
    path = _readable(path)
    with _opened(path) as (info, _):
        return info


def _reason(error: Exception) -> str:
    reason = str(getattr(error, "error_string", None) or getattr(error, "strerror", None) or error).rstrip(".")
    # "possibly a pipe" are libsndfile's words for an mp3 that is none.
    return "Format not recognised" if "possibly a pipe" in reason else reason


@contextmanager
def _opened(path: Path) -> Iterator[tuple[AudioInfo, Callable[[int], np.ndarray]]]:
    """What a file is, and how to read on in it: read(n) gives at most n samples per channel, none at the end."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            source = _source(path, file)
            opened = stack.enter_context(soundfile.SoundFile(source.file))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        except (RuntimeError, TypeError) as error:
            kind = media_format(file)
            if kind is None:
                raise UserError(f"{path} cannot be read as audio ({_reason(error)})") from error
            if kind == "ogg" and _ogg_is_cut(file):
                raise UserError(f"{path} is cut off: its last page is missing or incomplete") from error
            media, blocks = stack.enter_context(open_media(path, kind))
            about = round(media.about * media.sample_rate) if media.about else None
            yield AudioInfo(None, media.channels, media.sample_rate, "", media.mask, about), _by_length(blocks)
            return
        if opened.frames == 0:
            raise UserError(f"{path} holds no audio samples")
        if opened.format == "OGG" and opened.seekable():
            # Else a stream that was cut out of another begins late (findings/libsndfile_opus_granule.sh).
            opened.seek(0)
        if opened.format == "OGG" and _ogg_is_cut(file):
            raise UserError(f"{path} is cut off: its last page is missing or incomplete")
        frames = source.frames or (opened.frames if opened.frames < 2**60 else None)
        if frames != opened.frames:
            opened.seekable = lambda: False  # else soundfile seeks after every block, beyond the end too, and fails
        mask, channels = source.mask, opened.channels
        order: Any = slice(None)
        if opened.format == "FLAC" and channels > 2:
            mask = flac_mask(path, channels)
        elif opened.format == "OGG" and channels in FROM_VORBIS:
            mask, order = MASKS[channels], FROM_VORBIS[channels]
        read = lambda n: opened.read(n, dtype="float32", always_2d=True)[:, order]
        yield AudioInfo(frames, channels, opened.samplerate, opened.subtype, mask), read


def _by_length(blocks: Iterator[np.ndarray]) -> Callable[[int], np.ndarray]:
    """A function that gives the next of some audio, at most so many samples per channel."""
    rest: list[np.ndarray] = []

    def read(n: int) -> np.ndarray:
        block = rest.pop() if rest else next(blocks, np.zeros((0, 1), np.float32))
        if len(block) > n:
            rest.append(block[n:])
        return block[:n]

    return read


class _Source(NamedTuple):
    """What libsndfile is to open for a file, its speakers, and its true length where libsndfile would not know it."""

    file: Any
    mask: int
    frames: int | None = None


def _source(path: Path, file: BinaryIO) -> _Source:
    try:
        samples = find_samples(file)
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if samples and samples.is_cut:
        held = samples.stop - samples.start
        raise UserError(f"{path} is cut off: its header promises {samples.promised} bytes, the file has {held}")
    if samples and samples.head is not None:
        return _Source(Spliced(file, samples.head, samples.start, samples.stop), samples.mask)
    mpeg = None if samples else find_frames(file, path.suffix)
    if mpeg:
        # Where nothing tells the number of frames, libsndfile estimates it from the first bit rate and would end there:
        # a file that is longer by what rates can differ is read to its true end, which is known.
        zeros = 0 if mpeg.frames is None else 64 * (mpeg.stop - mpeg.start)
        return _Source(Spliced(file, b"", mpeg.start, mpeg.stop, zeros), 0, mpeg.frames)
    return _Source(native(path), samples.mask if samples else 0)


def _ogg_is_cut(file: BinaryIO) -> bool:
    """Whether the last page of an Ogg file is not the end of its stream; libsndfile takes the last whole page for it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**17))  # a page has at most 65,307 bytes
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:
        return True
    return 27 + page[26] + sum(page[27 : 27 + page[26]]) > len(page)


def read_blocks(path: str | Path, block: int) -> Iterator[np.ndarray]:
    """Yield a file's audio in blocks (≤ block, channels), float32.

    Raises:
      UserError: as `audio_info`; and, while reading, for a file that ends early or holds NaN or infinite samples.
    """
    path = _readable(path)
    done = 0
    with _opened(path) as (info, read):
        try:
            left = lambda: block if info.frames is None else min(block, info.frames - done)
            while len(data := read(left())):
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
    if info.frames is not None and done < info.frames - (MPEG_FRAME if info.subtype.startswith("MPEG") else 0):
        raise UserError(f"{path} is cut off: its header promises {info.frames} samples, {done} could be read")


def read_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """A whole file as ((samples, channels) float32 in [-1, 1] for integer formats, sample rate in Hz).

    Raises:
      UserError: as `read_blocks`.
    """
    return np.concatenate(list(read_blocks(path, 1 << 20))), audio_info(path).sample_rate


MP3_LOUDEST = 1000.0  # 60 dB over full scale


class _Sink(io.FileIO):
    """A file to be written that keeps its first error: libsndfile tells of none that its encoders meet at the end."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data)
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return len(data)

    def check(self) -> None:
        if self.error:
            raise self.error


class AudioWriter:
    """Writes a file block by block beside its place; leaving the `with` gives it its name, an error discards it.

    Integer formats clip what lies beyond ±1; `clipped` counts such samples. WAV is 32-bit float unless a subtype says
    otherwise (RF64, its form for large files, where `frames` say that 4 GB do not do), FLAC 24-bit; MP3, Ogg Vorbis and Opus lose
    something. `mask` names the speakers of more than two channels, as `AudioInfo.mask`; `tags` are written where the format can
    hold them. `dither` adds the triangular noise that makes the rounding to 16 bits independent of the sound, and none to digital
    silence; it is a text that the noise is drawn from, other for what is added up later. What is written depends on the arguments
    alone, not on the time.

    Raises:
      UserError: another suffix, the place cannot be written, a rate that the format has not, NaN or infinite samples, or a WAV
        file of unknown length that passes 4 GB.
    """

    def __init__(
        self,
        path: str | Path,
        sample_rate: int,
        channels: int,
        subtype: str | None = None,
        frames: int | None = None,
        mask: int = 0,
        tags: Tags | None = None,
        dither: str = "",
    ):
        self.path, self.channels, self.mask, self.tags = Path(path), channels, mask, tags
        self.noise = np.random.default_rng(zlib.crc32(os.fsencode(dither))) if dither else None
        self.clipped = 0
        suffix = self.path.suffix.lower()
        if suffix not in FORMATS:
            raise UserError(f"cannot write {path}: the name must end in {', '.join(FORMATS)}")
        if os.path.isdir(self.path):  # False also of a name that is too long
            raise UserError(f"cannot write {path}: it is a folder")
        kind, usual = FORMATS[suffix]
        if channels > CHANNELS.get(suffix, channels):
            raise UserError(
                f"cannot write {path}: {kind} holds {CHANNELS[suffix]} channels at most, not {channels}; write WAV"
            )
        check_rate(self.path, sample_rate)
        self.subtype = subtype or usual
        # Samples per channel that fit.
        self.room = WAV_BYTES // (WIDTH.get(self.subtype, 4) * channels) if kind == "WAV" else None
        if self.room and frames and frames > self.room:
            kind, self.room = "RF64", None
        elif kind == "WAV" and mask and channels > 2:
            kind = "WAVEX"
        self.kind, self.beside = kind, passing(self.path)
        self.order = np.argsort(FROM_VORBIS[channels]) if kind == "OGG" and channels in FROM_VORBIS else None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.sink = _Sink(self.beside, "w+")
            self.file = soundfile.SoundFile(
                self.sink, "w", sample_rate, channels, self.subtype, format=kind,
                compression_level=COMPRESSION.get(kind, COMPRESSION.get(self.subtype)),
            )  # fmt: skip
        except (OSError, RuntimeError, ValueError) as error:
            clear(self.beside)
            raise UserError(f"cannot write {path}: {_reason(error)}") from error

    def write(self, audio: np.ndarray) -> None:
        """Append (samples, channels) float32."""
        if not np.isfinite([audio.max(initial=0), audio.min(initial=0)]).all():  # neither passes over a NaN
            raise UserError(f"cannot write {self.path}: it would hold NaN or infinite samples")
        if self.kind == "MP3":  # its encoder ends the process for samples that are far louder still
            audio = np.clip(audio, -MP3_LOUDEST, MP3_LOUDEST)
        if self.subtype not in ("FLOAT", "DOUBLE"):
            self.clipped += int(np.count_nonzero(np.abs(audio) > 1))
        if self.noise is not None:
            audio = audio + np.where(audio == 0, 0, self._dither(audio.shape))
        if self.room is not None and self.file.tell() + len(audio) > self.room:
            raise UserError(f"cannot write {self.path}: a WAV file of unknown length ends at 4 GB; write FLAC")
        try:
            self.file.write(_rounded(audio if self.order is None else audio[:, self.order], self.subtype))
            self.sink.check()
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {self.path}: {_reason(error)}; is the disk full?") from error

    def _dither(self, shape: tuple[int, ...]) -> np.ndarray:
        assert self.noise is not None
        one, two = self.noise.random((2, *shape), np.float32)
        return (one - two) / 2**15

    def close(self) -> None:
        """Everything onto the disk, still beside its place."""
        if self.file.closed:
            return
        try:
            self.file.close()
            self.sink.close()
            self.sink.check()
            if self.kind in ("WAV", "WAVEX", "RF64"):
                _leave_out_peaks(self.beside)
            if self.mask and self.channels > 2 and self.kind != "OGG":
                write_mask(self.beside, self.kind, self.channels, self.mask)
            if self.tags:
                write_tags(self.beside, self.kind, self.tags)
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


def _leave_out_peaks(path: Path) -> None:
    """Make padding of the PEAK chunk in a WAV file's header: it has the time of day in it."""
    with open(path, "r+b") as file:
        head = file.read(4096)
        peak = head.find(b"PEAK")
        if 0 <= peak < head.find(b"data"):
            size = int.from_bytes(head[peak + 4 : peak + 8], "little")
            file.seek(peak)
            file.write(b"PAD " + head[peak + 4 : peak + 8] + bytes(size))


def write_audio(path: str | Path, audio: np.ndarray, sample_rate: int, subtype: str | None = None) -> None:
    """Write (samples, channels) float32 in the format of the name's suffix, whole or not at all.

    Raises:
      UserError: another suffix, or the place cannot be written.
    """
    with AudioWriter(path, sample_rate, audio.shape[1], subtype, len(audio)) as writer:
        writer.write(audio)


def check_rate(path: Path, sample_rate: int) -> None:
    """Raises UserError if the format of a file's suffix does not have a rate (Hz)."""
    suffix = path.suffix.lower()
    if suffix == ".flac" and sample_rate > 65_535 and (sample_rate % 10 or sample_rate > 655_350):
        raise UserError(f"cannot write {path}: FLAC has no rate of {sample_rate} Hz; write WAV")
    if suffix == ".ogg" and sample_rate > VORBIS_HIGHEST:
        raise UserError(f"cannot write {path}: no Ogg Vorbis is written above {VORBIS_HIGHEST} Hz; write WAV")


def _rounded(audio: np.ndarray, subtype: str) -> np.ndarray:
    """Samples as the integers of a subtype that is rounded to here, as libsndfile takes them; others as they are."""
    if subtype not in ROUNDED:
        return audio
    bits = 8 * WIDTH[subtype]
    one = 2.0 ** (bits - 1)
    whole = np.clip(np.rint(audio * np.float32(one)), -one, one - 1)
    return whole.astype(np.int16) if bits == 16 else whole.astype(np.int32) << (32 - bits)


def writable_rate(suffix: str, rate: int) -> int:
    """The rate in Hz that a file of this suffix (".opus") takes in place of another: the next above, or its highest."""
    if suffix == ".ogg":
        return min(rate, VORBIS_HIGHEST)
    rates = RATES.get(suffix, (rate,))
    return next((r for r in rates if r >= rate), rates[-1])


def resample(audio: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Resample (samples, channels) float32 from one rate in Hz to another, by soxr at high quality."""
    if rate_in == rate_out:
        return audio
    return soxr.resample(audio, rate_in, rate_out, quality="HQ").astype(np.float32)
