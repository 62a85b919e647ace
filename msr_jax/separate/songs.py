"""One song in, its stems out: whole, together, and none of them over a song or over older stems unasked."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from msr_jax.audio.io import AudioInfo, AudioWriter, read_blocks
from msr_jax.errors import UserError
from msr_jax.runtime import PASSING, clear, clear_left_over, passing
from msr_jax.separate.engine import Separator

BLOCK_SECONDS = 10


class Task(NamedTuple):
    """A song, and the folder that its stems go to."""

    song: Path
    folder: Path


def stem_paths(folder: Path, stems: Iterable[str], suffix: str) -> dict[str, Path]:
    return {stem: folder / f"{stem}.{suffix}" for stem in stems}


def separate_file(
    separator: Separator, task: Task, info: AudioInfo, suffix: str, stems: Sequence[str] | None = None, progress=None
) -> dict[Path, int]:
    """Separate one file into `task.folder`/<stem>.<suffix>; all stems appear together, or none.

    What runs that were killed left there is cleared.

    Args:
      stems: those to write (default: all).

    Returns:
      {path: number of samples that its format had to clip}.

    Raises:
      UserError: the song turns out damaged, or a stem cannot be written.
    """
    folder = task.folder
    new_folders = [place for place in folder.parents if not place.exists()]  # innermost first
    PASSING.update(new_folders)
    for place in (folder.parent, folder):
        clear_left_over(place)
    # A new folder gets its name when all is in it.
    beside = folder if folder.exists() else passing(folder)
    paths = stem_paths(beside, separator.stems if stems is None else stems, suffix)
    try:
        with ExitStack() as stack:
            writers = {
                stem: stack.enter_context(AudioWriter(path, info.sample_rate, info.channels, frames=info.frames))
                for stem, path in paths.items()
            }
            blocks = read_blocks(task.song, BLOCK_SECONDS * info.sample_rate)
            for part in separator.stream(blocks, info.sample_rate, info.channels, info.frames, progress):
                for stem, writer in writers.items():
                    writer.write(part[stem])
            for writer in writers.values():  # a disk that is full shows before the first stem gets its name
                writer.close()
        if beside != folder:
            try:
                os.replace(beside, folder)
            except OSError as error:
                raise UserError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        if beside != folder:
            clear(beside)
        for place in new_folders:  # those that stayed empty
            clear(place)
    return {folder / writer.path.name: writer.clipped for writer in writers.values()}
