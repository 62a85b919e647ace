"""Multitrack folders: Slakh2100 as distributed (numbered stems with `metadata.yaml`), one file per stem (MUSDB18-HQ, the
converted Slakh2100), or MUSDB18's `.stem.mp4` files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from msr_jax.audio.io import read_audio, resample
from msr_jax.data import stem_mp4
from msr_jax.errors import UserError

AUDIO = (".wav", ".flac")
CORPUS_RATE = 44_100  # Hz, of all corpora here as distributed
LENGTH_TOLERANCE = 0.15  # seconds by which stems of a track may differ, as in the published preparation
# General MIDI programs of the four groups of the paper, counted from 0; drums are marked instead.
PROGRAMS = {"piano": range(0, 8), "guitar": range(24, 32), "bass": range(32, 40)}


def group_of(program: int | None, is_drum: bool, inst_class: str = "") -> str | None:
    """The paper's group of a Slakh2100 stem (bass, drums, guitar or piano), or None for all others."""
    if is_drum or program == 128:
        return "drums"
    if program is None:  # metadata with missing keys: the class in words is all there is
        return inst_class.lower() if inst_class.lower() in PROGRAMS else None
    return next((name for name, programs in PROGRAMS.items() if program in programs), None)


class Track(NamedTuple):
    """A track as read: `audio` (stems, samples, channels) float32, the files it came from, and what was odd about them."""

    audio: np.ndarray
    files: list[Path]
    notes: list[str]


def track_name(track: Path) -> str:
    """The track's name: that of its folder, or of its file without `.stem.mp4`."""
    return track.name.removesuffix(stem_mp4.SUFFIX)


def is_track(folder: Path, stems: Sequence[str]) -> bool:
    """Whether a folder holds a track in one of the layouts, or is a `.stem.mp4` file."""
    if folder.name.startswith((".", "__MACOSX")):
        return False
    if not folder.is_dir():
        return folder.name.endswith(stem_mp4.SUFFIX)
    return (folder / "metadata.yaml").is_file() or any((folder / f"{s}{a}").is_file() for s in stems for a in AUDIO)


def find_tracks(folder: str | Path, stems: Sequence[str]) -> list[Path]:
    """Track folders (or `.stem.mp4` files) directly inside a folder, by name.

    Raises:
      UserError: it does not exist or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one that holds track folders")
    tracks = sorted(f for f in folder.iterdir() if is_track(f, stems))
    if not tracks:
        raise UserError(
            f"{folder} holds no tracks; a track is a folder with metadata.yaml and stems/, or with {stems[0]}.wav and so on"
        )
    return tracks


def _slakh_sources(track: Path) -> Iterator[tuple[str, Path]]:
    try:
        described = yaml.safe_load((track / "metadata.yaml").read_text(encoding="utf-8"))["stems"]
        entries = [(str(name), entry or {}) for name, entry in described.items()]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{track / 'metadata.yaml'} cannot be read as Slakh2100 metadata ({type(error).__name__}: {error})"
        ) from error
    for name, entry in entries:
        program = entry.get("program_num")
        group = group_of(program, bool(entry.get("is_drum")), str(entry.get("inst_class", "")))
        if group is None:
            continue
        for path in (track / "stems" / f"{name}{a}" for a in reversed(AUDIO)):
            if path.is_file():
                yield group, path
                break
        else:
            if entry.get("audio_rendered"):
                raise UserError(
                    f"{track} lacks stems/{name}.flac, which its metadata says was rendered; copy the track anew"
                )


def audio_file(folder: Path, name: str) -> Path | None:
    """NAME.wav or NAME.flac in a folder, if there is one."""
    return next((p for suffix in AUDIO if (p := folder / f"{name}{suffix}").is_file()), None)


def _plain_sources(track: Path, stems: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for stem in stems:
        if path := audio_file(track, stem):
            yield stem, path


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


def read_track(
    track: str | Path, stems: Sequence[str], sample_rate: int, channels: int = 1, needs_all: bool = False
) -> Track:
    """All stems of a track at `sample_rate` Hz.

    Sources of one group are summed; a group without a file is silent, as in the published preparation of Slakh2100. For
    one channel stereo files are averaged, for two mono files are doubled. Stems are cut to the shortest.

    Args:
      needs_all: refuse a track that lacks a stem.

    Raises:
      UserError: unreadable metadata or audio, no stem at all, or stems that differ in length by more than 0.15 s.
    """
    track = Path(track)
    audio: dict[str, list[tuple[np.ndarray, int]]] = {}
    files, notes = [], []
    if track.name.endswith(stem_mp4.SUFFIX):
        files = [track]
        for stem, samples, rate in stem_mp4.read_streams(track, stems):
            audio[stem] = [(to_channels(samples, channels, track), rate)]
    else:
        layout = _slakh_sources(track) if (track / "metadata.yaml").is_file() else _plain_sources(track, stems)
        for stem, path in layout:
            if stem in stems:
                samples, rate = read_audio(path)
                files.append(path)
                if rate not in (CORPUS_RATE, sample_rate):
                    notes.append(f"{path.name} is at {rate} Hz and was resampled")
                audio.setdefault(stem, []).append((to_channels(samples, channels, path), rate))
    missing = [stem for stem in stems if stem not in audio]
    if not audio:
        raise UserError(f"{track} holds no audio for any of {', '.join(stems)}")
    if needs_all and missing:
        raise UserError(f"{track} lacks the stem {missing[0]}")
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
        at_rate = [resample(samples, rate, sample_rate) for samples, rate in sources]
        length = min(map(len, at_rate))
        mixed[stem] = np.sum([samples[:length] for samples in at_rate], 0, dtype=np.float32)
    length = min(map(len, mixed.values()))
    silence = np.zeros((length, channels), np.float32)
    return Track(np.stack([mixed.get(stem, silence)[:length] for stem in stems]), files, notes)


def load_track(track: str | Path, stems: Sequence[str], sample_rate: int) -> np.ndarray:
    """All stems of a track, mono: (stems, samples) float32; otherwise as `read_track`."""
    return read_track(track, stems, sample_rate).audio[..., 0]


def split_of(corpus: str | Path, split: str) -> Path:
    """The folder of a split: `corpus/split` where that exists, else the corpus itself (a bare folder of tracks)."""
    inside = Path(corpus) / split
    return inside if inside.is_dir() else Path(corpus)
