"""The three ways to cut, separate and score a song. Each names itself in every result.

Audio here is (stems, channels, samples); a mixture is always the sum of its stems.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from msr_jax.data.indexing import kept_chunks
from msr_jax.evaluate.songs import REST
from msr_jax.metrics.aggregate import score_segment
from msr_jax.metrics.bss_eval import BssScores, bss_eval
from msr_jax.metrics.extras import log_wmse, snr
from msr_jax.metrics.si_sdr import WindowScores, score_windows

# (mixture (samples,) or (samples, channels), sample rate) -> {stem: array of the mixture's shape}
SeparateFunction = Callable[[np.ndarray, int], Mapping[str, np.ndarray]]
ROUNDED = (
    "references that had to be resampled are rounded to 16 bits, as the data sets' own conversion leaves them; frames whose "
    "projection is singular to working precision are in neither SIR nor SAR"
)
SONG = (
    "whole tracks, separated with overlap-add; SI-SDRi on 4 s windows every 2 s with at least two active stems, mean over "
    "all windows (active: without windows where the stem is silent, msdm: with them); BSSEval v4, 1 s frames, filters "
    "fitted per track, a frame left out only for stems whose reference is exactly silent in it; median over frames, then "
    "over tracks; " + ROUNDED
)
PAPER = (
    "as the released evaluation: segments of 11.9 s (one channel) or 11 s without overlap, each separated and scored on its own (one channel: the "
    "incomplete last one and those with more than two silent stems left out; more: the last one padded with zeros); "
    "SI-SDRi windows inside of segments; BSSEval v4 filters fitted per segment, a frame left out for all stems where any "
    "reference or estimate is silent by museval's rule (its channels add up to 0 at every sample), a segment where any is "
    "silent so throughout; " + ROUNDED
)
MSDM = (
    "as the original MSDM evaluation: segments separated on their own and laid end to end, the incomplete last one left "
    "out, then scored as one track as by 'song' (SI-SDRi, MSDM convention, is the figure that MSDM reports); " + ROUNDED
)
MUSEVAL = (
    "; BSSEval by museval with its rule for silence in place of that: a stem whose channels add up to 0 at every sample is "
    "silent, stems silent throughout are left out, and for all others frames in which any of them is silent"
)
PROTOCOLS = {"song": SONG, "paper": PAPER, "msdm": MSDM}
WINDOW_METRICS = ("si_sdri_active", "si_sdri_msdm", "si_sdr")  # a value per window
FRAME_METRICS = ("sdr", "isr", "sir", "sar")  # a value per frame
TRACK_METRICS = ("snr", "log_wmse")  # a value per track
METRICS = (*WINDOW_METRICS, *FRAME_METRICS, *TRACK_METRICS)
SEGMENT_SECONDS = {1: 262_144 / 22_050, 2: 11.0}  # of the released evaluation, by number of channels
LARGEST = 300.0  # dB; float64 tells no larger ratio, and an estimate without error has an infinite one


def protocol_text(protocol: str, backend: str) -> str:
    """What a result says of the way it was made: the protocol, and museval's rule for silence where that holds beside it."""
    return PROTOCOLS[protocol] + (MUSEVAL if backend == "museval" and protocol != "paper" else "")


def cut(audio: np.ndarray, protocol: str, segment: int | None) -> np.ndarray:
    """The part of a song that a protocol separates: all of it, or whole segments end to end.

    Args:
      audio: references (stems, channels, samples).
      segment: samples; None only for "song".
    """
    if protocol == "song":
        return audio
    assert segment is not None
    stems, channels, samples = audio.shape
    count = samples // segment
    if protocol == "paper" and channels > 1:
        count = -(-samples // segment)
        audio = np.pad(audio, ((0, 0), (0, 0), (0, count * segment - samples)))
    segments: np.ndarray = audio[..., : count * segment].reshape(stems, channels, count, segment)
    if protocol == "paper" and channels == 1:
        segments = segments[:, :, kept_chunks(audio[:, 0], segment)]
    return segments.reshape(stems, channels, -1)


def segment_of(channels: int, sample_rate: int) -> int:
    """Samples of the released evaluation's segments; a model of a shorter segment crosses over inside of them."""
    return round(SEGMENT_SECONDS[min(2, channels)] * sample_rate)


def estimate_stems(
    function: SeparateFunction,
    references: np.ndarray,
    stems: Sequence[str],
    sample_rate: int,
    segment: int | None = None,
    has_rest: bool = False,
) -> np.ndarray:
    """Estimates, of the references' shape, from the references' sum: of all at once, or of every `segment` on its own.

    With `has_rest` the last stem is `REST`; where the function does not give it, it is the mixture less the others.
    """
    mixture = references.sum(0)
    found = np.empty(references.shape, np.float32)
    step = segment or mixture.shape[-1]
    for start in range(0, mixture.shape[-1], step):
        part = mixture[:, start : start + step]
        parts = function(part[0] if len(part) == 1 else np.ascontiguousarray(part.T), sample_rate)
        for j, stem in enumerate(stems):
            if has_rest and stem == REST and REST not in parts:
                found[j, :, start : start + step] = part - found[:j, :, start : start + step].sum(0)
            else:
                found[j, :, start : start + step] = parts[stem].reshape(part.shape[1], -1).T
    return found


def _window_lists(windows: Sequence[WindowScores], stems: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    values, plain, silent = (np.concatenate([getattr(w, k) for w in windows]) for k in ("si_sdri", "si_sdr", "silent"))
    return {
        "si_sdri_active": {s: values[~silent[:, j], j].tolist() for j, s in enumerate(stems)},
        "si_sdri_msdm": {s: values[:, j].tolist() for j, s in enumerate(stems)},
        "si_sdr": {s: plain[~silent[:, j], j].tolist() for j, s in enumerate(stems)},
    }


def _kept(values: np.ndarray) -> list[float]:
    return np.clip(values[~np.isnan(values)], -LARGEST, LARGEST).tolist()


def _singular(bss: BssScores, stem: int, estimate: np.ndarray, sample_rate: int) -> int:
    """Frames of a stem whose projection is singular. Where its estimate (channels, samples) is silent, SIR and SAR are 0 / 0."""
    is_nan = np.isnan(bss.sir[stem]) & ~np.isnan(bss.sdr[stem])
    frame = lambda k: estimate[:, k * sample_rate : (k + 1) * sample_rate]
    return sum(bool(frame(k).any()) for k in np.flatnonzero(is_nan))


def score_song(
    estimates: np.ndarray, references: np.ndarray, stems: Sequence[str], sample_rate: int, backend: str = "jax"
) -> dict[str, Any]:
    """Scores of one track as a whole.

    With museval as `backend` its rule for silence holds: stems silent throughout are left out, and frames in which
    any of the others is silent.

    Returns:
      {metric: {stem: list of dB (log_wmse: points), one per window, frame or track that counts}, "singular_frames": {stem:
      frames left out of SIR and SAR}}, JSON as it stands.
    """
    scores = _window_lists([score_windows(estimates, references, sample_rate)], stems)
    sounding = references.any((1, 2))
    if backend == "museval":
        sounding &= (references.sum(1) != 0).any(1) & (estimates.sum(1) != 0).any(1)
    scores |= {metric: {s: [] for s in stems} for metric in FRAME_METRICS}
    singular = dict.fromkeys(stems, 0)
    which = np.flatnonzero(sounding)
    if len(which):
        bss = bss_eval(estimates[which], references[which], sample_rate, backend, joint_silence=backend == "museval")
        for metric, values in bss._asdict().items():
            scores[metric] |= {stems[j]: _kept(values[row]) for row, j in enumerate(which.tolist())}
        singular |= {stems[j]: _singular(bss, row, estimates[j], sample_rate) for row, j in enumerate(which.tolist())}
    return scores | {"singular_frames": singular} | _track_lists(estimates, references, stems, sample_rate)


def _track_lists(
    estimates: np.ndarray, references: np.ndarray, stems: Sequence[str], sample_rate: int
) -> dict[str, dict[str, list[float]]]:
    signal_to_noise, points = snr(estimates, references), log_wmse(estimates, references, sample_rate)
    sounding: Any = references.any((1, 2))
    return {
        "snr": {s: [float(signal_to_noise[j])] if sounding[j] else [] for j, s in enumerate(stems)},
        "log_wmse": {s: [float(points[j])] for j, s in enumerate(stems)},
    }


def score_segments(
    estimates: np.ndarray, references: np.ndarray, stems: Sequence[str], sample_rate: int, segment: int, backend: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores of a track segment by segment: as `score_song`, and what `released_aggregates` needs of every segment."""
    pieces = lambda x: np.moveaxis(x.reshape(*x.shape[:2], -1, segment), 2, 0)
    segments = [
        score_segment(e, r, sample_rate, backend) for e, r in zip(*map(pieces, (estimates, references)), strict=True)
    ]
    scores: dict[str, Any] = _window_lists([s.windows for s in segments], stems)
    frames = [s.bss for s in segments if s.bss is not None]
    for metric in FRAME_METRICS:
        scores[metric] = {s: [v for bss in frames for v in _kept(getattr(bss, metric)[j])] for j, s in enumerate(stems)}
    scored = [(s.bss, e) for s, e in zip(segments, pieces(estimates), strict=True) if s.bss is not None]
    scores["singular_frames"] = {
        stem: sum(_singular(bss, j, e[j], sample_rate) for bss, e in scored) for j, stem in enumerate(stems)
    }
    scores |= _track_lists(estimates, references, stems, sample_rate)
    return scores, [s.to_json() for s in segments]


def aggregate(tracks: Mapping[str, Mapping[str, Any]], stems: Sequence[str]) -> tuple[dict, dict]:
    """Over tracks: ({metric: {stem: value or None, "average": value}}, {metric: {stem: how many values}}).

    Window metrics: mean over all windows of all tracks. Frame metrics: median over frames, then over tracks. Track
    metrics: mean over tracks. The average is over the stems that have a value.
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
            elif metric in FRAME_METRICS:
                values[metric][stem] = float(np.median([np.median(v) for v in lists]))
            else:
                values[metric][stem] = float(np.mean(np.concatenate(lists)))
        present = [v for v in values[metric].values() if v is not None]
        values[metric]["average"] = float(np.mean(present)) if present else None
    return values, counts


def of_track(metric: str, values: Sequence[float]) -> float | None:
    """One figure of one track and stem from its windows or frames: their mean, or median; None where there are none."""
    if not len(values):
        return None
    return float(np.median(values) if metric in FRAME_METRICS else np.mean(values))
