"""BS-RoFormer: its bands cut the spectrum into pieces whose widths the config names, so a mask's bins are its bands'."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from msr_jax.errors import UserError
from msr_jax.models.interface import Backbone
from msr_jax.models.mask_roformer import MaskRoformer, as_backbone, read_network

BANDS = (2,) * 24 + (4,) * 12 + (12,) * 8 + (24,) * 8 + (48,) * 8 + (128, 129)  # in bins; the published default


class BSRoformer(MaskRoformer):
    """See `MaskRoformer`. Its mask heads have `mask_estimator_depth` linear layers, and one norm follows on all layers."""

    freqs_per_bands: Sequence[int] = BANDS

    @property
    def band_widths(self) -> tuple[int, ...]:
        return tuple(self.freqs_per_bands)

    @property
    def mask_linears(self) -> int:
        return self.mask_estimator_depth

    def _to_bands(self, bins: jax.Array) -> jax.Array:
        return bins

    def _to_bins(self, bands: jax.Array) -> jax.Array:
        return bands


def make_bs_roformer(sizes: Mapping[str, Any], dtype: jnp.dtype) -> Backbone:
    """The BS-RoFormer as a backbone; UserError for sizes that are unknown or contradict each other."""
    net = read_network(BSRoformer, sizes, dtype)
    bins = net.stft_n_fft // 2 + 1
    if sum(net.band_widths) != bins:
        raise UserError(f"freqs_per_bands add up to {sum(net.band_widths)} bins, and stft_n_fft gives {bins}")
    return as_backbone(net)
