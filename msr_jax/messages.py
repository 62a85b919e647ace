"""What the package says beside a command's output: a log that is silent in a library's use and that `msr` prints."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger("msr_jax")


@contextmanager
def saying(text: str, after: float = 1.0) -> Iterator[None]:
    """Log `text` if what is inside takes longer than so many seconds."""
    timer = threading.Timer(after, log.info, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _ToErrorOutput(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # The error output of this moment: a progress bar has its own.
        with suppress(OSError, ValueError):
            print(self.format(record), file=sys.stderr, flush=True)


def print_log() -> None:
    """Have what the package logs printed on the error output."""
    if not log.handlers:
        log.addHandler(_ToErrorOutput())
        log.setLevel(logging.INFO)
        log.propagate = False
