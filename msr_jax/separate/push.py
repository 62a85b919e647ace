"""Separation of what is pushed: blocks in as they come, stems out as soon as they are known."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from msr_jax.errors import UserError

Flow = Callable[[Iterable[np.ndarray]], Iterator[Mapping[str, np.ndarray]]]


class _Mark:
    """What goes between the two threads beside audio and errors."""


WAITING, ENDED = _Mark(), _Mark()  # all that came is separated; so is all that ever will
LAST, GIVEN_UP = _Mark(), _Mark()  # no more comes; and nobody asks for the rest


class _GivenUp(Exception):
    pass


class Pusher:
    """A stream of its own through a separator; made by its `pusher`. Also a context manager, which closes it.

    `latency`: in samples. After `push`, at least as many samples of every stem have come back as were pushed, less these.
    """

    def __init__(
        self,
        flow: Flow,
        stems: Sequence[str],
        channels: int,
        latency: int,
        check: Callable[[ArrayLike], np.ndarray],
    ):
        """`flow`: blocks (samples, channels) -> stems, in one thread: it asks for a block when it is done with all others."""
        self.stems, self.channels, self.latency = list(stems), channels, latency
        self._check, self._lock, self._is_open, self._is_flat = check, threading.Lock(), True, False
        given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._given, self._told = given, told
        threading.Thread(target=_work, args=(flow, given, told), daemon=True).start()
        self._results()
        weakref.finalize(self, given.put, GIVEN_UP)

    def push(self, block: ArrayLike) -> dict[str, np.ndarray]:
        """Give the next samples, (samples, channels) or, of one channel, (samples,); any number of them.

        Returns:
          {stem: float32, the block's number of axes}: what is known by now and has not come before; it may be empty.

        Raises:
          UserError: not audio, another number of channels, or closed.
        """
        with self._lock:
            checked = self._check(block)
            self._is_flat = np.ndim(block) == 1
            return self._after(checked.copy())  # the caller may fill the same array again

    def close(self) -> dict[str, np.ndarray]:
        """The rest of the stems: all that was pushed has then come back, to the sample. Raises UserError where closed before."""
        with self._lock:
            rest = self._after(LAST)
            self._is_open = False
            return rest

    def __enter__(self) -> "Pusher":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_open = False
            self._given.put(GIVEN_UP)

    def _after(self, given: Any) -> dict[str, np.ndarray]:
        if not self._is_open:
            raise UserError("this stream is closed; make another pusher for the next one")
        self._given.put(given)
        try:
            parts = self._results()
        except BaseException:
            self._is_open = False
            raise
        empty = np.zeros((0, self.channels), np.float32)
        stems = {stem: np.concatenate([empty, *(part[stem] for part in parts)]) for stem in self.stems}
        return {stem: audio[:, 0] for stem, audio in stems.items()} if self._is_flat else stems

    def _results(self) -> list[Mapping[str, np.ndarray]]:
        """What the other thread has made until it waits for more, or is done."""
        parts = []
        while not isinstance(told := self._told.get(), _Mark):
            if isinstance(told, BaseException):
                raise told
            parts.append(told)
        return parts


def _work(flow: Flow, given: queue.SimpleQueue[Any], told: queue.SimpleQueue[Any]) -> None:
    def blocks() -> Iterator[np.ndarray]:
        while True:
            told.put(WAITING)
            block = given.get()
            if block is GIVEN_UP:
                raise _GivenUp
            if block is LAST:
                return
            yield block

    try:
        for part in flow(blocks()):
            told.put(part)
        told.put(ENDED)
    except _GivenUp:
        pass
    except BaseException as error:
        told.put(error)
