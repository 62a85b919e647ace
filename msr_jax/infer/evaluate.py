"""`msr evaluate`: SI-SDRi and SDR of a model over a folder of multitrack songs."""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track as progress_over

from msr_jax.data.tracks import find_tracks, load_track
from msr_jax.errors import UserError
from msr_jax.methods.stages import REFINEMENTS
from msr_jax.metrics.bss_eval import bss_eval
from msr_jax.metrics.si_sdr import score_windows

PROTOCOL = (
    "whole tracks; mixture = sum of the stems; SI-SDRi on 4 s windows every 2 s with at least two active stems, mean over all "
    "windows (active: without windows where the stem is silent, msdm: with them); SDR by museval (BSSEval v4, 1 s frames, "
    "filters fitted per track, stems that are silent throughout a track left out of it), median over frames, then over tracks"
)
METRICS = ("si_sdri_active", "si_sdri_msdm", "sdr")
SeparateFunction = Callable[[np.ndarray, int], Mapping[str, np.ndarray]]


def score_track(
    estimates: np.ndarray, references: np.ndarray, stems: Sequence[str], sample_rate: int
) -> dict[str, Any]:
    """Scores of one track.

    Args:
      estimates, references: (stems, samples), mono.

    Returns:
      {"si_sdri_active", "si_sdri_msdm", "sdr": {stem: list of dB, one per window or frame that counts}}.
    """
    if not np.isfinite(estimates).all():
        raise UserError("an estimate holds NaN or infinite samples")
    windows = score_windows(estimates[:, None], references[:, None], sample_rate)
    everything = {stem: windows.si_sdri[:, j].tolist() for j, stem in enumerate(stems)}
    active = {stem: windows.si_sdri[~windows.silent[:, j], j].tolist() for j, stem in enumerate(stems)}
    sdr: dict[str, list[float]] = {stem: [] for stem in stems}
    # museval refuses a track with a stem that is silent throughout, for all stems; leave such stems out instead.
    sounding = [j for j in range(len(stems)) if references[j].any() and estimates[j].any()]
    if sounding and references.shape[1] >= sample_rate:
        frames = bss_eval(estimates[sounding][:, None], references[sounding][:, None], sample_rate).sdr
        for row, j in enumerate(sounding):
            sdr[stems[j]] = frames[row][np.isfinite(frames[row])].tolist()
    return {"si_sdri_active": active, "si_sdri_msdm": everything, "sdr": sdr}


def aggregate(tracks: Mapping[str, Mapping[str, Any]], stems: Sequence[str]) -> tuple[dict, dict]:
    """Over tracks: ({metric: {stem: dB or None, "average": dB}}, {metric: {stem: how many values}}).

    SI-SDRi is the mean over all windows of all tracks, SDR the median over frames and then over tracks. The average is
    over the stems that have a value.
    """
    values: dict[str, dict] = {}
    counts: dict[str, dict] = {}
    for metric in METRICS:
        values[metric], counts[metric] = {}, {}
        for stem in stems:
            lists = [scores[metric][stem] for scores in tracks.values() if scores[metric][stem]]
            counts[metric][stem] = sum(map(len, lists))
            if not lists:
                values[metric][stem] = None
            elif metric == "sdr":
                values[metric][stem] = float(np.median([np.median(v) for v in lists]))
            else:
                values[metric][stem] = float(np.mean(np.concatenate(lists)))
        present = [v for v in values[metric].values() if v is not None]
        values[metric]["average"] = float(np.mean(present)) if present else None
    return values, counts


def evaluate(
    separate: SeparateFunction, tracks: Iterable[Path], stems: Sequence[str], sample_rate: int
) -> dict[str, Any]:
    """Separate and score tracks.

    Args:
      separate: (mixture (samples,) float32, sample_rate) -> {stem: (samples,)}.
      tracks: track folders as `find_tracks` gives.

    Returns:
      {"aggregate", "counts", "tracks": {name: scores of every window and frame}, "rtf": seconds of work per second of audio,
      the first track left out where there are several, since it pays for compilation}.
    """
    scored: dict[str, Any] = {}
    worked, lasted = [], []
    for folder in tracks:
        references = load_track(folder, stems, sample_rate)
        mixture = references.sum(0)
        started = time.perf_counter()
        estimates = separate(mixture, sample_rate)
        worked.append(time.perf_counter() - started)
        lasted.append(references.shape[1] / sample_rate)
        scored[folder.name] = score_track(np.stack([estimates[s] for s in stems]), references, stems, sample_rate)
    values, counts = aggregate(scored, stems)
    timed = slice(1, None) if len(worked) > 1 else slice(None)
    rtf = sum(worked[timed]) / sum(lasted[timed])
    return {"aggregate": values, "counts": counts, "tracks": scored, "rtf": rtf}


def mixture_as_estimate(stems: Sequence[str]) -> SeparateFunction:
    """The baseline that every improvement is measured from: the mixture itself for every stem."""
    return lambda mixture, sample_rate: {stem: mixture for stem in stems}


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def markdown(results: Mapping[str, Any], stems: Sequence[str]) -> str:
    """The aggregate as a table, with the settings below it."""
    names = {
        "si_sdri_active": "SI-SDRi, active stems (dB)",
        "si_sdri_msdm": "SI-SDRi, MSDM convention (dB)",
        "sdr": "SDR (dB)",
    }
    rows = [f"| | {' | '.join([*stems, 'average'])} |", "|---" * (len(stems) + 2) + "|"]
    for metric in METRICS:
        values, counts = results["aggregate"][metric], results["counts"][metric]
        cells = [f"{_cell(values[s])} (n = {counts[s]})" for s in stems]
        rows.append(f"| {names[metric]} | {' | '.join([*cells, _cell(values['average'])])} |")
    settings = "\n".join(f"- {k}: {v}" for k, v in results["settings"].items())
    return "\n".join(rows) + f"\n\nReal time factor: {results['rtf']:.3f}\n\n{settings}\n"


def write_results(out: Path, results: Mapping[str, Any], stems: Sequence[str]) -> None:
    """Write results.json (strict JSON) and results.md, each whole or not at all."""
    for name, text in (
        ("results.json", json.dumps(results, indent=1, allow_nan=False) + "\n"),
        ("results.md", markdown(results, stems)),
    ):
        beside = out / f".{name}.{os.getpid()}.tmp"
        beside.write_text(text)
        os.replace(beside, out / name)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr evaluate", description=__doc__)
    parser.add_argument(
        "--data", required=True, metavar="DIR", type=Path, help="folder of tracks, or a corpus with splits"
    )
    parser.add_argument("--model", metavar="DIR", help="model folder; without one, the mixture is the estimate")
    parser.add_argument("--refine", choices=REFINEMENTS, help="default: the best that the model has")
    parser.add_argument("--steps", type=int, metavar="T", help="refinement steps (default: the model's own)")
    parser.add_argument("--split", default="test", help="of a corpus with splits (default: test)")
    parser.add_argument("--seed", type=int, default=0, help="of the refinement's noise")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="results.json and results.md go here")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        probe = args.out / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out {args.out}: {error.strerror}") from error
    settings: dict[str, Any] = {
        "data": str(args.data),
        "model": args.model,
        "refine": None,
        "steps": None,
        "seed": args.seed,
    }
    if args.model:
        from msr_jax.infer.separate import load

        separator = load(args.model, args.refine, args.steps, args.seed)
        separate, stems, rate = separator.separate, separator.stems, separator.sample_rate
        settings |= {"refine": separator.refine, "steps": args.steps or "the model's own"}
    else:
        from msr_jax.config import unet_base

        config = unet_base()
        stems, rate = list(config.stems), config.sample_rate
        separate = mixture_as_estimate(stems)
        settings["refine"] = "no model: the mixture is the estimate"
    folder = args.data / args.split if (args.data / args.split).is_dir() else args.data
    if folder != args.data:
        print(f"taking the split {args.split} of {args.data}")
        settings["split"] = args.split
    tracks = find_tracks(folder, stems)
    console = Console()
    results = evaluate(
        separate,
        progress_over(tracks, "evaluating", console=console, disable=not console.is_terminal),
        stems,
        rate,
    )
    settings |= {"tracks": len(tracks), "sample_rate": rate, "protocol": PROTOCOL}
    settings["versions"] = {name: version(name) for name in ("msr_jax", "jax", "flax", "numpy", "museval")}
    results["settings"] = settings
    write_results(args.out, results, stems)
    print(markdown(results, stems))
    print(f"wrote {args.out}/results.json and results.md ({len(tracks)} tracks)")
    return 0
