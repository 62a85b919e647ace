"""Separation of songs of any length, rate and channel count with a model that takes fixed segments at one rate.

The song flows through in blocks: resampling, chunks that overlap, the network, overlap-add, resampling back. Memory
holds a few segments, however long the song is. Reading, the network and what follows it work in threads of their own.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msr_jax.errors import UserError
from msr_jax.methods.stages import REFINEMENTS, make_refiner, network_of
from msr_jax.models.backbone import cast_params, make_backbone
from msr_jax.runtime import saying
from msr_jax.separate.chunks import ahead, cut_chunks, overlap_add, resampled
from msr_jax.separate.demix import Demix, demix
from msr_jax.separate.mixture import Original, Shares, without_offset
from msr_jax.weights.model_folder import (
    BUNDLED,
    DEFAULT_OVERLAP,
    DEFAULT_REFINE,
    DEFAULT_SEGMENTS,
    STEM_NUMBERS,
    Model,
    choose_stems,
    load_model,
)

MIXTURES = 2  # that one call of the network takes: both channels of a stereo song through a mono model
OVERLAP = 0.5  # of a segment: every sample twice, less at a segment's edges, where a network knows least
JOINT_SECONDS = 0.005  # of cross-fade where no overlap is asked for: a hard joint clicks
MAX_CHANNELS = 1024  # as in libsndfile


def channel_groups(channels: int, at_once: int) -> np.ndarray:
    """Channels of a song that go through a model together: (groups, at_once) indices; the last channel fills up the last."""
    groups = -(-channels // at_once)
    return np.minimum(np.arange(groups * at_once), channels - 1).reshape(groups, at_once)


class Separator:
    """A loaded model, ready to separate. Made by `msr_jax.load`."""

    def __init__(
        self,
        model: Model,
        refine: str | None = None,
        num_steps: int | None = None,
        seed: int = 0,
        overlap: float | None = None,
        batch_size: int | None = None,
        dtype: str = "float32",
        reference: Demix | None = None,
        mixture_consistent: bool = False,
        residual: str | None = None,
        stems: Sequence[str] | None = None,
        segments: int | None = None,
    ):
        """`overlap`: of neighbouring chunks, as a fraction. `segments`: chunks are so many segments of training's length, as many as
        a short song needs. None takes what the model's folder names, else half and 1.

        `batch_size`: examples per network call (stems × mixtures); it changes speed and memory, not the result. Below
        the number of stems, they are refined one by one.

        `dtype`: precision of the networks' products and activations; "bfloat16" is faster where the device
        has units for it, and right to about -40 dB.
        `reference`: cut and join as the public training code does instead, which holds the whole song in memory.
        `mixture_consistent`: what is missing is shared out among the stems, see `Shares`; for songs that hold nothing else.
        `residual`: name of one more stem: the song less all others.
        `stems`: which of the model's are wanted; None is all.
        """
        config = model.config
        chosen = None if stems is None else choose_stems(config, stems)
        if refine is None:
            held = [r for r in ("consistency", "diffusion", "det_x2") if network_of(config, r) in model.weights]
            refine = config.get(DEFAULT_REFINE, (held or ["none"])[0])
        self.refinements = [r for r in REFINEMENTS if network_of(config, r) in model.weights]
        if refine not in REFINEMENTS:
            raise UserError(f"refine must be one of {', '.join(REFINEMENTS)}, not '{refine}'")
        if network_of(config, refine) not in model.weights:
            have = ", ".join(model.weights)
            raise UserError(f"the model cannot refine by {refine}: its folder holds the networks {have}")
        overlap = config.get(DEFAULT_OVERLAP, OVERLAP) if overlap is None else overlap
        segments = config.get(DEFAULT_SEGMENTS, 1) if segments is None else segments
        if segments < 1:
            raise UserError(f"a chunk must be at least 1 segment, not {segments}")
        if not 0 <= overlap <= 0.5:
            raise UserError(f"overlap must lie between 0 and 0.5 of a segment, not {overlap}")
        if not 0 <= seed < 2**32:
            raise UserError(f"the seed must lie between 0 and 2^32 - 1, not {seed}")
        if reference:
            reference.check()
        self.config, self.refine, self.num_steps, self.seed = config, refine, num_steps, seed
        self.reference = reference
        self.separated = [stem for stem in config["stems"] if stems is None or stem in stems]  # what the network gives
        if mixture_consistent and (STEM_NUMBERS in config or len(self.separated) < len(config["stems"])):
            raise UserError(
                "stems add up to the mixture where all of them are there; leave mixture_consistent or stems out"
            )
        if mixture_consistent and len(self.separated) == 1 and not residual:
            raise UserError(
                f"a mixture-consistent model of one stem gives the mixture itself as {self.separated[0]}; "
                "have the rest as a stem of its own instead, by --residual NAME"
            )
        if mixture_consistent and residual:
            raise UserError("with a residual the stems add up to the song already; leave mixture_consistent out")
        if residual in self.separated:
            raise UserError(f"the residual must have another name than the stems {', '.join(self.separated)}")
        self.mixture_consistent, self.residual = mixture_consistent, residual
        self.stems: list[str] = [*self.separated, *([residual] if residual else [])]
        self.segment, self.sample_rate = config["segment"], config["sample_rate"]
        self.overlap, self.segments = overlap, 1 if reference else segments
        batch_size = batch_size or MIXTURES * len(self.separated)
        self.mixtures_per_call = max(1, batch_size // len(self.separated))
        backbone = make_backbone(config["model"], dtype)
        backbone.check_length(self.segment)
        needed = {"deterministic", network_of(config, refine)}
        device = next(iter(jnp.zeros(()).devices()))  # this thread's; others that compute for it have another default
        self.weights = {
            k: cast_params(jax.device_put(v, device), dtype) for k, v in model.weights.items() if k in needed
        }
        refiner = make_refiner(config, backbone, refine, num_steps, batch_size < len(self.separated), chosen)
        self._program = jax.jit(batch_function(refiner))
        self._compiled: dict[int, Any] = {}  # by the length of a chunk
        self._compiling = threading.Lock()

    def _run(self, weights: Any, mixture: np.ndarray, *inputs: Any) -> Any:
        samples = mixture.shape[1]
        with self._compiling:
            if samples not in self._compiled:
                text = f"compiling the network for {len(self.separated)} stems (refinement: {self.refine})"
                with saying(f"{text}; it is kept for the next time"):
                    self._compiled[samples] = self._program.lower(weights, mixture, *inputs).compile()
        return self._compiled[samples](weights, mixture, *inputs)

    def _chunk(self, frames: float | None) -> tuple[int, int]:
        """Length and overlap in samples of the chunks for a song of so many; a few lengths, since each is compiled for."""
        segments = self.segments
        if frames is not None:
            segments = min(segments, 2 ** max(0, math.ceil(math.log2(max(1, frames) / self.segment))))
        chunk = segments * self.segment
        return chunk, max(int(self.overlap * chunk), min(int(JOINT_SECONDS * self.sample_rate), chunk // 2))

    def _run_chunks(self, chunks: np.ndarray, first: int) -> np.ndarray:
        """(chunks, samples, channels) -> (chunks, stems, samples, channels), in batches of one fixed size.

        Silence needs no network and stays what it is, but in the reference's chunking.
        """
        count, samples, channels = chunks.shape
        groups = channel_groups(channels, self.config["channels"])  # (groups, the model's channels)
        index = np.stack(np.unravel_index(np.arange(count * len(groups)), (count, len(groups))), -1)
        if not self.reference:
            index = index[[chunks[chunk][:, groups[group]].any() for chunk, group in index]]
        out = np.zeros((count, len(self.separated), samples, channels), np.float32)
        for at in range(0, len(index), self.mixtures_per_call):
            chosen = index[at : at + self.mixtures_per_call]
            padded = np.resize(chosen, (self.mixtures_per_call, 2))
            mixture = np.stack([chunks[chunk][:, groups[group]] for chunk, group in padded])
            place = padded + np.array([first, 0])
            result = np.asarray(self._run(self.weights, mixture, place, np.uint32(self.seed)))
            for (chunk, group), stems in zip(chosen, result, strict=False):
                for own, channel in enumerate(groups[group]):  # a doubled channel gets the mean of its two results
                    out[chunk, :, :, channel] += stems[..., own] / np.count_nonzero(groups[group] == channel)
        return out

    def stream(
        self,
        blocks: Iterable[np.ndarray],
        sample_rate: int,
        channels: int,
        frames: int | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Separate a stream of blocks (samples, channels); memory does not grow with its length.

        Args:
          sample_rate: of the blocks and of what is yielded, Hz.
          frames: length of the stream in samples where it is known; what comes back has exactly this length.
          progress: called with the number of samples done so far, at the input's rate.

        Yields:
          {stem: (samples, channels) float32}, one after another.
        """
        original, taken = Original(sample_rate, channels), 0

        def kept() -> Iterator[np.ndarray]:
            nonlocal taken
            for block in blocks:
                original.add(block)
                taken += len(block)
                yield block

        at_model_rate = (b for b in resampled(kept(), sample_rate, self.sample_rate, channels) if len(b))
        length = None if frames is None else frames * self.sample_rate / sample_rate
        with closing(ahead(self._separated(at_model_rate, channels, length))) as separated:
            wide = len(self.separated) * channels  # all stems share one resampler, as so many channels
            flat = (np.ascontiguousarray(b.swapaxes(0, 1)).reshape(b.shape[1], wide) for b in separated)
            back = resampled(flat, self.sample_rate, sample_rate, wide)
            whole = _of_length(back, lambda: taken if frames is None else frames, wide)
            stems = (b.reshape(len(b), -1, channels).swapaxes(0, 1) for b in whole)
            done = 0
            for block in self._as_the_song(stems, original, sample_rate):
                done += block.shape[1]
                yield dict(zip(self.stems, block, strict=True))
                if progress:
                    progress(done)

    def _separated(self, blocks: Iterator[np.ndarray], channels: int, frames: float | None) -> Iterator[np.ndarray]:
        """The network's stems (stems, samples, channels) of a stream at its rate."""
        if self.reference:
            if song := list(blocks):
                yield demix(self._run_chunks, np.concatenate(song), self.segment, self.reference)
            return
        group = max(1, self.mixtures_per_call // len(channel_groups(channels, self.config["channels"])))
        chunk, overlap = self._chunk(frames)
        chunks = cut_chunks(without_offset(blocks, self.sample_rate), chunk, chunk - overlap)
        with closing(ahead(chunks, depth=2 * group)) as chunks_ahead:
            yield from overlap_add(chunks_ahead, self._run_chunks, len(self.separated), chunk, overlap, group)

    def _as_the_song(self, blocks: Iterator[np.ndarray], original: Original, sample_rate: int) -> Iterator[np.ndarray]:
        """Stems at the song's rate, silent where it is and, where that is asked for, adding up to it."""
        shares = Shares(sample_rate) if self.mixture_consistent else None
        for block in blocks:
            mixture, silent = original.take(block.shape[1])
            block[:, silent] = 0
            if self.residual:
                block = np.concatenate([block, (mixture - block.sum(0))[None]])
            yield shares.add(block, mixture) if shares else block
        if shares and shares.stems is not None:
            yield shares.add(shares.stems[:, :0], shares.mixture[:0], is_last=True)

    def separate(self, audio: np.ndarray, sample_rate: int) -> dict[str, np.ndarray]:
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
        audio = np.asarray(audio)
        if audio.dtype.kind != "f":
            raise UserError(f"audio must be floating-point samples in about [-1, 1], not {audio.dtype}")
        audio = audio.astype(np.float32, copy=False)
        if audio.ndim not in (1, 2) or audio.size == 0:
            raise UserError(
                f"audio must be (samples,) or (samples, channels) with at least one sample, not {audio.shape}"
            )
        if audio.ndim == 2 and audio.shape[1] > MAX_CHANNELS:
            raise UserError(f"audio has {audio.shape[1]} channels; it must be (samples, channels), is it transposed?")
        if not np.isfinite(audio).all():
            raise UserError("audio holds NaN or infinite samples")
        if sample_rate <= 0:
            raise UserError(f"the sample rate must be positive, not {sample_rate}")
        wide = audio.reshape(len(audio), -1)
        parts = list(self.stream([wide], sample_rate, wide.shape[1], len(wide)))
        return {s: np.concatenate([p[s] for p in parts]).reshape(audio.shape) for s in self.stems}


def _of_length(blocks: Iterator[np.ndarray], length: Callable[[], int], width: int) -> Iterator[np.ndarray]:
    """Blocks (samples, width), cut or filled up with zeros to a length that is known when they have come."""
    done = 0
    for block in blocks:
        block = block[: length() - done]
        done += len(block)
        if len(block):
            yield block
    if done < length():  # rounding of the two rates
        yield np.zeros((length() - done, width), np.float32)


def batch_function(refiner: Callable) -> Callable:
    """What runs on the device: (weights, mixture (batch, time, channels), place (batch, 2) integers, seed) -> stems
    (batch, stems, time, channels), to be jitted.
    """

    def run(weights, mixture, place, seed):  # place (batch, 2): chunk, group of channels
        # A key per example from its place in the song: the result does not depend on how examples are batched.
        key = lambda p: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), p[0]), p[1])
        return refiner(weights, mixture, jax.vmap(key)(jnp.asarray(place)))

    return run


def load(
    folder: str | Path = BUNDLED,
    refine: str | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    stems: Sequence[str] | None = None,
    **options,
) -> Separator:
    """Load a model folder (or a training run's working directory) for separation.

    Args:
      folder: by default the small model that comes with the package; its README.md says what it can do.
      refine: one of `REFINEMENTS`; None takes what the folder names (`default_refine` in its config.json), else the best
        that it has, in the reverse order.
      num_steps: refinement steps T; None takes the model's own.
      seed: of the refinement's noise.
      stems: which of the model's are wanted, by name; None is all. What belongs to the others alone is not even read.
      options: as of `Separator`.

    Raises:
      UserError: the folder is no model folder, is damaged, or lacks the refinement; `num_steps` does not fit it.
    """
    return Separator(load_model(folder, stems), refine, num_steps, seed, stems=stems, **options)
