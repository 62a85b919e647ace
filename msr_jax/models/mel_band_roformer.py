"""Mel-Band RoFormer: its bands are those of a mel filterbank, which overlap, so that almost every bin is in two of them.

Every second band tiles the spectrum: bands are cut from it twice, and a bin's masks are averaged by one sum without a scatter.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msr_jax.errors import UserError
from msr_jax.models.interface import Backbone
from msr_jax.models.mask_roformer import MaskRoformer, as_backbone, read_network

Array = jax.Array
LINEAR_UP_TO = 1000.0  # Hz, of Slaney's mel scale, which is logarithmic above
MEL_PER_HZ = 3 / 200
MEL_PER_LOG = 27 / np.log(6.4)


def _mel(hertz: float) -> float:
    knee = LINEAR_UP_TO * MEL_PER_HZ
    return hertz * MEL_PER_HZ if hertz < LINEAR_UP_TO else knee + MEL_PER_LOG * np.log(hertz / LINEAR_UP_TO)


def _hertz(mel: np.ndarray) -> np.ndarray:
    knee = LINEAR_UP_TO * MEL_PER_HZ
    return np.where(mel < knee, mel / MEL_PER_HZ, LINEAR_UP_TO * np.exp((mel - knee) / MEL_PER_LOG))


@lru_cache
def mel_bands(sample_rate: int, n_fft: int, num_bands: int) -> tuple[tuple[int, int], ...]:
    """The bands as (lowest bin, bins), low to high; each begins where the last but one ends.

    A band holds the bins on which its triangle of a mel filterbank (Slaney's scale, edges spaced evenly from 0 to half of
    `sample_rate` Hz) is above zero; the first band also holds bin 0, and the last one the highest bin.

    Raises:
      UserError: the sizes are no whole numbers above zero; a band holds no bin, or a bin lies just on the edge of a band.
    """
    if not all(isinstance(size, int) and size > 0 for size in (sample_rate, n_fft, num_bands)):
        raise UserError("sample_rate, stft_n_fft and num_bands must be whole numbers above zero")
    edges = _hertz(np.linspace(0, _mel(sample_rate / 2), num_bands + 2))
    hertz = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    first = np.searchsorted(hertz, edges[:-2], side="right")
    end = np.searchsorted(hertz, edges[2:], side="left")
    first[0], end[-1] = 0, len(hertz)
    told = f"{num_bands} bands on an stft_n_fft of {n_fft} at {sample_rate} Hz"
    empty = np.flatnonzero(end <= first)
    if len(empty):
        raise UserError(f"{told}: band {empty[0]} holds no bin; take fewer bands (num_bands) or a larger stft_n_fft")
    if (first[2:] != end[:-2]).any() or (num_bands > 1 and end[-2] < first[-1]):
        raise UserError(
            f"{told}: a bin lies just on the edge of a band, and every second band does not begin where another ends, as it must here;"
            " take another num_bands"
        )
    return tuple(zip(first.tolist(), (end - first).tolist(), strict=True))


class MelBandRoformer(MaskRoformer):
    """See `MaskRoformer`. Its mask heads have one linear layer more than `mask_estimator_depth`.

    `num_bands`, `stft_n_fft` and `sample_rate` (Hz) make the bands. `match_input_audio_length` says how many samples the
    published program answers with, see `published_length`; here stems are as long as the mixture either way.
    """

    num_bands: int = 60
    sample_rate: int = 44_100
    match_input_audio_length: bool = False
    mask_estimator_depth: int = 1
    attn_dropout: float = 0.1
    ff_dropout: float = 0.1

    has_output_norms: ClassVar[bool] = True

    @property
    def bands(self) -> tuple[tuple[int, int], ...]:
        """(lowest bin, bins) of each band."""
        return mel_bands(self.sample_rate, self.stft_n_fft, self.num_bands)

    @property
    def band_widths(self) -> tuple[int, ...]:
        return tuple(width for _, width in self.bands)

    @property
    def mask_linears(self) -> int:
        return self.mask_estimator_depth + 1

    def published_length(self, samples: int) -> int:
        """How many samples of stems the published program gives for so many of mixture: whole hops, or all of them."""
        return samples if self.match_input_audio_length else samples - samples % self.stft_hop_length

    def _to_bands(self, bins: Array) -> Array:
        step = 2 * self.channels
        parts: list[Any] = [None] * self.num_bands
        for parity in range(min(2, self.num_bands)):
            own = self.bands[parity::2]
            run = bins[:, step * own[0][0] : step * sum(own[-1])]
            parts[parity::2] = lax.split(run, [step * width for _, width in own], axis=1)
        return jnp.concatenate(parts, axis=1)

    def _to_bins(self, bands: Array) -> Array:
        step, count = 2 * self.channels, self.stft_n_fft // 2 + 1
        parts = lax.split(bands, [step * width for width in self.band_widths], axis=bands.ndim - 1)
        total: Any = 0.0
        holders = np.zeros(count, np.float32)
        for parity in range(min(2, self.num_bands)):
            own = self.bands[parity::2]
            start, end = own[0][0], sum(own[-1])
            around = [(0, 0)] * (bands.ndim - 1) + [(step * start, step * (count - end))]
            total = total + jnp.pad(jnp.concatenate(parts[parity::2], axis=-1), around)
            holders[start:end] += 1
        return total * jnp.asarray(np.repeat(1 / holders, step))


def make_mel_band_roformer(sizes: Mapping[str, Any], dtype: jnp.dtype) -> Backbone:
    """The Mel-Band RoFormer as a backbone; UserError for sizes that are unknown, or give no bands."""
    net = read_network(MelBandRoformer, sizes, dtype)
    mel_bands(net.sample_rate, net.stft_n_fft, net.num_bands)
    return as_backbone(net)
