"""One song of a batch, wherever the batch runs: kept if it is done, else separated, and told in a row of the manifest."""

import argparse
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from msr_jax.audio.io import AudioInfo, seekable
from msr_jax.errors import UserError
from msr_jax.methods.stages import REFINEMENTS
from msr_jax.separate.chunks import ahead
from msr_jax.separate.demix import Demix
from msr_jax.separate.engine import Separator, load
from msr_jax.separate.ensemble import BY, Ensemble, load_ensemble, parse_member
from msr_jax.separate.manifest import Manifest, sha256_of
from msr_jax.separate.places import at_hand
from msr_jax.separate.songs import Output, Task, Written, WrittenMeanwhile, about_song, levels_of, stems_of, write_stems
from msr_jax.weights.model_folder import ALL_STEMS, BUNDLED

SONGS = 2  # that are begun beside the one that is written
PARTS = 2  # of a song that wait to be written, beside those within its separation
# Options that are told of every song, beside what the model makes of those that are left out.
TOLD = (
    "stems", "steps", "seed", "dtype", "demix", "shifts", "one_mask", "mixture_consistent", "residual", "format", "bits", "peak"
)  # fmt: skip
OF_DEMIX = ("num_overlap", "chunk_batch", "bigshifts", "tta")


def separator_of(args: argparse.Namespace) -> Separator | Ensemble:
    """The model or models that the options of `msr separate` ask for.

    Raises:
      UserError: there is none, or options contradict each other.
    """
    if args.refine not in (None, *REFINEMENTS):
        raise UserError(f"--refine must be one of {', '.join(REFINEMENTS)}, not '{args.refine}'")
    reference = Demix(args.num_overlap, args.chunk_batch, args.bigshifts, args.tta)
    if not args.demix and reference != Demix():
        raise UserError("--num-overlap, --chunk-batch, --bigshifts and --tta go with --demix")
    if args.demix and (args.overlap, args.segments) != (None, None):
        raise UserError("--overlap and --segments are of our own chunks; --demix has --num-overlap")
    options: dict[str, Any] = {"refine": args.refine, "num_steps": args.steps, "seed": args.seed, "dtype": args.dtype}
    options |= {"overlap": args.overlap, "segments": args.segments, "shifts": args.shifts, "memory": args.memory}
    options |= {"one_mask": args.one_mask, "reference": reference if args.demix else None}
    options["stems"] = [name.strip() for name in args.stems.split(",")] if args.stems is not None else None
    whole = {"mixture_consistent": args.mixture_consistent, "residual": args.residual}
    if args.ensemble_by and not args.ensemble:
        raise UserError("--ensemble-by goes with --ensemble")
    if not args.ensemble:
        return load(args.model or BUNDLED, **options, **whole)
    if args.model:
        raise UserError("--ensemble names all of its models itself; leave --model out, or name that one there too")
    return load_ensemble([parse_member(text) for text in args.ensemble], args.ensemble_by or BY[0], **whole, **options)


class Outcome(NamedTuple):
    """What became of a song."""

    task: Task
    kept: list[str]  # stems that were there
    written: Written | None
    error: str | None
    row: dict[str, Any] | None  # of the manifest; None where it has one


class Batch:
    """The same for every song: a separator, and how its stems are written."""

    def __init__(self, args: argparse.Namespace, separator: Separator | Ensemble):
        self.separator, self.overwrite = separator, args.overwrite
        self.output = Output(args.format, args.bits, args.peak, not args.no_tags)
        self.model: Any = "bundled" if args.model in (None, BUNDLED) else str(args.model)
        chosen: dict[str, Any] = {}
        if isinstance(separator, Ensemble):
            self.model = " + ".join(args.ensemble)
            chosen["ensemble_by"] = separator.by
        one = separator.members[0]
        chosen |= {"refine": refinement_of(separator), "segments": one.segments, "overlap": one.overlap}
        if args.demix:
            chosen |= {"overlap": None} | {name: getattr(args, name) for name in OF_DEMIX}
        self.settings = {**chosen, **{name: getattr(args, name) for name in TOLD}}

    def begin(self, task: Task, is_told: Callable[[str, dict[str, Path]], bool] = lambda *_: False) -> "Begun":
        """Separate a song, but for stems that are there, in a thread of its own, as far ahead of `finish` as memory should hold.

        Args:
          is_told: whether a row of this source and these stems has been written; then one that is kept gets none.
        """
        paths = task.paths(self.separator.stems, self.output.suffix)
        kept = [] if self.overwrite else [stem for stem, path in paths.items() if path.is_file()]
        missing = [stem for stem in paths if stem not in kept]
        is_known = not missing and is_told(task.source, paths)
        made = None if is_known else ahead(self._made(task, kept, bool(missing)), PARTS)
        return Begun(task, paths, kept, missing, made)

    def _made(self, task: Task, kept: list[str], is_missing: bool) -> Iterator[Any]:
        """The song's hash; if stems are missing, what is known of it, and its stems part by part."""
        with at_hand(task) as here:
            yield sha256_of(seekable(here.song))
            if is_missing:
                if kept and self.output.peak == "scale":  # by which gain these are, nobody knows
                    raise UserError(
                        f"{task.folder} has {', '.join(kept)} of {task.song.name} already, and --peak scale is one gain "
                        "for all stems; --overwrite makes all of them anew, or name another folder"
                    )
                about = about_song(here.song, self.output)
                yield here, about
                yield from stems_of(self.separator, here.song, about.info)

    def finish(
        self,
        begun: "Begun",
        progress: Callable[[AudioInfo], Callable[[int], Any]] | None = None,
        manifest: Manifest | None = None,
    ) -> Outcome:
        """Write what is missing of a song. What is wrong with it comes back as the outcome's error.

        Args:
          manifest: tells whose the stems are that are there.
          progress: is given the song's sizes when they are known, and gives what is called with the samples done.
        """
        started = time.perf_counter()
        task, paths, kept, missing, made = begun
        if made is None:
            return Outcome(task, kept, None, None, None)
        written, error, sha256 = None, None, None
        stems = {stem: paths[stem] for stem in kept}
        levels: dict[str, float | None] = {}
        seconds = None
        try:
            with closing(made):
                sha256 = next(made)
                _check_owner(task, sha256, stems, manifest)
                if missing:
                    here, about = next(made)
                    update = progress(about.info) if progress else None
                    try:
                        written = write_stems(made, here, about, self.output, missing, update)
                    except WrittenMeanwhile:
                        kept, stems = list(paths), paths
                        _check_owner(task, sha256, stems, manifest)
            levels, seconds = levels_of(stems)
            if written:
                levels, seconds = levels | written.levels, written.seconds
                stems = stems | written.paths
        except UserError as problem:
            error = str(problem)
            stems = {} if isinstance(problem, _OfAnother) else stems
        row = {
            "source": task.source,
            "sha256": sha256,
            "model": self.model,
            "settings": self.settings,
            "stems": {stem: str(stems[stem]) for stem in paths if stem in stems},
            "levels": levels,
            "gain_db": round(20 * math.log10(written.gain), 3) if written else None,
            "clipped": written.clipped if written else {},
            "seconds": seconds,
            "work_seconds": round(time.perf_counter() - started, 3),
            "kept": [stem for stem in kept if stem in stems],
            "error": error,
        }
        return Outcome(task, row["kept"], written, error, row)


class _OfAnother(UserError):
    pass


def _check_owner(task: Task, sha256: str | None, stems: Mapping[str, Path], manifest: Manifest | None) -> None:
    """Raises _OfAnother where a manifest says that the stems that are there are another song's."""
    if manifest and (owner := manifest.other_owner(task.source, sha256, stems.values())):
        raise _OfAnother(
            f"{task.source}: in {task.folder} are stems of {owner}, by the manifest; name another folder with -o, or "
            "replace them with --overwrite"
        )


class Begun(NamedTuple):
    """A song that is being separated."""

    task: Task
    paths: dict[str, Path]  # of its stems
    kept: list[str]  # stems that were there
    missing: list[str]
    made: Generator[Any, None, None] | None  # see `Batch._made`; None: there is nothing to do and to tell


def begun_ahead(
    batch: Batch, tasks: Iterable[Task], is_told: Callable[[str, dict[str, Path]], bool]
) -> Iterator[Begun]:
    """Every song in turn, the next ones begun: the network never waits for one to be read or written, and they share its calls."""
    waiting: deque[Begun] = deque()
    try:
        for task in tasks:
            waiting.append(batch.begin(task, is_told))
            if len(waiting) > SONGS:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for begun in waiting:
            if begun.made is not None:
                begun.made.close()


def all_stems(separator: Separator | Ensemble) -> list[str]:
    """Of the model or models, whichever are wanted; and what is left of the song, if it is."""
    theirs = (stem for member in separator.members for stem in member.config.get(ALL_STEMS, member.config["stems"]))
    return list(dict.fromkeys([*separator.stems, *theirs]))


def refinement_of(separator: Separator | Ensemble) -> str:
    """Its name; of several models that differ in it, all of them."""
    return ", ".join(dict.fromkeys(member.refine for member in separator.members))
