"""Jobs: uploads that wait, are decoded and separated one after another, and are cleared away when their time is over.

A job's files lie in a folder of its own under names of ours: `song.f32` and `K.f32` hold float32 samples with the channels
interleaved, at the song's rate, and `*.view` what the page draws. Nothing of what a visitor sent becomes part of a path.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from msr_jax.errors import UserError
from msr_jax.serve.decode import Limits, get_ready
from msr_jax.serve.models import Models
from msr_jax.serve.overview import Overview
from msr_jax.serve.source import Source

BLOCK_SECONDS = 3
ENDED = ("done", "failed")
PATIENCE = (
    1.0  # seconds that a server that ends gives its work; a chunk of the network may take longer, and nobody hears it
)
OWN = "msr-serve-"  # how the folders of servers begin; --folder may hold others as well


class Full(Exception):
    """The queue holds as many jobs as it may."""


@dataclass
class Job:
    """`state` is queued, decoding, separating, done or failed; `frames` of each stem are on the disk already."""

    id: str
    folder: Path
    source: Source
    model: str
    refine: str
    steps: int | None
    stems: list[str]
    state: str = "queued"
    error: str | None = None
    frames: int = 0
    ended: float | None = None
    cancelled: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the files that downloads make

    def samples(self, track: str) -> Path:
        """The file of a stem's samples, or of the song's by the name "song"."""
        return self.source.path if track == "song" else self._place(track, "f32")

    def view(self, track: str) -> Path:
        """The file of the columns that show a stem, or the song."""
        return self.folder / "song.view" if track == "song" else self._place(track, "view")

    def _place(self, track: str, suffix: str) -> Path:
        return self.folder / f"{self.stems.index(track)}.{suffix}"

    def read(self, track: str, start: int, frames: int) -> np.ndarray:
        """(≤ frames, channels) float32 of a track from `start` on, as far as it is there."""
        audio = self.source.audio
        assert audio is not None
        frames = max(0, min(frames, self.frames - start))
        width = 4 * audio.channels
        with open(self.samples(track), "rb") as file:
            file.seek(start * width)
            return np.frombuffer(file.read(frames * width), np.float32).reshape(-1, audio.channels)

    def report(self, ahead: int | None) -> dict[str, Any]:
        """What the API says of it; `ahead`: jobs that come before it."""
        audio = self.source.audio
        return {
            "id": self.id,
            "name": self.source.name,
            "model": self.model,
            "refine": self.refine,
            "steps": self.steps,
            "state": self.state,
            "error": self.error,
            "ahead": ahead,
            "stems": self.stems,
            "sample_rate": audio.sample_rate if audio else None,
            "channels": audio.channels if audio else None,
            "frames": audio.frames if audio else None,
            "frames_done": self.frames,
        }


def own_folder(parent: Path | None) -> tuple[Path, Any]:
    """A folder for this server's files, and the open lock that keeps it; those whose server is gone are removed.

    Raises:
      UserError: `parent` cannot be written, or belongs to somebody else.
    """
    parent = parent or Path(tempfile.gettempdir()) / f"msr-serve-{os.getuid()}"
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if parent.stat().st_uid != os.getuid():
            raise UserError(f"{parent} belongs to somebody else; name another folder with --folder")
        for old in parent.glob(f"{OWN}*"):
            # What holds no lock is no server's; opened so, it is not made here, and can be locked on NFS.
            with contextlib.suppress(OSError), open(old / "lock", "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=OWN, dir=parent))
        lock = open(folder / "new", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The lock is never seen unlocked: another server would remove the folder.
        os.rename(folder / "new", folder / "lock")
    except OSError as error:
        raise UserError(f"{parent} cannot be written ({error.strerror}); name another folder with --folder") from error
    return folder, lock


class Desk:
    """Takes jobs, works through them in order, forgets them after `keep_hours`. Safe from several threads."""

    def __init__(
        self, models: Models, limits: Limits, workers: int, keep_hours: float, most: int, parent: Path | None = None
    ):
        self.models, self.limits, self.keep, self.most = models, limits, keep_hours * 3600, most
        self.folder, self._lock_file = own_folder(parent)
        get_ready()
        self.jobs: dict[str, Job] = {}
        self.counts = dict.fromkeys(("taken", "done", "failed", "refused"), 0)
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        self._threads.append(threading.Thread(target=self._forget, daemon=True))
        for thread in self._threads:
            thread.start()

    def take(self, source: Source | Path, name: str, model: str, refine: str, steps: int | None) -> Job:
        """Queue a song: an uploaded file (moved into the job's folder), or the source of an earlier job.

        Raises:
          Full: too many wait. UserError: no such model, or it cannot refine so.
        """
        stems = self.models.stems(model, refine, steps)
        identity = secrets.token_urlsafe(16)
        with self._change:
            self.check_room()
            folder = self.folder / secrets.token_hex(16)
            folder.mkdir()
            if isinstance(source, Path):
                source = Source(Path(shutil.move(source, folder / "upload")), name)
            job = Job(identity, folder, source, model, refine, steps, stems)
            self.jobs[identity] = job
            self._waiting.append(job)
            self.counts["taken"] += 1
            self._change.notify_all()
        return job

    def check_room(self) -> None:
        """Raises Full: too many jobs wait."""
        with self._change:
            if self._closed or len(self._waiting) >= self.most:
                self.counts["refused"] += 1
                raise Full(f"{len(self._waiting)} songs wait already; try again later")

    def get(self, identity: str) -> Job | None:
        return self.jobs.get(identity)

    def ahead(self, job: Job) -> int | None:
        """Jobs that are taken before this one; None once it is being worked on."""
        with self._change:
            return self._waiting.index(job) if job in self._waiting else None

    def remove(self, job: Job) -> None:
        """Forget a job and its files; one that runs stops at its next block."""
        with self._change:
            self.jobs.pop(job.id, None)
            job.cancelled = True
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)
        self._clear(job)

    def _clear(self, job: Job) -> None:
        source = job.source
        with self._change:
            used = any(other.source is source for other in self.jobs.values())
        if not used:
            source.close()
            shutil.rmtree(source.upload.parent, ignore_errors=True)
        if not used or job.folder != source.upload.parent:
            shutil.rmtree(job.folder, ignore_errors=True)
            return
        with contextlib.suppress(FileNotFoundError):  # the other job is removed just now
            for path in job.folder.iterdir():
                if path not in (source.upload, source.path):
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop, and remove every file."""
        with self._change:
            self._closed = True
            for job in self.jobs.values():
                job.cancelled = True
            self._waiting.clear()
            self._change.notify_all()
        for job in list(self.jobs.values()):
            job.source.close()
        end = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0, end - time.monotonic()))
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_file.close()

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                job = self._waiting.popleft()
            try:
                self._separate(job)
                self._end(job, "done")
            except UserError as error:
                self._end(job, "failed", str(error))
            except OSError as error:
                self._end(job, "failed", f"the server cannot keep the stems: {error.strerror or 'its disk fails'}")
            except Exception as error:  # one song's fault must not stop the others'
                self._end(job, "failed", f"the separation failed ({type(error).__name__})")
                if not job.cancelled:
                    print(f"msr serve: a job failed: {type(error).__name__}: {error}", flush=True)
            if job.cancelled:
                self._clear(job)

    def _end(self, job: Job, state: str, error: str | None = None) -> None:
        job.error, job.ended, job.state = error, time.time(), state
        if not job.cancelled:
            self.counts[state] += 1
        if state == "failed":  # half of its stems serve nobody
            for path in (*map(job.samples, job.stems), *map(job.view, ("song", *job.stems))):
                path.unlink(missing_ok=True)

    def _separate(self, job: Job) -> None:
        job.state = "decoding"
        audio = job.source.open(self.limits)
        separator = self.models.separator(job.model, job.refine, job.steps)
        job.state = "separating"
        with contextlib.ExitStack() as stack:
            files = {t: stack.enter_context(open(job.samples(t), "wb")) for t in job.stems}
            views = {t: stack.enter_context(open(job.view(t), "wb")) for t in ("song", *job.stems)}
            overviews = {t: Overview(audio.sample_rate) for t in views}
            blocks = self._blocks(job, audio.frames, BLOCK_SECONDS * audio.sample_rate)
            for part in separator.stream(blocks, audio.sample_rate, audio.channels, audio.frames):
                frames = len(next(iter(part.values())))
                own = job.source.read(job.frames, frames)
                ends = job.frames + frames >= audio.frames
                if not all(np.isfinite([s.max(initial=0), s.min(initial=0)]).all() for s in part.values()):
                    raise UserError("stems would hold NaN or infinite samples; is the song far louder than full scale?")
                for track, samples in part.items():
                    files[track].write(np.ascontiguousarray(samples, np.float32).tobytes())
                    files[track].flush()
                for track, samples in {"song": own, **part}.items():
                    views[track].write(overviews[track].add(samples, ends))
                    views[track].flush()
                job.frames += frames

    def _blocks(self, job: Job, frames: int, size: int) -> Iterator[np.ndarray]:
        for start in range(0, frames, size):
            if job.cancelled:
                raise UserError("the job was cancelled")
            yield job.source.read(start, size)

    def _forget(self) -> None:
        with self._change:
            while not self._closed:
                self._change.wait(min(30.0, max(self.keep / 4, 0.1)))
                now = time.time()
                old = [job for job in self.jobs.values() if job.ended and now - job.ended > self.keep]
                for job in old:
                    self.remove(job)
