"""`.stem.mp4` files: a mixture and its stems as streams of one file, as MUSDB18 is distributed and as other makers name theirs."""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import BinaryIO

import numpy as np

from msr_jax.audio.media import MediaInfo, media_format, open_media
from msr_jax.errors import UserError

SUFFIX = ".stem.mp4"
STREAMS = ("mixture", "drums", "bass", "other", "vocals")  # of MUSDB18, whose files need not name them


def streams_of(track: Path) -> list[str]:
    """Names of a file's streams of audio, in lower case: the mixture, then the stems as the file names them, or MUSDB18's.

    Of names that are there several times all but the first get a number: synth, synth 2.

    Raises:
      UserError: the file cannot be opened.
    """
    try:
        with open(track, "rb") as file:
            told = _atom(file, (b"moov", b"udta", b"stem"), 0, file.seek(0, 2))
    except OSError as error:
        raise UserError(f"{track} cannot be read ({error.strerror})") from error
    try:
        stems = json.loads(told)["stems"]
        names = [str(stem.get("name") or "").strip().lower() or f"stem {k}" for k, stem in enumerate(stems, 1)]
    except (ValueError, KeyError, TypeError, AttributeError):
        names = []
    # What the tool that made MUSDB18 wrote by itself says nothing.
    if all(name.startswith("stem") for name in names):
        return list(STREAMS)
    told_names, numbers = set(names), defaultdict[str, Iterator[int]](lambda: count(2))
    streams = dict.fromkeys(STREAMS[:1])
    for name in names:
        free = (one for k in numbers[name] if (one := f"{name} {k}") not in told_names)
        streams[next(free) if name in streams else name] = None
    return list(streams)


def read_streams(track: Path, stems: Sequence[str]) -> Iterator[tuple[str, np.ndarray, int]]:
    """(stem, (samples, channels) float32, Hz) of each stem of a `.stem.mp4` file.

    Raises:
      UserError: the file has no such stem, cannot be read, or there is nothing to decode it with.
    """
    streams = streams_of(track)
    lacking = [stem for stem in stems if stem.lower() not in streams]
    if lacking:
        raise UserError(f"{track} holds no {lacking[0]}; its stems are {', '.join(streams[1:])}")
    for stem in stems:
        with _opened(track, streams.index(stem.lower())) as (info, blocks):
            yield stem, np.concatenate([np.zeros((0, info.channels), np.float32), *blocks]), info.sample_rate


def format_of(track: Path) -> tuple[int, int]:
    """(sample rate in Hz, channels) of a file's mixture; UserError as `read_streams`."""
    with _opened(track, 0) as (info, _):
        return info.sample_rate, info.channels


def _opened(track: Path, stream: int) -> AbstractContextManager[tuple[MediaInfo, Iterator[np.ndarray]]]:
    with open(track, "rb") as file:
        kind = media_format(file)
    if kind != "mov":
        raise UserError(f"{track} is no mp4 file")
    return open_media(track, kind, stream)


def _atom(file: BinaryIO, names: Sequence[bytes], at: int, end: int) -> bytes:
    """The body of an atom inside others of an mp4 file, by its path; b"" if it is not there, or larger than a megabyte."""
    while at + 8 <= end:
        file.seek(at)
        size, name = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1:
            size, head = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))[0], 16
        stop = end if size == 0 else min(end, at + size)
        if name == names[0]:
            if len(names) == 1:
                return file.read(stop - at - head) if stop - at < 2**20 else b""
            if found := _atom(file, names[1:], at + head, stop):
                return found
        if stop < at + head:
            return b""
        at = stop
    return b""
