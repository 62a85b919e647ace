"""Separation with a stereo model, and chunked as the public training code does; the numbers themselves are fixtures."""

import jax
import numpy as np
import pytest

import msr_jax
from msr_jax.cli import main
from msr_jax.configs import bsrf_det_small
from msr_jax.errors import UserError
from msr_jax.models.backbone import make_backbone
from msr_jax.separate.demix import Demix, demix
from msr_jax.separate.engine import channel_groups
from msr_jax.weights.model_folder import save_model
from tests.test_backbones import TINY_BSRF, random_weights

RATE, SEGMENT = 44_100, 600


@pytest.fixture(scope="module")
def stereo_model(tmp_path_factory):
    """A model folder of a BS-RoFormer with random weights."""
    config = bsrf_det_small.get_config()
    config.model.update(TINY_BSRF)
    config.segment = SEGMENT
    folder = tmp_path_factory.mktemp("models") / "stereo"
    save_model(folder, config.to_dict(), jax.device_get(random_weights(make_backbone(config.model.to_dict()))))
    return folder


def song(samples, channels):
    return 0.1 * np.random.default_rng(0).standard_normal((samples, channels)).astype(np.float32)


def test_a_stereo_model_takes_pairs_and_gives_the_song_s_channels_back(stereo_model):
    assert channel_groups(1, 2).tolist() == [[0, 0]] and channel_groups(3, 2).tolist() == [[0, 1], [2, 2]]
    assert channel_groups(2, 1).tolist() == [[0], [1]]
    separator = msr_jax.load(stereo_model)
    assert separator.refine == "consistency"
    audio = song(1500, 3)
    stems, pair = separator.separate(audio, RATE), separator.separate(audio[:, :2], RATE)
    mono = separator.separate(audio[:, 2], RATE)
    for stem in separator.stems:
        assert stems[stem].shape == audio.shape and mono[stem].shape == (1500,)
        np.testing.assert_allclose(stems[stem][:, :2], pair[stem], atol=1e-5)
    doubled = msr_jax.load(stereo_model, refine="none")
    twice = doubled.separate(audio[:, [2, 2]], RATE)["bass"].mean(1)
    np.testing.assert_allclose(doubled.separate(audio[:, 2], RATE)["bass"], twice, atol=1e-6)


def test_reference_chunking_gives_every_length_whole_and_repeats(stereo_model):
    separator = msr_jax.load(stereo_model, reference=Demix(bigshifts=2, tta=True))
    for samples in (1, SEGMENT, 1500):
        once, again = (separator.separate(song(samples, 2), RATE) for _ in range(2))
        for stem in separator.stems:
            assert once[stem].shape == (samples, 2)
            np.testing.assert_array_equal(once[stem], again[stem])


def test_a_gain_comes_through_any_chunking():
    mix = song(2345, 2)
    halve = lambda chunks, _: np.stack([0.5 * chunks, 2 * chunks], axis=1)
    for settings in (Demix(2, 2), Demix(4, 1), Demix(3, 5, bigshifts=3, tta=True)):
        stems = demix(halve, mix, 1000, settings)
        np.testing.assert_allclose(stems, np.stack([0.5 * mix, 2 * mix]), atol=1e-6)


def test_every_chunk_has_a_number_of_its_own():
    seen = []

    def note(chunks, first):
        seen.extend(range(first, first + len(chunks)))
        return chunks[:, None]

    demix(note, song(2345, 2), 1000, Demix(2, 2, bigshifts=2, tta=True))
    assert seen == list(range(len(seen))) and len(seen) > 20


def test_the_last_chunk_is_filled_up_by_reflection_only_from_more_than_half_of_it_on():
    seen = []
    note = lambda chunks, _: seen.extend(chunks) or chunks[:, None]
    for rest in (500, 501):
        mix = song(1000 + rest, 2)
        demix(note, mix, 1000, Demix(1, 1))
        reflected = mix[-2 : -2 - (1000 - rest) : -1]
        np.testing.assert_array_equal(seen[-1][rest:], reflected if rest > 500 else np.zeros_like(reflected))


def test_settings_that_mean_nothing_are_refused(stereo_model, tmp_path, capsys):
    with pytest.raises(UserError, match="num_overlap must be at least 1"):
        msr_jax.load(stereo_model, reference=Demix(num_overlap=0))
    with pytest.raises(UserError, match="num_overlap must be at most"):
        msr_jax.load(stereo_model, reference=Demix(num_overlap=1_000_000))
    import soundfile

    soundfile.write(tmp_path / "a.wav", song(700, 2), RATE)
    command = ["separate", str(tmp_path / "a.wav"), "-o", str(tmp_path / "out"), "--model", str(stereo_model)]
    assert main([*command, "--tta"]) == 2 and "go with --demix" in capsys.readouterr().err
    assert main([*command, "--demix", "--overlap", "0.3"]) == 2
    assert "--demix has --num-overlap" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--demix", "--refine", "none"]) == 0
    assert soundfile.info(tmp_path / "out" / "a" / "vocals.wav").frames == 700
