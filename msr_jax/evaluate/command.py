"""`msr evaluate`: SI-SDRi, BSSEval and more of a model, or of any tool's estimates, over a folder of tracks."""

import argparse
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from msr_jax.config_fields import check_field
from msr_jax.data.tracks import split_of
from msr_jax.errors import UserError
from msr_jax.evaluate.protocols import PROTOCOLS, protocol_text
from msr_jax.evaluate.report import write_results
from msr_jax.evaluate.score import evaluate_tracks, excerpts_of, outdated, summary
from msr_jax.evaluate.systems import System, stamp_of, system_of_estimates, system_of_mixture, system_of_model
from msr_jax.methods.stages import REFINEMENTS
from msr_jax.metrics.bss_eval import BACKENDS
from msr_jax.process import parse_shard

# Options that are None unless they were given, and mean nothing elsewhere.
OF_A_MODEL = ("refine", "steps", "seed", "dtype", "mixture_consistent", "no_det")
OF_DATA = ("stems", "sample_rate")
PACKAGES = ("msr_jax", "jax", "flax", "numpy", "scipy", "museval", "log-wmse-audio-quality")


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


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    _check(args)
    shard, shards = parse_shard(args.shard)
    folder = split_of(args.data, args.split)
    system = _system(args, folder)
    plan, tracks = system.plan, system.tracks
    _prepare_out(args.out)
    if plan.others:
        print(
            f"{', '.join(plan.others)} are in the mixture too: scored together as '{plan.stems[-1]}', the mixture less the other stems"
        )
    if folder != args.data:
        print(f"taking the split {args.split} of {args.data}")
    settings = _settings(args, folder, system)
    accelerated = jax.default_backend() != "cpu"
    workers = args.workers or len(system.estimators) + accelerated
    common: dict[str, Any] = {
        "plan": plan,
        "workers": workers,
        "stamp": lambda track: [settings, stamp_of(system.files(track))],
        # Of each track, and no setting: shards may come from several machines.
        "facts": {"devices": sorted({d.device_kind for d in jax.local_devices()})},
    }
    mine = tracks[shard - 1 :: shards]
    for keep in ("tracks_det", "tracks") if system.det else ("tracks",):
        _say_what_is_anew(mine, args.out / keep, common["stamp"])
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=len(mine) * (1 + bool(system.det)))
        common["progress"] = lambda track: bar.advance(task)
        baseline = None
        if system.det:
            baseline = evaluate_tracks(mine, system.det, keep=args.out / "tracks_det", **common)
        scored, faults, kept = evaluate_tracks(
            mine, system.estimators, keep=args.out / "tracks", excerpts=tracks[: args.excerpts], **common
        )
    if kept:
        print(f"{kept} of {len(mine)} tracks were scored before")
    if shards > 1:
        for fault in faults:
            print(f"NOT scored: {fault['track']}: {fault['reason']}")
        print(f"shard {shard} of {shards} is done; run the same command without --shard to collect all")
        return 1 if faults else 0
    if not scored:
        raise UserError(f"no track could be scored; {faults[0]['track']}: {faults[0]['reason']}")
    results = summary(scored, [*system.problems, *faults], plan)
    if not args.model:  # the time to read files, or none, is no system's
        results["rtf"] = None
    if baseline:  # of the tracks that it stands beside
        results["deterministic"] = summary({n: t for n, t in baseline[0].items() if n in scored}, baseline[1], plan)
    # By the settings that excerpts are stamped with; what this run alone knows comes after.
    heard = excerpts_of(tracks[: args.excerpts], args.out / "tracks", common["stamp"])
    devices = sorted({kind for track in scored.values() for kind in track["devices"]})
    results["settings"] = {**settings, "tracks": len(scored), "workers": workers, "devices": devices}
    write_results(args.out, results, heard)
    console.print((args.out / "results.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    print(f"wrote {args.out}/results.json, results.md and report.html ({len(scored)} tracks)")
    if results["problems"]:
        print(f"NOT scored: {len(results['problems'])}, in no average; results.md names them")
    return 1 if results["problems"] else 0


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for options that contradict each other, or would change nothing."""
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
    if args.estimates and args.protocol != "song":
        raise UserError("--estimates are whole tracks; they are scored by --protocol song")


def _system(args: argparse.Namespace, folder: Path) -> System:
    if args.model:
        options: dict[str, Any] = {
            "dtype": args.dtype or "float32",
            "mixture_consistent": bool(args.mixture_consistent),
        }
        run = (args.refine, args.steps, args.seed or 0, args.protocol, args.bss_backend)
        return system_of_model(args.model, *run, folder, not args.no_det, **options)
    stems = check_field("stems", args.stems.split(","), "--") if args.stems else None
    if args.estimates:
        return system_of_estimates(args.estimates, folder, stems, args.sample_rate, args.bss_backend)
    return system_of_mixture(folder, stems, args.sample_rate, args.protocol, args.bss_backend)


def _settings(args: argparse.Namespace, folder: Path, system: System) -> dict[str, Any]:
    """What a track's scores depend on, beside its files: scores of other settings are made anew."""
    plan = system.plan
    return {
        **{"data": str(args.data), "model": None, "estimates": None, **system.settings},
        **({"split": folder.name} if folder != args.data else {}),
        "protocol": plan.protocol,
        "protocol_text": protocol_text(plan.protocol, plan.backend),
        "bss_backend": plan.backend,
        "sample_rate": plan.sample_rate,
        "channels": plan.channels,
        "segment": None if plan.protocol == "song" else plan.segment,
        "stems": list(plan.stems),
        "versions": {name: version(name) for name in PACKAGES},
    }
