"""`msr separate`: songs in, a folder of stems for each out."""

import argparse
from contextlib import ExitStack, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from msr_jax.audio.io import AudioInfo, AudioWriter, audio_info, read_blocks
from msr_jax.errors import UserError
from msr_jax.methods.stages import REFINEMENTS
from msr_jax.separate.demix import Demix
from msr_jax.separate.engine import OVERLAP, Separator, load
from msr_jax.weights.model_folder import BUNDLED

BLOCK_SECONDS = 10


def separate_file(
    separator: Separator, song: Path, info: AudioInfo, folder: Path, suffix: str, progress=None
) -> dict[Path, int]:
    """Separate one file into `folder`/<stem>.<suffix>; all stems appear, or none.

    Returns:
      {path: number of samples that its format had to clip}.

    Raises:
      UserError: the song turns out damaged, or a stem cannot be written.
    """
    paths = {stem: folder / f"{stem}.{suffix}" for stem in separator.stems}
    new_folders = [place for place in (folder, *folder.parents) if not place.exists()]  # innermost first
    try:
        with ExitStack() as stack:
            writers = {
                stem: stack.enter_context(AudioWriter(path, info.sample_rate, info.channels, frames=info.frames))
                for stem, path in paths.items()
            }
            blocks = read_blocks(song, BLOCK_SECONDS * info.sample_rate)
            for part in separator.stream(blocks, info.sample_rate, info.channels, info.frames, progress):
                for stem, audio in part.items():
                    writers[stem].write(audio)
            for writer in writers.values():  # a disk that is full shows before the first stem gets its name
                writer.close()
    except BaseException:
        for place in new_folders:
            with suppress(OSError):  # never there, or another song's by now
                place.rmdir()
        raise
    return {writer.path: writer.clipped for writer in writers.values()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="msr separate", description=__doc__)
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
        help=f"of neighbouring segments, 0 to 0.5 (default {OVERLAP:g}; less is faster)",
    )
    parser.add_argument(
        "--mixture-consistent",
        action="store_true",
        help="have the stems add up to the mixture, each as loud as its share",
    )
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


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.refine not in (None, *REFINEMENTS):
        raise UserError(f"--refine must be one of {', '.join(REFINEMENTS)}, not '{args.refine}'")
    infos = {song: audio_info(song) for song in args.songs}
    names = [song.stem for song in infos]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"two songs are named {twice[0]} and would share a folder; separate them into different folders"
        )
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file; -o must name a folder")
    settings = Demix(args.num_overlap, args.chunk_batch, args.bigshifts, args.tta)
    if not args.demix and settings != Demix():
        raise UserError("--num-overlap, --chunk-batch, --bigshifts and --tta go with --demix")
    options = {"overlap": args.overlap, "dtype": args.dtype, "reference": settings if args.demix else None}
    options["mixture_consistent"] = args.mixture_consistent
    separator = load(args.model, args.refine, args.steps, args.seed, **options)
    sources = {song.resolve() for song in infos}
    for song in infos:
        for stem in separator.stems:
            path = args.out / song.stem / f"{stem}.{args.format}"
            if path.resolve() in sources:
                raise UserError(f"the stem {path} would replace a song that is to be separated; name another folder")
    steps = f", T = {args.steps}" if args.steps else ""
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        for song, info in infos.items():
            task = bar.add_task(song.name, total=info.frames)
            update = lambda done, task=task: bar.update(task, completed=done)
            written = separate_file(separator, song, info, args.out / song.stem, args.format, update)
            bar.console.print(
                f"{song.name}: {len(written)} stems in {args.out / song.stem} (refinement: {separator.refine}{steps})",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
            if clipped := {path.name: count for path, count in written.items() if count}:
                bar.console.print(
                    f"  samples beyond ±1, clipped: {', '.join(f'{n} in {p}' for p, n in clipped.items())};"
                    " --format wav keeps them",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
    return 0
