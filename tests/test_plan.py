"""A dry run adds up what a run needs, and shows that only parameters and gradients cross devices."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.plan.chips import CHIPS, peak_flops
from msr_jax.plan.program import expected_time, make_plan
from tests import toy
from tests.conftest import launch_script

ROOT = Path(__file__).resolve().parents[1]
TOY = str(ROOT / "tests" / "toy.py")


def dry_run(tmp_path, devices, *options):
    """The plan of the toy on so many simulated devices, in a process of its own, and what was printed."""
    path = tmp_path / f"{devices}.json"
    argv = ["--dry-run", "--config", TOY, "--devices", str(devices), "--json", str(path), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "msr_jax.cli", "train", *argv],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


@pytest.mark.multiprocess
def test_state_falls_with_the_devices_and_nothing_but_parameters_is_gathered(tmp_path):
    one, _ = dry_run(tmp_path, 1)
    many, said = dry_run(tmp_path, 8, "--config.mesh.fsdp=8", "--chip", "v5e", "--config.ema_rate=0.9")
    assert one["collectives"] == {} and one["parameters"] == many["parameters"] == 16 * 64 + 4 * 64 + 64 * 16
    whole, part = one["bytes_per_device"], many["bytes_per_device"]
    assert part["parameters"] * 8 == part["averages"] * 8 == whole["parameters"] == 4 * one["parameters"]
    assert part["optimiser"] * 8 == pytest.approx(whole["optimiser"], abs=100)  # but for the counters
    # Forward and backward each need the parameters once; the compiler keeps what it gathered.
    assert set(many["collectives"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert many["collectives"]["all-gather"]["result_bytes"] == whole["parameters"]
    assert many["largest_gather"] <= many["largest_parameter"]
    for words in ("data 1 × fsdp 8", "2,304 trained", "all-gather", "on v5e", "fits in 16 GB"):
        assert words in said
    assert not (tmp_path / "run").exists()


def test_a_plan_of_the_later_stages_needs_no_models_on_disk():
    config = toy.get_config().to_dict()
    for method, frozen in (("det_x2", 1), ("diffusion", 1), ("consistency", 2)):
        plan = make_plan({**config, "method": method})
        assert plan["flops_per_device"] > 0
        assert plan["bytes_per_device"]["frozen"] == pytest.approx(frozen * 4 * 2304, rel=0.15)


def test_expected_time_is_computing_and_sending_at_the_chip_s_rates():
    chip = CHIPS["h100"]
    plan = {
        "flops_per_device": 0.45 * chip.flops * 2,
        "collectives": {"all-reduce": {"sent_bytes": 3 * chip.host_link}},
        "bytes_per_device": {"arguments": 1, "activations": chip.memory},
    }
    far, near = expected_time(plan, "h100", 16), expected_time(plan, "h100", 8)
    assert (far["compute"], far["communication"]) == (pytest.approx(2), pytest.approx(3))
    assert (far["overlapped"], far["exposed"], far["fits"]) == (pytest.approx(3), pytest.approx(5), False)
    assert near["communication"] == pytest.approx(3 * chip.host_link / chip.link)


@pytest.mark.parametrize(
    "kind,chip",
    [("TPU v5 lite", "v5e"), ("TPU v4", "v4"), ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "h100"),
     ("NVIDIA A100-SXM4-80GB", "a100"), ("cpu", None)],
)  # fmt: skip
def test_devices_are_known_by_jax_s_names(kind, chip):
    assert peak_flops(kind) == (CHIPS[chip].flops if chip else None)


def test_what_a_dry_run_cannot_use_is_answered(capsys):
    with pytest.raises(UserError, match="--chip must be one of v4, v5e"):
        make_plan(toy.get_config().to_dict(), "abacus")
    for argv, words in (
        (["--chip", "h100", "--workdir", "run"], "--chip goes with --dry-run"),
        ([], "--workdir is missing"),
        (["--dry-run", "--config.data.batch=0"], "must be a multiple"),
    ):
        assert main(["train", "--config", TOY, *argv]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.multiprocess
def test_the_scaling_tables_are_made_from_plans(tmp_path, capsys, monkeypatch):
    script = launch_script("plan_scaling")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    argv = ["tests/toy.py", "--per-device", "2", "--devices", "1", "4", "--keep", str(tmp_path)]
    script.main(argv)
    said = capsys.readouterr().out
    assert "2,304 parameters trained, 2 × 256 samples per device" in said
    assert re.search(r"^\| 4 \| .* \| 1\.00\d \|", said, re.M)  # the state falls as 1/N
    assert "| 4 | all-gather | 3 |" in said and "Assumed: computing at 45%" in said
    script.main(argv)  # from the plans that are there
    assert capsys.readouterr().out == said


@pytest.mark.multiprocess
def test_no_activation_of_a_bs_roformer_is_gathered(tmp_path):
    """Its layers, its Fourier transforms and its loss: everything but the parameters stays with its example."""
    path = tmp_path / "plan.json"
    settings = {"mesh.fsdp": 8, "mesh.fsdp_min_size": 1, "data.batch": 8}
    settings |= {"model.dim": 16, "model.depth": 1, "model.heads": 1}
    argv = ["--config", str(ROOT / "configs" / "bsrf_det_small.py"), "--devices", "8", "--json", str(path)]
    argv += [f"--config.{k}={v}" for k, v in settings.items()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "msr_jax.cli", "train", "--dry-run", *argv], env=env, cwd=ROOT, check=True)
    plan = json.loads(path.read_text())
    assert 0 < plan["largest_gather"] <= plan["largest_parameter"]
    # Each parameter for the forward pass and for the backward pass, padded to what the devices divide.
    assert plan["collectives"]["all-gather"]["result_bytes"] < 2.5 * 4 * plan["parameters"]
