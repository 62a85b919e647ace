"""`msr separate`: songs in, a folder of stems for each out."""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from msr_jax.audio.io import audio_info
from msr_jax.errors import UserError
from msr_jax.methods.stages import REFINEMENTS
from msr_jax.runtime import log, parse_shard
from msr_jax.separate.catalogue import check_stems, find_tasks
from msr_jax.separate.demix import Demix
from msr_jax.separate.engine import OVERLAP, Separator, load
from msr_jax.separate.manifest import Manifest, sha256_of
from msr_jax.separate.songs import SUBTYPES, Output, Task, Written, separate_file, stem_paths
from msr_jax.weights.model_folder import BUNDLED
from msr_jax.weights.registry import find_named

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
FULL_DISK = 2**20  # bytes that are left on a disk where nothing can be written any more


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msr separate",
        description=__doc__,
        epilog="Exit codes: 0 done, 1 some songs of several could not be separated, 2 bad options, or a single bad song, "
        "130 interrupted. Started again, a batch goes on where it was.",
    )
    parser.add_argument(
        "songs", nargs="*", metavar="SONG", help="audio files (wav, flac, ogg, mp3, …), folders, or patterns in quotes"
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="DIR", type=Path, help="gets a folder of stems for each song"
    )
    parser.add_argument(
        "--model",
        default=BUNDLED,
        metavar="DIR",
        help="model folder, --workdir of a training run, or a name that `msr models` lists (default: the small one that comes with this package)",
    )
    parser.add_argument(
        "--refine",
        metavar="|".join(REFINEMENTS),
        help="what follows the deterministic model; default: what the model names, or the best it has",
    )
    parser.add_argument("--steps", type=int, metavar="T", help="refinement steps (default: the model's own)")
    parser.add_argument(
        "--format",
        choices=["wav", "flac", "mp3", "ogg", "opus"],
        default="wav",
        help="wav (default, 32-bit float), flac (24-bit), or with loss mp3, ogg (Vorbis), opus (at 48 kHz, or below)",
    )
    parser.add_argument("--bits", choices=list(SUBTYPES), help="of wav (16, 24, 32f) and flac (16, 24); 16 with dither")
    parser.add_argument(
        "--peak",
        choices=["keep", "clip", "scale"],
        help="samples beyond ±1: keep them (default of 32-bit float), clip them (of all else), or scale all stems alike",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the refinement's noise")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products")
    parser.add_argument(
        "--memory",
        type=_bytes,
        metavar="SIZE",
        help="that a call of the network may take on a device, such as 800MB or 4GB (default: half of what is free)",
    )
    parser.add_argument(
        "--segments",
        type=int,
        metavar="K",
        help="of training's length that the network takes at a time (default: the model's own, else 1)",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        help=f"of what it takes at a time, 0 to 0.5 (default: the model's own, else {OVERLAP:g}; less is faster); joints are "
        "cross-faded over 5 ms at least",
    )
    parser.add_argument("--no-tags", action="store_true", help="leave out the song's title, artist, cover and so on")
    parser.add_argument(
        "--stems", metavar="A,B", help="those alone; where a network has a head for each, only theirs run"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace stems that are there; without, they are kept")
    many = parser.add_argument_group(
        "many songs",
        "stems of a folder's songs, or of those of a pattern or list, keep the folders that the songs are in",
    )
    many.add_argument("--list", metavar="FILE", type=Path, help="songs: a path a line, or .jsonl objects with a path")
    many.add_argument("--shard", default="1/1", metavar="K/N", help="every N-th song from the K-th, for N processes")
    many.add_argument(
        "--manifest", metavar="FILE", type=Path, help="JSONL, a line a song: hash, stems, levels, seconds, error"
    )
    many.add_argument("--json", action="store_true", help="print those lines instead of words")
    adding_up = parser.add_mutually_exclusive_group()
    adding_up.add_argument(
        "--mixture-consistent",
        action="store_true",
        help="have the stems add up to the song, offset and all: what is missing goes to each by its level",
    )
    adding_up.add_argument("--residual", metavar="NAME", help="one more stem of this name: the song less all others")
    reference = parser.add_argument_group(
        "reference chunking",
        "as the public training code cuts and joins songs, for comparable results; needs the whole song in memory",
    )
    reference.add_argument("--demix", action="store_true", help="use it instead of --overlap")
    reference.add_argument("--num-overlap", type=int, default=2, help="chunks that cover each sample (default 2)")
    reference.add_argument("--chunk-batch", type=int, default=2, help="chunks per batch; changes the fades (default 2)")
    reference.add_argument("--bigshifts", type=int, default=1, help="circular shifts to average over (default 1)")
    reference.add_argument("--tta", action="store_true", help="average with channels swapped and with the song negated")
    return parser


def _bytes(text: str) -> int:
    """Bytes of "800MB" or "4GB"; of a bare number, that many."""
    number, unit = text.upper().removesuffix("B"), 1
    if number[-1:] in UNITS:
        number, unit = number[:-1], UNITS[number[-1:]]
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give one such as 800MB or 4GB")
    return size


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.refine not in (None, *REFINEMENTS):
        raise UserError(f"--refine must be one of {', '.join(REFINEMENTS)}, not '{args.refine}'")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file; -o must name a folder")
    output = Output(args.format, args.bits, args.peak, not args.no_tags)
    output.check()
    shard, shards = parse_shard(args.shard)
    tasks = find_tasks(args.songs, args.out, args.list)[shard - 1 :: shards]
    is_alone = len(tasks) == 1 and shards == 1 and not args.manifest
    if is_alone:
        audio_info(tasks[0].song)  # before a model is loaded
    manifest = Manifest(args.manifest) if args.manifest else None
    settings = Demix(args.num_overlap, args.chunk_batch, args.bigshifts, args.tta)
    if not args.demix and settings != Demix():
        raise UserError("--num-overlap, --chunk-batch, --bigshifts and --tta go with --demix")
    options = {"overlap": args.overlap, "dtype": args.dtype, "reference": settings if args.demix else None}
    options |= {"segments": args.segments, "memory": args.memory}
    options |= {"mixture_consistent": args.mixture_consistent, "residual": args.residual}
    options["stems"] = [name.strip() for name in args.stems.split(",")] if args.stems is not None else None
    separator = load(find_named(args.model, log.info), args.refine, args.steps, args.seed, **options)
    check_stems(tasks, separator.stems, args.format)
    told = _Teller(args, separator, manifest)
    problems = []
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=args.json or not console.is_terminal) as bar:
        told.say = lambda text: bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        whole = bar.add_task(f"{len(tasks)} songs", total=len(tasks), visible=len(tasks) > 1)
        for task in tasks:
            paths = stem_paths(task.folder, separator.stems, args.format)
            kept = [] if args.overwrite else [stem for stem, path in paths.items() if path.exists()]
            missing = [stem for stem in paths if stem not in kept]
            started, written, error = time.perf_counter(), None, None
            try:
                if missing:
                    info = audio_info(task.song)
                    shown = bar.add_task(task.song.name, total=info.frames)
                    update = lambda done, shown=shown: bar.update(shown, completed=done)
                    written = separate_file(separator, task, info, output, missing, update)
                    if len(tasks) > 1:
                        bar.remove_task(shown)
            except UserError as problem:
                if is_alone or (args.out.exists() and shutil.disk_usage(args.out).free < FULL_DISK):
                    raise
                problems.append(error := str(problem))
            told.song(task, kept, written, error, time.perf_counter() - started)
            bar.advance(whole)
    told.end(problems, len(tasks))
    return 1 if problems else 0


class _Teller:
    """Says what becomes of every song, in words or in JSON, and writes it down."""

    def __init__(self, args: argparse.Namespace, separator: Separator, manifest: Manifest | None):
        self.separator, self.manifest, self.is_json = separator, manifest, args.json
        self.say: Callable[[str], None] = print
        self.steps = f", T = {args.steps}" if args.steps else ""
        self.model = "bundled" if args.model == BUNDLED else str(args.model)
        names = (
            "stems",
            "steps",
            "seed",
            "dtype",
            "demix",
            "mixture_consistent",
            "residual",
            "format",
            "bits",
            "peak",
        )
        chosen = {name: getattr(separator, name) for name in ("refine", "segments", "overlap")}
        self.settings = {**chosen, **{name: getattr(args, name) for name in names}}

    def song(self, task: Task, kept: Sequence[str], written: Written | None, error: str | None, seconds: float) -> None:
        if self.is_json or (self.manifest and (written or error or str(task.song) not in self.manifest.sources)):
            row = {
                "source": str(task.song),
                "sha256": sha256_of(task.song),
                "model": self.model,
                "settings": self.settings,
                "stems": {stem: str(path) for stem, path in written.paths.items()} if written else {},
                "levels": written.levels if written else {},
                "seconds": written.seconds if written else None,
                "work_seconds": round(seconds, 3),
                "kept": list(kept),
                "error": error,
            }
            if self.manifest:
                self.manifest.add(row)
            if self.is_json:
                print(json.dumps(row, allow_nan=False), flush=True)
        if not self.is_json:
            self._in_words(task, kept, written)

    def _in_words(self, task: Task, kept: Sequence[str], written: Written | None) -> None:
        if kept:
            self.say(f"{task.song.name}: kept {', '.join(kept)} in {task.folder}; --overwrite replaces them")
        if written:
            stems = "1 stem" if len(written.paths) == 1 else f"{len(written.paths)} stems"
            self.say(f"{task.song.name}: {stems} in {task.folder} (refinement: {self.separator.refine}{self.steps})")
            if clipped := {stem: count for stem, count in written.clipped.items() if count}:
                numbers = ", ".join(f"{count} in {written.paths[stem].name}" for stem, count in clipped.items())
                self.say(f"  samples beyond ±1, clipped: {numbers}; --peak scale or --format wav keeps their shape")
            if written.gain != 1:
                self.say(f"  all stems by {20 * math.log10(written.gain):.2f} dB, so that none passes ±1")

    def end(self, problems: Sequence[str], songs: int) -> None:
        others = [name for name in self.separator.refinements if name != self.separator.refine]
        if self.separator.refine == "none" and others and not self.is_json:
            dial = f"--refine {'|'.join(others)} takes longer and may come nearer"
            print(f"not refined; {dial}: the model's README.md has figures")
        if problems:
            print(f"NOT separated: {len(problems)} of {songs} songs", file=sys.stderr)
            for problem in problems:
                print(f"  {problem}", file=sys.stderr)
