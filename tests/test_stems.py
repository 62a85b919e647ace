"""Some of a model's stems alone: the same as with the others, from their own tensors."""

import jax
import numpy as np
import pytest

import msr_jax
from msr_jax.config import bsrf_base
from msr_jax.errors import UserError
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.model_folder import flatten, load_model, save_model

RATE = 8000


@pytest.fixture(scope="module")
def roformer(tmp_path_factory):
    """A model folder of a tiny BS-RoFormer with a refinement that draws noise, random weights."""
    config = bsrf_base()
    config.model.update({"dim": 8, "depth": 1, "heads": 2, "dim_head": 4, "stereo": False, "stft_adapter_hidden": 4})
    config.model.update({"stft_n_fft": 32, "stft_win_length": 32, "stft_hop_length": 16, "freqs_per_bands": (5, 12)})
    config.update({"segment": 512, "sample_rate": RATE, "channels": 1})
    backbone = make_backbone(config.model.to_dict())
    networks = {
        "deterministic": backbone.init(jax.random.key(0), False),
        "diffusion": backbone.init(jax.random.key(1), True),
    }
    folder = tmp_path_factory.mktemp("models") / "roformer"
    save_model(folder, config.to_dict(), jax.device_get(networks))
    return folder


@pytest.fixture(scope="module")
def song():
    return 0.1 * np.random.default_rng(0).standard_normal((900, 1)).astype(np.float32)


def test_a_stem_is_the_same_whichever_others_are_wanted(roformer, song):
    whole = msr_jax.load(roformer).separate(song, RATE)
    some = msr_jax.load(roformer, stems=["vocals", "bass"], residual="rest").separate(song, RATE)
    assert list(some) == ["bass", "vocals", "rest"]  # the model's order
    for stem in ("bass", "vocals"):
        np.testing.assert_allclose(some[stem], whole[stem], atol=1e-6)
    np.testing.assert_allclose(some["rest"] + some["bass"] + some["vocals"], song, atol=1e-6)


def test_only_the_wanted_heads_are_loaded(roformer):
    whole, some = load_model(roformer), load_model(roformer, ["other"])
    assert some.config["stems"] == ["other"] and some.config["model"]["num_stems"] == 1
    for network, params in some.weights.items():
        for path, value in flatten(params).items():
            every = flatten(whole.weights[network])[path]
            is_of_stems = path.startswith(("mask_estimators", "conditioning/stem"))
            np.testing.assert_array_equal(value, every[2:3] if is_of_stems else every, err_msg=path)


def test_a_network_without_heads_runs_for_the_wanted_stems(tiny_model, song):
    song = np.tile(song, (3, 1))
    whole = msr_jax.load(tiny_model, "none").separate(song, RATE)
    some = msr_jax.load(tiny_model, "none", stems=["piano"]).separate(song, RATE)
    assert list(some) == ["piano"]
    np.testing.assert_allclose(some["piano"], whole["piano"], atol=1e-5)


def test_stems_that_are_none_are_refused(roformer):
    for stems, words in (
        (["Vocals"], "has no stem 'Vocals'; its stems are drums, bass, other, vocals"),
        (["bass", "bass"], "named twice"),
        ([], r"^no stem is named; name some of the model's, drums, bass, other, vocals, or leave stems out for all$"),
    ):
        with pytest.raises(UserError, match=words):
            load_model(roformer, stems)
    with pytest.raises(UserError, match="leave mixture_consistent or stems out"):
        msr_jax.load(roformer, stems=["bass"], mixture_consistent=True)
