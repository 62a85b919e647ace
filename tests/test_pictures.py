"""Spectrograms are pictures that anything reads, with frequencies upwards."""

import struct
import zlib

import numpy as np

from msr_jax.train.pictures import HOP, WINDOW, png, spectrogram


def test_a_tone_is_one_white_line_at_its_height():
    bin_of_tone = 100
    audio = np.sin(2 * np.pi * bin_of_tone / WINDOW * np.arange(8 * WINDOW))
    pixels = spectrogram(audio)
    assert pixels.shape == (WINDOW // 2 + 1, 1 + 7 * WINDOW // HOP) and pixels.dtype == np.uint8
    assert (pixels.argmax(0) == WINDOW // 2 - bin_of_tone).all() and pixels.max() == 255 and np.median(pixels) == 0


def test_silence_and_a_sound_shorter_than_a_window_have_pictures_too():
    assert np.isfinite(spectrogram(np.zeros(10))).all()


def test_a_png_holds_its_pixels():
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    data = png(pixels)
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    length = struct.unpack(">I", data[33:37])[0]
    rows = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8).reshape(2, 4)
    np.testing.assert_array_equal(rows[:, 1:], pixels)
