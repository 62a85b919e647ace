"""Spectrograms for TensorBoard, without an imaging library."""

import struct
import zlib

import numpy as np

WINDOW, HOP, FLOOR_DB = 1024, 512, -80.0


def spectrogram(audio: np.ndarray) -> np.ndarray:
    """Grey picture (frequencies, frames) uint8 of audio (samples,): white is the loudest bin, black 80 dB below; low at the bottom."""
    audio = np.pad(audio.astype(np.float64), (0, max(0, WINDOW - len(audio))))
    frames = np.lib.stride_tricks.sliding_window_view(audio, WINDOW)[::HOP] * np.hanning(WINDOW + 1)[:-1]
    power = np.abs(np.fft.rfft(frames)) ** 2
    decibels = 10 * np.log10(np.maximum(power, 1e-20) / max(power.max(), 1e-20))
    return np.round(255 * np.clip(1 - decibels.T[::-1] / FLOOR_DB, 0, 1)).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """A grey picture (height, width) uint8 as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # each row says that it is not filtered
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
