"""Streams of audio cut into segments that overlap, and segments cross-faded into a stream again."""

import math
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, tee
from typing import Any, TypeVar

import numpy as np
import soxr

from msr_jax.separate.gather import waited_for

# (segments (chunks, samples, channels), index of the first) -> estimates (chunks, stems, samples, channels)
ChunkFunction = Callable[[np.ndarray, int], np.ndarray]
Item = TypeVar("Item")


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


def run_groups(
    chunks: Iterator[tuple[int, int, np.ndarray]], run: ChunkFunction, group: int
) -> Iterator[list[tuple[int, int, int, np.ndarray]]]:
    """Run chunks through the model, `group` at a time.

    Yields:
      For each group its chunks: start and length, up to where the stream is known then, the estimate (stems, samples, channels).
    """
    count, following = 0, next(chunks, None)
    while following is not None:
        batch = [following, *(chunk for _, chunk in zip(range(group - 1), chunks, strict=False))]
        estimates = run(np.stack([chunk for _, _, chunk in batch]), count)
        count += len(batch)
        following = next(chunks, None)
        end = batch[-1][0] + batch[-1][1]
        # What lies before the chunk that follows is final: it can be heard while that one is still being computed.
        finals = [start for start, _, _ in [*batch[1:], following or (end, 0, None)]]
        yield [(*chunk[:2], final, one) for chunk, final, one in zip(batch, finals, estimates, strict=True)]


def overlap_add(
    groups: Iterable[list[tuple[int, int, int, np.ndarray]]], segment: int, overlap: int
) -> Iterator[np.ndarray]:
    """Cross-fade what `run_groups` gives, estimates (stems, samples, channels) float32; `segment` and `overlap` in samples, the
    overlap at most half of a segment.

    Yields:
      Blocks (stems, samples, channels) that together are as long as the stream was.
    """
    fade = cross_fade(segment, overlap)[:, None]
    tail: Any = None  # of the chunk before, from where this one begins: not final yet
    tail_weight = fade[:0]
    for start, length, final, estimate in chain.from_iterable(groups):
        # Weights are 1 but at the edges, and most of a chunk is its middle.
        total, weight = np.array(estimate[:, :length]), fade[:length].copy()
        rising, falling = min(overlap, length), max(min(overlap, length), segment - overlap)
        total[:, :rising] *= fade[:rising]
        total[:, falling:] *= fade[falling:length]
        if met := len(tail_weight):
            total[:, :met] += tail
            weight[:met] += tail_weight
        # Copies: a block that waits must not hold the rest of its chunk.
        block, tail = np.split(total, [final - start], 1)
        block, tail = block.copy(), tail.copy()
        weight, tail_weight = np.split(weight, [final - start])
        uneven = max(rising, met)
        for part in (slice(uneven), slice(max(uneven, falling), None)):
            block[:, part] /= weight[part]
        yield block


def resampled(blocks: Iterable[np.ndarray], rate_in: int, rate_out: int, channels: int) -> Iterator[np.ndarray]:
    """Blocks (samples, channels) float32 at another rate in Hz, by soxr at high quality."""
    return (block[0] for block in resampled_stems((block[None] for block in blocks), rate_in, rate_out, 1, channels))


def resampled_stems(
    blocks: Iterable[np.ndarray], rate_in: int, rate_out: int, stems: int, channels: int
) -> Iterator[np.ndarray]:
    """Blocks (stems, samples, channels) float32 at another rate in Hz, as `resampled`; each stem by itself."""
    if rate_in == rate_out:
        yield from blocks
        return
    # Two channels at most go through a stream: soxr reads beyond what it has to give of one with hundreds.
    pairs = [slice(at, min(at + 2, channels)) for at in range(0, channels, 2)]
    places = [(stem, slice(None), pair) for stem in range(stems) for pair in pairs]
    make = lambda width: soxr.ResampleStream(rate_in, rate_out, width, dtype="float32", quality="HQ")
    streams = [make(pair.stop - pair.start) for _, _, pair in places]
    last = np.zeros((stems, 0, channels), np.float32)
    for block, is_last in chain(((block, False) for block in blocks), [(last, True)]):
        with waited_for():
            parts = [
                stream.resample_chunk(np.ascontiguousarray(block[place]), last=is_last)
                for stream, place in zip(streams, places, strict=True)
            ]
        back = np.empty((stems, len(parts[0]), channels), np.float32)
        for place, part in zip(places, parts, strict=True):
            back[place] = part.reshape(back[place].shape)
        yield back


@cache
def resampling_delay(rate_in: float, rate_out: float) -> float:
    """Seconds that `resampled` is behind at most, whatever the blocks: what it shows in a second of small ones."""
    if rate_in == rate_out:
        return 0.0
    stream, step, back, most = soxr.ResampleStream(rate_in, rate_out, 1, dtype="float32", quality="HQ"), 32, 0, 0.0
    for taken in range(step, math.ceil(rate_in), step):  # rates may be fractions
        back += len(stream.resample_chunk(np.zeros((step, 1), np.float32)))
        most = max(most, taken / rate_in - back / rate_out)
    return most + step / rate_in


def shared(items: Iterable[Item], count: int) -> list[Iterator[Item]]:
    """The same items for several readers, each in a thread of its own or all in one; what one has not read yet is kept."""
    if count == 1:
        return [iter(items)]
    lock = threading.Lock()

    def read(own: Iterator[Item]) -> Iterator[Item]:
        while True:
            with lock:
                item = next(own, None)
            if item is None:
                return
            yield item

    return [read(own) for own in tee(items, count)]


def abreast(streams: Sequence[Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """Blocks (stems, samples, channels) of streams that are as long as each other -> (streams, stems, samples, channels).

    The one that is farthest behind is always asked next: no more is held than one of its blocks lasts.
    """
    held: list[Any] = [None] * len(streams)
    length = lambda k: 0 if held[k] is None else held[k].shape[1]
    while True:
        last = min(range(len(streams)), key=length)
        block = next(streams[last], None)
        if block is None:
            return
        held[last] = block if held[last] is None else np.concatenate([held[last], block], 1)
        if ready := min(map(length, range(len(streams)))):
            yield np.stack([part[:, :ready] for part in held])
            held = [part[:, ready:] for part in held]


def ahead(items: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """The same items, made in a thread of their own from now on, at most `depth` of them before they are asked for.

    What the thread raises comes out here. Whoever stops early closes the iterator; the thread then ends after the item that
    it is at, and nobody waits for it (the program's end does for a call of the networks, see `gather.waited_for`).
    """
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    is_over = threading.Event()

    def put(is_item: bool, value: Any) -> bool:
        while not is_over.is_set():
            try:
                made.put((is_item, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        iterator = iter(items)
        try:
            if not all(put(True, item) for item in iterator):
                return
            put(False, None)
        except BaseException as error:
            put(False, error)
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    def taken() -> Generator[Any, None, None]:
        try:
            yield None  # what has not begun cannot be closed
            while True:
                is_item, value = made.get()
                if is_item:
                    yield value
                elif value is None:
                    return
                else:
                    raise value
        finally:
            is_over.set()

    items_taken = taken()
    next(items_taken)
    threading.Thread(target=work, daemon=True).start()
    return items_taken
