"""What a song knows better than a network: its offset is no music, its silence is silent, and its stems add up to it."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

# Of the running mean: what a recording adds to a song varies in seconds. Instruments have offsets too, which come and go with
# their notes and by which a network knows them: a mean over 0.1 s took 0.7 dB off the bass of a track with such a synthesizer.
OFFSET_SECONDS = 0.3
OFFSET_REACH = 1.5 * OFFSET_SECONDS  # seconds on either side that it takes
SILENCE_SECONDS = 0.1  # of exact zeros, that are silence and no quiet music
SHARE_SECONDS = 0.05  # in which a stem's share of what is missing follows its level
PIECE = 2**16  # samples summed up at a time: rounding grows with the sum


def without_offset(blocks: Iterable[np.ndarray], sample_rate: int) -> Iterator[np.ndarray]:
    """Blocks (samples, channels) float32 less what varies slower than about 1 Hz; as long together as they came.

    The mean runs three times over `OFFSET_SECONDS`: from 5 Hz on, 1 % of a tone changes at the most. What it is half its reach
    from the ends holds up to them; a song that is shorter than its reach, 0.9 seconds, loses the one mean that it has.
    """
    width = max(3, int(sample_rate * OFFSET_SECONDS) | 1)
    reach = 3 * (width // 2)  # samples on either side that a mean takes
    held: np.ndarray | None = None  # from `reach` before the next sample that is due, once there is a mean
    mean: np.ndarray | None = None
    for block in _pieces(blocks, PIECE):
        held = block if held is None else np.concatenate([held, block])
        if len(held) > 2 * reach:
            is_first, mean = mean is None, _running_mean(held, width)
            if is_first:
                yield held[:reach] - mean[0]
            yield held[reach:-reach] - mean
            held = held[-2 * reach :]
    if held is not None:
        yield held - held.mean(0) if mean is None else held[reach:] - mean[-1]


def _pieces(blocks: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    for block in blocks:
        yield from (block[at : at + length] for at in range(0, len(block), length))


def _running_mean(x: np.ndarray, width: int) -> np.ndarray:
    """(samples, channels) -> (samples - 3 (width - 1), channels) float32."""
    means = np.empty((len(x) - 3 * (width - 1), x.shape[1]), np.float32)
    for channel, mean in zip(x.T, means.T, strict=True):  # along memory, a sum is twice as fast
        for _ in range(3):
            total = np.cumsum(channel, dtype=np.float64)
            channel = total[width - 1 :].copy()
            channel[1:] -= total[:-width]
            channel /= width
        mean[:] = np.rint(channel * 2.0**40) / 2.0**40  # without what sums of silence leave of rounding
    return means


class Original:
    """A song as it came, kept until its stems come back. One thread may add while another takes."""

    def __init__(self, sample_rate: int, channels: int):
        self.least = max(1, int(SILENCE_SECONDS * sample_rate))
        self.added: deque[np.ndarray] = deque()
        self.held = np.zeros((0, channels), np.float32)
        self.zeros_before = 0  # samples of exact silence that end where `held` begins

    def add(self, block: np.ndarray) -> None:
        self.added.append(block)

    def take(self, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """The next samples (samples, channels), and where they are silent (samples,): exactly zero for `SILENCE_SECONDS`.

        Zeros follow the song's end.
        """
        blocks, held = [self.held], len(self.held)
        while self.added and held < samples + self.least:  # what is not due yet is not copied
            blocks.append(self.added.popleft())
            held += len(blocks[-1])
        self.held = np.concatenate(blocks) if len(blocks) > 1 else self.held
        if len(self.held) < samples:
            self.held = np.pad(self.held, ((0, samples - len(self.held)), (0, 0)))
        part, self.held = self.held[:samples], self.held[samples:]
        zero = np.concatenate([_is_zero(part), _is_zero(self.held[: self.least])])
        edges = np.flatnonzero(np.diff(np.concatenate([[False], zero, [False]]).astype(np.int8))).reshape(-1, 2)
        lengths = edges[:, 1] - edges[:, 0] + np.where(edges[:, 0] == 0, self.zeros_before, 0)
        silent = np.zeros(len(zero), bool)
        for start, end in edges[lengths >= self.least]:
            silent[start:end] = True
        sounding = np.flatnonzero(~zero[:samples])
        self.zeros_before = len(part) - 1 - sounding[-1] if len(sounding) else self.zeros_before + len(part)
        return part, silent[:samples]


def _is_zero(x: np.ndarray) -> np.ndarray:
    """Which samples of (samples, channels) are zero in all channels; channel by channel, as NumPy is slow along a short axis."""
    zero = x[:, 0] == 0
    for channel in range(1, x.shape[1]):
        zero &= x[:, channel] == 0
    return zero


class Shares:
    """Has stems add up to their mixture: what is missing is shared out in proportion to their power.

    Silent stems stay silent, if one sounds (Wisdom et al., "Differentiable consistency constraints for improved deep speech
    enhancement", 2019). Power is that of `SHARE_SECONDS`, and shares change gradually from one to the next.
    """

    def __init__(self, sample_rate: int):
        self.hop = max(1, int(SHARE_SECONDS * sample_rate))
        self.stems: np.ndarray | None = None  # what does not fill a hop yet
        self.mixture = np.zeros((0, 0), np.float32)
        self.shares: np.ndarray | None = None

    def add(self, stems: np.ndarray, mixture: np.ndarray, is_last: bool = False) -> np.ndarray:
        """Stems (stems, samples, channels) that add up, as many as are due; what is held back comes with a later call."""
        if self.stems is not None:
            stems = np.concatenate([self.stems, stems], 1)
            mixture = np.concatenate([self.mixture, mixture])
        whole = stems.shape[1] if is_last else stems.shape[1] // self.hop * self.hop
        done = np.empty_like(stems[:, :whole])
        for at in range(0, whole, self.hop):
            part = stems[:, at : at + self.hop]
            power = np.square(part, dtype=np.float64).mean((1, 2))
            new = power / power.sum() if power.sum() > 0 else np.full(len(power), 1 / len(power))
            old = new if self.shares is None else self.shares
            ramp = np.linspace(0, 1, part.shape[1], endpoint=False)
            shares = (old[:, None] + ramp * (new - old)[:, None]).astype(np.float32)
            missing = mixture[at : at + self.hop] - part.sum(0)
            done[:, at : at + self.hop] = part + shares[..., None] * missing
            self.shares = new
        self.stems, self.mixture = stems[:, whole:], mixture[whole:]
        return done


def as_the_song(
    blocks: Iterable[np.ndarray], original: Original, sample_rate: int, is_consistent: bool, has_residual: bool
) -> Iterator[np.ndarray]:
    """Stems (stems, samples, channels) at the song's rate, silent where it is.

    `is_consistent`: they add up to it, see `Shares`. `has_residual`: one more stem, the song less all others.
    """
    shares = Shares(sample_rate) if is_consistent else None
    for block in blocks:
        mixture, silent = original.take(block.shape[1])
        if silent.any():
            block[:, silent] = 0
        if has_residual:
            block = np.concatenate([block, (mixture - block.sum(0))[None]])
        yield shares.add(block, mixture) if shares else block
    if shares and shares.stems is not None:
        yield shares.add(shares.stems[:, :0], shares.mixture[:0], is_last=True)
