"""`msr compare A.json B.json …`: paired differences over tracks, with Student's confidence intervals."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from msr_jax.errors import UserError
from msr_jax.evaluate.protocols import METRICS, of_track
from msr_jax.evaluate.report import NAMES
from msr_jax.files import write_whole

SHOWN = ("si_sdri_active", "si_sdri_msdm", "sdr")
FEWEST = 5  # tracks, with fewer of which nothing can be said
BY_SILENCE = ("sdr", "isr", "sir", "sar")  # whose frames are chosen by the backend's rule for silence
LEVEL = 0.95


class Difference(NamedTuple):
    """Mean over tracks of B - A, its 95 % interval, and what may be said of it."""

    metric: str
    stem: str
    tracks: int
    mean: float | None
    low: float | None
    high: float | None
    verdict: str


def read_results(path: Path) -> dict[str, Any]:
    """A results.json, or the one in a folder.

    Raises:
      UserError: it cannot be read or is none.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(results.get(k), dict) for k in ("tracks", "settings", "aggregate")):
            raise ValueError("it lacks tracks, settings or aggregate")
        stems = results["settings"].get("stems")
        if not isinstance(stems, list) or not stems or not all(isinstance(stem, str) for stem in stems):
            raise ValueError("its settings name no stems")
        for name, track in results["tracks"].items():
            wrong = [m for m in METRICS if m in track and not all(_are_figures(track[m].get(stem)) for stem in stems)]
            if wrong:
                raise ValueError(f"{wrong[0]} of {name} is not a list of numbers for each stem")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no results.json of msr evaluate ({error})") from error
    return results


def _are_figures(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)


def differences_of(before: Mapping[str, Any], after: Mapping[str, Any], metric: str, stem: str) -> np.ndarray:
    """B - A (tracks,) of the tracks that have a figure in both; of the stem "average", their mean over the stems that have."""
    stems = before["settings"]["stems"] if stem == "average" else [stem]
    found = []
    for name in (n for n in before["tracks"] if n in after["tracks"]):
        pairs = [[of_track(metric, r["tracks"][name][metric][s]) for r in (before, after)] for s in stems]
        apart = [b - a for a, b in pairs if a is not None and b is not None]
        found += [float(np.mean(apart))] if apart else []
    return np.array(found)


def interval(differences: np.ndarray, level: float) -> tuple[float, float]:
    """Student's interval of the mean of (tracks,). (A bootstrap's is too narrow for few tracks.)"""
    mean, count = differences.mean(), len(differences)
    half = stdtrit(count - 1, (1 + level) / 2) * differences.std(ddof=1) / math.sqrt(count)
    return float(mean - half), float(mean + half)


def compare(before: Mapping[str, Any], after: Mapping[str, Any], metrics: Sequence[str] = SHOWN) -> list[Difference]:
    """Differences over the tracks that both results have, for every metric, stem and the average.

    A difference is "real" where even the interval that allows for the number of comparisons (Bonferroni) keeps away from
    0, and "likely" where the 95 % interval alone does.

    Raises:
      UserError: the results were made by different protocols or rules for silence, on different splits, stems, rates or
        channels, share no track, or lack a metric.
    """
    keys = ["protocol", "stems", "sample_rate", "channels", "split"]
    for key in keys + ["bss_backend"] * any(metric in BY_SILENCE for metric in metrics):
        a, b = before["settings"].get(key), after["settings"].get(key)
        is_untold = key in ("channels", "split", "bss_backend") and None in (a, b)  # as in older results
        if a != b and not is_untold:
            raise UserError(f"the results differ in {key} ({a} and {b}) and cannot be compared")
    if not set(before["tracks"]) & set(after["tracks"]):
        raise UserError("the results have no track in common")
    stems = [*before["settings"]["stems"], "average"]
    found = []
    for metric in metrics:
        lacking = [name for r in (before, after) for name, track in r["tracks"].items() if metric not in track]
        if lacking:
            raise UserError(f"the track {lacking[0]} has no {metric} in one of the results; evaluate it again")
        for stem in stems:
            d = differences_of(before, after, metric, stem)
            if len(d) < FEWEST:
                mean = float(d.mean()) if len(d) else None
                found.append(Difference(metric, stem, len(d), mean, None, None, "too few tracks"))
                continue
            low, high = interval(d, LEVEL)
            strict = interval(d, 1 - (1 - LEVEL) / (len(metrics) * len(stems)))
            away = lambda ends: ends[0] > 0 or ends[1] < 0
            verdict = "real" if away(strict) else "likely" if away((low, high)) else "not shown"
            found.append(Difference(metric, stem, len(d), float(d.mean()), low, high, verdict))
    return found


def markdown(name_a: str, name_b: str, differences: Sequence[Difference], unmatched: Sequence[str]) -> str:
    lines = [f"{name_b} minus {name_a}, mean over tracks with a 95 % interval", ""]
    lines += ["| metric | stem | tracks | difference | 95 % interval | |", "|---|---|---|---|---|---|"]
    for d in differences:
        ends = "–" if d.low is None else f"{d.low:+.2f} to {d.high:+.2f}"
        shown = "–" if d.mean is None else f"{round(d.mean, 2) + 0.0:+.2f}"
        lines.append(f"| {NAMES[d.metric]} | {d.stem} | {d.tracks} | {shown} | {ends} | {d.verdict} |")
    if unmatched:
        lines += ["", f"In one of the two only, and left out: {len(unmatched)} ({', '.join(unmatched)})"]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr compare", description=__doc__)
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS", help="results.json, or its folder; the first is the base"
    )
    parser.add_argument("--metrics", default=",".join(SHOWN), help=f"of {', '.join(METRICS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the differences here as well")
    args = parser.parse_args(argv)
    metrics = args.metrics.split(",")
    if unknown := [m for m in metrics if m not in METRICS]:
        raise UserError(f"there is no metric '{unknown[0]}'; known are {', '.join(METRICS)}")
    if len(args.results) < 2:
        raise UserError("name two results at least, the first is what the others are compared with")
    read = [read_results(path) for path in args.results]
    told = []
    for path, after in zip(args.results[1:], read[1:], strict=True):
        differences = compare(read[0], after, metrics)
        unmatched = sorted(set(read[0]["tracks"]) ^ set(after["tracks"]))
        print(markdown(str(args.results[0]), str(path), differences, unmatched))
        told.append(
            {
                "base": str(args.results[0]),
                "other": str(path),
                "unmatched": unmatched,
                "differences": [d._asdict() for d in differences],
            }
        )
    few = all(d.verdict == "too few tracks" for t in told for d in map(lambda x: Difference(**x), t["differences"]))
    print(
        f"fewer than {FEWEST} tracks in common: no difference can be called real"
        if few
        else "real: its interval keeps away from 0 even when all comparisons are allowed for; likely: on its own"
    )
    if args.json:
        write_whole(args.json, json.dumps(told, indent=1, allow_nan=False) + "\n")
    return 0
