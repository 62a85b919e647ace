"""`msr separate`: songs in, a folder of stems for each out."""

import argparse
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from msr_jax.audio.io import audio_info
from msr_jax.errors import UserError
from msr_jax.methods.stages import REFINEMENTS
from msr_jax.separate.catalogue import check_stems, find_tasks
from msr_jax.separate.demix import Demix
from msr_jax.separate.engine import OVERLAP, load
from msr_jax.separate.songs import separate_file, stem_paths
from msr_jax.weights.model_folder import BUNDLED

FULL_DISK = 2**20  # bytes that are left on a disk where nothing can be written any more


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msr separate",
        description=__doc__,
        epilog="Exit codes: 0 done, 1 some songs of several could not be separated, 2 bad options, or a single bad song, "
        "130 interrupted. Started again, a batch goes on where it was.",
    )
    parser.add_argument("songs", nargs="+", metavar="SONG", type=Path, help="audio files: wav, flac, ogg, mp3, …")
    parser.add_argument(
        "-o", "--out", required=True, metavar="DIR", type=Path, help="gets a folder of stems for each song"
    )
    parser.add_argument(
        "--model",
        default=BUNDLED,
        metavar="DIR",
        help="model folder, or --workdir of a training run (default: the small one that comes with this package)",
    )
    parser.add_argument(
        "--refine",
        metavar="|".join(REFINEMENTS),
        help="what follows the deterministic model; default: what the model names, or the best it has",
    )
    parser.add_argument("--steps", type=int, metavar="T", help="refinement steps (default: the model's own)")
    parser.add_argument("--format", choices=["wav", "flac"], default="wav", help="wav (32-bit float) or flac (24-bit)")
    parser.add_argument("--seed", type=int, default=0, help="of the refinement's noise")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products")
    parser.add_argument(
        "--overlap",
        type=float,
        default=OVERLAP,
        help=f"of neighbouring segments, 0 to 0.5 (default {OVERLAP:g}; less is faster); joints are cross-faded over 5 ms at least",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace stems that are there; without, they are kept")
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


def _count(stems: int) -> str:
    return "1 stem" if stems == 1 else f"{stems} stems"


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.refine not in (None, *REFINEMENTS):
        raise UserError(f"--refine must be one of {', '.join(REFINEMENTS)}, not '{args.refine}'")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file; -o must name a folder")
    tasks = find_tasks(args.songs, args.out)
    if len(tasks) == 1:
        audio_info(tasks[0].song)  # before a model is loaded
    settings = Demix(args.num_overlap, args.chunk_batch, args.bigshifts, args.tta)
    if not args.demix and settings != Demix():
        raise UserError("--num-overlap, --chunk-batch, --bigshifts and --tta go with --demix")
    options = {"overlap": args.overlap, "dtype": args.dtype, "reference": settings if args.demix else None}
    options |= {"mixture_consistent": args.mixture_consistent, "residual": args.residual}
    separator = load(args.model, args.refine, args.steps, args.seed, **options)
    check_stems(tasks, separator.stems, args.format)
    steps = f", T = {args.steps}" if args.steps else ""
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    problems = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        say = lambda text: bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        for task in tasks:
            paths = stem_paths(task.folder, separator.stems, args.format)
            kept = [] if args.overwrite else [stem for stem, path in paths.items() if path.exists()]
            if kept:
                say(f"{task.song.name}: kept {', '.join(kept)} in {task.folder}; --overwrite replaces them")
            if len(kept) == len(paths):
                continue
            try:
                info = audio_info(task.song)
                shown = bar.add_task(task.song.name, total=info.frames)
                update = lambda done, shown=shown: bar.update(shown, completed=done)
                missing = [stem for stem in paths if stem not in kept]
                written = separate_file(separator, task, info, args.format, missing, update)
            except UserError as error:
                if len(tasks) == 1 or (args.out.exists() and shutil.disk_usage(args.out).free < FULL_DISK):
                    raise
                problems.append(str(error))
                continue
            say(f"{task.song.name}: {_count(len(written))} in {task.folder} (refinement: {separator.refine}{steps})")
            if clipped := {path.name: count for path, count in written.items() if count}:
                numbers = ", ".join(f"{count} in {name}" for name, count in clipped.items())
                say(f"  samples beyond ±1, clipped: {numbers}; --format wav keeps them")
    others = [name for name in separator.refinements if name != separator.refine]
    if separator.refine == "none" and others:
        say(
            f"not refined; --refine {'|'.join(others)} takes longer and may come nearer: the model's README.md has figures"
        )
    if problems:
        print(f"NOT separated: {len(problems)} of {len(tasks)} songs", file=sys.stderr)
        for problem in problems:
            print(f"  {problem}", file=sys.stderr)
    return 1 if problems else 0
