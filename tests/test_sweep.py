"""A sweep gives what separation gives, for every setting, from one pass of the deterministic network."""

import json

import numpy as np
import pytest

from msr_jax.cli import main
from msr_jax.data.tracks import find_tracks
from msr_jax.infer import sweep as sweep_module
from msr_jax.infer.sweep import Setting, make_cached, sigmas_of, sweep
from msr_jax.weights.model_folder import load_model


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


def test_sampling_from_the_cache_is_the_refiner(model, tiny_model):
    import msr_jax

    mixture = 0.1 * np.random.default_rng(0).standard_normal((2048, 1)).astype(np.float32)
    prepare, sample = make_cached(model.config, "consistency")
    cache = prepare(model.weights, mixture)
    # T = 1 at so low a level that noise does not matter.
    quiet = Setting(1, 2e-4, None, None, 0)
    refined = sample(model.weights, cache, sigmas_of(model.config, "consistency", quiet), 0, None, None)
    model.config["consistency"]["sampler"]["sigma_max"] = 2e-4
    separator = msr_jax.load(tiny_model, "consistency", 1)
    expected = separator.__class__(model, "consistency", 1).separate(mixture[:, 0], separator.sample_rate)
    np.testing.assert_allclose(np.asarray(refined)[..., 0], np.stack(list(expected.values())), atol=2e-3)


def test_the_deterministic_network_runs_once_per_segment(model, corpus, monkeypatch):
    prepared = []
    real = sweep_module.make_cached

    def counting(config, refine):
        prepare, sample = real(config, refine)
        return lambda *a: prepared.append(1) or prepare(*a), sample

    monkeypatch.setattr(sweep_module, "make_cached", counting)
    monkeypatch.setitem(model.config, "segment", 98_304)
    tracks = find_tracks(corpus / "test", model.config["stems"])[:1]
    settings = [Setting(t, s, 1, 0.0, k) for t in (1, 2) for s in (0.005, 0.01) for k in (0, 1)]
    rows = sweep(model, "diffusion", settings, tracks)
    assert len(prepared) == 13 * 22_050 // 98_304
    assert len(rows) == 9 and rows[0]["setting"] is None
    scores = [row["si_sdri_msdm"] for row in rows]
    assert np.isfinite(scores).all() and len(set(scores)) == 9


def test_the_command_writes_all_combinations(tiny_model, corpus, tmp_path, capsys):
    argv = ["sweep", "--data", corpus, "--model", tiny_model, "--refine", "consistency", "--out", tmp_path / "out"]
    assert main([*map(str, argv), "--steps", "1,2", "--sigma-max", "0.01,0.02", "--tracks", "1"]) == 0
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [r["setting"] and (r["setting"]["steps"], r["setting"]["sigma_max"]) for r in told["rows"]] == [
        None, (1, 0.01), (1, 0.02), (2, 0.01), (2, 0.02),
    ]  # fmt: skip
    assert told["data"].endswith("validation") and "**best**" in (tmp_path / "out" / "sweep.md").read_text()
    assert "**best**" in capsys.readouterr().out


def test_bad_input_gets_one_sentence(tiny_model, corpus, tmp_path, capsys):
    for options, words in (
        (("--refine", "consistency", "--s-churn", "1"), "settings of --refine diffusion"),
        (("--refine", "diffusion", "--steps", "two"), "--steps must be numbers"),
        (("--refine", "diffusion", "--sigma-max", "0"), "--sigma-max must be positive"),
    ):
        argv = ("--data", corpus, "--model", tiny_model, *options, "--out", tmp_path / "out")
        assert main(["sweep", *map(str, argv)]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1 and not (tmp_path / "out").exists()
