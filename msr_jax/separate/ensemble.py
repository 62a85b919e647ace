"""Several models as one separator: the average or the median of their stems, as waveforms or as spectra."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msr_jax.errors import UserError
from msr_jax.separate.chunks import abreast, shared
from msr_jax.separate.engine import Separator, load
from msr_jax.separate.interface import AudioSeparator, check_consistent, check_residual, is_number
from msr_jax.separate.mixture import SHARE_SECONDS, Original, as_the_song

BY = ("mean", "median", "mean-spectra", "median-spectra")
WINDOW, HOP = 4096, 1024  # samples of a spectrum, at the song's rate, and from one to the next


class Member(NamedTuple):
    """A model of an ensemble by its folder, and how much it counts beside the others."""

    model: Path
    weight: float = 1.0


def parse_member(text: str) -> Member:
    """Of MODEL[:WEIGHT]. Raises UserError unless the weight is a positive number."""
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Member(Path(text))
    try:
        weight = float(number)
    except ValueError:
        return Member(Path(text))
    if not name or not (0 < weight < math.inf):
        raise UserError(f"a member of an ensemble is MODEL or MODEL:WEIGHT with a weight above 0, not '{text}'")
    return Member(Path(name), weight)


def _is_weight(value: Any) -> bool:
    return is_number(value) and 0 < value < math.inf


def _as_member(given: Any) -> Member:
    """What `load_ensemble` takes as a member. UserError where it is none."""
    if isinstance(given, str | os.PathLike):
        return Member(Path(given))
    if isinstance(given, Sequence) and len(given) == 2 and isinstance(given[0], str | os.PathLike):
        if _is_weight(given[1]):
            return Member(Path(given[0]), given[1])
    raise UserError(f"a member of an ensemble is a model, or (model, weight) with a weight above 0, not {given!r}")


class Ensemble(AudioSeparator):
    """Separators with the same stems, at any rates and of any backbones, as one."""

    def __init__(
        self,
        members: Sequence[Separator],
        weights: Sequence[float] | None = None,
        by: str = "mean",
        mixture_consistent: bool = False,
        residual: str | None = None,
    ):
        """
        Args:
          weights: above 0, relative to each other; None counts all alike. Of a median, half of all weight is on either side.
          by: of samples the "mean" or "median"; or "mean-spectra", "median-spectra": of magnitudes, with the phases of the mean.
          mixture_consistent, residual: as of `Separator`, of what comes out; the members have neither.

        Raises:
          UserError: other stems, weights or ways than these.
        """
        weights = [1.0] * len(members) if weights is None else list(weights)
        if not members or len(weights) != len(members) or not all(map(_is_weight, weights)):
            raise UserError("an ensemble needs at least one model, and for each a weight above 0")
        if by not in BY:
            raise UserError(f"an ensemble is made by {', '.join(BY)}, not '{by}'")
        first, *others = members
        for other in others:
            if set(other.stems) != set(first.stems):
                raise UserError(
                    f"the models of an ensemble must have the same stems, but one has {', '.join(first.stems)} and another "
                    f"{', '.join(other.stems)}; name those that all of them have by --stems"
                )
        check_residual(residual, first.stems, mixture_consistent)
        self.members, self.by, self.separated = list(members), by, list(first.stems)
        self.weights = np.asarray(weights) / np.sum(weights)
        self.mixture_consistent, self.residual = mixture_consistent, residual
        self.stems = [*self.separated, *([residual] if residual else [])]

    def _flow(
        self,
        blocks: Iterable[np.ndarray],
        sample_rate: int,
        channels: int,
        frames: int | None = None,
        progress: Callable[[int], Any] | None = None,
        is_live: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        original = Original(sample_rate, channels)

        def kept() -> Iterator[np.ndarray]:
            for block in blocks:
                original.add(block)
                yield block

        flows = [
            member._flow(song, sample_rate, channels, frames, is_live=is_live)
            for member, song in zip(self.members, shared(kept(), len(self.members)), strict=True)
        ]
        parts = abreast([(np.stack([part[stem] for stem in self.separated]) for part in flow) for flow in flows])
        together = self._spectra(parts) if self.by.endswith("-spectra") else map(self._waveform, parts)
        done = 0
        for block in as_the_song(together, original, sample_rate, self.mixture_consistent, self.residual is not None):
            done += block.shape[1]
            yield dict(zip(self.stems, block, strict=True))
            if progress:
                progress(done)

    def _waveform(self, parts: np.ndarray) -> np.ndarray:
        """(members, …) -> (…)"""
        average = weighted_median if self.by.startswith("median") else weighted_mean
        return average(parts, self.weights).astype(np.float32)

    def _spectra(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Blocks (members, stems, samples, channels) -> (stems, samples, channels), as long together.

        Magnitudes are averaged; the phases are those of the mean of the spectra, in which members that agree weigh most.
        """
        window = np.hanning(WINDOW + 1)[:-1]
        scale = np.square(window).sum() / HOP  # the sum of its squares over all that overlap, at every sample
        edge = WINDOW - HOP  # samples before the first and after the last that share spectra with them
        held: Any = None
        total: Any = None
        taken = given = 0  # samples that came and went, `edge` of silence before them included

        def add(samples: np.ndarray) -> np.ndarray:
            nonlocal held, total
            held = samples if held is None else np.concatenate([held, samples], 2)
            done = []
            while held.shape[2] >= WINDOW:
                spectra = np.fft.rfft(held[:, :, :WINDOW] * window[:, None], axis=2)
                mean = weighted_mean(spectra, self.weights)
                phase = mean / np.maximum(np.abs(mean), np.finfo(np.float64).tiny)
                part = np.fft.irfft(self._waveform(np.abs(spectra)) * phase, WINDOW, 1) * window[:, None] / scale
                total = part if total is None else np.pad(total, ((0, 0), (0, HOP), (0, 0))) + part
                done.append(total[:, :HOP].astype(np.float32))
                total, held = total[:, HOP:], held[:, :, HOP:]
            return np.concatenate(done, 1) if done else np.zeros((held.shape[1], 0, held.shape[3]), np.float32)

        for block in blocks:
            silence = np.zeros((*block.shape[:2], edge, block.shape[3]), np.float32)
            parts = add(block if taken else np.concatenate([silence, block], 2))
            taken += block.shape[2]
            due = parts[:, max(0, edge - given) :]
            given += parts.shape[1]
            if due.shape[1]:
                yield due
        if taken:
            parts = add(np.zeros((*held.shape[:2], edge + HOP, held.shape[3]), np.float32))
            yield parts[:, max(0, edge - given) :][:, : taken - max(0, given - edge)]

    def latency(self, sample_rate: int) -> int:
        own = WINDOW + HOP if self.by.endswith("-spectra") else 0
        own += math.ceil(SHARE_SECONDS * self.mixture_consistent * sample_rate)
        return max(member.latency(sample_rate) for member in self.members) + own


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Over the first axis; weights add up to 1."""
    return sum(weight * value for weight, value in zip(weights.astype(values.real.dtype), values, strict=True))


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Over the first axis: half of all weight lies on either side; between two values where that is exactly so, their mean."""
    order = np.argsort(values, 0)
    ordered, below = np.take_along_axis(values, order, 0), np.cumsum(weights[order], 0)
    half, rounding = weights.sum() / 2, 1e-9
    pick = lambda reached: np.take_along_axis(ordered, np.argmax(reached, 0)[None], 0)[0]
    return (pick(below >= half - rounding) + pick(below > half + rounding)) / 2


def load_ensemble(
    members: Sequence[Member | tuple[str | Path, float] | str | Path],
    by: str = "mean",
    mixture_consistent: bool = False,
    residual: str | None = None,
    **options: Any,
) -> Ensemble:
    """Load several models as one separator.

    Args:
      members: folders, or (folder, weight).
      by: "mean", "median", "mean-spectra" or "median-spectra", see `Ensemble`.
      options: as of `load`, for every one of them.

    Raises:
      UserError: as `load`, no list, a weight that is not above 0, or their stems differ.
    """
    if isinstance(members, str | os.PathLike | Member) or not isinstance(members, Iterable):
        raise UserError(f"the members of an ensemble are a list, such as ['bundled', 'another'], not {members!r}")
    whole = [_as_member(member) for member in members]
    loaded = [load(member.model, **options) for member in whole]
    ensemble = Ensemble(loaded, [member.weight for member in whole], by, mixture_consistent, residual)
    if mixture_consistent:
        for separator in loaded:
            check_consistent(separator.separated, separator.config)
    return ensemble
