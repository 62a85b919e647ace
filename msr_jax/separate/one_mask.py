"""Stems of all channels of a song from one run of a mono model: about half the time for stereo, and worse the wider it is.

The network separates the channels' mean. What a channel is beside that mean is shared out among the stems by how loud each is
in the separated mean, bin by bin of a spectrum (a mask); a song whose channels are equal comes out as from the network.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from msr_jax.audio.stft import istft, stft

Array = jax.Array
WINDOW = 2048  # samples; at the rates of these models a tone's partials are apart in it, and a beat's are not smeared


def with_one_mask(function: Callable[..., Array]) -> Callable[..., Array]:
    """What runs a mono network on mixtures of any channels, as one program.

    Args:
      function: (weights, mixture (batch, time, 1), place, seed) -> stems (batch, stems, time, 1).

    Returns:
      (weights, mixture (batch, time, channels), place, seed) -> stems (batch, stems, time, channels).
    """

    def run(weights, mixture: Array, place: Array, seed: Array) -> Array:
        mean = mixture.mean(-1, keepdims=True)
        stems = function(weights, mean, place, seed)
        return stems if mixture.shape[-1] == 1 else stems + share_out(mixture - mean, stems[..., 0])

    return run


def share_out(rest: Array, stems: Array) -> Array:
    """rest (batch, time, channels) by the magnitudes of stems (batch, stems, time): (batch, stems, time, channels).

    rest sums to zero over the channels, and so does every stem's share; over the stems the shares sum to rest.
    """
    samples = rest.shape[1]
    size = min(WINDOW, 2 ** (samples.bit_length() - 1))
    sizes = (size, size // 2, size)
    loud = jnp.linalg.norm(stft(stems, *sizes), axis=-1, keepdims=True) + 1e-9  # silence is shared out evenly
    masks = loud / loud.sum(1, keepdims=True)  # (batch, stems, frames, bins, 1)
    spectrum = stft(rest[..., 1:].swapaxes(1, 2), *sizes)  # (batch, channels - 1, frames, bins, 2)
    shares = istft(masks[:, :, None] * spectrum[:, None], *sizes, samples)
    return jnp.concatenate([-shares.sum(2, keepdims=True), shares], 2).swapaxes(2, 3)
