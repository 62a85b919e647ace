"""Short-time Fourier transform and its inverse by the conventions of `torch.stft(center=True)`, in float32.

Spectra are real arrays with a last axis (real, imaginary): complex numbers are poorly served on some accelerators. Frames are
cut and put together by shifts of whole hops, which differentiate into the same; a gather would turn into a scatter.
"""

import jax
import jax.numpy as jnp
import numpy as np

from msr_jax.audio.fft import irfft, rfft

Array = jax.Array


def periodic_hann(length: int, n_fft: int) -> np.ndarray:
    """Periodic Hann window of `length` samples, centred in n_fft by zeros: (n_fft,) float32."""
    window = np.zeros(n_fft, np.float32)
    margin = (n_fft - length) // 2
    window[margin : margin + length] = np.hanning(length + 1)[:-1]
    return window


def cut_frames(x: Array, length: int, hop: int, count: int) -> Array:
    """Frames [k·hop, k·hop + length) of x (…, time), zeros past its end: (…, count, length)."""
    per_frame = -(-length // hop)  # a frame is so many blocks of one hop, the last of them cut
    wanted = (count + per_frame - 1) * hop
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(0, wanted - x.shape[-1]))])[..., :wanted]
    blocks = x.reshape(*x.shape[:-1], count + per_frame - 1, hop)
    shifted = [blocks[..., j : j + count, :] for j in range(per_frame)]
    return jnp.concatenate(shifted, axis=-1)[..., :length]


def overlap_add(frames: Array, hop: int) -> Array:
    """Sum of frames (…, count, length), the k-th put at sample k·hop: (…, at least (count - 1)·hop + length)."""
    *leading, count, length = frames.shape
    per_frame = -(-length // hop)
    frames = jnp.pad(frames, [(0, 0)] * (len(leading) + 1) + [(0, per_frame * hop - length)])
    blocks = frames.reshape(*leading, count, per_frame, hop)
    pad = lambda j: [(0, 0)] * len(leading) + [(j, per_frame - 1 - j), (0, 0)]
    summed = sum(jnp.pad(blocks[..., j, :], pad(j)) for j in range(per_frame))
    return jnp.reshape(summed, (*leading, -1))


def stft(x: Array, n_fft: int, hop: int, window_length: int, normalized: bool = False) -> Array:
    """STFT of x (…, time), time > n_fft/2: (…, frames, n_fft/2 + 1, 2), frames = 1 + time // hop.

    Frames are centred by reflection; the window is periodic Hann.
    """
    x = jnp.asarray(x, jnp.float32)
    count = 1 + x.shape[-1] // hop
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(n_fft // 2, n_fft // 2)], mode="reflect")
    spectrum = rfft(cut_frames(x, n_fft, hop, count) * periodic_hann(window_length, n_fft))
    return spectrum * n_fft**-0.5 if normalized else spectrum


def istft(spectrum: Array, n_fft: int, hop: int, window_length: int, samples: int, normalized: bool = False) -> Array:
    """Inverse of `stft` by overlap-add of windowed frames, divided by the sum of squared windows: (…, samples); 0 where no window
    reaches, as at the end where frames are farther apart than half a window.

    The imaginary parts of the first and the last bin are ignored.
    """
    spectrum = spectrum * n_fft**0.5 if normalized else spectrum
    window = periodic_hann(window_length, n_fft)
    count = spectrum.shape[-3]
    envelope = np.zeros((count - 1) * hop + n_fft)
    for k in range(count):
        envelope[k * hop : k * hop + n_fft] += np.square(window, dtype=np.float64)
    kept = slice(n_fft // 2, n_fft // 2 + samples)
    envelope = envelope[kept]
    envelope = np.where(envelope > 1e-11, envelope, np.inf).astype(np.float32)  # x / inf is 0, and so is its gradient
    x = overlap_add(irfft(spectrum, n_fft) * window, hop)[..., kept][..., : len(envelope)] / envelope
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, samples - len(envelope))])
