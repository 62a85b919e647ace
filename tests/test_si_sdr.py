"""SI-SDR and its windows; the song-level extras."""

import numpy as np
import pytest

from msr_jax.metrics.extras import log_wmse, snr
from msr_jax.metrics.si_sdr import is_silent, score_windows, si_sdr, windows

RATE = 8000


def orthogonal(decibels, seed=0):
    """(reference, noise at so many dB below it), orthogonal to each other."""
    s, n = np.random.default_rng(seed).standard_normal((2, 5 * RATE))
    n -= (n @ s) / (s @ s) * s
    return s, n * np.linalg.norm(s) / np.linalg.norm(n) * 10 ** (-decibels / 20)


def test_si_sdr_ignores_scale_and_knows_orthogonal_noise():
    s, n = orthogonal(20)
    assert si_sdr(3 * (s + n), s) == pytest.approx(20, abs=1e-6)
    assert si_sdr(s, s) > 80


def test_windows_are_four_seconds_every_two_and_the_last_is_cut():
    assert [(w.start, w.stop) for w in windows(262_144, 22_050)][-1] == (4 * 2 * 22_050, 262_144)
    assert len(windows(262_144, 22_050)) == 5
    assert len(windows(2 * 22_050, 22_050)) == 0


def test_windows_with_fewer_than_two_active_stems_are_left_out():
    references = np.zeros((4, 1, 10 * RATE))
    references[0] = np.random.default_rng(0).standard_normal((1, 10 * RATE))
    assert len(score_windows(references, references, RATE).start) == 0
    references[1, :, 5 * RATE :] = references[0, :, 5 * RATE :]
    assert (score_windows(references, references, RATE).start >= 2 * RATE).all()


def test_scores_from_products_of_hops_are_those_of_whole_windows():
    rng = np.random.default_rng(0)
    references = rng.standard_normal((3, 2, int(9.3 * RATE))) + 0.1
    references[2] *= 1e-6
    estimates = references + 0.1 * rng.standard_normal(references.shape)
    scores = score_windows(estimates, references, RATE)
    for k, window in enumerate(windows(references.shape[-1], RATE)):
        e, r = estimates[..., window], references[..., window]
        mixture = np.broadcast_to(r.sum(0), r.shape)
        np.testing.assert_allclose(scores.si_sdri[k], (si_sdr(e, r) - si_sdr(mixture, r)).mean(-1), atol=1e-6)
        centred = [x - x.mean(-1, keepdims=True) for x in (e, r)]
        np.testing.assert_allclose(scores.si_snr[k], si_sdr(*centred).mean(-1), atol=1e-6)
        plain = 10 * np.log10((np.square(r).sum(-1) + 1e-5) / (np.square(r - e).sum(-1) + 1e-5))
        np.testing.assert_allclose(scores.sdr[k], plain.mean(-1), atol=1e-6)
        rms = 20 * np.log10(np.sqrt(np.square(e).mean((1, 2))) + 1e-10)
        np.testing.assert_allclose(scores.output_rms[k], rms, atol=1e-6)
        assert (scores.silent[k] == is_silent(r)).all()
    assert scores.silent.tolist() == [[False, False, True]] * 4


def test_snr_and_log_wmse_fall_with_noise_and_take_a_silent_reference():
    s, n = orthogonal(20)
    references = np.stack([s, 0 * s])[:, None]
    near, far = references + 0.1 * n, references + n
    assert snr(references + n, references)[0] == pytest.approx(20, abs=1e-3)
    better, worse = (log_wmse(x, references, RATE) for x in (near, far))
    assert (better > worse + 10).all() and np.isfinite(better).all()
    assert log_wmse(references, references, RATE) == pytest.approx(-4 * np.log(1e-8))
