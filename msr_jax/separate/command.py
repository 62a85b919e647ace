"""`msr separate`: songs in, a folder of stems for each out."""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from msr_jax.audio.io import AudioInfo, audio_info
from msr_jax.errors import UserError
from msr_jax.messages import log
from msr_jax.methods.stages import REFINEMENTS
from msr_jax.separate.batch import Batch, Outcome, all_stems, begun_ahead, refinement_of, separator_of
from msr_jax.separate.catalogue import FILENAME, check_stems, find_shard, find_tasks, without_stems
from msr_jax.separate.engine import OVERLAP, Separator
from msr_jax.separate.ensemble import BY, Ensemble
from msr_jax.separate.manifest import Manifest
from msr_jax.separate.places import is_url
from msr_jax.separate.songs import SUBTYPES, Output

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
FULL_DISK = 2**20  # bytes that are left on a disk where nothing can be written any more


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msr separate",
        description=__doc__,
        epilog="Exit codes: 0 done, 1 some songs of several could not be separated, 2 bad options, or a single bad song, "
        "130 interrupted. Started again, a batch goes on where it was.",
    )
    parser.add_argument(
        "songs",
        nargs="*",
        metavar="SONG",
        help="audio files (wav, flac, ogg, mp3, …), folders, or patterns in quotes; gs://, s3:// and so on with the extra `cloud`",
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="DIR", type=_here, help="gets a folder of stems for each song"
    )
    parser.add_argument(
        "--model",
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
        help="samples beyond ±1: keep them (default of 32-bit float), clip them (of all else), or scale all stems of a run by one gain",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the refinement's noise, and of --shifts")
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
    parser.add_argument(
        "--one-mask",
        action="store_true",
        help="of a mono model such as the bundled one: one run for all channels; about half the time for stereo, and worse the wider it is",
    )
    parser.add_argument("--no-tags", action="store_true", help="leave out the song's title, artist, cover and so on")
    parser.add_argument(
        "--stems", metavar="A,B", help="those alone; where a network has a head for each, only theirs run"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace stems that are there; without, they are kept")
    better = parser.add_argument_group("several runs as one", "each takes its time, and may come nearer")
    better.add_argument(
        "--shifts",
        type=int,
        default=1,
        metavar="N",
        help="the mean of N runs over the song moved by up to half a second (default 1, as it is)",
    )
    better.add_argument(
        "--ensemble",
        nargs="+",
        action="extend",
        metavar="MODEL[:WEIGHT]",
        help="models with the same stems (as of --model, `bundled` too), together; a weight counts beside those of the others",
    )
    better.add_argument(
        "--ensemble-by",
        choices=BY,
        help="of what: samples (default mean), or magnitudes of spectra with the phases of their mean",
    )
    many = parser.add_argument_group(
        "many songs",
        "stems of a folder's songs, or of those of a pattern or list, keep the folders that the songs are in",
    )
    many.add_argument(
        "--list",
        metavar="FILE",
        help="songs: a path a line, .jsonl objects with a path, or a .parquet with a column path",
    )
    many.add_argument("--filename", metavar="PATTERN", help=f"of stems in -o (default {FILENAME})".replace("%", "%%"))
    many.add_argument(
        "--shard",
        metavar="K/N",
        help="every N-th song from the K-th, for N processes (default: what launch/local.sh, srun, mpirun or JAX's variables tell)",
    )
    for name, kind in (("coordinator", str), ("processes", int), ("process", int)):
        many.add_argument(
            f"--{name}", type=kind, help=argparse.SUPPRESS
        )  # as launch/local.sh gives them to every command
    many.add_argument(
        "--manifest", metavar="FILE", type=_here, help="JSONL, a line a song: hash, stems, levels, seconds, error"
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


def _here(text: str) -> Path:
    """A place to write to. A URL would become a folder of that name."""
    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"{text} is no place of this machine: mount the store, and name the folder there"
        )
    return Path(text)


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


def check_output(args: argparse.Namespace) -> None:
    """Raises UserError if stems cannot be written as, or where, the options say."""
    if os.path.exists(args.out) and not os.path.isdir(args.out):  # pathlib's raise where one may not look
        raise UserError(f"{args.out} is a file; -o must name a folder")
    Output(args.format, args.bits, args.peak).check()


def main(argv: list[str]) -> int:
    args = parser_of().parse_args(argv)
    check_output(args)
    shard, shards = find_shard(args.shard, os.environ, args.processes, args.process)
    tasks = find_tasks(args.songs, args.out, args.list, args.filename)
    if len(tasks) == shards == 1 and not (tasks[0].url or args.manifest or args.json):
        audio_info(tasks[0].song)  # before a model is loaded
    manifest = Manifest(args.manifest) if args.manifest else None
    if not tasks[shard - 1 :: shards]:
        log.info(f"there is no song for share {shard} of {shards}")
        return 0
    separator = separator_of(args)
    if not args.overwrite:
        tasks = without_stems(tasks, all_stems(separator))
    check_stems(tasks, separator.stems, args.format, is_any_format=args.overwrite)
    is_alone = len(tasks) == 1 and shards == 1
    tasks = tasks[shard - 1 :: shards]
    batch = Batch(args, separator)
    is_told = lambda source, stems: not args.json and (manifest is None or manifest.has(source, stems))
    told = _Teller(args, separator)
    problems: list[str] = []
    console = Console()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=args.json or not console.is_terminal) as bar:
        told.say = lambda text: bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        whole = bar.add_task(f"{len(tasks)} songs", total=len(tasks), visible=len(tasks) > 1)
        for begun in begun_ahead(batch, tasks, is_told):
            task = begun.task
            shown = bar.add_task(task.song.name, total=None, visible=False)

            def update(info: AudioInfo, shown: TaskID = shown) -> Callable[[int], None]:
                bar.reset(shown, total=info.frames, visible=True)
                return lambda done: bar.update(shown, completed=done)

            outcome = batch.finish(begun, update, manifest)
            told.song(outcome)
            is_full = bool(outcome.error) and args.out.exists() and shutil.disk_usage(args.out).free < FULL_DISK
            if (row := outcome.row) and manifest and not is_full:
                if outcome.written or not manifest.tells(row):
                    manifest.add(row)
            if outcome.error:
                if is_full and problems:
                    told.problems(problems, len(tasks))
                if is_full or is_alone:
                    raise UserError(outcome.error)
                problems.append(outcome.error)
            if len(tasks) > 1:
                bar.remove_task(shown)
            bar.advance(whole)
    told.end(problems, len(tasks))
    return 1 if problems else 0


class _Teller:
    """Says what becomes of every song, in words or in JSON."""

    def __init__(self, args: argparse.Namespace, separator: Separator | Ensemble):
        self.separator, self.is_json, self.has_written = separator, args.json, False
        self.is_float = Output(args.format, args.bits, "keep").keeps_peaks
        self.say: Callable[[str], None] = print
        ways = [f"T = {args.steps}"] if args.steps else []
        ways += [f"{args.shifts} shifts"] if args.shifts > 1 else []
        ways += [f"{separator.by} of {len(separator.members)} models"] if isinstance(separator, Ensemble) else []
        self.how = ", ".join([f"refinement: {refinement_of(separator)}", *ways])

    def song(self, outcome: Outcome) -> None:
        if self.is_json:
            print(json.dumps(outcome.row, allow_nan=False), flush=True)
            return
        task, written = outcome.task, outcome.written
        self.has_written |= written is not None
        if outcome.kept:
            self.say(f"{task.song.name}: kept {', '.join(outcome.kept)} in {task.folder}; --overwrite replaces them")
        if written:
            stems = "1 stem" if len(written.paths) == 1 else f"{len(written.paths)} stems"
            self.say(f"{task.song.name}: {stems} in {task.folder} ({self.how})")
            if clipped := {stem: count for stem, count in written.clipped.items() if count}:
                numbers = ", ".join(f"{count} in {written.paths[stem].name}" for stem, count in clipped.items())
                ways = "--peak keep or scale" if self.is_float else "--peak scale or wav of 32 bits"
                self.say(f"  samples beyond ±1, clipped: {numbers}; {ways} keeps their shape")
            if written.gain != 1:
                gain = f"{20 * math.log10(written.gain):.2f} dB"
                self.say(f"  {', '.join(written.paths)} by {gain}, so that none passes ±1")

    def end(self, problems: Sequence[str], songs: int) -> None:
        others = [name for name in self.separator.members[0].refinements if name != "none"]
        if refinement_of(self.separator) == "none" and others and self.has_written:
            dial = f"--refine {'|'.join(others)} takes longer and may come nearer"
            print(f"not refined; {dial}")
        self.problems(problems, songs)

    def problems(self, problems: Sequence[str], songs: int) -> None:
        if problems:
            print(f"NOT separated: {len(problems)} of {songs} songs", file=sys.stderr)
            for problem in problems:
                print(f"  {problem}", file=sys.stderr)
