"""A plan adds up what a program needs on a target, by the target's compiler, and says what would fit where it does not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh

from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.plan import compiled, target
from msr_jax.plan.advice import largest_batch, split_batch, what_would_fit
from msr_jax.plan.chips import CHIPS, GPUS, gpu_description, peak_flops
from msr_jax.plan.command import _fit
from msr_jax.plan.necessary import necessary_bytes
from msr_jax.plan.plan import expected_time, make_plan, memory_of
from msr_jax.plan.target import find_target
from tests import toy

ROOT = Path(__file__).resolve().parents[1]
TOY = str(ROOT / "tests" / "toy.py")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSR_HOME", str(tmp_path / "cache"))


def plan_of(tmp_path, name, *options, config=TOY):
    """The plan for so many simulated devices, in a process of its own, and what was printed."""
    path = tmp_path / f"{name.replace(':', '')}.json"
    argv = ["plan", "--config", config, "--target", name, "--json", str(path), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, tests.toy; from msr_jax.cli import main; sys.exit(main(sys.argv[1:]))",
            *argv,
        ],
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
    one = make_plan(toy.get_config().to_dict(), find_target("cpu:1"))
    many, said = plan_of(tmp_path, "cpu:8", "--config.mesh.fsdp=8", "--config.ema_rate=0.9")
    assert one["collectives"] == {} and one["parameters"] == many["parameters"] == 16 * 64 + 4 * 64 + 64 * 16
    whole, part = one["bytes_per_device"], many["bytes_per_device"]
    assert part["parameters"] * 8 == part["averages"] * 8 == whole["parameters"] == 4 * one["parameters"]
    assert part["optimiser"] * 8 == pytest.approx(whole["optimiser"], abs=100)  # but for the counters
    # Forward and backward each need the parameters once; the compiler keeps what it gathered.
    assert set(many["collectives"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert many["collectives"]["all-gather"]["result_bytes"] == whole["parameters"]
    assert many["largest_gather"] <= many["largest_parameter"]
    seven_of_eight = 7 / 8 * whole["parameters"]
    assert many["necessary_bytes"] == dict.fromkeys(("gathers", "gradients", "narrow_gradients"), seven_of_eight)
    assert one["necessary_bytes"]["gathers"] == one["necessary_bytes"]["gradients"] == 0
    for words in (
        "data 1 × fsdp 8",
        "gathered once 0.000 GB",
        "2,304 trained",
        "all-gather",
        "by jaxlib",
        "work space",
    ):
        assert words in said


def test_what_parameters_make_necessary_follows_the_mesh_and_the_precision():
    tree = {"a": {"weight": jax.ShapeDtypeStruct((8, 4), np.float32), "bias": jax.ShapeDtypeStruct((4,), np.float32)}}

    def necessary(data, fsdp, frozen=None, **options):
        mesh = AbstractMesh((data, fsdp), ("data", "fsdp"))
        return necessary_bytes(mesh, tree, frozen, 8, jnp.bfloat16, **options)

    whole, part = 32, 4  # numbers of the matrix, which fsdp splits, and of the vector
    assert necessary(1, 1) == {"gathers": 0, "gradients": 0, "narrow_gradients": 0}
    assert necessary(2, 1) == {"gathers": 0, "gradients": 4 * (whole + part), "narrow_gradients": 2 * whole + 4 * part}
    both = necessary(2, 4, tree)
    assert both["gathers"] == 2 * 2 * whole * 3 / 4  # the trained network and the frozen one
    of_vector = 2 * part * 7 / 8  # summed over all eight
    of_matrix = whole * 3 / 4 + whole / 4
    assert both["gradients"] == 4 * (of_matrix + of_vector)
    assert both["narrow_gradients"] == 2 * of_matrix + 4 * of_vector
    held = necessary(2, 4, mask={"a": {"weight": False, "bias": True}})
    assert held["gathers"] == both["gathers"] / 2 and held["gradients"] == 4 * of_vector


@pytest.mark.multiprocess
def test_adapters_make_a_network_cross_in_float32_and_its_gradients_stay(tmp_path):
    settings = {"mesh.fsdp": 8, "mesh.fsdp_min_size": 1, "data.batch": 8, "compute_dtype": "bfloat16"}
    settings |= {"model.dim": 16, "model.depth": 1, "model.heads": 1, "model.lora_rank": 2}
    argv = [f"--config.{k}={v}" for k, v in settings.items()]
    plan, _ = plan_of(tmp_path, "cpu:8", *argv, config=str(ROOT / "configs" / "bsrf_det_small.py"))
    assert plan["necessary_bytes"]["gathers"] > 3 * plan["parameters"]  # bytes, with all in float32
    assert 0 < plan["necessary_bytes"]["gradients"] < plan["parameters"]  # of the adapters alone


def test_a_plan_of_the_later_stages_and_of_separation_needs_no_models_on_disk():
    config, cpu = toy.get_config().to_dict(), find_target("cpu:1")
    for method, frozen in (("det_x2", 1), ("diffusion", 1), ("consistency", 2)):
        plan = make_plan({**config, "method": method}, cpu)
        assert plan["flops_per_device"] > 0
        assert plan["bytes_per_device"]["frozen"] == pytest.approx(frozen * 4 * 2304, rel=0.15)
    once, thrice = (make_plan(config, cpu, "diffusion", steps)["flops_per_device"] for steps in (1, 3))
    separation = make_plan(config, cpu, "none")
    assert separation["flops_per_device"] < once < thrice
    # A CPU's memory is no part of the target: whether it is enough is not known.
    assert (
        separation["fits"] is None
        and separation["has"] is None
        and what_would_fit(config, make_plan(config, cpu)) == []
    )


def test_a_compiled_plan_is_kept_and_a_changed_program_is_not_taken_for_it(monkeypatch):
    config, cpu = toy.get_config().to_dict(), find_target("cpu:1")
    first = make_plan(config, cpu, "none")
    monkeypatch.setattr(compiled, "_facts", lambda *of: pytest.fail("compiled again"))
    assert make_plan(config, cpu, "none") == first
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        make_plan({**config, "segment": 512}, cpu, "none")


def test_a_kept_plan_is_found_however_its_target_is_written():
    upper, lower = (SimpleNamespace(name=name, compiler="c") for name in ("V5E:2X2", "v5e:2x2"))
    assert compiled._key("program", upper) == compiled._key("program", lower)


def test_a_plan_is_made_all_the_same_where_there_is_no_home_directory(monkeypatch):
    monkeypatch.setattr(compiled, "home", lambda: (_ for _ in ()).throw(UserError("there is no home directory here")))
    assert make_plan(toy.get_config().to_dict(), find_target("cpu:1"), "none")["flops_per_device"] > 0


def test_what_a_compiler_refuses_for_want_of_memory_is_read():
    words = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 28.75G of 15.75G "
        "hbm. Exceeded hbm capacity by 13.00G."
    )
    found = compiled._refusal(words)
    assert (found["needs"], found["has"]) == (28.75 * 2**30, 15.75 * 2**30)
    words = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries ({}) exceeds available "
        "HBM (15.75G)."
    )
    for size, needs in (("274.19G", 274.19 * 2**30), ("7.28T", 7.28 * 2**40), ("42.93P", 42.93 * 2**50)):
        found = compiled._refusal(words.format(size))
        assert (found["needs"], found["has"]) == (round(needs), 15.75 * 2**30)
    assert compiled._refusal("INTERNAL: no tiles") == {"refused": "INTERNAL: no tiles"}


def test_expected_time_is_computing_moving_and_sending_at_the_chip_s_rates():
    chip = CHIPS["h100"]
    plan = {
        "flops_per_device": 0.45 * chip.flops * 2,
        "bytes_moved": 4 * chip.bandwidth,
        "collectives": {"all-reduce": {"sent_bytes": 3 * chip.host_link}},
    }
    far, near = expected_time(plan, chip, 16), expected_time(plan, chip, 8)
    assert (far["compute"], far["communication"]) == (pytest.approx(2), pytest.approx(3))
    assert (far["overlapped"], far["exposed"], far["at_least"]) == (
        pytest.approx(4),
        pytest.approx(7),
        pytest.approx(4),
    )
    assert near["communication"] == pytest.approx(3 * chip.host_link / chip.link)
    blind = expected_time({**plan, "bytes_moved": None}, chip, 16)
    assert (blind["at_least"], blind["overlapped"], blind["exposed"]) == tuple(map(pytest.approx, (3, 3, 5)))


@pytest.mark.parametrize(
    "kind,chip",
    [("TPU v5 lite", "v5e"), ("TPU v4", "v4"), ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "h100"),
     ("NVIDIA A100-SXM4-80GB", "a100"), ("cpu", None)],
)  # fmt: skip
def test_devices_are_known_by_jax_s_names(kind, chip):
    assert peak_flops(kind) == (CHIPS[chip].flops if chip else None)


def test_a_program_has_all_of_a_tpu_s_memory_and_of_a_gpu_s_what_the_driver_leaves():
    on = lambda platform, chip: SimpleNamespace(platform=platform, chip=CHIPS[chip])
    assert memory_of(on("tpu", "v5e")) == CHIPS["v5e"].memory
    assert memory_of(on("gpu", "h200")) == CHIPS["h200"].memory - 2e9


def test_a_gpu_s_text_names_it_and_its_architecture():
    for name in GPUS:
        text = gpu_description(CHIPS[name])
        assert name.upper() in text and text.count("{") == text.count("}")
    assert "major: 8 minor: 0 }" in gpu_description(CHIPS["a100"])
    assert "major: 10 minor: 0 feature_extension: ACCELERATED_FEATURES" in gpu_description(CHIPS["b200"])


@pytest.mark.parametrize(
    "name,words",
    [("v9:2x2", "KIND:SHAPE"), ("h200", "KIND:SHAPE"), ("v5e:", "KIND:SHAPE"), ("v5e:3x3", "slices of v5e are 1x1, 2x2"),
     ("v5e:32x32", "slices of v5e"), ("v5p:2x2", "three sizes"), ("v5p:2x2x3", "a multiple of 4"), ("h200:16", "h200:2x8"),
     ("h100:2x9", "at most 8"), ("h100:1x2x8", "HOSTSxN"), ("cpu:2x2", "cpu:N"), ("cpu:0", "has 0 devices"),
     ("cpu:5000", "for 1 to 1024"), ("cpu:٣", "KIND:SHAPE"), ("h200:12", "written h200:2x6")],
)  # fmt: skip
def test_a_target_that_does_not_exist_is_answered_in_a_sentence(name, words, capsys):
    assert main(["plan", "--config", TOY, "--target", name]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_missing_compiler_is_named_with_what_brings_it(monkeypatch, capsys):
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    for name, extra in (("v5e:2x2", "msr_jax[tpu]"), ("h200:8", "msr_jax[cuda]")):
        assert main(["plan", "--config", TOY, "--target", name]) == 2
        assert f"pip install '{extra}'" in capsys.readouterr().err


def test_a_compiler_that_fails_without_a_word_is_named_all_the_same(monkeypatch):
    def fail(**_):
        raise RuntimeError

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    with pytest.raises(UserError, match=r"\(RuntimeError\)"):
        find_target("v5e:2x2")


def test_what_a_plan_cannot_use_is_answered(capsys):
    for argv, words in (
        (["--config.data.batch=0"], "data.batch must be at least 1"),
        (["--config.mesh.fsdp=3"], "does not fit 1 devices"),
        (["--steps", "2"], "--steps goes with --separate"),
        (["--fit"], "--fit needs a chip"),
        (["--separate", "diffusion", "--steps", "0"], "at least 1"),
    ):
        assert main(["plan", "--config", TOY, "--target", "cpu:1", *argv]) == 2
        assert words in capsys.readouterr().err


def test_sizes_whose_products_leave_64_bits_are_answered(capsys):
    argv = ["--config", "bsrf_det_small", "--target", "cpu:1", "--config.model.dim=2147483646"]
    for separate in ([], ["--separate", "none"]):
        assert main(["plan", *argv, *separate]) == 2
        assert "the config's sizes are beyond any machine" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--dry-run"], ["--chip", "h100"], ["--devices=8"]])
def test_the_dry_run_s_flags_name_what_came_after(flags, capsys):
    assert main(["train", "--config", TOY, *flags]) == 2
    assert "is gone: msr plan --config" in capsys.readouterr().err


def test_a_batch_that_devices_do_not_divide_is_planned_at_the_next_with_advice():
    config = {"data": {"batch": 18}, "optim": {"accumulate": 1}}
    split = split_batch(config, 8)
    said = " ".join(split.advice)
    assert split.batch == 24
    for words in ("8 devices do not divide data.batch=18", "data.batch=16", "data.batch=24", "6 or 3 devices"):
        assert words in said
    assert split_batch(config, 6) == (18, [])


def test_a_step_that_does_not_fit_comes_with_what_would():
    config = {"model": {"remat": False}}
    plan = {
        "fits": False, "program": "train", "mesh": {"data": 8, "fsdp": 1}, "examples_per_device": 4, "batch": 32,
        "accumulate": 1, "needs": 20e9, "has": 16e9,
        "bytes_per_device": {"parameters": 2e9, "optimiser": 4e9, "averages": 0, "frozen": 0},
    }  # fmt: skip
    said = what_would_fit(config, plan)
    assert "mesh.fsdp=8" in said[0]
    assert "data.batch=16 --config.optim.accumulate=2" in said[1] and "32 examples a step" in said[1]
    assert "model.remat=True" in said[2]
    alone = what_would_fit({"model": {"remat": True}}, {**plan, "examples_per_device": 1, "batch": 8})
    assert any("v6e" in line for line in alone) and not any("accumulate" in line for line in alone)
    for known in ({"fits": True}, {"fits": None, "has": None}, {"has": None}):  # the last: refused for another reason
        assert what_would_fit(config, {**plan, **known}) == []


@pytest.mark.parametrize("per_example,fixed,start", [(3.0, 4.0, 2), (7.9, 4.0, 6), (0.11, 1.0, 1), (20.0, 1.0, 3)])
def test_the_largest_batch_is_found_in_a_handful_of_compilations(per_example, fixed, start):
    asked = []

    def plan(n):
        asked.append(n)
        needs = fixed + per_example * n
        return {"fits": needs <= 16, "needs": needs, "has": 16, "bytes_per_device": {"work_space": per_example * n}}

    most, is_largest, rows = largest_batch(plan, start)
    assert most == max(0, int((16 - fixed) // per_example)) and is_largest
    assert len(asked) == len(set(asked)) == len(rows) <= 8


@pytest.mark.parametrize("start,per_example,most", [(1, 1e-3, 1024), (3000, 1e-3, 3000), (3, 0, 384)])
def test_a_batch_of_which_no_more_was_tried_is_told_as_at_least_that(start, per_example, most, capsys):
    plan = lambda n: {"fits": True, "needs": 1 + per_example * n, "has": 16, "bytes_per_device": {}}
    found = _fit(plan, start, SimpleNamespace(name="v5p:1x1x1"))
    assert (found["examples_per_device"], found["is_largest"]) == (most, False)
    assert f"at least {most} (more was not tried)" in capsys.readouterr().out


def test_a_search_that_ends_between_two_batches_names_both(capsys):
    fits = lambda n: n * n + 100 <= 2600  # work space that grows faster than the batch
    plan = lambda n: {"fits": fits(n), "needs": n * n + 100, "has": 2600, "bytes_per_device": {"work_space": n * n}}
    found = _fit(plan, 1, SimpleNamespace(name="v5p:1x1x1"))
    most = found["examples_per_device"]
    assert fits(most) and not found["is_largest"]
    told = re.search(rf"at least {most} \((\d+) do not fit, nothing between was tried\)", capsys.readouterr().out)
    assert told and int(told[1]) > most + 1 and not fits(int(told[1]))


@pytest.mark.multiprocess
def test_no_activation_of_a_bs_roformer_is_gathered(tmp_path):
    """Its layers, its Fourier transforms and its loss: everything but the parameters stays with its example."""
    settings = {"mesh.fsdp": 8, "mesh.fsdp_min_size": 1, "data.batch": 8}
    settings |= {"model.dim": 16, "model.depth": 1, "model.heads": 1}
    argv = [f"--config.{k}={v}" for k, v in settings.items()]
    plan, _ = plan_of(tmp_path, "cpu:8", *argv, config=str(ROOT / "configs" / "bsrf_det_small.py"))
    assert 0 < plan["largest_gather"] <= plan["largest_parameter"]
    # Each parameter for the forward pass and for the backward pass, padded to what the devices divide.
    assert plan["collectives"]["all-gather"]["result_bytes"] < 2.5 * 4 * plan["parameters"]
