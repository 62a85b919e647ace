"""Evaluation of a model, or of any estimates, over many tracks; a track that is done stays done."""

import json
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from msr_jax.audio.io import write_audio
from msr_jax.data.tracks import track_name
from msr_jax.errors import UserError
from msr_jax.evaluate.protocols import (
    PROTOCOLS,
    SeparateFunction,
    aggregate,
    cut,
    estimate_stems,
    score_segments,
    score_song,
    segment_of,
)
from msr_jax.evaluate.songs import REST, load_references, others_of
from msr_jax.files import short_name, write_whole
from msr_jax.metrics.aggregate import SegmentScores, aggregate_segments

EXCERPT_SECONDS = 8
STAMP = "stamp.json"  # in the folder of an excerpt that is whole
# (track folder, references (stems, channels, samples)) -> estimates of that shape, notes
EstimateFunction = Callable[[Path, np.ndarray], tuple[np.ndarray, list[str]]]


class Plan(NamedTuple):
    """What is scored, and how. With `others`, stems of the data set that nobody asked for, the last of `stems` is `REST`."""

    stems: Sequence[str]
    sample_rate: int
    channels: int = 1
    protocol: str = "song"
    segment: int | None = None  # samples; for the protocols that cut
    backend: str = "jax"
    others: Sequence[str] = ()


def with_others(plan: Plan, folder: Path) -> Plan:
    """A plan for the tracks in a folder: what is in their mixture beside the plan's stems is scored together, as `REST`."""
    others = others_of(folder, plan.stems)
    return plan._replace(stems=[*plan.stems, REST], others=others) if others else plan


def by_model(function: SeparateFunction, plan: Plan) -> EstimateFunction:
    """Estimates by separating the sum of the references; segments on their own where the protocol cuts."""
    segment = None if plan.protocol == "song" else plan.segment
    return lambda folder, references: (
        estimate_stems(function, references, plan.stems, plan.sample_rate, segment, bool(plan.others)),
        [],
    )


def mixture_as_estimate(stems: Sequence[str]) -> SeparateFunction:
    """The baseline that every improvement is measured from: the mixture itself for every stem."""
    return lambda mixture, sample_rate: {stem: mixture for stem in stems}


def score_track(
    folder: Path,
    borrowed: Callable[[], AbstractContextManager[tuple[EstimateFunction, bool]]],
    plan: Plan,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Load, separate and score one track.

    Args:
      borrowed: waits for an estimate function that is free, which is no work, and tells whether this is its first track.

    Returns:
      ({"seconds", "work_seconds", "first" (a function's first track pays for its compilation), "notes", what `score_song`
      gives, "segments" (protocol "paper")}, estimates and references (stems, channels, samples)).

    Raises:
      UserError: references or estimates cannot be used.
    """
    references = load_references(folder, plan.stems, plan.sample_rate, plan.channels, plan.others)
    references = cut(references, plan.protocol, plan.segment)
    if not references.shape[-1]:
        raise UserError(f"{folder} has no segment that the protocol '{plan.protocol}' keeps")
    with borrowed() as (estimate, is_first):
        started = time.perf_counter()
        estimates, notes = estimate(folder, references)
        worked = time.perf_counter() - started
    if not np.isfinite(estimates).all():
        raise UserError(f"an estimate of {folder} holds NaN or infinite samples")
    told = {"seconds": references.shape[-1] / plan.sample_rate, "work_seconds": worked, "first": is_first}
    told["notes"] = notes + [
        f"reference {s} is silent throughout" for s, r in zip(plan.stems, references, strict=True) if not r.any()
    ]
    told["notes"] += [
        f"estimate {s} is silent throughout" for s, e in zip(plan.stems, estimates, strict=True) if not e.any()
    ]
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is told of below
        if plan.protocol == "paper":
            assert plan.segment is not None
            scores, segments = score_segments(
                estimates, references, plan.stems, plan.sample_rate, plan.segment, plan.backend
            )
            scores["segments"] = segments
        else:
            scores = score_song(estimates, references, plan.stems, plan.sample_rate, plan.backend)
    try:
        json.dumps(scores, allow_nan=False)
    except ValueError as error:
        peak = max(float(np.abs(audio).max()) for audio in (estimates, references))
        raise UserError(
            f"scores of {folder} are not finite: its samples reach {peak:.1e}, where full scale is 1; scale them down"
        ) from error
    if any(scores["singular_frames"].values()):
        counts = ", ".join(f"{s} {n} of {n + len(scores['sir'][s])}" for s, n in scores["singular_frames"].items() if n)
        told["notes"].append(f"SIR and SAR leave out frames whose projection is singular to precision: {counts}")
    return told | scores, estimates, references


def write_excerpt(folder: Path, estimates: np.ndarray, references: np.ndarray, plan: Plan, stamp: Any = None) -> None:
    """Write the stretch where the quietest stem sounds most, so that all can be heard: mixture, references, estimates.

    The stamp (JSON) is written last: a folder without it is not whole.

    Raises:
      UserError: the folder cannot be written.
    """
    length = min(EXCERPT_SECONDS * plan.sample_rate, references.shape[-1])
    starts = range(0, references.shape[-1] - length + 1, plan.sample_rate)
    levels = [np.sort(np.sqrt(np.square(references[..., s : s + length]).mean((1, 2)))) for s in starts]
    start = starts[int(np.argmax([np.log(level + 1e-6).sum() for level in levels]))]
    part = slice(start, start + length)
    sounds = {"mixture": references.sum(0)}
    for j, stem in enumerate(plan.stems):
        sounds |= {f"{stem}.reference": references[j], f"{stem}.estimate": estimates[j]}
    write_whole(folder / STAMP, "{}")  # the sounds of an earlier stamp are about to go
    for name, audio in sounds.items():  # as WAV, which has every rate and any number of channels
        write_audio(folder / f"{name}.wav", audio[:, part].T, plan.sample_rate, "PCM_16")
    write_whole(folder / STAMP, json.dumps({"stamp": stamp}))


def _excerpt_folder(keep: Path, track: Path) -> Path:
    return keep.parent / "excerpts" / short_name(track_name(track))


def _stamped(stamp: Callable[[Path], Any], track: Path) -> Any:
    """JSON turns tuples into lists: compared is what can be read back."""
    return json.loads(json.dumps(stamp(track)))


def _read(path: Path) -> dict[str, Any]:
    """What was written with a stamp; {} where there is nothing, or something else."""
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return kept if isinstance(kept, dict) and "stamp" in kept else {}


def _read_kept(path: Path, stamp: Any) -> dict[str, Any] | None:
    """What was written with this stamp; None where there is nothing, or something else."""
    kept = _read(path)
    return kept if kept and kept["stamp"] == stamp else None


def _scores_file(keep: Path, track: Path) -> Path:
    return keep / f"{short_name(track_name(track))}.json"


def outdated(tracks: Iterable[Path], keep: Path, stamp: Callable[[Path], Any]) -> list[tuple[Any, Any]]:
    """(stamp that its scores in `keep` have, stamp that they should have) of every track where the two differ."""
    kept = [(_read(_scores_file(keep, t)), _stamped(stamp, t)) for t in tracks]
    return [(old["stamp"], new) for old, new in kept if old and old["stamp"] != new]


def excerpts_of(tracks: Iterable[Path], keep: Path, stamp: Callable[[Path], Any]) -> dict[str, Path]:
    """{track: folder of its excerpt} of those whose excerpt is whole and has the stamp; `keep` and `stamp` as below."""
    places = {track: _excerpt_folder(keep, track) for track in tracks}
    return {track_name(t): p for t, p in places.items() if _read_kept(p / STAMP, _stamped(stamp, t))}


def evaluate_tracks(
    tracks: Iterable[Path],
    estimators: Sequence[EstimateFunction],
    plan: Plan,
    keep: Path | None = None,
    stamp: Callable[[Path], Any] = lambda folder: None,
    workers: int = 1,
    excerpts: Sequence[Path] = (),
    progress: Callable[[Path], Any] = lambda folder: None,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, dict], list[dict[str, str]], int]:
    """Score many tracks at a time.

    Args:
      estimators: one per device; a track waits for a free one to be separated, and is scored without it.
      keep: folder in which each track's scores stay, as NAME.json; a track found there with an equal stamp is not done
        again.
      stamp: what a track's scores depend on, as JSON.
      workers: tracks in work at a time.
      excerpts: tracks of which audio is kept, below `keep`'s neighbour `excerpts`.
      progress: called with each track that is done.
      facts: what is told with the scores that are made now, and decides nothing, as JSON.

    Returns:
      ({track: its scores}, problems [{"track", "reason"}], number of tracks taken from `keep`).

    Raises:
      UserError: scores or an excerpt cannot be written.
    """
    free: queue.Queue = queue.Queue()
    for estimator in estimators:
        free.put((estimator, True))

    @contextmanager
    def borrowed() -> Iterator[tuple[EstimateFunction, bool]]:
        estimator, is_first = free.get()
        try:
            yield estimator, is_first
        finally:
            free.put((estimator, False))

    def work(folder: Path) -> tuple[str, dict | None, str, bool]:
        name = track_name(folder)
        place = _scores_file(keep, folder) if keep else None
        sounds = _excerpt_folder(keep, folder) if keep and folder in excerpts else None
        told = _stamped(stamp, folder)
        kept = _read_kept(place, told) if place else None
        if kept and (not sounds or _read_kept(sounds / STAMP, told)):
            return name, kept["scores"], "", True
        try:
            scores, estimates, references = score_track(folder, borrowed, plan)
            scores |= facts
        except UserError as error:
            return name, None, str(error), False
        # Outside of the `try`: that nothing can be written, as on a full disk, is no problem of this track.
        if place:
            write_whole(place, json.dumps({"stamp": told, "scores": scores}, allow_nan=False))
        if sounds:
            write_excerpt(sounds, estimates, references, plan, told)
        return name, scores, "", False

    scored, problems, found = {}, [], 0
    tracks = list(tracks)
    pool = ThreadPoolExecutor(workers)
    try:
        for folder, (name, scores, reason, was_kept) in zip(tracks, pool.map(work, tracks), strict=True):
            found += was_kept
            if scores is None:
                problems.append({"track": name, "reason": reason})
            else:
                scored[name] = scores
            progress(folder)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the tracks in work
        raise
    pool.shutdown()
    return scored, problems, found


def summary(
    scored: Mapping[str, Mapping[str, Any]], problems: Sequence[Mapping[str, str]], plan: Plan
) -> dict[str, Any]:
    """Everything that results.json says of scored tracks, but for the settings.

    Returns:
      {"aggregate", "counts", "released" (protocol "paper": the names of the released evaluation), "rtf": seconds of work
      per second of audio, without the tracks that paid for compilation, None where no other remains, "problems", "tracks"}.
    """
    values, counts = aggregate(scored, plan.stems)
    timed = list(scored.values())
    if any("first" in track for track in timed):  # the first of every process and device, however they were joined
        timed = [track for track in timed if not track.get("first")]
    elif len(timed) > 1:  # scores from before that was kept
        timed = timed[1:]
    seconds = sum(t["seconds"] for t in timed)
    results = {"aggregate": values, "counts": counts}
    if plan.protocol == "paper":
        segments = [(n, SegmentScores.from_json(s)) for n, t in scored.items() for s in t["segments"]]
        results["released"] = aggregate_segments(segments, plan.stems, include_silent=plan.channels == 1)
    return results | {
        "rtf": sum(t["work_seconds"] for t in timed) / seconds if seconds else None,
        "problems": list(problems),
        "tracks": dict(scored),
    }


def evaluate(
    separate: SeparateFunction,
    tracks: Iterable[Path],
    stems: Sequence[str],
    sample_rate: int,
    channels: int = 1,
    protocol: str = "song",
    backend: str = "jax",
) -> dict[str, Any]:
    """Separate and score tracks in memory.

    Args:
      separate: (mixture, sample_rate) -> {stem: array of its shape}; the mixture is (samples,) for one channel and
        (samples, channels) for more, float32.
      tracks: track folders as `find_tracks` gives, of one folder; what their data set has beside `stems` is scored as `REST`.
      protocol: a key of `PROTOCOLS`.

    Returns:
      As `summary`.

    Raises:
      UserError: an unknown protocol, or a track that cannot be scored.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"the protocol must be one of {', '.join(PROTOCOLS)}, not '{protocol}'")
    plan = Plan(stems, sample_rate, channels, protocol, segment_of(channels, sample_rate), backend)
    tracks = list(tracks)
    plan = with_others(plan, tracks[0].parent) if tracks else plan
    scored, problems, _ = evaluate_tracks(tracks, [by_model(separate, plan)], plan)
    if problems:
        raise UserError(f"{problems[0]['track']}: {problems[0]['reason']}")
    return summary(scored, problems, plan)
