"""What is evaluated: a model, the estimates of another tool, or the mixture itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from msr_jax.config import unet_base
from msr_jax.data.tracks import SLAKH, find_tracks, track_name
from msr_jax.errors import UserError
from msr_jax.evaluate.protocols import segment_of
from msr_jax.evaluate.score import EstimateFunction, Plan, by_model, mixture_as_estimate, with_others
from msr_jax.evaluate.songs import format_of, load_estimates, pair_folders, stems_of
from msr_jax.methods.stages import own_steps
from msr_jax.separate.engine import Separator, load

NAMED = 3  # files at the most, where several are odd


class System(NamedTuple):
    """Who separates which tracks.

    `estimators` has a function for each device, `det` those of the deterministic pass to set beside; `files` names what a
    track's scores depend on; `settings` and `problems` go into the results.
    """

    estimators: Sequence[EstimateFunction]
    plan: Plan
    tracks: list[Path]
    settings: dict[str, Any]
    files: Callable[[Path], list[Path]]
    det: Sequence[EstimateFunction] = ()
    problems: Sequence[dict[str, str]] = ()


def stamp_of(paths: Sequence[Path]) -> list[list]:
    """Name, size and time of files (or of those in folders): what tells whether results are still theirs."""
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p])]
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]


def model_runs(
    model: str | Path,
    refine: str | None,
    steps: int | None,
    seed: int,
    protocol: str,
    backend: str,
    data: Path | None = None,
    **options,
) -> tuple[list[EstimateFunction], Plan, Separator]:
    """A model on every local device, ready to separate by a protocol: (estimate functions, plan, separator).

    There is a function for each device; the separator is the first one's. Stems that the tracks in the folder `data` have beside
    the model's are scored together. `options` are `Separator`'s.
    """
    separators = []
    for device in jax.local_devices():
        with jax.default_device(device):
            separators.append(load(model, refine, steps, seed, **options))
    first = separators[0]
    channels, rate = first.config["channels"], first.sample_rate
    plan = Plan(first.stems, rate, channels, protocol, segment_of(channels, rate), backend)
    plan = with_others(plan, data) if data else plan

    def on(device: Any, function: Callable) -> Callable:
        def run(mixture, rate):
            with jax.default_device(device):
                return function(mixture, rate)

        return run

    functions = [on(d, s.separate) for d, s in zip(jax.local_devices(), separators, strict=True)]
    return [by_model(f, plan) for f in functions], plan, first


def system_of_model(
    model: str,
    refine: str | None,
    steps: int | None,
    seed: int,
    protocol: str,
    backend: str,
    folder: Path,
    has_det: bool = True,
    **options,
) -> System:
    """A model, and its deterministic pass beside it where it refines and `has_det`; arguments as of `model_runs`."""
    run = (seed, protocol, backend, folder)
    estimators, plan, first = model_runs(model, refine, steps, *run, **options)
    det = model_runs(model, "none", None, *run, **options)[0] if has_det and first.refine != "none" else []
    steps = steps or own_steps(first.config, first.refine)
    settings = {"model": model, "refine": first.refine, **({"steps": steps} if steps else {}), "seed": seed, **options}
    files = lambda track: [track, Path(model)]
    return System(estimators, plan, find_tracks(folder, first.stems), settings, files, det)


def system_of_estimates(
    estimates: Path, folder: Path, stems: Sequence[str] | None, sample_rate: int | None, backend: str
) -> System:
    """TRACK/STEM files that any tool has made of the tracks in `folder`, whole songs."""
    stems, tracks = _references(folder, stems)
    paired, alone, strangers = pair_folders(estimates, tracks)
    tracks = [t for t in tracks if track_name(t) in paired]
    rate, channels = _format(tracks, stems, sample_rate)
    problems = [{"track": n, "reason": "has no folder of estimates"} for n in alone]
    problems += [{"track": n, "reason": "is a folder of estimates without a reference track"} for n in strangers]
    plan = with_others(Plan(stems, rate, channels, "song", None, backend), folder)
    read = lambda track, references: load_estimates(
        paired[track_name(track)], plan.stems, references, rate, bool(plan.others)
    )
    settings = {"estimates": str(estimates), "refine": "estimates of another tool"}
    files = lambda track: [track, paired[track_name(track)]]
    return System([read], plan, tracks, settings, files, problems=problems)


def system_of_mixture(
    folder: Path, stems: Sequence[str] | None, sample_rate: int | None, protocol: str, backend: str
) -> System:
    """The mixture itself as every stem's estimate: what an improvement is measured from."""
    stems, tracks = _references(folder, stems)
    if stems == list(SLAKH):  # as models of it are scored, and not as it is distributed
        rate, channels = sample_rate or unet_base().sample_rate, 1
    else:
        rate, channels = _format(tracks, stems, sample_rate)
    plan = with_others(Plan(stems, rate, channels, protocol, segment_of(channels, rate), backend), folder)
    estimators = [by_model(mixture_as_estimate(plan.stems), plan)]
    settings = {"refine": "no model: the mixture is the estimate"}
    return System(estimators, plan, tracks, settings, lambda track: [track])


def _references(folder: Path, stems: Sequence[str] | None) -> tuple[list[str], list[Path]]:
    """The stems that are scored where no model names them, and the tracks."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one that holds track folders")
    stems = list(stems) if stems else stems_of(folder)
    return stems, find_tracks(folder, stems)


def _format(tracks: list[Path], stems: list[str], sample_rate: int | None) -> tuple[int, int]:
    """Sample rate in Hz and channels at which estimates are scored that come from no model; odd references are named."""
    rate, channels, odd = format_of(tracks, stems)
    rate = sample_rate or rate
    if odd:
        some = ", ".join(odd[:NAMED]) + (", …" if len(odd) > NAMED else "")
        print(f"scoring at {rate} Hz in {channels} channels, as most references are; not so: {some}")
    return rate, channels
