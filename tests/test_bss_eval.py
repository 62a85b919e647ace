"""BSSEval in JAX gives museval's figures frame by frame, NaN and infinite ones among them, and can do without its rule for silence."""

import numpy as np
import pytest

from msr_jax.metrics.bss_eval import bss_eval
from msr_jax.metrics.museval_backend import museval_metrics
from msr_jax.metrics.silent_frames import silent_frame_scores

RATE = 800
TOLERANCE = 1e-6  # dB, of every frame


def noise(stems=2, channels=1, seconds=3.2, seed=0):
    return np.random.default_rng(seed).standard_normal((stems, channels, round(seconds * RATE)))


def estimates_of(references, seed=1):
    """Leakage, some colour, and noise 20 dB below each stem."""
    level = references.std((1, 2), keepdims=True)
    coloured = references + 0.3 * np.roll(references, 3, -1)
    return (
        coloured + 0.2 * references[::-1] + 0.1 * level * noise(*references.shape[:2], references.shape[2] / RATE, seed)
    )


def assert_as_museval(references, estimates):
    ours, theirs = (bss_eval(estimates, references, RATE, backend) for backend in ("jax", "museval"))
    for name, values in ours._asdict().items():
        np.testing.assert_allclose(values, getattr(theirs, name), rtol=0, atol=TOLERANCE, err_msg=name)
    return ours


@pytest.mark.parametrize("channels", [1, 2])
def test_random_signals_score_as_by_museval(channels):
    references = noise(channels=channels)
    scores = assert_as_museval(references, estimates_of(references))
    assert scores.sdr.shape == (2, 3) and np.isfinite(scores.sdr).all()


def test_correlated_stems_score_as_by_museval():
    references = noise()
    references[1] = 0.95 * references[0] + 0.05 * references[1]
    assert_as_museval(references, estimates_of(references))


def test_near_silent_stems_score_as_by_museval():
    references = noise()
    references[1] *= 1e-7
    assert_as_museval(references, estimates_of(references))


def test_two_references_alike_score_as_by_museval():
    references = noise(stems=3, seconds=2)
    references[1] = references[0]
    assert_as_museval(references, estimates_of(references) + 0.3 * noise(stems=3, seconds=2, seed=5))


@pytest.mark.parametrize("which", ["reference", "estimate"])
def test_a_frame_with_a_silent_stem_is_nan_for_all_as_in_museval(which):
    references = noise(channels=2)
    estimates = estimates_of(references)
    silenced = references if which == "reference" else estimates
    silenced[1, :, RATE : 2 * RATE] = 0
    scores = assert_as_museval(references, estimates)
    assert (np.isnan(scores.sdr) == [[False, True, False]] * 2).all()


def test_antiphase_channels_count_as_silence_as_in_museval():
    references = noise(channels=2)
    references[0, 1, :RATE] = -references[0, 0, :RATE]
    assert np.isnan(assert_as_museval(references, estimates_of(references)).sdr[:, 0]).all()


def test_antiphase_channels_are_no_silence_where_every_stem_has_frames_of_its_own():
    references = noise(channels=2)
    references[0, 1] = -references[0, 0]
    estimates = estimates_of(references)
    scores = bss_eval(estimates, references, RATE, joint_silence=False)
    assert all(np.isfinite(values).all() for values in scores)  # although its channels are alike but for the sign
    # Channels are independent of each other's sign: the same as with both in phase.
    for audio in (references, estimates):
        audio[0, 1] *= -1
    np.testing.assert_allclose(
        bss_eval(estimates, references, RATE, joint_silence=False).sdr[0], scores.sdr[0], atol=1e-6
    )


def band_limited(audio):
    """Float32 with nothing above three quarters of the band but its own rounding."""
    spectrum = np.fft.rfft(audio)
    spectrum[..., spectrum.shape[-1] * 3 // 4 :] = 0
    return np.fft.irfft(spectrum, audio.shape[-1]).astype(np.float32)


@pytest.mark.parametrize("backend", ["jax", "museval"])
def test_frames_whose_projection_is_singular_to_precision_have_no_sir_and_sar(backend):
    references = 0.1 * band_limited(noise())
    estimates = estimates_of(references).astype(np.float32)
    rounded = np.rint(references * 2**15) / 2**15
    expected, scores = (bss_eval(estimates, r, RATE, backend) for r in (rounded, references))
    assert all(np.isfinite(values).all() for values in expected)
    assert np.isnan(scores.sir).all() and np.isnan(scores.sar).all()
    np.testing.assert_allclose(scores.sdr, expected.sdr, atol=0.01)
    if backend == "jax":  # an estimate that is right needs no projection on what is not there
        assert (bss_eval(references, references, RATE).sir > 100).all()


def test_a_perfect_estimate_has_infinite_sdr_in_both():
    references = noise()
    for backend in ("jax", "museval"):
        assert np.isposinf(bss_eval(references, references, RATE, backend).sdr).all()


def test_a_signal_shorter_than_a_frame_is_one_frame():
    references = noise(seconds=0.95)
    assert assert_as_museval(references, estimates_of(references)).sdr.shape == (2, 1)


@pytest.mark.parametrize("backend", ["jax", "museval"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_stem_silent_throughout_is_refused(backend, which):
    pair = [noise(), noise(seed=2)]
    pair[which][1] = 0
    with pytest.raises(ValueError, match="silent"):
        bss_eval(*pair, RATE, backend)


def test_without_joint_silence_a_frame_is_lost_for_the_silent_stem_alone():
    references = noise(stems=3)
    estimates = estimates_of(references)
    whole = bss_eval(estimates, references, RATE)
    references[2] = 0
    estimates[1, :, :RATE] = 0
    scores = bss_eval(estimates, references, RATE, joint_silence=False)
    assert np.isnan(scores.sdr[2]).all()
    np.testing.assert_allclose(scores.sdr[0], whole.sdr[0], atol=1e-9)
    # An estimate that says nothing where there is something has an error as large as the stem.
    assert scores.sdr[1, 0] == pytest.approx(0, abs=1e-9) and np.isfinite(scores.sdr[:2]).all()


def test_a_batch_of_tracks_scores_as_one_by_one():
    references = np.stack([noise(seed=k) for k in range(2)])
    estimates = np.stack([estimates_of(r, seed=9) for r in references])
    batch = bss_eval(estimates, references, RATE)
    for k in range(2):
        for name, values in bss_eval(estimates[k], references[k], RATE)._asdict().items():
            np.testing.assert_allclose(getattr(batch, name)[k], values, atol=1e-9)


def test_the_caller_s_precision_is_left_alone():
    import jax.numpy as jnp

    bss_eval(estimates_of(noise()), noise(), RATE)
    assert jnp.zeros(1).dtype == jnp.float32


def test_museval_runs_without_ffmpeg_and_solves_singular_systems(monkeypatch):
    monkeypatch.setenv("PATH", "")
    museval_metrics.cache_clear()
    x = noise(stems=1, seconds=2)
    twins = np.concatenate([x, x])  # the same reference twice: no unique filters
    estimates = twins + 0.1 * noise(seconds=2, seed=1)
    np.testing.assert_allclose(bss_eval(estimates, twins, RATE, "museval").sdr, 20, atol=1)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_frame_is_silent_whose_norm_over_samples_and_channels_stays_below_the_threshold(channels):
    rate = 1000
    sound = np.random.default_rng(0).standard_normal((channels, rate))
    level = 1.5e-5 * np.sqrt(channels * rate)  # RMS of a frame at the threshold
    for times, frames in ((0.97, 1), (1.03, 0)):
        quiet = sound * times * level / np.sqrt(np.square(sound).mean())
        references = np.stack([quiet, sound[..., ::-1]])
        silent, heard = silent_frame_scores(references + 0.1 * sound, references, rate)
        assert len(silent[0]) == len(silent[1]) == frames and len(heard[0]) == 0
