"""Chunked inference as the public training code's `demix` has it, sample for sample, for results that can be compared.

It keeps the whole song in memory and its own habits: the corrections of the fade belong to batches, not to chunks, so that
the result depends a little on the batch size, and a sample that no chunk gives weight to is zero.
"""

from typing import Any, NamedTuple

import numpy as np

from msr_jax.errors import UserError
from msr_jax.separate.chunks import ChunkFunction


class Demix(NamedTuple):
    """Settings under their published names, and defaults of the public 4-stem model.

    A chunk starts every `chunk / num_overlap` samples. `bigshifts` averages over so many circular shifts of the song, `tta` over
    the song, the song with its two channels swapped, and the song negated.
    """

    num_overlap: int = 2
    batch_size: int = 2
    bigshifts: int = 1
    tta: bool = False

    def check(self, chunk: int) -> None:
        """Raises UserError for settings that mean nothing with chunks of so many samples."""
        for name in ("num_overlap", "batch_size", "bigshifts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_overlap > chunk:
            raise UserError(f"num_overlap must be at most the chunk's {chunk} samples, not {self.num_overlap}")


def demix(run: ChunkFunction, mix: np.ndarray, chunk: int, settings: Demix) -> np.ndarray:
    """Separate a song.

    Args:
      mix: (samples, channels) float32.
      chunk: samples that the model takes.

    Returns:
      (stems, samples, channels) float32.
    """
    calls = 0

    def counted(chunks: np.ndarray, _: int) -> np.ndarray:  # every call of the model has a number of its own
        nonlocal calls
        calls += len(chunks)
        return run(chunks, calls - len(chunks))

    def shifted(mix: np.ndarray) -> np.ndarray:
        offsets = [k * (len(mix) // settings.bigshifts) for k in range(settings.bigshifts)]
        return _mean(np.roll(_demix_once(counted, np.roll(mix, n, 0), chunk, settings), -n, 1) for n in offsets)

    if not settings.tta:
        return shifted(mix)
    return _mean(iter([shifted(mix), shifted(mix[:, ::-1])[..., ::-1], -shifted(-mix)]))


def _mean(arrays) -> np.ndarray:
    total, count = next(arrays), 1
    for array in arrays:
        total, count = total + array, count + 1
    return total / np.float32(count)


def _demix_once(run: ChunkFunction, mix: np.ndarray, chunk: int, settings: Demix) -> np.ndarray:
    fade, step = chunk // 10, chunk // settings.num_overlap
    border = chunk - step
    is_bordered = border > 0 and len(mix) > 2 * border
    if is_bordered:
        mix = np.pad(mix, ((border, border), (0, 0)), mode="reflect")
    window = np.ones(chunk, np.float32)
    window[:fade] = np.linspace(0, 1, fade, dtype=np.float32)
    window[chunk - fade :] = np.linspace(1, 0, fade, dtype=np.float32)
    starts = list(range(0, len(mix), step))
    total: Any = None  # until an estimate tells the number of stems
    weight = np.zeros((len(mix), 1), np.float32)
    for at in range(0, len(starts), settings.batch_size):
        chosen = starts[at : at + settings.batch_size]
        estimates = run(np.stack([_part(mix, start, chunk) for start in chosen]), at)
        if total is None:
            total = np.zeros((estimates.shape[1], *mix.shape), np.float32)
        own = window.copy()
        if chosen[-1] == 0:
            own[:fade] = 1
        elif chosen[-1] == starts[-1]:
            own[chunk - fade :] = 1
        for start, estimate in zip(chosen, estimates, strict=True):
            n = min(chunk, len(mix) - start)
            total[:, start : start + n] += estimate[:, :n] * own[:n, None]
            weight[start : start + n] += own[:n, None]
    stems = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return stems[:, border : len(mix) - border] if is_bordered else stems


def _part(mix: np.ndarray, start: int, chunk: int) -> np.ndarray:
    """Samples from `start`, filled up to a chunk: by reflection where more than half is there, else by zeros."""
    part = mix[start : start + chunk]
    missing = ((0, chunk - len(part)), (0, 0))
    return np.pad(part, missing, mode="reflect") if len(part) > chunk // 2 else np.pad(part, missing)
