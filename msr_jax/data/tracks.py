"""Multitrack folders: Slakh2100 as distributed (numbered stems with `metadata.yaml`), one file per stem (MUSDB18-HQ, the
converted Slakh2100), or MUSDB18's `.stem.mp4` files. Names of files and folders are compared without case."""

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from msr_jax.audio.headers import AUDIO_SUFFIXES
from msr_jax.audio.io import read_audio, resample
from msr_jax.data import stem_mp4
from msr_jax.errors import UserError
from msr_jax.files import printable
from msr_jax.messages import log

AUDIO = (".wav", ".flac")
SPLITS = ("train", "validation", "test")
MUSDB, SLAKH = ("drums", "bass", "other", "vocals"), ("bass", "drums", "guitar", "piano")  # stems of the two data sets
NAMED = 5  # tracks that are named, where they may be many
CORPUS_RATE = 44_100  # Hz, of all corpora here as distributed
LENGTH_TOLERANCE = 0.15  # seconds by which stems of a track may differ, as in the published preparation
# General MIDI programs of the four groups of the paper, counted from 0; drums are marked instead.
PROGRAMS = {"piano": range(0, 8), "guitar": range(24, 32), "bass": range(32, 40)}


def group_of(program: int | None, is_drum: bool, inst_class: str = "") -> str | None:
    """The paper's group of a Slakh2100 stem (bass, drums, guitar or piano), or None for all others."""
    if is_drum or program == 128:
        return "drums"
    if program is None:  # metadata with missing keys: the class in words is all there is
        return name if (name := inst_class.lower()) in SLAKH else None
    return next((name for name, programs in PROGRAMS.items() if program in programs), None)


class Track(NamedTuple):
    """A track as read: `audio` (stems, samples, channels) float32, the files it came from, what was odd about them, and
    which stems had to be resampled."""

    audio: np.ndarray
    files: list[Path]
    notes: list[str]
    resampled: list[str]


def plain(name: str) -> str:
    """A name as names are compared: composed characters, no case."""
    return unicodedata.normalize("NFC", name).casefold()


def child(folder: Path, name: str) -> Path:
    """What a folder holds under a name, however its case; that very name first, also where there is none."""
    exact = folder / name
    if os.path.exists(exact):  # which, other than a path's own, is no error in a folder that may not be entered
        return exact
    return next((p for p in _children(folder) if plain(p.name) == plain(name)), exact)


def _children(folder: Path) -> list[Path]:
    """What is directly inside a folder, by name; nothing if it is none. UserError if it may not be read."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from error


def is_audio(path: Path) -> bool:
    """Whether a file's name is that of a stem: WAV or FLAC, and not what macOS leaves beside files."""
    return path.suffix.lower() in AUDIO and not path.name.startswith(".")


def is_mp4(path: Path) -> bool:
    """Whether a file holds a whole track, as its name says."""
    return path.name.lower().endswith(stem_mp4.SUFFIX)


def track_name(track: Path) -> str:
    """The track's name, as it can be printed: that of its folder, or of its file without `.stem.mp4`."""
    return printable(track.name[: -len(stem_mp4.SUFFIX)] if is_mp4(track) else track.name)


def _may_be_track(path: Path) -> bool:
    """Whether it is what a track can be: a folder, a link to what is gone, a `.stem.mp4` file; nothing hidden or of macOS."""
    is_gone = path.is_symlink() and not os.path.exists(path)
    return not path.name.startswith((".", "__MACOSX")) and (os.path.isdir(path) or is_mp4(path) or is_gone)


def is_track(folder: Path, stems: Sequence[str]) -> bool:
    """Whether a folder holds a track in one of the layouts, or is a `.stem.mp4` file."""
    if not _may_be_track(folder) or not folder.is_dir():
        return _may_be_track(folder) and is_mp4(folder)
    wanted = {plain(s) for s in stems}
    return any(plain(f.name) == "metadata.yaml" or (is_audio(f) and plain(f.stem) in wanted) for f in _children(folder))


def find_tracks(folder: str | Path, stems: Sequence[str], every_folder: bool = False) -> list[Path]:
    """Track folders (or `.stem.mp4` files) directly inside a folder, by name.

    Folders of other things are passed over, and the log names them; with `every_folder`, as where a folder holds nothing but
    tracks, they are given too, so that `read_track` says of each what is wrong with it.

    Raises:
      UserError: it does not exist or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one that holds track folders")
    found = [f for f in _children(folder) if _may_be_track(f)]
    tracks = found if every_folder else [f for f in found if is_track(f, stems)]
    if tracks and (others := [track_name(f) for f in found if f not in tracks]):
        named = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
        log.info(f"passed over in {folder}, as there is no audio of {', '.join(stems)} in it: {named}")
    if not tracks:
        raise UserError(
            f"{folder} holds no tracks; a track is a folder with metadata.yaml and stems/, or with {stems[0]}.wav and so on"
        )
    return tracks


def _program(value: Any, where: str) -> int | None:
    """`program_num` of a stem, as a number or as text; None if it is not given."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not number.is_integer() or not 0 <= number <= 128:
        raise UserError(f"{where} has the program_num {value!r}; it must be a whole number from 0 to 128")
    return int(number)


def _flag(entry: Mapping[str, Any], name: str, where: str) -> bool:
    """A yes or no of a stem, also as text; no if it is not given."""
    told = str(entry.get(name) if entry.get(name) is not None else "").strip().lower()
    if told not in ("true", "yes", "1", "false", "no", "0", ""):
        raise UserError(f"{where} has the {name} {entry[name]!r}; it must be true or false")
    return told in ("true", "yes", "1")


def _slakh_sources(track: Path) -> Iterator[tuple[str, Path]]:
    path = child(track, "metadata.yaml")
    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))["stems"]
        entries = [(str(name), dict(entry or {})) for name, entry in described.items()]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as Slakh2100 metadata ({type(error).__name__}: {error})") from error
    folder = child(track, "stems")
    for name, entry in entries:
        where = f"stem {name} of {path}"
        program = _program(entry.get("program_num"), where)
        group = group_of(program, _flag(entry, "is_drum", where), str(entry.get("inst_class", "")))
        if group is None:
            continue
        if source := audio_file(folder, name, AUDIO[::-1]):
            yield group, source
            continue
        _refuse_other_format(folder, [name])
        if _flag(entry, "audio_rendered", where):
            raise UserError(
                f"{track} lacks stems/{name}.flac, which its metadata says was rendered; copy the track anew"
            )


def audio_file(folder: Path, name: str, suffixes: Sequence[str] = AUDIO) -> Path | None:
    """NAME.wav or NAME.flac in a folder, if there is one, whatever its case; a file first, and that very name.

    What is no file (a link to nothing, a folder) is there too: whoever reads it says so, where a stem without a file is silent.
    """
    found = [f for f in _children(folder) if is_audio(f) and plain(f.stem) == plain(name)]
    exact = [name + s for s in suffixes]
    order = lambda f: (not os.path.isfile(f), suffixes.index(f.suffix.lower()), f.name not in exact, f.name)
    return min(found, key=order, default=None)


def _refuse_other_format(folder: Path, lacking: Sequence[str]) -> None:
    """Raises UserError if a stem that has no file that is read has one in another format, which would be taken for silence."""
    names = set(map(plain, lacking))
    for f in _children(folder):
        if plain(f.stem) in names and f.suffix.lower() in AUDIO_SUFFIXES and not f.name.startswith("."):
            raise UserError(f"{f} is no .wav or .flac file, as stems are to be; convert it")


def _plain_sources(track: Path, stems: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for stem in stems:
        if path := audio_file(track, stem):
            yield stem, path


def _check_layout(track: Path, stems: Sequence[str], is_slakh: bool) -> None:
    """Raises UserError for a stem that a track of its data set cannot have, or always has and lacks."""
    there = {plain(f.stem) for f in _children(track) if is_audio(f)}
    lacking = [s for s in stems if plain(s) not in there]
    if not is_slakh:
        _refuse_other_format(track, lacking)
    if is_slakh:
        names, held = SLAKH, "Slakh2100"
    elif set(MUSDB) <= there and "vocals" not in stems and not there & {"guitar", "piano"}:
        names, held = MUSDB, "MUSDB18"
    else:
        if lacking and there and set(stems) <= set(MUSDB) and {"other", "vocals"} & set(stems):
            raise UserError(f"{track} lacks the stem {lacking[0]}")
        return
    if strange := [s for s in lacking if s not in names]:
        raise UserError(f"{track} is a track of {held}, of {', '.join(names)}; it has no {' and no '.join(strange)}")


def _why_unusable(track: Path, stems: Sequence[str]) -> str:
    if not os.path.exists(track):
        return "is a link to what does not exist" if track.is_symlink() else "does not exist"
    if os.path.isdir(child(track, "stems")) and not os.path.isfile(child(track, "metadata.yaml")):
        return "has stems/ but no metadata.yaml; copy the track anew"
    return f"holds no audio for any of {', '.join(stems)}" if _children(track) else "is empty"


def to_channels(samples: np.ndarray, channels: int, path: Path) -> np.ndarray:
    """(samples, any) -> (samples, channels): to mono all are averaged, and mono is repeated.

    Raises:
      UserError: any other numbers; `path` names the file.
    """
    if channels == 1:
        return samples.mean(1, keepdims=True)
    if samples.shape[1] not in (1, channels):
        raise UserError(f"{path} has {samples.shape[1]} channels, {channels} are wanted")
    return samples if samples.shape[1] == channels else np.repeat(samples, channels, 1)


def read_track(track: str | Path, stems: Sequence[str], sample_rate: int, channels: int = 1) -> Track:
    """All stems of a track at `sample_rate` Hz.

    Sources of one group are summed. A stem without a file is silent, as in the published preparation of Slakh2100, but for
    those of MUSDB18, which has all four for every song. For one channel stereo files are averaged, for two mono files are doubled. Stems are cut to the shortest.

    Raises:
      UserError: unreadable metadata or audio, no stem at all, one that MUSDB18 always has or that a track of its data set
        cannot have, or stems that differ in length by more than 0.15 s.
    """
    track = Path(track)
    audio: dict[str, list[tuple[np.ndarray, int]]] = {}
    files, notes, resampled = [], [], list[str]()
    is_slakh = os.path.isfile(child(track, "metadata.yaml"))
    _check_layout(track, stems, is_slakh)
    if is_mp4(track):
        files = [track]
        for stem, samples, rate in stem_mp4.read_streams(track, stems):
            audio[stem] = [(to_channels(samples, channels, track), rate)]
    else:
        layout = _slakh_sources(track) if is_slakh else _plain_sources(track, stems)
        for stem, path in layout:
            if stem in stems:
                samples, rate = read_audio(path)
                files.append(path)
                if rate not in (CORPUS_RATE, sample_rate):
                    notes.append(f"{path.name} is at {rate} Hz and was resampled")
                audio.setdefault(stem, []).append((to_channels(samples, channels, path), rate))
    if not audio:
        raise UserError(f"{track} {_why_unusable(track, stems)}")
    if not is_slakh:
        notes += [f"it has no {stem}; silence stands for it" for stem in stems if stem not in audio]
    seconds = [len(samples) / rate for sources in audio.values() for samples, rate in sources]
    apart = max(seconds) - min(seconds)
    if apart > LENGTH_TOLERANCE:
        raise UserError(
            f"stems of {track} last between {min(seconds):.2f} and {max(seconds):.2f} s; they must be of one length"
        )
    if apart:
        notes.append(f"stems differ in length by {apart:.4f} s and were cut to the shortest")
    mixed: dict[str, Any] = {}
    for stem, sources in audio.items():
        resampled += [stem] if any(rate != sample_rate for _, rate in sources) else []
        at_rate = [resample(samples, rate, sample_rate) for samples, rate in sources]
        length = min(map(len, at_rate))
        mixed[stem] = np.sum([samples[:length] for samples in at_rate], 0, dtype=np.float32)
    length = min(map(len, mixed.values()))
    silence = np.zeros((length, channels), np.float32)
    return Track(np.stack([mixed.get(stem, silence)[:length] for stem in stems]), files, notes, resampled)


def load_track(track: str | Path, stems: Sequence[str], sample_rate: int) -> np.ndarray:
    """All stems of a track, mono: (stems, samples) float32; otherwise as `read_track`."""
    return read_track(track, stems, sample_rate).audio[..., 0]


def split_of(corpus: str | Path, split: str) -> Path:
    """The folder of a split: `corpus/split` where that exists, else the corpus itself (a bare folder of tracks).

    Raises:
      UserError: the corpus has splits, but not this one.
    """
    inside = child(Path(corpus), split)
    if inside.is_dir():
        return inside
    # A bare folder may hold a song of such a name: a track has files directly inside of it.
    is_split = lambda folder: folder.is_dir() and not any(f.is_file() and not is_mp4(f) for f in _children(folder))
    others = [name for name in SPLITS if name != split and is_split(child(Path(corpus), name))]
    if others:
        raise UserError(f"{corpus} has no split '{split}'; it has {', '.join(others)}")
    return Path(corpus)
