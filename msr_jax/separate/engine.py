"""Separation of songs of any length, rate and channel count with a model that takes fixed segments at one rate.

The song flows through in blocks: resampling, chunks that overlap, the network, overlap-add, resampling back. Memory
holds a few segments, however long the song is.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soxr

from msr_jax.errors import UserError
from msr_jax.methods.stages import REFINEMENTS, make_refiner, network_of
from msr_jax.models.backbone import cast_params, make_backbone
from msr_jax.separate.demix import Demix, demix
from msr_jax.weights.model_folder import BUNDLED, DEFAULT_REFINE, Model, load_model

OVERLAP = 0.5  # of a segment: every sample twice, less at a segment's edges, where a network knows least
MAX_CHANNELS = 1024  # as in libsndfile
# (segments (chunks, samples, channels), index of the first) -> estimates (chunks, stems, samples, channels)
ChunkFunction = Callable[[np.ndarray, int], np.ndarray]


def cross_fade(segment: int, overlap: int) -> np.ndarray:
    """Weights (segment,) that rise and fall linearly over `overlap` samples and are nowhere 0."""
    ramp = np.minimum(np.arange(1, segment + 1), np.arange(segment, 0, -1)) / (overlap + 1)
    return np.minimum(ramp, 1.0).astype(np.float32)


def cut_chunks(blocks: Iterable[np.ndarray], segment: int, hop: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cut a stream of blocks (any length, channels) into overlapping segments.

    Yields:
      (start, length, chunk (segment, channels)). The last chunk is moved back so that it ends with the stream; a stream
      shorter than a segment gives one chunk, zeros after its `length` samples.
    """
    # `held` are the samples from `base` on; `start` is where the next chunk begins.
    held: np.ndarray | None = None
    base = start = 0
    for block in blocks:
        held = block if held is None else np.concatenate([held, block])
        while base + len(held) >= start + segment:
            yield start, segment, held[start - base : start - base + segment]
            held, base = held[start - base :], start  # the last chunk may have to reach back as far as this one
            start += hop
    end = base + (0 if held is None else len(held))
    if held is not None and start == 0:
        yield 0, len(held), np.pad(held, ((0, segment - len(held)), (0, 0)))
    elif held is not None and end > base + segment:
        yield end - segment, segment, held[-segment:]


def overlap_add(
    chunks: Iterator[tuple[int, int, np.ndarray]],
    run: ChunkFunction,
    stems: int,
    segment: int,
    overlap: int,
    group: int,
) -> Iterator[np.ndarray]:
    """Run chunks through the model, `group` at a time, and cross-fade the results.

    Yields:
      Blocks (stems, samples, channels) that together are as long as the stream was.
    """
    fade = cross_fade(segment, overlap)[:, None]
    total: Any = None  # until an estimate tells the number of channels
    weight = np.zeros((0, 1), np.float32)
    base = count = 0

    def flush(upto: int) -> np.ndarray:
        nonlocal total, weight, base
        ready = total[:, : upto - base] / weight[: upto - base]
        total, weight, base = total[:, upto - base :], weight[upto - base :], upto
        return ready

    end = 0
    while batch := [c for _, c in zip(range(group), chunks, strict=False)]:
        estimates = run(np.stack([chunk for _, _, chunk in batch]), count)
        count += len(batch)
        for (start, length, _), estimate in zip(batch, estimates, strict=True):
            if total is None:
                total = np.zeros((stems, 0, estimate.shape[-1]), np.float32)
            if start > base:
                yield flush(start)
            grow = start + length - base - total.shape[1]
            total = np.pad(total, ((0, 0), (0, grow), (0, 0)))
            weight = np.pad(weight, ((0, grow), (0, 0)))
            total[:, start - base : start - base + length] += (estimate * fade)[:, :length]
            weight[start - base : start - base + length] += fade[:length]
            end = start + length
    if total is not None:
        yield flush(end)


def _resampled(blocks: Iterable[np.ndarray], rate_in: int, rate_out: int, channels: int) -> Iterator[np.ndarray]:
    if rate_in == rate_out:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate_in, rate_out, channels, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block)).reshape(-1, channels)
    yield stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).reshape(-1, channels)


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
        overlap: float = OVERLAP,
        batch_size: int | None = None,
        dtype: str = "float32",
        reference: Demix | None = None,
        mixture_consistent: bool = False,
    ):
        """`batch_size`: examples per network call (stems × mixtures); it changes speed and memory, not the result. Below
        the number of stems, they are refined one by one.

        `dtype`: precision of the networks' products and activations; "bfloat16" is faster where the device
        has units for it, and right to about -40 dB.
        `reference`: cut and join as the public training code does instead, which holds the whole song in memory.
        `mixture_consistent`: see `mixture_consistency`; for songs that hold nothing but the model's stems.
        """
        config = model.config
        if refine is None:
            held = [r for r in ("consistency", "diffusion", "det_x2") if network_of(config, r) in model.weights]
            refine = config.get(DEFAULT_REFINE, (held or ["none"])[0])
        if refine not in REFINEMENTS:
            raise UserError(f"refine must be one of {', '.join(REFINEMENTS)}, not '{refine}'")
        if network_of(config, refine) not in model.weights:
            have = ", ".join(model.weights)
            raise UserError(f"the model cannot refine by {refine}: its folder holds the networks {have}")
        if not 0 <= overlap <= 0.5:
            raise UserError(f"overlap must lie between 0 and 0.5 of a segment, not {overlap}")
        if not 0 <= seed < 2**32:
            raise UserError(f"the seed must lie between 0 and 2^32 - 1, not {seed}")
        if reference:
            reference.check()
        self.config, self.refine, self.num_steps, self.seed = config, refine, num_steps, seed
        self.reference = reference
        self.stems: list[str] = list(config["stems"])
        self.segment, self.sample_rate = config["segment"], config["sample_rate"]
        self.overlap = int(overlap * self.segment)
        batch_size = batch_size or len(self.stems)
        self.mixtures_per_call = max(1, batch_size // len(self.stems))
        backbone = make_backbone(config["model"], dtype)
        backbone.check_length(self.segment)
        needed = {"deterministic", network_of(config, refine)}
        self.weights = {k: cast_params(jax.device_put(v), dtype) for k, v in model.weights.items() if k in needed}
        refiner = make_refiner(config, backbone, refine, num_steps, one_by_one=batch_size < len(self.stems))
        self._run = jax.jit(batch_function(refiner, mixture_consistent))

    def _run_chunks(self, chunks: np.ndarray, first: int) -> np.ndarray:
        """(chunks, samples, channels) -> (chunks, stems, samples, channels), in batches of one fixed size."""
        count, samples, channels = chunks.shape
        groups = channel_groups(channels, self.config["channels"])  # (groups, the model's channels)
        index = np.stack(np.unravel_index(np.arange(count * len(groups)), (count, len(groups))), -1)
        out = np.zeros((count, len(self.stems), samples, channels), np.float32)
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
        group = max(1, self.mixtures_per_call // len(channel_groups(channels, self.config["channels"])))
        taken = 0

        def counted() -> Iterator[np.ndarray]:
            nonlocal taken
            for block in blocks:
                taken += len(block)
                yield block

        at_model_rate = _resampled(counted(), sample_rate, self.sample_rate, channels)
        at_model_rate = (b for b in at_model_rate if len(b))
        if self.reference:
            separated = self._demixed(at_model_rate, self.reference)
        else:
            chunks = cut_chunks(at_model_rate, self.segment, self.segment - self.overlap)
            separated = overlap_add(chunks, self._run_chunks, len(self.stems), self.segment, self.overlap, group)
        wide = len(self.stems) * channels  # all stems share one resampler, as so many channels
        flat = (np.ascontiguousarray(b.swapaxes(0, 1)).reshape(b.shape[1], wide) for b in separated)
        done = 0
        for block in _resampled(flat, self.sample_rate, sample_rate, wide):
            block = block[: None if frames is None else frames - done]
            done += len(block)
            if len(block):
                yield self._named(block, channels)
            if progress:
                progress(done)
        wanted = taken if frames is None else frames
        if done < wanted:  # rounding of the two rates
            yield self._named(np.zeros((wanted - done, wide), np.float32), channels)
            if progress:
                progress(wanted)

    def _demixed(self, blocks: Iterable[np.ndarray], reference: Demix) -> Iterator[np.ndarray]:
        """All of the song (stems, samples, channels) at once, as `demix` has it; every chunk is padded to one batch."""
        if song := list(blocks):
            yield demix(self._run_chunks, np.concatenate(song), self.segment, reference)

    def _named(self, block: np.ndarray, channels: int) -> dict[str, np.ndarray]:
        by_stem = block.reshape(len(block), len(self.stems), channels)
        return {stem: by_stem[:, k] for k, stem in enumerate(self.stems)}

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


def mixture_consistency(stems: jax.Array, mixture: jax.Array) -> jax.Array:
    """Stems (batch, stems, time, channels) that add up to the mixture (batch, time, channels).

    What is missing is shared out in proportion to the power of the stems, so that silent ones stay silent (Wisdom et al.,
    "Differentiable consistency constraints for improved deep speech enhancement", 2019).
    """
    rest = mixture[:, None] - stems.sum(1, keepdims=True)
    power = jnp.square(stems).mean((2, 3), keepdims=True)
    return stems + rest * power / jnp.maximum(power.sum(1, keepdims=True), 1e-20)


def batch_function(refiner: Callable, mixture_consistent: bool) -> Callable:
    """What runs on the device: (weights, mixture (batch, time, channels), place (batch, 2) integers, seed) -> stems
    (batch, stems, time, channels), to be jitted.
    """

    def run(weights, mixture, place, seed):  # place (batch, 2): chunk, group of channels
        # A key per example from its place in the song: the result does not depend on how examples are batched.
        key = lambda p: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), p[0]), p[1])
        stems = refiner(weights, mixture, jax.vmap(key)(jnp.asarray(place)))
        return mixture_consistency(stems, mixture) if mixture_consistent else stems

    return run


def load(
    folder: str | Path = BUNDLED, refine: str | None = None, num_steps: int | None = None, seed: int = 0, **options
) -> Separator:
    """Load a model folder (or a training run's working directory) for separation.

    Args:
      folder: by default the small model that comes with the package; its README.md says what it can do.
      refine: one of `REFINEMENTS`; None takes what the folder names (`default_refine` in its config.json), else the best
        that it has, in the reverse order.
      num_steps: refinement steps T; None takes the model's own.
      seed: of the refinement's noise.

    Raises:
      UserError: the folder is no model folder, is damaged, or lacks the refinement; `num_steps` does not fit it.
    """
    return Separator(load_model(folder), refine, num_steps, seed, **options)
