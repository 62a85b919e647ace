"""Measures of a whole song beside those of the paper."""

import numpy as np

SNR_EPSILON = 1e-7


def snr(estimates: np.ndarray, references: np.ndarray) -> np.ndarray:
    """SNR over all channels and samples, the "SDR" of the Sound Demixing Challenge 2023: 10 log10(‖s‖² / ‖s - ŝ‖²).

    Args:
      estimates, references: (stems, channels, samples).

    Returns:
      (stems,) dB; a stem with a silent reference has a value far below 0.
    """
    energy = lambda x: np.einsum("scn,scn->s", x, x, dtype=np.float64, casting="same_kind") + SNR_EPSILON
    return 10 * np.log10(energy(references) / energy(references - estimates))


def log_wmse(estimates: np.ndarray, references: np.ndarray, sample_rate: int) -> np.ndarray:
    """logWMSE (Jordal, package `log-wmse-audio-quality`): weighted by hearing, defined for silent references as well.

    Args:
      estimates, references: (stems, channels, samples); the mixture is the sum of the references.

    Returns:
      (stems,), higher is better, at most 73.7.
    """
    # Late, for it imports scipy.signal, which takes longer than all of ours.
    from log_wmse_audio_quality import calculate_log_wmse

    mixture = references.sum(0)
    return np.array(
        [float(calculate_log_wmse(mixture, e, r, sample_rate)) for e, r in zip(estimates, references, strict=True)]
    )
