"""What a finished job gives away: a stem or a mix of stems as a file, and all stems as a ZIP."""

import errno
import io
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from msr_jax.audio.io import CHANNELS, RATES, AudioWriter
from msr_jax.errors import UserError
from msr_jax.serve.jobs import Job

MEDIA = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg"}
BLOCK = 1 << 18  # samples that are encoded at a time
MIXES = 4  # of a job that are kept, whatever gains are asked for


def encoded(job: Job, gains: Mapping[str, float], suffix: str, name: str) -> Path:
    """The file of a sum of tracks, made once and kept in the job's folder.

    Args:
      gains: track ("song" is the song itself): factor.
      suffix: wav (32-bit float), flac (24 bits), mp3 (48 kHz and two channels at the most).
      name: of the file, one of ours.

    Raises:
      UserError: the format cannot hold this rate or so many channels, or the sum is not finite. OSError: there is no room, or the
        job has been deleted.
    """
    path = job.folder / f"{name}.{suffix}"
    with job.lock:
        if not path.exists():
            audio = job.source.audio
            assert audio is not None
            if suffix == "mp3" and (audio.channels > CHANNELS[".mp3"] or audio.sample_rate not in RATES[".mp3"]):
                raise UserError(f"mp3 holds no {audio.channels} channels at {audio.sample_rate} Hz; take wav or flac")
            if name.startswith("mix_"):
                for old in sorted(job.folder.glob("mix_*"), key=lambda p: p.stat().st_mtime)[: 1 - MIXES]:
                    old.unlink()
            try:
                with AudioWriter(path, audio.sample_rate, audio.channels, frames=audio.frames) as writer:
                    for block in _mixed(job, gains):
                        writer.write(block)
            except UserError as error:  # of a place that is the server's own affair
                if isinstance(error.__cause__, OSError):
                    raise error.__cause__ from None
                raise UserError(str(error).replace(str(path), f"the {suffix} file")) from error
    return path


def _mixed(job: Job, gains: Mapping[str, float]) -> Iterator[np.ndarray]:
    for start in range(0, job.frames, BLOCK):
        if job.cancelled:  # its folder may stay, for another job of the same song
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with np.errstate(over="ignore"):  # who writes it refuses what is not finite
            parts = [np.float32(gain) * job.read(track, start, BLOCK) for track, gain in gains.items()]
            mixed = np.add.reduce(parts, 0, dtype=np.float32)
        yield mixed


def piece(audio: np.ndarray, sample_rate: int) -> bytes:
    """(samples, channels) float32 as a WAV file of 32-bit float, in memory: what the player fetches."""
    samples, channels = audio.shape
    data = np.ascontiguousarray(audio, "<f4").tobytes()
    width = 4 * channels
    head = struct.pack("<HHIIHH", 3, channels, sample_rate, sample_rate * width, width, 32)
    chunks = b"fmt " + struct.pack("<I", 16) + head + b"fact" + struct.pack("<II", 4, samples)
    chunks += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


class _Sink(io.RawIOBase):
    """Collects what a ZIP writer writes, to be taken away piece by piece."""

    def __init__(self) -> None:
        self.held = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.held += data
        return len(data)

    def take(self) -> bytes:
        taken, self.held = bytes(self.held), bytearray()
        return taken


def zipped(job: Job, suffix: str) -> Iterator[bytes]:
    """A ZIP of all stems, piece by piece; nothing of it is held but the piece.

    Where the job is deleted on the way it ends there, without the directory that would make it whole.
    """
    sink, is_begun = _Sink(), False
    try:
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
            for k, stem in enumerate(job.stems):
                path = encoded(job, {stem: 1.0}, suffix, f"{k}")
                with open(path, "rb") as source, archive.open(f"{stem}.{suffix}", "w", force_zip64=True) as target:
                    while data := source.read(1 << 20):
                        target.write(data)
                        yield sink.take()
                        is_begun = True
        yield sink.take()
    except FileNotFoundError:
        if not is_begun:  # it can still be answered
            raise
