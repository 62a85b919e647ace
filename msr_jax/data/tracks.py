"""Multitrack folders: Slakh2100 as distributed (numbered stems with `metadata.yaml`), or one file per stem."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml

from msr_jax.audio.io import read_audio, resample
from msr_jax.errors import UserError

AUDIO = (".wav", ".flac")
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


def is_track(folder: Path, stems: Sequence[str]) -> bool:
    """Whether a folder holds a track in one of the two layouts."""
    if not folder.is_dir() or folder.name.startswith(("._", "__MACOSX", ".")):
        return False
    return (folder / "metadata.yaml").is_file() or any((folder / f"{s}{a}").is_file() for s in stems for a in AUDIO)


def find_tracks(folder: str | Path, stems: Sequence[str]) -> list[Path]:
    """Track folders directly inside a folder, by name.

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


def _plain_sources(track: Path, stems: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for stem in stems:
        path = next((p for a in AUDIO if (p := track / f"{stem}{a}").is_file()), None)
        if path:
            yield stem, path


def load_track(track: str | Path, stems: Sequence[str], sample_rate: int) -> np.ndarray:
    """All stems of a track: (stems, samples) float32, mono, at `sample_rate` Hz.

    Sources of one group are summed; a group without a file is silent, as in the published preparation. Stereo files are
    averaged; stems are cut to the shortest.

    Raises:
      UserError: unreadable metadata or audio, no stem at all, or stems that differ in length by more than 0.15 s.
    """
    track = Path(track)
    layout = _slakh_sources(track) if (track / "metadata.yaml").is_file() else _plain_sources(track, stems)
    audio: dict[str, list[tuple[np.ndarray, int]]] = {}
    for stem, path in layout:
        if stem in stems:
            samples, rate = read_audio(path)
            audio.setdefault(stem, []).append((samples.mean(1), rate))
    if not audio:
        raise UserError(f"{track} holds no audio for any of {', '.join(stems)}")
    seconds = [len(samples) / rate for sources in audio.values() for samples, rate in sources]
    if max(seconds) - min(seconds) > LENGTH_TOLERANCE:
        raise UserError(
            f"stems of {track} last between {min(seconds):.2f} and {max(seconds):.2f} s; they must be of one length"
        )
    mixed = {}
    for stem, sources in audio.items():
        at_rate = [resample(samples[:, None], rate, sample_rate)[:, 0] for samples, rate in sources]
        length = min(map(len, at_rate))
        mixed[stem] = np.sum([samples[:length] for samples in at_rate], 0, dtype=np.float32)
    length = min(map(len, mixed.values()))
    silence = np.zeros(length, np.float32)
    return np.stack([mixed.get(stem, silence)[:length] for stem in stems])


def split_of(corpus: str | Path, split: str) -> Path:
    """The folder of a split: `corpus/split` where that exists, else the corpus itself (a bare folder of tracks)."""
    inside = Path(corpus) / split
    return inside if inside.is_dir() else Path(corpus)
