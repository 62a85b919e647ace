"""What separates audio, one model or several together: arrays whole, streams, and blocks that are pushed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from msr_jax.config_fields import is_plain_name
from msr_jax.errors import UserError, first_line
from msr_jax.separate.push import Pusher
from msr_jax.weights.model_folder import STEM_NUMBERS

MAX_CHANNELS = 1024  # as in libsndfile


class AudioSeparator(ABC):
    """Audio in, a dict of stems out. Any number of threads may use one at once: every song has a state of its own."""

    stems: list[str]

    @abstractmethod
    def _flow(
        self,
        blocks: Iterable[np.ndarray],
        sample_rate: int,
        channels: int,
        frames: int | None = None,
        progress: Callable[[int], Any] | None = None,
        is_live: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        """`stream` of checked blocks (samples, channels) float32. `is_live`: in this thread alone, chunk by chunk, and no block is asked
        for before all that can be is done with those that came.
        """

    @abstractmethod
    def latency(self, sample_rate: int) -> int:
        """Samples at that rate that what a `pusher` has given may be behind what was pushed, at most.

        Raises:
          UserError: the whole song is needed.
        """

    def separate(self, audio: ArrayLike, sample_rate: int) -> dict[str, np.ndarray]:
        """Separate a song in memory.

        A mono model separates every channel on its own, a stereo model every pair of channels (a single one is doubled,
        and gets the mean of its two results), so that stems have the channels of the song. Songs longer than a segment
        are cut into segments that overlap and are cross-faded; shorter ones are padded with zeros.

        Args:
          audio: (samples,) or (samples, channels), about [-1, 1].
          sample_rate: Hz.

        Returns:
          {stem: float32 array of audio's shape}.

        Raises:
          UserError: no samples, another shape, integers, NaN or infinite samples, a rate that is not positive.
        """
        given = _as_array(audio)
        wide = checked(given)
        if not wide.size:
            raise UserError(
                f"audio must be (samples,) or (samples, channels) with at least one sample, not {given.shape}"
            )
        parts = list(self._flow([wide], checked_rate(sample_rate), wide.shape[1], len(wide)))
        return {stem: np.concatenate([part[stem] for part in parts]).reshape(given.shape) for stem in self.stems}

    def stream(
        self,
        blocks: Iterable[ArrayLike],
        sample_rate: int,
        channels: int | None = None,
        frames: int | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Separate a stream of blocks, any length each; memory does not grow with that of the stream.

        Args:
          blocks: (samples, channels) or, of one channel, (samples,), about [-1, 1]; copied, so that one array may carry them all.
          sample_rate: of the blocks and of what is yielded, Hz.
          channels: of the blocks; None takes those of the first one.
          frames: length of the stream in samples where it is known; what comes back has exactly this length.
          progress: called with the number of samples done so far, at the input's rate.

        Yields:
          {stem: (samples, channels) float32}, one after another.

        Raises:
          UserError: as `separate`, or a block has another number of channels than those before it.
        """
        if getattr(blocks, "ndim", 3) < 3:
            raise UserError("blocks are several arrays, one after another; give a whole song to separate, or [song]")
        rate, rest = checked_rate(sample_rate), iter(blocks)
        if frames is not None and not is_whole(frames, 0):
            raise UserError(f"frames must be a number of samples, not {frames!r}")
        if channels is None:
            first = next(rest, None)
            if first is None:
                return
            first = checked(first).copy()
            channels, rest = first.shape[1], chain([first], rest)
        check_channels(channels)
        yield from self._flow((checked(block, channels).copy() for block in rest), rate, channels, frames, progress)

    def pusher(self, sample_rate: int, channels: int = 1) -> Pusher:
        """Separate what is pushed, as from a sound card: `push(block)` gives the stems so far, `close()` the rest.

        Its `latency` says how many samples it may be behind; a model that is loaded with `segments=1` is least.
        """
        rate = checked_rate(sample_rate)
        check_channels(channels)
        flow = lambda blocks: self._flow(blocks, rate, channels, is_live=True)
        return Pusher(flow, self.stems, channels, self.latency(rate), lambda block: checked(block, channels))


def check_channels(channels: int) -> None:
    """Raises UserError unless a song can have so many."""
    if not is_whole(channels, 1, MAX_CHANNELS):
        raise UserError(f"there must be 1 to {MAX_CHANNELS} channels, not {channels}")


def is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    """Whether a value is a whole number, Python's or NumPy's, from `least` to `most`."""
    return isinstance(value, int | np.integer) and bool(least <= value <= most)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, Python's or NumPy's."""
    return isinstance(value, int | float | np.integer | np.floating)


def checked_rate(sample_rate: int) -> int:
    """A sample rate in Hz as Python's number. Raises UserError where it is none, or not positive."""
    if getattr(sample_rate, "shape", None) == () and hasattr(sample_rate, "item"):  # a number of an array package
        sample_rate = sample_rate.item()
    if not is_number(sample_rate) or not 0 < sample_rate < math.inf:
        raise UserError(f"the sample rate must be positive, in Hz, not {sample_rate!r}")
    return sample_rate


def check_consistent(stems: Sequence[str], config: Mapping[str, Any]) -> None:
    """Raises UserError unless these stems of a model can be made to add up to the mixture: all that it has, two at least."""
    if STEM_NUMBERS in config or len(stems) < len(config["stems"]):
        raise UserError(
            "stems add up to the mixture where all of them are there; leave mixture_consistent or stems out"
        )
    if len(stems) == 1:
        raise UserError(
            f"a mixture-consistent model of one stem gives the mixture itself as {stems[0]}; "
            "have the rest as a stem of its own instead, by --residual NAME"
        )


def check_residual(residual: str | None, stems: Sequence[str], mixture_consistent: bool) -> None:
    """Raises UserError unless something is left over, and can have this name beside the others."""
    if residual is None:
        return
    if mixture_consistent:
        raise UserError("with a residual the stems add up to the song already; leave mixture_consistent out")
    if not is_plain_name(residual):
        raise UserError(f"the residual is a file's name without a folder, not {residual!r}")
    if residual.casefold() in [stem.casefold() for stem in stems]:
        raise UserError(f"the residual must have another name than the stems {', '.join(stems)}")


def _as_array(audio: ArrayLike) -> np.ndarray:
    try:
        return np.asarray(audio)
    except (RuntimeError, TypeError, ValueError) as error:  # a tensor with a gradient, lists of unlike lengths
        raise UserError(f"audio cannot be read as an array ({first_line(error)})") from error


def checked(audio: ArrayLike, channels: int | None = None) -> np.ndarray:
    """Audio (samples,) or (samples, channels) as (samples, channels) float32. Raises UserError where it is none."""
    audio = _as_array(audio)
    if audio.dtype.kind != "f" and audio.dtype.name != "bfloat16":
        raise UserError(f"audio must be floating-point samples in about [-1, 1], not {audio.dtype}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused below
        audio = audio.astype(np.float32, copy=False)
    if audio.ndim not in (1, 2):
        raise UserError(f"audio must be (samples,) or (samples, channels) with at least one sample, not {audio.shape}")
    wide = audio[:, None] if audio.ndim == 1 else audio
    if wide.shape[1] > MAX_CHANNELS:
        raise UserError(f"audio has {wide.shape[1]} channels; it must be (samples, channels), is it transposed?")
    if channels not in (None, wide.shape[1]):
        raise UserError(f"a block has {wide.shape[1]} channels, but the stream has {channels}")
    if not np.isfinite(wide).all():
        raise UserError("audio holds NaN or infinite samples")
    return wide
