"""`msr evaluate`: SI-SDRi, BSSEval and more of a model, or of any tool's estimates, over a folder of tracks."""

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from msr_jax.config import unet_base
from msr_jax.config_fields import check_field
from msr_jax.data.tracks import SLAKH, find_tracks, split_of, track_name
from msr_jax.errors import UserError
from msr_jax.evaluate.protocols import PROTOCOLS, protocol_text, segment_of
from msr_jax.evaluate.report import write_results
from msr_jax.evaluate.score import (
    EstimateFunction,
    Plan,
    by_model,
    evaluate_tracks,
    excerpts_of,
    mixture_as_estimate,
    outdated,
    summary,
    with_others,
)
from msr_jax.evaluate.songs import format_of, load_estimates, pair_folders, stems_of
from msr_jax.methods.stages import REFINEMENTS, own_steps
from msr_jax.metrics.bss_eval import BACKENDS
from msr_jax.process import parse_shard
from msr_jax.separate.engine import Separator, load

NAMED = 3  # files at the most, where several are odd
# Options that are None unless they were given, and mean nothing elsewhere.
OF_A_MODEL = ("refine", "steps", "seed", "dtype", "mixture_consistent", "no_det")
OF_DATA = ("stems", "sample_rate")
PACKAGES = ("msr_jax", "jax", "flax", "numpy", "scipy", "museval", "log-wmse-audio-quality")


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="msr evaluate", description=__doc__)
    parser.add_argument(
        "--data",
        "--references",
        required=True,
        metavar="DIR",
        type=Path,
        help="folder of tracks, or a corpus with splits",
    )
    parser.add_argument("--model", metavar="DIR", help="model folder; with neither this nor --estimates, the mixture")
    parser.add_argument("--estimates", metavar="DIR", type=Path, help="TRACK/STEM.wav or .flac, made by any tool")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="results.json, results.md, report.html")
    parser.add_argument("--split", default="test", help="of a corpus with splits (default: test)")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="song", help="how songs are cut and scored")
    parser.add_argument("--bss-backend", choices=BACKENDS, default="jax", help="museval is the reference, and slow")
    parser.add_argument("--refine", choices=REFINEMENTS, help="default: what the model names, or the best that it has")
    parser.add_argument("--steps", type=int, metavar="T", help="refinement steps (default: the model's own)")
    parser.add_argument("--seed", type=int, help="of the refinement's noise (default: 0)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 is faster (default: float32)")
    parser.add_argument(
        "--mixture-consistent",
        action="store_true",
        default=None,
        help="have the stems add up to the mixture, each as loud as its share",
    )
    parser.add_argument(
        "--no-det",
        action="store_true",
        default=None,
        help="do not score the deterministic estimate beside a refined one",
    )
    parser.add_argument(
        "--stems", metavar="A,B", help="without --model: the stems (default: as the references' data set)"
    )
    parser.add_argument(
        "--sample-rate",
        type=int,
        metavar="HZ",
        help="without --model: score at this rate (default: the references'; the mixture of Slakh2100: 22050)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="tracks at a time (default: one per device, and one more)"
    )
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="every N-th track from the K-th, for N processes")
    parser.add_argument("--excerpts", type=int, default=2, metavar="N", help="tracks that can be heard in the report")
    return parser


def _prepare_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from error


def _format(args: argparse.Namespace, tracks: list[Path], stems: list[str]) -> tuple[int, int]:
    """Sample rate in Hz and channels at which estimates are scored that come from no model; odd references are named."""
    rate, channels, odd = format_of(tracks, stems)
    rate = args.sample_rate or rate
    if odd:
        some = ", ".join(odd[:NAMED]) + (", …" if len(odd) > NAMED else "")
        print(f"scoring at {rate} Hz in {channels} channels, as most references are; not so: {some}")
    return rate, channels


def _say_what_is_anew(tracks: list[Path], keep: Path, stamp: Callable[[Path], Any]) -> None:
    """Scores that are there and do not count would else be made again without a word, as where shards are joined."""
    old = outdated(tracks, keep, stamp)
    apart: set[str] = set()
    for was, (now, files) in old:
        is_ours = isinstance(was, list) and len(was) == 2 and isinstance(was[0], dict)
        before, files_before = was if is_ours else ({}, None)
        apart |= {k for k in {*before, *now} if before.get(k) != now.get(k)}
        apart |= {"files"} if files != files_before else set()
    if old:
        print(f"{len(old)} of {len(tracks)} tracks have scores of other {', '.join(sorted(apart))}: scored anew")


def _from_estimates(
    args: argparse.Namespace, tracks: list[Path], stems: list[str]
) -> tuple[list, Plan, list[dict], dict[str, Path]]:
    """Estimate functions, plan, problems and the folder of each track, for folders of another tool's estimates."""
    if args.protocol != "song":
        raise UserError("--estimates are whole tracks; they are scored by --protocol song")
    paired, alone, strangers = pair_folders(args.estimates, tracks)
    rate, channels = _format(args, [t for t in tracks if track_name(t) in paired], stems)
    problems = [{"track": n, "reason": "has no folder of estimates"} for n in alone]
    problems += [{"track": n, "reason": "is a folder of estimates without a reference track"} for n in strangers]
    plan = with_others(Plan(stems, rate, channels, "song", None, args.bss_backend), tracks[0].parent)
    read = lambda folder, references: load_estimates(
        paired[track_name(folder)], plan.stems, references, rate, bool(plan.others)
    )
    return [read], plan, problems, paired


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.model and args.estimates:
        raise UserError("--model and --estimates exclude each other")
    for names, is_used, why in (
        (OF_A_MODEL, args.model, "only a model uses that; name its folder by --model"),
        (OF_DATA, not args.model, "a model has stems and a rate of its own"),
    ):
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
        if given and not is_used:
            raise UserError(f"{', '.join(given)} would change nothing: {why}")
    for name, value in (("--workers", args.workers), ("--sample-rate", args.sample_rate)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1")
    if args.excerpts < 0:
        raise UserError("--excerpts must be at least 0")
    shard, shards = parse_shard(args.shard)
    folder = split_of(args.data, args.split)
    settings: dict[str, Any] = {"data": str(args.data), "model": args.model, "estimates": None, "refine": None}
    problems: list[dict[str, str]] = []
    det: list[EstimateFunction] = []
    sources: Callable[[Path], list[Path]] = lambda track: [track]
    if args.model:
        seed = args.seed or 0
        run = (seed, args.protocol, args.bss_backend)
        options: dict[str, Any] = {"dtype": args.dtype or "float32"}
        options["mixture_consistent"] = bool(args.mixture_consistent)
        estimators, plan, first = model_runs(args.model, args.refine, args.steps, *run, folder, **options)
        if first.refine != "none" and not args.no_det:
            det = model_runs(args.model, "none", None, *run, folder, **options)[0]
        steps = args.steps or own_steps(first.config, first.refine)
        settings |= {"refine": first.refine, **({"steps": steps} if steps else {}), "seed": seed, **options}
        sources = lambda track: [track, Path(args.model)]
        tracks = find_tracks(folder, first.stems)
    else:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; name one that holds track folders")
        stems = list(check_field("stems", args.stems.split(","), "--")) if args.stems else stems_of(folder)
        tracks = find_tracks(folder, stems)
    if args.estimates:
        estimators, plan, problems, paired = _from_estimates(args, tracks, stems)
        settings |= {"estimates": str(args.estimates), "refine": "estimates of another tool"}
        tracks = [t for t in tracks if track_name(t) in paired]
        sources = lambda track: [track, paired[track_name(track)]]
    elif not args.model:
        if stems == list(SLAKH):  # as models of it are scored, and not as it is distributed
            rate, channels = args.sample_rate or unet_base().sample_rate, 1
        else:
            rate, channels = _format(args, tracks, stems)
        plan = Plan(stems, rate, channels, args.protocol, segment_of(channels, rate), args.bss_backend)
        plan = with_others(plan, folder)
        estimators = [by_model(mixture_as_estimate(plan.stems), plan)]
        settings["refine"] = "no model: the mixture is the estimate"
    _prepare_out(args.out)
    if plan.others:
        print(
            f"{', '.join(plan.others)} are in the mixture too: scored together as '{plan.stems[-1]}', the mixture less the other stems"
        )
    if folder != args.data:
        print(f"taking the split {args.split} of {args.data}")
        settings["split"] = folder.name
    settings |= {
        "protocol": plan.protocol,
        "protocol_text": protocol_text(plan.protocol, plan.backend),
        "bss_backend": plan.backend,
        "sample_rate": plan.sample_rate,
        "channels": plan.channels,
        "segment": None if plan.protocol == "song" else plan.segment,
        "stems": list(plan.stems),
        "versions": {name: version(name) for name in PACKAGES},
    }
    accelerated = jax.default_backend() != "cpu"
    workers = args.workers or len(estimators) + accelerated
    common: dict[str, Any] = {
        "plan": plan,
        "workers": workers,
        "stamp": lambda track: [settings, stamp_of(sources(track))],
        # Of each track, and no setting: shards may come from several machines.
        "facts": {"devices": sorted({d.device_kind for d in jax.local_devices()})},
    }
    mine = tracks[shard - 1 :: shards]
    for keep in ("tracks_det", "tracks") if det else ("tracks",):
        _say_what_is_anew(mine, args.out / keep, common["stamp"])
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=len(mine) * (1 + bool(det)))
        common["progress"] = lambda track: bar.advance(task)
        baseline = evaluate_tracks(mine, det, keep=args.out / "tracks_det", **common) if det else None
        scored, faults, kept = evaluate_tracks(
            mine, estimators, keep=args.out / "tracks", excerpts=tracks[: args.excerpts], **common
        )
    if kept:
        print(f"{kept} of {len(mine)} tracks were scored before")
    if shards > 1:
        for fault in faults:
            print(f"NOT scored: {fault['track']}: {fault['reason']}")
        print(f"shard {shard} of {shards} is done; run the same command without --shard to collect all")
        return 1 if faults else 0
    results = summary(scored, problems + faults, plan)
    if not scored:
        raise UserError(f"no track could be scored; {faults[0]['track']}: {faults[0]['reason']}")
    if not args.model:  # the time to read files, or none, is no system's
        results["rtf"] = None
    if baseline:  # of the tracks that it stands beside
        results["deterministic"] = summary({n: t for n, t in baseline[0].items() if n in scored}, baseline[1], plan)
    # Before the settings change, by which excerpts are stamped.
    heard = excerpts_of(tracks[: args.excerpts], args.out / "tracks", common["stamp"])
    settings |= {"tracks": len(scored), "workers": workers}
    settings["devices"] = sorted({kind for track in scored.values() for kind in track["devices"]})
    results["settings"] = settings
    write_results(args.out, results, heard)
    console.print((args.out / "results.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    print(f"wrote {args.out}/results.json, results.md and report.html ({len(scored)} tracks)")
    if results["problems"]:
        print(f"NOT scored: {len(results['problems'])}, in no average; results.md names them")
    return 1 if results["problems"] else 0
