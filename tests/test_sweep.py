"""A sweep gives what separation gives, for every setting, from one pass of the deterministic network."""

import copy
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from msr_jax.cli import main
from msr_jax.data.tracks import find_tracks
from msr_jax.evaluate import sweep as sweep_module
from msr_jax.evaluate.protocols import PROTOCOLS
from msr_jax.evaluate.sweep import Setting, make_cached, sigmas_of, sweep
from msr_jax.methods import stages
from msr_jax.separate.engine import Separator
from msr_jax.weights.model_folder import load_model
from tests.conftest import TINY_RATE


@pytest.fixture(scope="module")
def model(toy_model):
    return load_model(toy_model)


@pytest.mark.parametrize(("refine", "resamples", "churn"), [("consistency", None, None), ("diffusion", 2, 1.0)])
def test_sampling_from_the_cache_is_what_separation_does(model, monkeypatch, refine, resamples, churn):
    # The two number their noise differently; a fixed pattern in place of it makes them comparable.
    fixed = lambda keys, shape: lambda index: jnp.broadcast_to(jnp.cos(jnp.arange(shape[1]))[:, None], shape)
    for module in (stages, sweep_module):
        monkeypatch.setattr(module, "noise_from_keys", fixed)
    config = copy.deepcopy(model.config)
    config[refine]["sampler"] |= {"sigma_max": 0.3, "num_resamples": resamples, "s_churn": churn}
    mixture = 0.1 * np.random.default_rng(0).standard_normal((2048, 1)).astype(np.float32)
    mixture -= mixture.mean()  # which separation does outside of the network
    prepare, sample = make_cached(config, refine)
    sigmas = sigmas_of(config, refine, Setting(2, 0.3, resamples, churn, 0))
    refined = sample(model.weights, prepare(model.weights, mixture), sigmas, 0, resamples, churn)
    separated = Separator(model._replace(config=config), refine, 2).separate(mixture[:, 0], config["sample_rate"])
    np.testing.assert_allclose(np.asarray(refined)[..., 0], np.stack(list(separated.values())), atol=1e-5)


def test_the_deterministic_network_runs_once_per_segment(model, short_corpus, monkeypatch):
    prepared = []
    real = sweep_module.make_cached

    def counting(config, refine):
        prepare, sample = real(config, refine)
        return lambda *a: prepared.append(1) or prepare(*a), sample

    monkeypatch.setattr(sweep_module, "make_cached", counting)
    monkeypatch.setitem(model.config, "segment", 16_384)
    tracks = find_tracks(short_corpus / "test", model.config["stems"])[:1]
    settings = [Setting(t, s, 1, 0.0, k) for t in (1, 2) for s in (0.005, 0.01) for k in (0, 1)]
    rows, skipped = sweep(model, "diffusion", settings, tracks)
    assert skipped == []
    assert len(prepared) == 5 * TINY_RATE // 16_384
    assert len(rows) == 9 and rows[0]["setting"] is None
    scores = [row["si_sdri_msdm"] for row in rows]
    assert np.isfinite(scores).all() and len(set(scores)) == 9


def test_the_command_writes_all_combinations(toy_model, short_corpus, tmp_path, capsys):
    argv = [
        "sweep",
        "--data",
        short_corpus,
        "--model",
        toy_model,
        "--refine",
        "consistency",
        "--out",
        tmp_path / "out",
    ]
    assert main([*map(str, argv), "--steps", "1,2", "--sigma-max", "0.01,0.02", "--tracks", "1"]) == 0
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [r["setting"] and (r["setting"]["steps"], r["setting"]["sigma_max"]) for r in told["rows"]] == [
        None, (1, 0.01), (1, 0.02), (2, 0.01), (2, 0.02),
    ]  # fmt: skip
    assert told["data"].endswith("validation") and "**best**" in (tmp_path / "out" / "sweep.md").read_text()
    assert "**best**" in capsys.readouterr().out


def test_tracks_shorter_than_a_segment_are_named_and_not_counted(toy_model, short_corpus, tmp_path, capsys):
    shutil.copytree(short_corpus / "validation" / "Track00000", tmp_path / "data" / "long")
    for path in (tmp_path / "data" / "long").iterdir():
        (tmp_path / "data" / "short").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "data" / "short" / path.name, np.full(100, 0.1), TINY_RATE)
    argv = ("--data", tmp_path / "data", "--model", toy_model, "--refine", "consistency", "--out", tmp_path / "out")
    assert main(["sweep", *map(str, argv)]) == 0
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (told["tracks"], told["skipped"]) == (1, ["short"])
    # "msdm" is another cut: the released evaluation's segments, and not the model's.
    assert told["protocol"] not in PROTOCOLS and told["segment"] == load_model(toy_model).config["segment"]
    for text in (capsys.readouterr().out, (tmp_path / "out" / "sweep.md").read_text()):
        assert "on 1 tracks" in text and "shorter than a segment: short" in text and told["protocol"] in text


def test_bad_input_gets_one_sentence(toy_model, corpus, tmp_path, capsys):
    for options, words in (
        (("--refine", "consistency", "--s-churn", "1"), "settings of --refine diffusion"),
        (("--refine", "diffusion", "--steps", "two"), "--steps must be numbers"),
        (("--refine", "consistency", "--seeds=1,-1"), "--seeds must be 0 or more"),
        (("--refine", "diffusion", "--sigma-max", "0"), "--sigma-max must be positive"),
        (("--refine", "diffusion", "--sigma-max", "1e-9", "--steps", "2"), "1e-09 is too low for T = 2"),
    ):
        argv = ("--data", corpus, "--model", toy_model, *options, "--out", tmp_path / "out")
        assert main(["sweep", *map(str, argv)]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1 and not (tmp_path / "out").exists()
