"""Work that several threads ask for, gathered into calls: full where there is enough of it, and so many at a time."""

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Run = Callable[[list[Any]], Any]  # whose result has one entry an item
_inside, _threads = threading.Condition(), set[int]()  # that compile or compute
_is_ending = False


@contextmanager
def waited_for() -> Iterator[None]:
    """The end of the program waits for a thread that is inside.

    Python stops threads in its end, and one that it stops inside of XLA takes the process down with it. Where the end has
    begun, none but the main thread comes in: others stay here, as Python would have them stay somewhere.
    """
    me = threading.get_ident()
    with _inside:
        is_outermost = me not in _threads
        if _is_ending and is_outermost and threading.current_thread() is not threading.main_thread():
            _inside.wait_for(lambda: False)
        _threads.add(me)
    try:
        yield
    finally:
        with _inside:
            if is_outermost:
                _threads.discard(me)
            _inside.notify_all()


@atexit.register
def _wait_for_all() -> None:
    global _is_ending
    with _inside:
        _is_ending = True
        _inside.wait_for(lambda: not _threads)


def _forget_threads() -> None:
    """In a forked process, which has none of them."""
    global _inside
    _inside = threading.Condition()
    _threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@dataclass(eq=False)
class _Asked:
    """What one thread waits for."""

    key: Hashable
    run: Run
    results: list[Any]
    left: int
    error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        return self.left == 0 or self.error is not None


@dataclass
class Calls:
    """Items wait in one line. Whoever waits for some runs calls meanwhile, for others too."""

    _line: deque[tuple[_Asked, int, Any]] = field(default_factory=deque)
    _running: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, items: Sequence[Any], key: Hashable, run: Run, size: int, abreast: int) -> list[Any]:
        """run(items) for lists of at most `size` items, `abreast` of them at a time: the results in the items' order.

        Items of other threads share a call if they have the same key; `run` must then be the same too.

        Raises:
          what `run` raised in a call that one of the items was in; no further call begins for the others.
        """
        asked = _Asked(key, run, [None] * len(items), len(items))
        with self._changed:
            self._line.extend((asked, k, item) for k, item in enumerate(items))
            self._changed.notify_all()
        # Nobody waits for these threads where the program ends, beyond the call that each is at.
        for _ in range(min(abreast, -(-len(items) // size)) - 1):
            threading.Thread(target=self._work, args=(asked, size, abreast), daemon=True).start()
        self._work(asked, size, abreast)
        if asked.error is not None:
            raise asked.error
        return asked.results

    def _work(self, asked: _Asked, size: int, abreast: int) -> None:
        """Run calls until what was asked for is there."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: asked.is_over or (self._line and self._running < abreast))
                taken = [] if asked.is_over else self._take(size)
                if asked.is_over:
                    return
                self._running += bool(taken)
            if taken:
                self._call(taken)

    def _take(self, size: int) -> list[tuple[_Asked, int, Any]]:
        """Those in front that go together; what belongs to one that has failed is dropped."""
        taken: list[tuple[_Asked, int, Any]] = []
        while self._line and len(taken) < size:
            first = self._line[0][0]
            if first.is_over:
                self._line.popleft()
            elif taken and first.key != taken[0][0].key:
                break
            else:
                taken.append(self._line.popleft())
        return taken

    def _call(self, taken: list[tuple[_Asked, int, Any]]) -> None:
        error: BaseException | None = None
        results: Any = ()
        try:
            with waited_for():
                results = taken[0][0].run([item for _, _, item in taken])
        except BaseException as raised:
            error = raised
        with self._changed:
            self._running -= 1
            for k, (asked, place, _) in enumerate(taken):
                if error is None:
                    asked.results[place], asked.left = results[k], asked.left - 1
                else:
                    asked.error = error
            self._changed.notify_all()
