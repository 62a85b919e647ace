"""All channels of a song from one run of a mono model."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

import msr_jax
from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.separate.engine import Separator
from msr_jax.separate.one_mask import share_out
from msr_jax.weights.model_folder import load_model
from tests.conftest import TINY_RATE, TINY_SEGMENT


def noise(*shape, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def separators(tiny_model):
    return [msr_jax.load(tiny_model, "none", one_mask=one) for one in (False, True)]


def test_equal_channels_come_out_as_from_the_network(separators):
    each, one = separators
    x = np.repeat(noise(3 * TINY_SEGMENT, 1), 2, axis=1)
    expected, found = each.separate(x, TINY_RATE), one.separate(x, TINY_RATE)
    for stem in each.stems:
        np.testing.assert_allclose(found[stem], expected[stem], atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_chunk_is_one_run_for_any_channels(separators, channels):
    _, one = separators
    x = noise(2 * TINY_SEGMENT, channels)
    stems = one.separate(x, TINY_RATE)
    assert all(audio.shape == x.shape for audio in stems.values())
    mean = one.separate(x.mean(1, keepdims=True), TINY_RATE)
    for stem in one.stems:  # what a channel has beside the mean cancels in the mean of the channels
        np.testing.assert_allclose(stems[stem].mean(1, keepdims=True), mean[stem], atol=1e-6)


def test_what_a_channel_has_beside_the_mean_goes_to_the_loud_stem():
    rest, samples = noise(1, 8192, 3), np.arange(8192)
    rest -= rest.mean(-1, keepdims=True)
    low, high = np.sin(0.05 * samples), np.sin(1.5 * samples)
    stems = np.stack([low, high])[None].astype(np.float32)
    shared = np.asarray(share_out(rest, stems))
    np.testing.assert_allclose(shared.sum(1), rest, atol=1e-6)
    tone = np.stack([high, -high], 1)[None].astype(np.float32)
    to_low, to_high = np.square(np.asarray(share_out(tone, stems))[0]).sum((1, 2))
    assert to_high > 1000 * to_low


def test_a_stereo_model_has_it_already(tiny_model):
    model = load_model(tiny_model)
    with pytest.raises(UserError, match="both channels of a song in one run; leave one_mask out"):
        Separator(model._replace(config={**model.config, "channels": 2}), "none", one_mask=True)


def test_the_command_takes_it_and_the_manifest_tells(tiny_model, tmp_path):
    song = tmp_path / "song.wav"
    soundfile.write(song, noise(2 * TINY_SEGMENT, 2), TINY_RATE)
    out = ["-o", str(tmp_path / "out"), "--manifest", str(tmp_path / "rows.jsonl")]
    assert main(["separate", str(song), "--model", str(tiny_model), "--refine", "none", "--one-mask", *out]) == 0
    (row,) = map(json.loads, Path(tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["settings"]["one_mask"] is True
    assert len(list((tmp_path / "out" / "song").iterdir())) == 4
