"""Which songs to separate, and where their stems go: files, folders, patterns, lists, and every N-th of them."""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from msr_jax.errors import UserError
from msr_jax.separate.songs import Task, stem_paths

# What counts as a song in a folder; a file that is named is read whatever it is called.
AUDIO_SUFFIXES = frozenset(
    ".wav .wave .flac .ogg .oga .opus .mp3 .mp2 .aif .aiff .aifc .au .caf .w64 .rf64 .m4a .aac .wma .webm .mka".split()
)


def folder_name(song: Path) -> str:
    """The name of a song's folder of stems: the song's without suffix, or all of it where only dots would be left (`...wav`)."""
    return song.stem if song.stem.strip(".") else song.name


def find_tasks(given: Iterable[str | Path], out: Path, listed: Path | None = None) -> list[Task]:
    """The songs, each with a folder of its own in `out`.

    Args:
      given: files, whose folders are named after them; folders and patterns (`music/**/*.mp3`), whose songs keep the folders
        that they are in below the one that is common to them.
      listed: a file with a path a line, or with JSON objects that have a `path` (.jsonl); as a pattern's songs.

    Raises:
      UserError: nothing there, an unreadable list, or two songs would share a folder.
    """
    tasks: dict[Path, Task] = {}
    for place in map(Path, given):
        if place.is_dir():
            found = _below(place, _songs_in(place, out), out)
            if not found:
                raise UserError(f"{place} holds no audio files; name one that does, or a song")
        elif not place.exists() and glob.has_magic(str(place)):
            found = _below_common([Path(p) for p in sorted(glob.glob(str(place), recursive=True))], out)
            if not found:
                raise UserError(f"no file is called like {place}")
        else:
            found = [Task(place, out / folder_name(place))]
        tasks.update((task.song, task) for task in found)
    if listed:
        tasks.update((task.song, task) for task in _below_common(_read_list(listed), out))
    if not tasks:
        raise UserError("no songs are named; give files, folders, patterns or --list FILE")
    counts = Counter(task.folder for task in tasks.values())
    folder, count = counts.most_common(1)[0]
    if count > 1:
        raise UserError(
            f"two songs are named {folder.name} and would share a folder; separate them into different folders"
        )
    return list(tasks.values())


def _songs_in(folder: Path, out: Path) -> list[Path]:
    """Audio files at any depth; those of hidden names and those in `out` are not for it."""
    found, own = [], out.resolve()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and (Path(place) / n).resolve() != own)
        found += [
            Path(place) / n for n in sorted(names) if not n.startswith(".") and Path(n).suffix.lower() in AUDIO_SUFFIXES
        ]
    return found


def _below(folder: Path, songs: Iterable[Path], out: Path) -> list[Task]:
    return [Task(song, out / song.relative_to(folder).parent / folder_name(song)) for song in songs]


def _below_common(songs: Sequence[Path], out: Path) -> list[Task]:
    songs = [song for song in songs if not song.is_dir()]
    if not songs:
        return []
    folders = [Path(os.path.abspath(song.parent)) for song in songs]
    common = os.path.commonpath(folders)
    return [Task(s, out / f.relative_to(common) / folder_name(s)) for s, f in zip(songs, folders, strict=True)]


def _read_list(path: Path) -> list[Path]:
    try:
        lines = [
            line for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines() if line.strip()
        ]
        if path.suffix == ".jsonl":
            lines = [json.loads(line)["path"] for line in lines]
        found = [Path(line) for line in lines]
    except OSError as error:
        raise UserError(f"--list {path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--list {path} is not a path a line, nor (.jsonl) an object with a path a line") from error
    if not found:
        raise UserError(f"--list {path} names no songs")
    return found


def check_stems(tasks: Sequence[Task], stems: Sequence[str], suffix: str) -> None:
    """Raises UserError if a stem would take the place of a song."""
    songs = {task.song.resolve() for task in tasks}
    for task in tasks:
        for path in stem_paths(task.folder, stems, suffix).values():
            if path.resolve() in songs:
                raise UserError(f"the stem {path} would replace a song that is to be separated; name another folder")
