"""One song in, its stems out: whole, together, and none of them over a song or over older stems unasked."""

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msr_jax.audio.io import AudioInfo, AudioWriter, read_blocks
from msr_jax.audio.tags import read_tags, stem_tags
from msr_jax.errors import UserError
from msr_jax.runtime import PASSING, clear, clear_left_over, passing
from msr_jax.separate.engine import Separator

BLOCK_SECONDS = 10


class Task(NamedTuple):
    """A song, and the folder that its stems go to."""

    song: Path
    folder: Path


class Written(NamedTuple):
    """What was written of a song, by stem."""

    paths: dict[str, Path]
    clipped: dict[str, int]  # samples that the format had to clip
    levels: dict[str, float | None]  # RMS in dB below full scale; None for silence
    seconds: float  # of audio


def stem_paths(folder: Path, stems: Iterable[str], suffix: str) -> dict[str, Path]:
    return {stem: folder / f"{stem}.{suffix}" for stem in stems}


def separate_file(
    separator: Separator,
    task: Task,
    info: AudioInfo,
    suffix: str,
    stems: Sequence[str] | None = None,
    progress=None,
    with_tags: bool = True,
) -> Written:
    """Separate one file into `task.folder`/<stem>.<suffix>; all stems appear together, or none.

    What runs that were killed left there is cleared.

    Args:
      stems: those to write (default: all).
      with_tags: copy the song's tags and cover, with `TITLE (stem)` as title.

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
    tags = read_tags(task.song) if with_tags else None
    done, squares = 0, dict.fromkeys(paths, 0.0)
    try:
        with ExitStack() as stack:
            writers = {
                stem: stack.enter_context(
                    AudioWriter(
                        path,
                        info.sample_rate,
                        info.channels,
                        frames=info.frames,
                        mask=info.mask,
                        tags=tags and stem_tags(tags, stem, folder.name),
                    )
                )
                for stem, path in paths.items()
            }
            blocks = read_blocks(task.song, BLOCK_SECONDS * info.sample_rate)
            for part in separator.stream(blocks, info.sample_rate, info.channels, info.frames, progress):
                done += len(next(iter(part.values())))
                for stem, writer in writers.items():
                    writer.write(part[stem])
                    squares[stem] += float(np.square(part[stem], dtype=np.float64).sum())
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
    return Written(
        {stem: folder / path.name for stem, path in paths.items()},
        {stem: writer.clipped for stem, writer in writers.items()},
        {stem: _level(square / (done * info.channels)) for stem, square in squares.items()},
        done / info.sample_rate,
    )


def _level(power: float) -> float | None:
    return round(10 * math.log10(power), 2) if power > 0 else None
