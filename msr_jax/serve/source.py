"""An upload, and its samples, which can be had while it is still being decoded."""

import threading
from pathlib import Path

import numpy as np

from msr_jax.errors import UserError
from msr_jax.serve.decode import Decoded, Limits, decode


class Source:
    """An upload, decoded once, when it is first needed; jobs with other settings share it. Safe from several threads."""

    def __init__(self, upload: Path, name: str):
        """`name` is for people alone."""
        self.upload, self.name = upload, name
        self.path = upload.with_name("song.f32")
        self.audio: Decoded | None = None  # once its length is known
        self._ready = 0  # frames that are decoded
        self._error: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._change = threading.Condition()

    def open(self, limits: Limits) -> Decoded:
        """The song, as soon as its length is known; UserError where it cannot be had."""
        with self._change:
            if self._thread is None:
                self._thread = threading.Thread(target=self._decode, args=(limits,), daemon=True)
                self._thread.start()
            self._change.wait_for(lambda: self.audio or self._error)
            if self.audio is None:
                raise UserError(str(self._error))
            return self.audio

    def read(self, start: int, frames: int) -> np.ndarray:
        """(frames, channels) float32 from `start` on, fewer at the song's end, when they are decoded; after `open`.

        Raises:
          UserError: the file is damaged there, or takes too long.
        """
        assert self.audio is not None
        end = min(start + frames, self.audio.frames)
        with self._change:
            self._change.wait_for(lambda: self._ready >= end or self._error)
            if self._ready < end:
                raise UserError(str(self._error))
        width = self.audio.channels
        with open(self.path, "rb") as file:
            return np.fromfile(file, np.float32, (end - start) * width, offset=4 * start * width).reshape(-1, width)

    def close(self) -> None:
        """Stop decoding; returns when nothing is written any more."""
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _decode(self, limits: Limits) -> None:
        error = None
        try:
            for audio, ready in decode(self.upload, self.path, limits, self._stop):
                with self._change:
                    self.audio, self._ready = audio, ready
                    self._change.notify_all()
        except UserError as problem:
            error = str(problem)
        except Exception as problem:  # no process, no room: whoever waits must hear of it
            error = f"the file could not be decoded ({type(problem).__name__})"
        with self._change:
            self._error = error
            self._change.notify_all()
