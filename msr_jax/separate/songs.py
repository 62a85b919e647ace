"""One song in, its stems out: whole, together, and none of them over a song or over older stems unasked."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msr_jax.audio.io import AudioInfo, AudioWriter, audio_info, check_rate, read_blocks, seekable, writable_rate
from msr_jax.audio.tags import Tags, read_tags, stem_tags
from msr_jax.data.stem_mp4 import SUFFIX
from msr_jax.data.tracks import is_mp4
from msr_jax.errors import UserError
from msr_jax.files import PASSING, clear, clear_left_over, passing
from msr_jax.separate.chunks import resampled_stems
from msr_jax.separate.interface import AudioSeparator

BLOCK_SECONDS = 10
LARGE = 2**62  # samples: more than a WAV file of any kind but RF64 has room for
MARGIN = 1.01  # of a length that is known roughly
SUBTYPES = {"16": "PCM_16", "24": "PCM_24", "32f": "FLOAT"}
ROUNDING = 1e-6  # above 1 that is no clipping


class Task(NamedTuple):
    """A song, and the folder that its stems go to.

    `names`: of the stems in there, with {stem} and {ext}. `is_shared`: the folder is for other songs too. `url`: where the song lies if
    that is no file here; `song` is then its name, until it is fetched. `is_found`: in a folder or by a pattern, not named itself.
    """

    song: Path
    folder: Path
    names: str = "{stem}.{ext}"
    is_shared: bool = False
    url: str | None = None
    is_found: bool = False

    @property
    def source(self) -> str:
        return self.url or str(self.song)

    def paths(self, stems: Iterable[str], suffix: str, folder: Path | None = None) -> dict[str, Path]:
        """Of the stems; in `folder` instead of its own, if one is given."""
        place = folder or self.folder
        return {stem: place / self.names.format(stem=stem, ext=suffix) for stem in stems}


class Output(NamedTuple):
    """How stems are written.

    `bits`: "16" (with dither), "24" or "32f"; None takes the format's own. `peak`, of samples beyond ±1: "keep" them, "clip" them, or
    "scale" all stems of a song by one gain; None keeps them where the format can.
    """

    suffix: str = "wav"  # wav, flac, mp3, ogg, opus
    bits: str | None = None
    peak: str | None = None
    with_tags: bool = True  # the song's and its cover, with `TITLE (stem)` as title

    def check(self) -> None:
        """Raises UserError where they contradict each other."""
        having = {"wav": tuple(SUBTYPES), "flac": ("16", "24")}.get(self.suffix, ())
        if self.bits and self.bits not in having:
            choice = f"can have --bits {' or '.join(having)}" if having else "has no bits per sample"
            raise UserError(f"--format {self.suffix} {choice}, not {self.bits}")
        if self.peak == "keep" and not self.keeps_peaks:
            raise UserError("--peak keep goes with 32-bit float WAV; other formats end at ±1: clip or scale")

    @property
    def keeps_peaks(self) -> bool:
        return self.suffix == "wav" and self.bits in (None, "32f")


class Written(NamedTuple):
    """What was written of a song, by stem."""

    paths: dict[str, Path]
    clipped: dict[str, int]  # samples that were clipped
    levels: dict[str, float | None]  # RMS in dB below full scale; None for silence
    seconds: float  # of audio
    peak: float  # largest sample of all stems
    gain: float  # of all stems, 1 but for `peak` "scale"


class WrittenMeanwhile(UserError):
    """Another run has written the same song's stems; they are whole."""


class About(NamedTuple):
    """What is known of a song before it is separated."""

    info: AudioInfo
    tags: Tags | None


def song_name(song: Path) -> str:
    """A song's name without its suffix, which is all of `.stem.mp4`, as where tracks are scored."""
    return song.name[: -len(SUFFIX)] if is_mp4(song) else song.stem


def about_song(song: Path, output: Output) -> About:
    """Raises UserError if it cannot be read."""
    return About(audio_info(song), read_tags(seekable(song)) if output.with_tags else None)


def stems_of(separator: AudioSeparator, song: Path, info: AudioInfo) -> Iterator[dict[str, np.ndarray]]:
    """The stems (samples, channels) of a song, part by part, as they are taken; memory holds a few parts.

    Raises:
      UserError: the song turns out damaged.
    """
    blocks = read_blocks(song, BLOCK_SECONDS * info.sample_rate)
    return separator.stream(blocks, info.sample_rate, info.channels, info.frames)


def write_stems(
    parts: Iterable[Mapping[str, np.ndarray]],
    task: Task,
    about: About,
    output: Output,
    stems: Sequence[str],
    progress: Callable[[int], Any] | None = None,
) -> Written:
    """Write the stems of a song, from what `stems_of` gives, as `task.folder`/<stem>.<suffix>; all appear together, or none.

    What runs that were killed left there is cleared.

    Args:
      stems: those to write.
      progress: called with the samples done.

    Raises:
      UserError: the song turns out damaged, or a stem cannot be written.
    """
    found, folder = about.tags, task.folder
    new_folders = [place for place in folder.parents if not place.exists()]  # innermost first
    PASSING.update(new_folders)
    unscaled_name = f"{folder.name}.unscaled"
    clear_left_over(folder.parent, [folder.name])
    if not task.is_shared:
        for place in {path.parent for path in task.paths(stems, output.suffix).values()}:
            clear_left_over(place)
    # A new folder gets its name when all is in it, unless others write to it too.
    beside = folder if folder.exists() or task.is_shared else passing(folder)
    unscaled = passing(folder.with_name(unscaled_name))
    paths = task.paths(stems, output.suffix, beside)
    title = song_name(task.song) if task.is_shared else folder.name
    tags = {stem: stem_tags(found, stem, title) for stem in stems} if found else {}
    try:
        rate = writable_rate(f".{output.suffix}", about.info.sample_rate)
        for path in paths.values():
            check_rate(path, rate)  # before the song is separated
        counted = _at_rate(_counted(parts, progress) if progress else parts, list(paths), about.info, rate)
        info = about.info._replace(sample_rate=rate)  # only WAV asks for its length, and WAV has every rate
        if info.frames is None and info.about:
            info = info._replace(frames=round(info.about * MARGIN))
        if output.peak == "scale":
            # The gain is known when all is there; it is that of all stems, also of those that are kept.
            highest = [1.0]
            noted = _noting_peaks(counted, highest)
            large = info._replace(frames=LARGE)  # whatever is known of the length: no one else reads these
            first = _write(noted, Task(task.song, unscaled).paths(stems, "wav"), large, Output(), {})
            written = _write(_read_back(first.paths, info), paths, info, output, tags, 1 / max(highest))
        else:
            written = _write(counted, paths, info, output, tags)
        if beside != folder:
            try:
                _put(beside, folder)
            except OSError as error:
                if all(path.is_file() for path in task.paths(stems, output.suffix).values()):
                    raise WrittenMeanwhile(f"another run has written {folder} meanwhile; its stems stay") from error
                raise UserError(f"cannot write {folder}: {error.strerror}") from error
    except WrittenMeanwhile:
        raise
    except UserError as error:  # in the words of what was asked for
        raise UserError(str(error).replace(str(beside), str(folder)).replace(str(unscaled), str(folder))) from error
    finally:
        temporary = {unscaled, beside} - {folder}
        for place in (*temporary, *new_folders):  # of these, those that stayed empty
            clear(place)
    return written._replace(paths=task.paths(stems, output.suffix))


def _put(beside: Path, folder: Path) -> None:
    """Give what was written its name. Another song, of this name and a folder's, may have made the folder meanwhile."""
    try:
        os.replace(beside, folder)
    except OSError:
        places = {path: folder / path.relative_to(beside) for path in beside.rglob("*") if path.is_file()}
        if not folder.is_dir() or any(place.exists() for place in places.values()):
            raise
        for path, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)


def _noting_peaks(parts: Iterable[Mapping[str, np.ndarray]], peaks: list[float]) -> Iterator[Mapping[str, np.ndarray]]:
    for part in parts:
        peaks += [float(np.abs(audio).max(initial=0)) for audio in part.values()]
        yield part


def _counted(
    parts: Iterable[Mapping[str, np.ndarray]], progress: Callable[[int], Any]
) -> Iterator[Mapping[str, np.ndarray]]:
    done = 0
    for part in parts:
        yield part
        done += len(next(iter(part.values())))
        progress(done)


def _write(
    parts: Iterable[Mapping[str, np.ndarray]],
    paths: dict[str, Path],
    info: AudioInfo,
    output: Output,
    tags: Mapping[str, Tags],
    gain: float = 1.0,
) -> Written:
    squares, clipped = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0)
    done, peak = 0, 0.0
    with ExitStack() as stack:
        writers = {
            stem: stack.enter_context(
                AudioWriter(
                    path, info.sample_rate, info.channels, SUBTYPES.get(output.bits or ""), info.frames, info.mask,
                    tags.get(stem), stem if output.bits == "16" else "",
                )
            )
            for stem, path in paths.items()
        }  # fmt: skip
        for part in parts:
            done += len(next(iter(part.values())))
            for stem, writer in writers.items():
                audio = part[stem] if gain == 1 else part[stem] * np.float32(gain)
                highest = max(float(audio.max(initial=0)), -float(audio.min(initial=0)))
                peak = max(peak, highest)
                if highest > 1 and (not output.keeps_peaks or output.peak == "clip"):
                    clipped[stem] += int(np.count_nonzero(np.abs(audio) > 1 + ROUNDING))
                    audio = np.clip(audio, -1, 1)
                squares[stem] += _energy(audio)
                writer.write(audio)
        for writer in writers.values():  # a disk that is full shows before the first stem gets its name
            writer.close()
    levels = {stem: _level(square / max(1, done * info.channels)) for stem, square in squares.items()}
    return Written(paths, clipped, levels, done / info.sample_rate, peak, gain)


def _at_rate(
    parts: Iterable[Mapping[str, np.ndarray]], stems: Sequence[str], info: AudioInfo, rate: int
) -> Iterable[Mapping[str, np.ndarray]]:
    """The parts at the rate that their format can have."""
    if rate == info.sample_rate:
        return parts
    together = (np.stack([part[stem] for stem in stems]) for part in parts)
    blocks = resampled_stems(together, info.sample_rate, rate, len(stems), info.channels)

    def some() -> Iterator[np.ndarray]:
        done = 0
        for block in blocks:
            done += block.shape[1]
            yield block
        if not done:  # of a sample or two at a higher rate; no format has empty files
            yield np.zeros((len(stems), 1, info.channels), np.float32)

    return (dict(zip(stems, block, strict=True)) for block in some() if block.shape[1])


def _read_back(paths: Mapping[str, Path], info: AudioInfo) -> Iterator[dict[str, np.ndarray]]:
    files = [read_blocks(path, BLOCK_SECONDS * info.sample_rate) for path in paths.values()]
    return (dict(zip(paths, blocks, strict=True)) for blocks in zip(*files, strict=True))


def levels_of(paths: Mapping[str, Path]) -> tuple[dict[str, float | None], float | None]:
    """Levels and seconds, as `Written` has them, of stems that are there. Raises UserError for one that cannot be read."""
    levels, seconds = {}, None
    for stem, path in paths.items():
        info, square, samples = audio_info(path), 0.0, 0
        for block in read_blocks(path, BLOCK_SECONDS * info.sample_rate):
            square += _energy(block)
            samples += len(block)
        levels[stem], seconds = _level(square / max(1, samples * info.channels)), samples / info.sample_rate
    return levels, seconds


def _energy(audio: np.ndarray) -> float:
    """The sum of squares, in float32 over a second or two at a time: right to 1e-4 dB."""
    flat = audio.reshape(-1)
    return sum(float(np.dot(part, part)) for part in np.split(flat, range(2**16, len(flat), 2**16)))


def _level(power: float) -> float | None:
    return round(10 * math.log10(power), 2) if power > 0 else None
