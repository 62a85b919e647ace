"""Standard output of a command whose results are files: who reads it may leave, and the work goes on."""

import io
import os
import sys

from msr_jax.errors import UserError


class _Output(io.FileIO):
    def write(self, data) -> int:  # type: ignore[override]
        try:
            return super().write(data) or 0
        except BrokenPipeError:  # `msr … | head`
            self._drop_the_rest()
        except OSError as error:  # a full disk
            self._drop_the_rest()
            raise UserError(f"cannot write to standard output: {error.strerror or error}") from error
        return len(data)

    def _drop_the_rest(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def outlive_readers() -> None:
    """Have `print` go on without its reader, and tell of a full disk in a sentence; does nothing where output is closed."""
    if sys.stdout is None:
        return
    buffer = io.BufferedWriter(_Output(sys.stdout.fileno(), "w", closefd=False))
    told = sys.stdout
    # As of the stream that it replaces: `python -u` has asked for lines at once.
    lines, through = (bool(getattr(told, name, False)) for name in ("line_buffering", "write_through"))
    sys.stdout = io.TextIOWrapper(buffer, told.encoding, told.errors, line_buffering=lines, write_through=through)
