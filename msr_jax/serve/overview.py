"""What the page draws of a track: the range of the waveform and a coarse spectrum, column by column."""

import numpy as np

COLUMN = 2048  # samples of a song that one column shows
BANDS = 48  # of the spectrum, spaced evenly in log frequency
LOWEST = 40.0  # Hz, where the first band begins
FLOOR = -90.0  # dB that are drawn as 0; 0 dB is a sine of full scale, drawn as 255
COLUMN_BYTES = 2 + BANDS


class Overview:
    """Turns a stream of blocks into columns of `COLUMN_BYTES` bytes: lowest and highest sample (int8), then levels (uint8)."""

    def __init__(self, sample_rate: int):
        self.rest = np.zeros(0, np.float32)
        self.window = np.hanning(COLUMN).astype(np.float32)
        edges = np.geomspace(LOWEST, sample_rate / 2, BANDS + 1) / sample_rate * COLUMN
        bins = np.minimum(edges.round().astype(int), COLUMN // 2 - 1)
        self.first = bins[:-1]
        self.last = np.maximum(bins[1:], self.first + 1)  # bands narrower than a bin share one

    def add(self, block: np.ndarray, ends: bool = False) -> bytes:
        """Columns that a block (samples, channels) completes; with `ends`, what is left becomes the last one."""
        mono = np.concatenate([self.rest, block.mean(1, dtype=np.float32)])
        if ends and len(mono) % COLUMN:
            mono = np.pad(mono, (0, -len(mono) % COLUMN))
        whole = len(mono) // COLUMN * COLUMN
        self.rest = mono[whole:]
        frames = mono[:whole].reshape(-1, COLUMN)
        out = np.zeros((len(frames), COLUMN_BYTES), np.uint8)
        if len(frames):
            ends_of = np.stack([frames.min(1), frames.max(1)], 1)
            out[:, :2] = (np.clip(ends_of, -1, 1) * 127).round().astype(np.int8).view(np.uint8)
            power = np.square(np.abs(np.fft.rfft(frames * self.window)) / (self.window.sum() / 2))
            sums = np.concatenate([np.zeros((len(power), 1)), np.cumsum(power, 1)], 1)
            levels = 10 * np.log10(np.maximum(sums[:, self.last] - sums[:, self.first], 1e-12))
            out[:, 2:] = np.clip(255 * (1 - levels / FLOOR), 0, 255).astype(np.uint8)
        return out.tobytes()
