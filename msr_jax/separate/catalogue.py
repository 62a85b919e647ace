"""Which songs to separate, and where their stems go."""

from collections.abc import Sequence
from pathlib import Path

from msr_jax.errors import UserError
from msr_jax.separate.songs import Task, stem_paths


def find_tasks(songs: Sequence[Path], out: Path) -> list[Task]:
    """The songs, each with a folder of its own in `out`.

    Raises:
      UserError: two of them would share one.
    """
    tasks = [Task(song, out / song.stem) for song in dict.fromkeys(songs)]
    folders = [task.folder for task in tasks]
    twice = sorted({folder.name for folder in folders if folders.count(folder) > 1})
    if twice:
        raise UserError(
            f"two songs are named {twice[0]} and would share a folder; separate them into different folders"
        )
    return tasks


def check_stems(tasks: Sequence[Task], stems: Sequence[str], suffix: str) -> None:
    """Raises UserError if a stem would take the place of a song."""
    songs = {task.song.resolve() for task in tasks}
    for task in tasks:
        for path in stem_paths(task.folder, stems, suffix).values():
            if path.resolve() in songs:
                raise UserError(f"the stem {path} would replace a song that is to be separated; name another folder")
