"""Separation of songs of any length, rate and channel count with a model that takes fixed segments at one rate.

The song flows through in blocks: resampling, chunks that overlap, the network, overlap-add, resampling back. Memory
holds a few segments, however long the song is. Reading, the network and what follows it work in threads of their own.
"""

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msr_jax.errors import UserError
from msr_jax.messages import log
from msr_jax.methods.samplers import SOLVERS
from msr_jax.methods.stages import REFINEMENTS, make_refiner, network_of
from msr_jax.models.backbone import BACKBONES, cast_params, compute_dtype, make_backbone
from msr_jax.separate.chunks import (
    abreast,
    ahead,
    cut_chunks,
    overlap_add,
    resampled,
    resampled_stems,
    resampling_delay,
    run_groups,
    shared,
)
from msr_jax.separate.demix import Demix, demix
from msr_jax.separate.interface import AudioSeparator, check_consistent, check_residual, is_number, is_whole
from msr_jax.separate.mixture import OFFSET_REACH, SHARE_SECONDS, Original, as_the_song, without_offset
from msr_jax.separate.network import ABREAST, Network
from msr_jax.separate.one_mask import with_one_mask
from msr_jax.weights.model_folder import (
    ALL_STEMS,
    BUNDLED,
    DEFAULT_OVERLAP,
    DEFAULT_REFINE,
    DEFAULT_SEGMENTS,
    Model,
    choose_stems,
    load_model,
)
from msr_jax.weights.registry import find_named

OVERLAP = 0.5  # of a segment: every sample twice, less at a segment's edges, where a network knows least
JOINT_SECONDS = 0.005  # of cross-fade where no overlap is asked for: a hard joint clicks
SHIFT_SECONDS = 0.5  # that a song is moved by at most to average over shifts, or what a chunk advances by
CHUNKS = 2**24  # more than a song has: each shift's chunks have numbers, and so noise, of their own


def channel_groups(channels: int, at_once: int) -> np.ndarray:
    """Channels of a song that go through a model together: (groups, at_once) indices; the last channel fills up the last."""
    groups = -(-channels // at_once)
    return np.minimum(np.arange(groups * at_once), channels - 1).reshape(groups, at_once)


class Separator(AudioSeparator):
    """A loaded model, ready to separate. Made by `msr_jax.load`; any number of threads may use it at once."""

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
        shifts: int = 1,
        memory: int | None = None,
        one_mask: bool = False,
    ):
        """`overlap`: of neighbouring chunks, as a fraction. `segments`: chunks are so many segments of training's length, as many as
        a short song needs. None takes what the model's folder names, else half and 1.

        `batch_size`: examples per network call and device (stems × mixtures); it changes speed and memory, not the result. Below
        the number of stems, they are refined one by one. None takes one or two mixtures, on accelerators as many as fit.
        `memory`: bytes that a call may take on a device; None is half of what is free. A batch that takes more is halved.

        `dtype`: precision of the networks' products and activations; "bfloat16" is faster where the device
        has units for it, and right to about -40 dB.
        `reference`: cut and join as the public training code does instead, which holds the whole song in memory.
        `mixture_consistent`: what is missing is shared out among the stems, see `Shares`; for songs that hold nothing else.
        `residual`: name of one more stem: the song less all others.
        `stems`: which of the model's are wanted; None is all.
        `shifts`: the mean of so many runs, the first of the song as it is, the others of the song moved by up to half a second; by
        how much follows from the seed. So many times slower.
        `one_mask`: of a mono model, one run for all channels of a song, see the module of that name.
        """
        config = model.config
        chosen = None if stems is None else choose_stems(config, stems)
        self.refinements = [r for r in REFINEMENTS if network_of(config, r) in model.weights]
        refine = _refinement(model, self.refinements) if refine is None else refine
        if refine not in REFINEMENTS:
            raise UserError(f"refine must be one of {', '.join(REFINEMENTS)}, not '{refine}'")
        if refine not in self.refinements:
            have = ", ".join(model.weights)
            raise UserError(f"the model cannot refine by {refine}: its folder holds the networks {have}")
        overlap = config.get(DEFAULT_OVERLAP, OVERLAP) if overlap is None else overlap
        segments = config.get(DEFAULT_SEGMENTS, 1) if segments is None else segments
        _check_numbers(segments, overlap, seed, batch_size, memory, shifts)
        if reference:
            reference.check(config["segment"])
            if shifts > 1:
                raise UserError("the reference chunking has shifts of its own, by bigshifts; leave shifts out")
        if one_mask and config["channels"] > 1:
            raise UserError("the model takes both channels of a song in one run; leave one_mask out")
        self.one_mask = one_mask
        self.config, self.refine, self.num_steps, self.seed = config, refine, num_steps, seed
        self.reference, self.shifts = reference, shifts
        self.separated = [stem for stem in config["stems"] if stems is None or stem in stems]  # what the network gives
        check_residual(residual, config.get(ALL_STEMS, config["stems"]), mixture_consistent)
        if mixture_consistent:
            check_consistent(self.separated, config)
        self.mixture_consistent, self.residual = mixture_consistent, residual
        self.stems: list[str] = [*self.separated, *([residual] if residual else [])]
        self.segment, self.sample_rate = config["segment"], config["sample_rate"]
        self.overlap, self.segments = overlap, 1 if reference else segments
        backbone = make_backbone(config["model"], dtype, within=self.segment if self.segments > 1 else None)
        backbone.check_length(self.segment)
        needed = {"deterministic", network_of(config, refine)}
        weights = {k: cast_params(v, dtype, backbone.looped) for k, v in model.weights.items() if k in needed}
        refiner = lambda one_by_one: make_refiner(config, backbone, refine, num_steps, one_by_one, chosen)
        refiner(False)  # what is wrong with the number of steps shows here
        parts: list[Callable] = [BACKBONES[config["model"]["name"]]]
        if refine == "diffusion":
            parts.append(SOLVERS[config["diffusion"]["sampler"]["solver"]])
        is_own = all(part.__module__.startswith("msr_jax.") for part in parts)  # others' sources are not looked at
        settings = {"config": config, "refine": refine, "num_steps": num_steps, "stems": chosen, "one_mask": one_mask}
        masked = with_one_mask if one_mask else lambda function: function
        self.network = Network(
            lambda one_by_one: masked(batch_function(refiner(one_by_one))),
            weights,
            len(self.separated),
            batch_size,
            memory,
            {**settings, "dtype": str(compute_dtype(dtype))} if is_own else None,
            f"the network for {len(self.separated)} stems (refinement: {refine})",
            mixtures=1 if backbone.stems_together else 2,  # those take their tokens a few at a time by themselves
        )

    @property
    def members(self) -> list["Separator"]:
        """Itself alone, as an ensemble has several."""
        return [self]

    def _channels_of_run(self, channels: int) -> int:
        """How many of a song's channels go through the network together."""
        return channels if self.one_mask else self.config["channels"]

    def _chunk(self, frames: float | None) -> tuple[int, int]:
        """Length and overlap in samples of the chunks for a song of so many; a few lengths, since each is compiled for."""
        segments = self.segments
        if frames is not None:
            segments = min(segments, 2 ** max(0, math.ceil(math.log2(max(1, frames) / self.segment))))
        chunk = segments * self.segment
        return chunk, max(int(self.overlap * chunk), min(int(JOINT_SECONDS * self.sample_rate), chunk // 2))

    def _run_chunks(self, chunks: np.ndarray, first: int) -> np.ndarray:
        """(chunks, samples, channels) -> (chunks, stems, samples, channels).

        Silence needs no network and stays what it is, but in the reference's chunking.
        """
        count, samples, channels = chunks.shape
        groups = channel_groups(channels, self._channels_of_run(channels))  # (groups, channels of a run)
        index = np.stack(np.unravel_index(np.arange(count * len(groups)), (count, len(groups))), -1)
        if not self.reference:
            index = index[[chunks[chunk][:, groups[group]].any() for chunk, group in index]]
        out = np.zeros((count, len(self.separated), samples, channels), np.float32)
        if not len(index):
            return out
        mixtures = np.stack([chunks[chunk][:, groups[group]] for chunk, group in index])
        places = index + np.array([first, 0])
        for (chunk, group), stems in zip(index, self.network(mixtures, places, self.seed), strict=True):
            if not np.isfinite([stems.max(), stems.min()]).all():  # neither passes over a NaN
                raise UserError(
                    "the model gives NaN or infinite samples; is the song far louder than ±1, or are the weights damaged?"
                )
            for own, channel in enumerate(groups[group]):  # a doubled channel gets the mean of its two results
                times = np.count_nonzero(groups[group] == channel)
                out[chunk, :, :, channel] += stems[..., own] if times == 1 else stems[..., own] / times
        return out

    def _flow(
        self,
        blocks: Iterable[np.ndarray],
        sample_rate: int,
        channels: int,
        frames: int | None = None,
        progress: Callable[[int], Any] | None = None,
        is_live: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        original, taken = Original(sample_rate, channels), 0
        if frames is None:
            blocks, known = self._looked_ahead(blocks, sample_rate)
        else:
            known = frames

        def kept() -> Iterator[np.ndarray]:
            nonlocal taken
            for block in blocks:
                original.add(block)
                taken += len(block)
                yield block

        at_model_rate = (b for b in resampled(kept(), sample_rate, self.sample_rate, channels) if len(b))
        length = None if known is None else known * self.sample_rate / sample_rate
        parts = self._separated(at_model_rate, channels, length, is_live)
        with closing(parts if is_live else ahead(parts, depth=2 * ABREAST)) as separated:
            back = resampled_stems(separated, self.sample_rate, sample_rate, len(self.separated), channels)
            stems = _of_length(back, lambda: taken if frames is None else frames, len(self.separated), channels)
            done = 0
            for block in as_the_song(stems, original, sample_rate, self.mixture_consistent, self.residual is not None):
                done += block.shape[1]
                yield dict(zip(self.stems, block, strict=True))
                if progress:
                    progress(done)

    def _looked_ahead(self, blocks: Iterable[np.ndarray], sample_rate: int) -> tuple[Iterator[np.ndarray], int | None]:
        """The same blocks, and their samples if these are so few that the length of a chunk depends on them."""
        held: list[np.ndarray] = []
        taken, rest = 0, iter(blocks)
        most = self.segment * 2 ** math.ceil(math.log2(self.segments)) / 2 * sample_rate / self.sample_rate
        while self.segments > 1 and taken <= most:
            block = next(rest, None)
            if block is None:
                return iter(held), taken
            held.append(block)
            taken += len(block)
        return chain(held, rest), None

    def _separated(
        self, blocks: Iterator[np.ndarray], channels: int, frames: float | None, is_live: bool
    ) -> Generator[np.ndarray, None, None]:
        """The network's stems (stems, samples, channels) of a stream at its rate."""
        if self.reference:
            if song := list(blocks):
                yield demix(self._run_chunks, np.concatenate(song), self.segment, self.reference)
            return
        moving = SHIFT_SECONDS * self.sample_rate if self.shifts > 1 else 0
        chunk, overlap = self._chunk(None if frames is None else frames + moving)
        of_run = self._channels_of_run(channels)
        runs_of_chunk = len(channel_groups(channels, of_run))
        group = 1 if is_live else max(1, self.network.mixtures_at_once(chunk, of_run) // runs_of_chunk)
        songs = shared(without_offset(blocks, self.sample_rate), self.shifts)
        with ExitStack() as stack:
            runs = []
            for k, (shift, one) in enumerate(zip(self._shifts(chunk - overlap), songs, strict=True)):
                moved = chain([np.zeros((shift, channels), np.float32)], one) if shift else one
                chunks = cut_chunks(moved, chunk, chunk - overlap)
                if not is_live:
                    chunks = stack.enter_context(closing(ahead(chunks, depth=2 * group)))
                run = partial(self._run_numbered, k * CHUNKS)
                groups = run_groups(chunks, run, group)
                if not is_live and self.shifts == 1:  # several runs keep the network busy by themselves
                    groups = stack.enter_context(closing(ahead(groups, depth=1)))
                runs.append(_without_first(overlap_add(groups, chunk, overlap), shift))
            yield from runs[0] if self.shifts == 1 else (parts.mean(0) for parts in abreast(runs))

    def _shifts(self, hop: int) -> list[int]:
        """Samples by which the song is moved in each run: none, then one in each of as many equal parts as there are runs."""
        farthest = min(int(SHIFT_SECONDS * self.sample_rate), hop)
        places = np.arange(self.shifts) + np.random.default_rng(self.seed).random(self.shifts)
        return [0, *(places[1:] * farthest / self.shifts).astype(int).tolist()]

    def _run_numbered(self, number: int, chunks: np.ndarray, first: int) -> np.ndarray:
        return self._run_chunks(chunks, number + first)

    def latency(self, sample_rate: int) -> int:
        if self.reference:
            raise UserError("the reference chunking needs the whole song; nothing comes before its end")
        chunk, overlap = self._chunk(None)
        reach = int(OFFSET_REACH * self.sample_rate) + 3
        there, back = (sample_rate, self.sample_rate), (self.sample_rate, sample_rate)
        delay = resampling_delay(*there) + resampling_delay(*back) + SHARE_SECONDS * self.mixture_consistent
        waiting = max(2 * chunk - overlap + reach, 2 * reach)  # a chunk is final when the next one is known
        return math.ceil(sample_rate * (waiting / self.sample_rate + delay))


def _refinement(model: Model, held: Sequence[str]) -> str:
    """The one that is taken where none is named: the folder's own, else the best that it has the networks of."""
    best = [refine for refine in ("consistency", "diffusion", "det_x2") if refine in held]
    return model.config.get(DEFAULT_REFINE, (best or ["none"])[0])


def _check_numbers(
    segments: int, overlap: float, seed: int, batch_size: int | None, memory: int | None, shifts: int
) -> None:
    """Raises UserError for the first of a separator's numbers that none can have."""
    if not is_whole(segments, 1):
        raise UserError(f"a chunk must be at least 1 segment, not {segments!r}")
    if not is_number(overlap) or not 0 <= overlap <= 0.5:
        raise UserError(f"overlap must lie between 0 and 0.5 of a segment, not {overlap!r}")
    if not is_whole(seed, 0, 2**32 - 1):
        raise UserError(f"the seed must lie between 0 and 2^32 - 1, not {seed!r}")
    for name, value in {"batch_size": batch_size, "memory": memory}.items():
        if value is not None and not is_whole(value, 1):
            raise UserError(f"{name} must be a whole number above 0, not {value!r}")
    if not is_whole(shifts, 1):
        raise UserError(f"there must be at least 1 shift, not {shifts!r}")


def _of_length(
    blocks: Iterator[np.ndarray], length: Callable[[], int], stems: int, channels: int
) -> Iterator[np.ndarray]:
    """Blocks (stems, samples, channels), cut or filled up with zeros to a length that is known when they have come."""
    done = 0
    for block in blocks:
        block = block[:, : length() - done]
        done += block.shape[1]
        if block.shape[1]:
            yield block
    if done < length():  # rounding of the two rates
        yield np.zeros((stems, length() - done, channels), np.float32)


def _without_first(blocks: Iterator[np.ndarray], samples: int) -> Iterator[np.ndarray]:
    """Blocks (stems, samples, channels) less their first so many samples."""
    for block in blocks:
        if samples < block.shape[1]:
            yield block[:, samples:]
        samples = max(0, samples - block.shape[1])


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
    **options: Any,
) -> Separator:
    """Load a model folder (or a training run's working directory) for separation.

    Args:
      folder: a folder, or a name that `msr models` lists, fetched at its first use; by default the small model that comes with the
        package, "bundled", whose README.md says what it can do.
      refine: one of `REFINEMENTS`; None takes what the folder names (`default_refine` in its config.json), else the best
        that it has, in the reverse order.
      num_steps: refinement steps T; None takes the model's own.
      seed: of the refinement's noise.
      stems: which of the model's are wanted, by name; None is all. What belongs to the others alone is not even read.
      options: as of `Separator`.

    Raises:
      UserError: the folder is no model folder, is damaged, or lacks the refinement; `num_steps` does not fit it.
    """
    if not isinstance(folder, str | os.PathLike):
        raise UserError(f"a model is named by its folder or by a name that `msr models` lists, not by {folder!r}")
    if isinstance(stems, str) or not isinstance(stems, Iterable | type(None)):
        raise UserError(f"stems is a list of names, such as ['{stems}'], not {stems!r}")
    stems = None if stems is None else list(stems)
    model = load_model(find_named(folder, log.info), stems, options.get("dtype", "float32"))
    return Separator(model, refine, num_steps, seed, stems=stems, **options)
