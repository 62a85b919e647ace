"""What the preparations of all corpora share: the command line, what is done to a track, and the report."""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.writer import CODINGS, SHARD_BYTES, convert, make_manifest, save_note, save_track
from msr_jax.audio.io import read_audio
from msr_jax.data.records import to_pcm
from msr_jax.data.tracks import NAMED, audio_file, is_track, read_track, track_name
from msr_jax.errors import UserError
from msr_jax.messages import print_log
from msr_jax.metrics.si_sdr import SILENT
from msr_jax.process import begin

OFFSET = 1e-2  # mean of a stem's samples from which on the report speaks of a constant offset


class Corpus(NamedTuple):
    """A corpus as published, and how its tracks are found: find(SRC, arguments) -> the tracks of each split."""

    layout: str
    stems: tuple[str, ...]
    sample_rate: int
    channels: int
    crop: int
    parts: int  # records that a crop is as long as: measured, see README.md
    find: Callable[[Path, argparse.Namespace], dict[str, list[Path]]]
    edition: Callable[[Mapping[str, int]], str]


def checksum(files: Sequence[Path], root: Path) -> str:
    """SHA-256 over the names, relative to `root`, and the contents of files."""
    total = hashlib.sha256()
    for path in sorted(files):
        with open(path, "rb") as file:
            line = f"{path.relative_to(root)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n"
            total.update(line.encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def activity(stems: np.ndarray, crop: int) -> np.ndarray:
    """Share (stems,) of crops of a track (stems, samples, channels) in which each stem is not silent, by the released rule."""
    length = min(crop, stems.shape[1])
    windows = stems[:, : stems.shape[1] // length * length].reshape(len(stems), -1, length * stems.shape[2])
    norms = np.sqrt(np.einsum("swn,swn->sw", windows, windows, dtype=np.float64))
    return (norms / length >= SILENT).mean(1)


def loudness(audio: np.ndarray) -> float | None:
    """RMS in dB below full scale; None for silence."""
    power = np.mean(np.square(audio, dtype=np.float64))
    return float(10 * np.log10(power)) if power > 0 else None


def _oddities(pcm: np.ndarray, stems: Sequence[str], crop: int, sample_rate: int) -> list[str]:
    notes = [
        f"{name} has a constant offset of {mean / 32768:.4f}"
        for name, mean in zip(stems, pcm.mean((1, 2), dtype=np.float64), strict=True)
        if abs(mean) > OFFSET * 32768
    ]
    if pcm.shape[1] < crop:
        notes.append(f"it lasts {pcm.shape[1] / sample_rate:.2f} s, shorter than a crop; silence will follow it")
    return notes


def _mixture_note(track: Path, total: np.ndarray, sample_rate: int, steps: int) -> list[str]:
    """How far `mixture.wav` is from the sum of stems (samples, channels), where that is more than rounding and the file has
    the rate and channels of the records.
    """
    path = audio_file(track, "mixture")
    if path is None:
        return []
    try:
        mixture, rate = read_audio(path)
    except UserError as error:
        return [f"its mixture is not used, and could not be read: {error}"]
    length = min(len(mixture), len(total))
    if mixture.shape[1] != total.shape[1] or rate != sample_rate:
        return []
    apart = np.abs(mixture[:length] - total[:length]).max() * 32768
    return [f"{path.name} is up to {apart:.0f} steps of 16 bits from the sum of stems"] if apart > steps else []


def decode(
    layout: str, manifest: Mapping[str, Any], track: Path
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray] | None]:
    """A track's note, and its audio as `save_track` takes it; None, with the reason in the note, if it is left out."""
    try:
        read = read_track(track, manifest["stems"], manifest["sample_rate"], manifest["channels"])
        digest = checksum(read.files, track if track.is_dir() else track.parent)
        if not read.audio.any():
            raise UserError(f"{track} is silent in every stem")
    except OSError as error:
        return {"name": track_name(track), "skipped": f"{track} cannot be read ({error.strerror or error})"}, None
    except UserError as error:
        return {"name": track_name(track), "skipped": str(error)}, None
    pcm, clipped = to_pcm(read.audio)
    mixture = read.audio.sum(0)
    notes = [*read.notes, *_oddities(pcm, manifest["stems"], manifest["crop"], manifest["sample_rate"])]
    if layout == "musdb18hq":
        notes += _mixture_note(track, mixture, manifest["sample_rate"], len(pcm))
    note = {
        "name": track_name(track),
        "samples": pcm.shape[1],
        "checksum": digest,
        "clipped": clipped,
        "notes": notes,
        "active": activity(read.audio, manifest["crop"]).tolist(),
        "loudness": [loudness(x) for x in (*read.audio, mixture)],
    }
    return note, (pcm, mixture)


def save_corpus_track(
    layout: str, manifest: Mapping[str, Any], folder: Path, split: str, item: tuple[int, Path]
) -> None:
    """Decode one track for the shards, or note why it is left out."""
    index, track = item
    note, audio = decode(layout, manifest, track)
    if audio is None:
        save_note(folder, split, index, note)
    else:
        save_track(folder, split, index, note, audio, manifest)


def signature(track: Path) -> list[Any]:
    """What tells whether a track has changed since an earlier run: names, sizes and times of its files, linked folders' too."""
    files, seen = [] if track.is_dir() else [track], set[str]()
    for top, folders, names in os.walk(track, followlinks=True):
        if (real := os.path.realpath(top)) in seen:  # links may go in circles
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        files += [Path(top, name) for name in names]
    there = sorted(f for f in files if os.path.isfile(f))
    return [[str(f.relative_to(track.parent)), f.stat().st_size, f.stat().st_mtime_ns] for f in there]


def report(notes: Mapping[str, Sequence[Mapping[str, Any]]], manifest: Mapping[str, Any]) -> list[str]:
    """Lines on what went in: tracks, hours, clipping, activity and loudness; then what was left out or odd, and why."""
    lines, remarks, seen = [], [], dict[str, str]()
    for split, tracks in notes.items():
        used = [t for t in tracks if "samples" in t]
        seconds = np.array([t["samples"] / manifest["sample_rate"] for t in used])
        active = 100 * np.average([t["active"] for t in used], axis=0, weights=seconds)
        loud = np.array([[np.nan if x is None else x for x in t["loudness"]] for t in used])
        means = [np.nanmean(x) if np.isfinite(x).any() else -np.inf for x in loud.T]
        lines.append(
            f"{split}: {len(used)} of {len(tracks)} tracks, {seconds.sum() / 3600:.2f} h, "
            f"{sum(t['clipped'] for t in used)} clipped samples"
        )
        per_stem = zip(manifest["stems"], active, strict=True)
        lines.append("  active: " + ", ".join(f"{s} {a:.0f} %" for s, a in per_stem))
        named = zip([*manifest["stems"], "mixture"], means, strict=True)
        lines.append("  loudness (RMS): " + ", ".join(f"{s} {x:.1f} dB" for s, x in named))
        noted: dict[str, list[str]] = {}
        for track in used:
            for note in track["notes"]:
                noted.setdefault(note, []).append(track["name"])
        often = {note: names for note, names in noted.items() if len(names) > NAMED}
        remarks += [
            f"noted: {split}: {len(names)} tracks ({', '.join(names[:NAMED])}, …): {note}"
            for note, names in often.items()
        ]
        for track in tracks:
            if "skipped" in track:
                remarks.append(f"skipped: {track['skipped']}")
                continue
            remarks += [f"noted: {split}/{track['name']}: {note}" for note in track["notes"] if note not in often]
            other = seen.setdefault(track["checksum"], f"{split}/{track['name']}")
            if other != f"{split}/{track['name']}":
                remarks.append(f"noted: {split}/{track['name']} has the same files as {other}")
    skipped = sum(line.startswith("skipped") for line in remarks)
    return [*lines, f"{skipped} tracks skipped, {len(remarks) - skipped} remarks", *remarks]


def add_arguments(parser: argparse.ArgumentParser, corpus: Corpus) -> None:
    parser.add_argument("src", type=Path, metavar="SRC")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of records to write")
    parser.add_argument("--crop", type=int, default=corpus.crop, help="samples of a training crop; any can be read")
    parser.add_argument("--parts", type=int, default=corpus.parts, help="records that a crop is as long as")
    parser.add_argument("--margin", type=float, default=0.0, help="overlap of neighbouring records, in records")
    parser.add_argument(
        "--coding", choices=CODINGS, default="none", help="of records; zstd is smaller, and slower to read"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of records")


def add_local_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that Beam decides by itself."""
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="about how large a shard becomes")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode and write")


def plan_of(corpus: Corpus, args: argparse.Namespace) -> tuple[dict[str, list[Path]], dict[str, Any], dict[str, Any]]:
    """(tracks of each split, manifest, plan) for a source folder. UserError for arguments or a folder that do not fit."""
    if not args.src.is_dir():
        raise UserError(f"{args.src} is no folder")
    if min(args.crop, args.parts) < 1 or not 0 <= args.margin <= 100:
        raise UserError("--crop and --parts must be at least 1, --margin from 0 to 100")
    tracks = corpus.find(args.src, args)
    if not tracks:
        raise UserError(f"{args.src} has no folder of tracks of {corpus.layout}; name the root of the corpus")
    # By what is a track: other folders, which are told of as unusable, do not make the corpus another one.
    edition = corpus.edition({s: sum(is_track(t, corpus.stems) for t in found) for s, found in tracks.items()})
    manifest = make_manifest(
        corpus.stems, corpus.sample_rate, corpus.channels, args.crop, args.margin, args.seed, args.parts,
        layout=corpus.layout, edition=edition,
    )  # fmt: skip
    return tracks, manifest, {"tracks": {s: [signature(t) for t in found] for s, found in tracks.items()}}


def run(
    module: str,
    description: str,
    corpus: Corpus,
    argv: list[str] | None,
    more=lambda parser: None,
    hint: Callable[[Collection[str]], str] = lambda splits: "",
) -> int:
    """The command `python -m MODULE SRC OUT`; returns the exit code.

    Args:
      more: adds arguments.
      hint: what to say in the end, from the names of the splits.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    add_arguments(parser, corpus)
    add_local_arguments(parser)
    more(parser)
    args = parser.parse_args(argv)
    try:
        begin(sys.argv[1:] if argv is None else argv)
        print_log()
        if args.shard_bytes < 1:
            raise UserError("--shard-bytes must be at least 1")
        tracks, manifest, plan = plan_of(corpus, args)
        save = partial(save_corpus_track, corpus.layout, manifest)
        listed = {split: list(enumerate(found)) for split, found in tracks.items()}
        notes, full, is_new = convert(
            args.out, listed, save, manifest, plan, args.workers, args.coding, args.shard_bytes
        )
    except UserError as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{module}: interrupted; start again to go on", file=sys.stderr)
        return 130
    print("\n".join(report(notes, full)))
    edition = manifest["edition"]
    print(
        f"wrote {args.out} ({edition})"
        if is_new
        else f"{args.out} is there already, made of the same files ({edition})"
    )
    if said := hint(tracks):
        print(said)
    return 0
