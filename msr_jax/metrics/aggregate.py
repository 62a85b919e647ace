"""Aggregates over segments and songs under the names, and by the rules, of the released evaluation."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msr_jax.metrics.bss_eval import BssScores, bss_eval
from msr_jax.metrics.si_sdr import WindowScores, score_windows
from msr_jax.metrics.silent_frames import silent_frame_scores


class Item(NamedTuple):
    """One segment of a song: references and estimates (stems, channels, samples)."""

    track: str
    references: np.ndarray
    estimates: np.ndarray


class SegmentScores(NamedTuple):
    """All scores of one segment; `bss` is None where a stem is silent throughout, `silent_frames` (SIR, SAR) by stem."""

    windows: WindowScores
    bss: BssScores | None
    silent_frames: list[tuple[np.ndarray, np.ndarray]]

    def to_json(self) -> dict[str, Any]:
        """Lists in place of arrays, None in place of what is not finite."""
        return {
            "windows": {k: _lists(v) for k, v in self.windows._asdict().items()},
            "bss": {k: _lists(v) for k, v in self.bss._asdict().items()} if self.bss else None,
            "silent_frames": [[_lists(v) for v in pair] for pair in self.silent_frames],
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "SegmentScores":
        numbers = lambda v: np.array(v, np.float64)  # None becomes NaN
        stems = len(told["silent_frames"])
        windows = {k: numbers(v).reshape(-1, stems) for k, v in told["windows"].items() if k != "start"}
        windows["silent"] = windows["silent"].astype(bool)
        return cls(
            WindowScores(start=numbers(told["windows"]["start"]).astype(int), **windows),
            BssScores(**{k: numbers(v) for k, v in told["bss"].items()}) if told["bss"] else None,
            [(numbers(sir), numbers(sar)) for sir, sar in told["silent_frames"]],
        )


def _lists(values: np.ndarray) -> Any:
    if values.dtype.kind != "f":
        return values.tolist()
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()


def score_segment(
    estimates: np.ndarray, references: np.ndarray, sample_rate: int, backend: str = "jax"
) -> SegmentScores:
    """Score one segment, (stems, channels, samples) twice, by everything that the released evaluation logs."""
    try:
        bss = bss_eval(estimates, references, sample_rate, backend)
    except ValueError:
        bss = None
    return SegmentScores(
        score_windows(estimates, references, sample_rate), bss, silent_frame_scores(estimates, references, sample_rate)
    )


def _finite(values: Sequence[np.ndarray]) -> np.ndarray:
    joined = np.concatenate([np.asarray(v, np.float64) for v in values]) if values else np.zeros(0)
    return joined[np.isfinite(joined)]


def released_aggregates(
    items: Iterable[Item], stems: Sequence[str], sample_rate: int, include_silent: bool, backend: str = "jax"
) -> dict[str, float]:
    """Every aggregate that the released evaluation logs, in dB; arguments as `aggregate_segments`."""
    scored = [(item.track, score_segment(item.estimates, item.references, sample_rate, backend)) for item in items]
    return aggregate_segments(scored, stems, include_silent)


def aggregate_segments(
    scored: Iterable[tuple[str, SegmentScores]], stems: Sequence[str], include_silent: bool
) -> dict[str, float]:
    """Every aggregate that the released evaluation logs, in dB, from the scores of (track, segment).

    A segment in which any stem is silent throughout adds nothing to the BSSEval figures of any stem.

    Args:
      include_silent: SI-SDRi counts windows in which the stem's reference is silent ("msdm" style, the U-Net track), or
        leaves them out (the BS-RoFormer track).
    """
    windows: dict[str, dict[str, list]] = {s: {} for s in stems}
    frames: dict[str, dict[str, dict[str, list]]] = {s: {} for s in stems}
    for track, (scores, bss, silent_frames) in scored:
        for j, stem in enumerate(stems):
            silent = scores.silent[:, j]
            kept = np.ones_like(silent) if include_silent else ~silent
            for name, values, mask in (
                ("msdm_si_sdr", scores.si_sdri, kept),
                ("sdr", scores.sdr, np.ones_like(silent)),
                ("si_sdr", scores.si_sdr, ~silent),
                ("si_snr", scores.si_snr, ~silent),
                ("sdr_silent", scores.sdr, silent),
                ("output_rms_silent", scores.output_rms, silent),
            ):
                windows[stem].setdefault(name, []).append(values[mask, j])
            for name, values in zip(("sir_silent", "sar_silent"), silent_frames[j], strict=True):
                windows[stem].setdefault(name, []).append(values)
            for name, values in (bss._asdict() if bss else {}).items():
                frames[stem].setdefault(name, {}).setdefault(track, []).append(values[j])
    found: dict[str, float] = {}
    for stem in stems:
        for name, parts in windows[stem].items():
            values = _finite(parts)
            if not len(values):
                continue
            mean_key = f"{name}/{stem}/mean" if name in ("sir_silent", "sar_silent") else f"{name}/{stem}"
            found[mean_key] = float(values.mean())
            if name not in ("msdm_si_sdr", "si_sdr", "si_snr"):
                found[f"{name}/{stem}/median"] = float(np.median(values))
        for name, by_track in frames[stem].items():
            songs = [v for parts in by_track.values() if len(v := _finite(parts))]
            if not songs:
                continue
            pooled = np.concatenate(songs)
            found[f"museval_{name}/{stem}/mean"] = float(pooled.mean())
            found[f"museval_{name}/{stem}/median"] = float(np.median(pooled))
            found[f"museval_{name}/{stem}/per_track_mean"] = float(np.mean([np.median(v) for v in songs]))
            found[f"museval_{name}/{stem}/per_track_median"] = float(np.median([np.median(v) for v in songs]))
            if name == "sdr":
                found[f"museval_sdr/{stem}/num_tracks"] = float(len(songs))
    # A stem without any value adds 0 to this sum, and counts in the divisor all the same: as released.
    found["msdm_si_sdr_avg"] = sum(found.get(f"msdm_si_sdr/{s}", 0.0) for s in stems) / len(stems)
    measured = [s for s in stems if f"museval_sdr/{s}/median" in found]
    if measured:
        found["sdr_avg"] = float(np.mean([found[f"museval_sdr/{s}/median"] for s in measured]))
        found["sdr_median_of_medians"] = float(np.mean([found[f"museval_sdr/{s}/per_track_median"] for s in measured]))
    elif plain := [found[f"sdr/{s}/median"] for s in stems if f"sdr/{s}/median" in found]:
        found["sdr_avg"] = float(np.mean(plain))
    return found
