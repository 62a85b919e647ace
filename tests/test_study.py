"""The study's scripts: a blend lies between two networks, a mean of two separators is scored as they are."""

import shutil

import jax
import numpy as np
import pytest

from msr_jax.errors import UserError
from msr_jax.models.backbone import make_backbone
from msr_jax.train.loop import train
from msr_jax.weights.model_folder import load_model, save_model
from tests import toy
from tests.conftest import launch_script
from tests.test_loop import noise


@pytest.fixture
def stages(tmp_path):
    """Working directories of three short stages of the toy backbone; diffusion begins with another separator."""
    small = toy.get_config().to_dict()
    small["data"]["batch"] = 2
    small["train"].update(steps=4, checkpoint_every=4, validate_every=4)
    other = make_backbone(toy.MODEL).init(jax.random.key(9), False)
    save_model(tmp_path / "other", small, {"deterministic": other})
    det, diffusion, start = (str(tmp_path / name) for name in ("deterministic", "diffusion", "other"))
    begins = {
        "deterministic": {},
        "diffusion": {"deterministic": det, "start": start, "warm_start": True},
        "consistency": {"diffusion": diffusion},
    }
    for method, begin in begins.items():
        config = {**small, "method": method, "init_from": {**small["init_from"], **begin}}
        train(config, tmp_path / method, noise())
    return tmp_path


def blend(monkeypatch, stages, share):
    out = stages / f"blend_{share}"
    arguments = [str(stages / "diffusion"), str(stages / "consistency"), str(out), "--share", str(share)]
    monkeypatch.setattr("sys.argv", ["blend.py", *arguments])
    launch_script("study/blend").main()
    return load_model(out).weights


def test_a_blend_lies_between_what_diffusion_began_with_and_the_consistency_network(stages, monkeypatch):
    trained, other = load_model(stages / "consistency"), load_model(stages / "other").weights["deterministic"]
    begun, half, whole = (blend(monkeypatch, stages, share) for share in (0, 0.5, 1))
    (name,) = set(begun) - {"deterministic"}
    jax.tree.map(np.testing.assert_array_equal, {k: begun[name][k] for k in other}, other)
    jax.tree.map(np.testing.assert_array_equal, half["deterministic"], trained.weights["deterministic"])
    jax.tree.map(lambda *p: np.testing.assert_allclose(*p, atol=1e-6), whole[name], trained.weights[name])
    between = jax.tree.map(lambda a, b: (a + b) / 2, begun[name], whole[name])
    jax.tree.map(lambda *p: np.testing.assert_allclose(*p, atol=1e-6), half[name], between)
    with pytest.raises(UserError, match="between 0 and 1"):
        blend(monkeypatch, stages, 1.5)


def test_a_mean_of_two_separators_is_scored_beside_them(toy_model, short_corpus, tmp_path, capsys, monkeypatch):
    def table(other):
        monkeypatch.setattr("sys.argv", ["mean.py", str(toy_model), str(other), str(short_corpus)])
        launch_script("study/mean").main()
        rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
        return np.array([[float(cell) for cell in row[1:]] for row in rows])

    shutil.copytree(toy_model, tmp_path / "same")
    twice = table(tmp_path / "same")
    np.testing.assert_array_equal(twice, np.repeat(twice[:1], 3, 0))
    config = load_model(toy_model).config
    backbone = make_backbone(config["model"])
    save_model(tmp_path / "other", config, {"deterministic": backbone.init(jax.random.key(7), False)})
    first, other, mean = table(tmp_path / "other")
    np.testing.assert_array_equal(first, twice[0])
    assert (other != first).any() and (mean != first).any()
    config["stems"] = [*config["stems"][:-1], "flute"]
    save_model(tmp_path / "flute", config, {"deterministic": backbone.init(jax.random.key(7), False)})
    with pytest.raises(UserError, match="other stems"):
        table(tmp_path / "flute")


def test_a_curve_leaves_out_what_was_not_finite():
    rows = [{"step": k, "loss": value} for k, value in enumerate([1.0, None, 3.0, float("nan")])]
    points = launch_script("study/curves").curve("run", rows, "loss")
    assert [(step, mean) for step, mean, _ in points] == [(0.0, 1.0), (2.0, 3.0)]
