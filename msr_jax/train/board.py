"""TensorBoard event files, written where they are asked for: what was flushed is on the disk, whatever kills the process.

tensorboardX's own `SummaryWriter` hands events to a thread, and its `flush` does not wait for that: a run that was killed
lacked validation scores from up to seconds before. Its file format and summaries are used here without the thread.
"""

import os
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class Board:
    """An event file of a run that goes on after `start_step`; later steps of older files in the folder count no more."""

    def __init__(self, folder: Path, start_step: int):
        """Raises OSError if the file cannot be made."""
        folder.mkdir(parents=True, exist_ok=True)
        # The name holds the second of its making; runs that are started within one must not share it.
        self.writer = EventsWriter(str(folder / "events"), f".{start_step}.{os.getpid()}")
        self.is_behind = False
        self._write(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.writer.write_event(event)
        self.is_behind = True

    def scalar(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=summary.scalar(name, value)))

    def audio(self, name: str, audio: np.ndarray, step: int, sample_rate: int) -> None:
        """A sound (samples,) between -1 and 1."""
        self._write(Event(step=step, summary=summary.audio(name, audio[:, None], sample_rate)))

    def image(self, name: str, png: bytes, shape: tuple[int, ...], step: int) -> None:
        """A picture of `shape` (height, width, channels)."""
        image = Summary.Image(height=shape[0], width=shape[1], colorspace=1, encoded_image_string=png)
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def flush(self) -> None:
        """Everything onto the disk. Raises OSError, as on a full one."""
        if self.is_behind:
            self.writer.flush()
            self.is_behind = False

    def close(self) -> None:
        self.writer.close()
