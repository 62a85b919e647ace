"""Training runs: killed, resumed, on one device or eight, in one scan or several, the numbers are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msr_jax.cli import main
from msr_jax.config_files import read_config
from msr_jax.errors import UserError
from msr_jax.models.backbone import BACKBONES
from msr_jax.train.loop import train
from msr_jax.train.sharding import make_mesh
from msr_jax.train.state import init_state, make_train_steps
from msr_jax.weights.model_folder import load_model
from tests.conftest import TINY_SEGMENT, TINY_SIZES
from tests.toy import MODEL, make_toy

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "unet_det.py")


def curve(workdir):
    """Every line of the log but what timing could change: there is nothing of that kind in it."""
    return (Path(workdir) / "metrics.jsonl").read_text().splitlines()


def losses(workdir):
    return [row["loss"] for row in map(json.loads, curve(workdir)) if "loss" in row]


def overrides(records, steps=12):
    sizes = [f"--config.model.{k}={v}".replace(" ", "") for k, v in TINY_SIZES.items()]
    settings = {
        "segment": TINY_SEGMENT,
        "data.crop": TINY_SEGMENT,
        "data.train": records,
        "data.validation": records,
        "data.batch": 8,
        "compute_dtype": "float32",
        "train.steps": steps,
        "train.steps_per_dispatch": 2,
        "train.log_every": 4,
        "train.validate_every": 12,
        "train.validation_windows": 2,
        "train.checkpoint_every": 4,
    }
    return sizes + [f"--config.{k}={v}" for k, v in settings.items()]


def run(workdir, records, *settings, steps=24, devices=1):
    """A run of the U-Net's recipe in a process of its own, on so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    argv = [sys.executable, "-m", "msr_jax.cli", "train", "--config", CONFIG, "--workdir", str(workdir)]
    argv += [*overrides(records, steps), *settings]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "XLA_FLAGS": flags})


@pytest.fixture(scope="module")
def straight(records, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    process = run(workdir, records)
    said = process.communicate(timeout=500)[0]
    assert process.returncode == 0, said
    return workdir


@pytest.mark.multiprocess
def test_a_killed_run_goes_on_as_if_nothing_had_happened(straight, records, tmp_path):
    killed = run(tmp_path, records)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and not ((tmp_path / "metrics.jsonl").exists() and len(curve(tmp_path)) >= 9):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    assert 9 <= len(curve(tmp_path)) < 24  # it died on the way
    again = run(tmp_path, records)
    said = again.communicate(timeout=500)[0]
    assert again.returncode == 0 and "resumed from step" in said
    assert curve(tmp_path) == curve(straight)
    a, b = (load_model(folder).weights for folder in (tmp_path, straight))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.multiprocess
def test_eight_devices_give_the_losses_of_one(straight, records, tmp_path):
    settings = ("--config.mesh.fsdp=2", "--config.data.validation=")
    process = run(tmp_path, records, *settings, steps=4, devices=8)
    said = process.communicate(timeout=500)[0]
    assert process.returncode == 0, said
    assert len(losses(tmp_path)) == 4
    np.testing.assert_allclose(losses(tmp_path), losses(straight)[:4], rtol=1e-5)


def toy():
    """A linear model: loss_fn, optimiser, schedule, initial parameters."""

    def loss_fn(params, frozen, batch, key):
        noise = jax.random.normal(key, batch["x"].shape) * 0.1
        target = frozen["target"]["w"] if "target" in frozen else 0.0
        return jnp.square((batch["x"] + noise) @ (params["w"] - target) - batch["y"]).mean(), {}

    schedule = optax.constant_schedule(0.1)
    return loss_fn, optax.sgd(0.1), schedule, {"w": jnp.ones(3)}


def toy_batches(steps, micro=1):
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((steps, micro, 4, 3)).astype("f"),
        "y": rng.standard_normal((steps, micro, 4)).astype("f"),
    }


def test_steps_per_dispatch_do_not_change_the_numbers():
    loss_fn, tx, schedule, params = toy()
    steps = jax.jit(make_train_steps(loss_fn, tx, schedule, seed=3))
    batches = toy_batches(6)
    _, together = steps(init_state(params, tx, 0.0, False), {}, batches)
    state, apart = init_state(params, tx, 0.0, False), []
    for k in range(6):
        state, metrics = steps(state, {}, jax.tree.map(lambda x, k=k: x[k : k + 1], batches))
        apart.append(metrics["loss"][0])
    np.testing.assert_array_equal(together["loss"], np.stack(apart))


def test_accumulation_averages_gradients_with_a_key_for_each_part():
    loss_fn, tx, schedule, params = toy()
    batches = toy_batches(1, micro=2)
    state, _ = make_train_steps(loss_fn, tx, schedule, seed=3)(init_state(params, tx, 0.0, False), {}, batches)
    key = jax.random.fold_in(jax.random.key(3), 0)
    grads = [
        jax.grad(loss_fn, has_aux=True)(
            params, {}, jax.tree.map(lambda x, m=m: x[0, m], batches), jax.random.fold_in(key, m)
        )[0]
        for m in range(2)
    ]
    np.testing.assert_allclose(state.params["w"], params["w"] - 0.05 * (grads[0]["w"] + grads[1]["w"]), rtol=1e-6)


def test_the_target_is_averaged_with_the_parameters_before_the_update():
    loss_fn, tx, schedule, params = toy()
    steps = make_train_steps(loss_fn, tx, schedule, seed=0, target_rate=0.9)
    state = init_state(params, tx, 0.0, True)
    moved = state.replace(params={"w": jnp.full(3, 2.0)})
    after, _ = steps(moved, {}, toy_batches(1))
    np.testing.assert_allclose(after.target_params["w"], 0.9 * 1.0 + 0.1 * 2.0, rtol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tiny_config, records, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", make_toy)
    tiny_config["model"] = MODEL
    tiny_config["data"].update(train=str(records), batch=4)
    tiny_config["optim"]["lr"] = 1e30
    with pytest.raises(UserError, match="the loss of step"):
        train(json.loads(json.dumps(tiny_config)), tmp_path / "run")


def test_a_run_refuses_what_does_not_fit(tiny_config, records, tmp_path):
    plain = json.loads(json.dumps(tiny_config))
    plain["data"].update(train=str(records), batch=4)
    for change, words in (
        ({"method": "diffusion"}, "set --config.init_from.deterministic"),
        ({"method": "guess"}, "config.method"),
        ({"loss_hop": 0}, "config.loss_hop must be at least 1"),
        ({"loss_floor_silent": 0.0}, "config.loss_floor_silent must be above 0"),
        ({"diffusion": {**plain["diffusion"], "loss_weight": "one"}}, "loss_weight must be one of edm, none"),
        ({"mesh": {"data": 3, "fsdp": 1}}, "does not fit 1 devices"),
        ({"segment": 100}, "multiple of"),
        ({"train": {**plain["train"], "log_every": 3}}, "multiple of train.steps_per_dispatch"),
        ({"stems": ["a", "b", "c", "d"]}, "hold stems"),
        ({"data": {**plain["data"], "train": str(tmp_path)}}, "holds no records"),
    ):
        with pytest.raises((UserError, KeyError), match=words):
            train({**plain, **change}, tmp_path / "run")
    with pytest.raises(UserError, match="mesh"):
        make_mesh({"data": 2, "fsdp": 2})


def test_settings_are_read_and_wrong_ones_answered_with_the_nearest(capsys, tmp_path):
    config = read_config(CONFIG, ["--config.optim.lr=3e-4", "--config.model.multipliers=(1,2)"])
    assert config["optim"]["lr"] == 3e-4 and config["model"]["multipliers"] == (1, 2)
    for argv, words in (
        (["--config", CONFIG, "--config.optim.lrr=1"], "no setting 'optim.lrr'; near it are optim.lr"),
        (
            ["--config", CONFIG, "--config.data.batch=many"],
            'config.data.batch must be a whole number, at least 1, not "many"',
        ),
        (["--config", "configs/none.py"], "is not there"),
        (["--config", CONFIG, "--lr=1"], "settings are written --config.a.b=value"),
    ):
        assert main(["train", *argv, "--workdir", str(tmp_path / "run")]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "configs").glob("*.py")))
def test_every_config_builds_its_network_and_objective(path):
    from msr_jax.methods.stages import make_objective
    from msr_jax.models.backbone import make_backbone

    config = read_config(str(ROOT / "configs" / path), [])
    backbone = make_backbone(config["model"], config["compute_dtype"])
    backbone.check_length(config["segment"])
    backbone.check_length(config["data"]["crop"])
    assert callable(make_objective(config, backbone))
