"""Training and separation of both backbones compile for a TPU, at tiny sizes, by the TPU's own compiler; no chip is needed.

libtpu comes with launch/test.sh alone. `launch/compile_check.sh` does so with the official sizes on every chip.
"""

import math

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from msr_jax.config import bsrf_base, unet_base
from msr_jax.plan.chips import LARGEST_SLICE, TPUS
from msr_jax.plan.plan import make_plan
from msr_jax.plan.target import find_target
from tests import toy

pytest.importorskip("libtpu", reason="comes with launch/test.lock, for Linux on x86-64")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSR_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def one_chip():
    return find_target("v5e:1x1")


@pytest.mark.parametrize("kind", TPUS)
def test_a_slice_has_a_device_for_each_chip(kind):
    shapes = ("1x1x1", "2x2x1", "4x4x4") if kind in LARGEST_SLICE else ("1x1", "2x2", "4x8")
    for shape in shapes:
        assert len(find_target(f"{kind}:{shape}").devices) == math.prod(map(int, shape.split("x")))


def test_jax_keeps_no_program_for_a_chip_that_is_not_there_and_keeps_others_as_before(one_chip, tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    kept = tmp_path / "jax"
    try:
        for name, value in zip(names, (str(kept), 0.0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.jit(lambda x: x + 1)(np.zeros(3))  # JAX has decided to keep
        assert any(kept.iterdir())
        compiling, seen = jax.stages.Lowered.compile, []

        def watched(*of, **options):
            earlier, compiled = {*kept.iterdir()}, compiling(*of, **options)
            seen.append({*kept.iterdir()} - earlier)
            return compiled

        monkeypatch.setattr(jax.stages.Lowered, "compile", watched)
        assert make_plan(toy.get_config().to_dict(), one_chip, "none")["refused"] == ""
        assert seen == [set()]
        own = {*kept.iterdir()}
        jax.jit(lambda x: x + 2)(np.zeros(3))
        assert {*kept.iterdir()} > own
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()


LOW_RATE = 1000  # Hz: at 44,100 the equaliser's transform is of half a second more than the chunk, which takes the compiler long


def small_unet():
    """One level below the first, with attention."""
    config = unet_base()
    config.sample_rate = LOW_RATE
    config.model.update({"channels": 8, "patch_factor": 4, "multipliers": (1, 1), "factors": (2,), "num_blocks": (1,)})
    config.model.update({"attentions": (True,), "attention_heads": 2, "attention_features": 8, "resnet_groups": 4})
    return config


def small_bs_roformer():
    """Two bands, two stems, mono; its dropout, its recomputation, and the equaliser, whose FFT is of a whole segment."""
    config = bsrf_base()
    config.sample_rate = LOW_RATE
    config.stems, config.channels, config.loss = ("other", "vocals"), 1, "mse"
    config.model.update({"dim": 8, "depth": 1, "heads": 1, "dim_head": 8, "num_stems": 2, "stereo": False})
    config.model.update({"freqs_per_bands": (16, 17), "stft_n_fft": 64, "stft_win_length": 64, "stft_hop_length": 32})
    config.model.update({"stft_adapter_hidden": 4, "mask_estimator_depth": 1, "mlp_expansion_factor": 1})
    config.data.augment.update({"pitch_shift": 0.0, "time_stretch": 0.0, "distortion": 0.0, "noise": 0.0})
    return config


# Every stage, and the first of both backbones: a minute and a half of two cores. The others are run by `-m slow`.
ORDINARY = {
    (small_unet, "deterministic"), (small_bs_roformer, "deterministic"), (small_unet, "det_x2"),
    (small_bs_roformer, "diffusion"), (small_bs_roformer, "consistency"),
}  # fmt: skip
STEPS = [
    pytest.param(make, method, marks=[] if (make, method) in ORDINARY else [pytest.mark.slow])
    for make in (small_unet, small_bs_roformer)
    for method in ("deterministic", "det_x2", "diffusion", "consistency")
]
WORK_SPACE = 100e6  # a few samples take half of it; a transform of a length that a TPU is bad at takes thousands of times as much


@pytest.mark.parametrize("make_config,method", STEPS)
def test_a_training_step_compiles(make_config, method, one_chip):
    config = make_config()
    config.method, config.segment, config.data.crop, config.data.batch = method, 512, 512, 2
    plan = make_plan(config.to_dict(), one_chip)
    assert plan["refused"] == "" and plan["fits"]
    assert plan["bytes_per_device"]["work_space"] < WORK_SPACE


@pytest.mark.parametrize("make_config", [small_unet, small_bs_roformer])
def test_separation_compiles(make_config, one_chip):
    config = make_config()
    config.segment = 512
    plan = make_plan(config.to_dict(), one_chip, "consistency")
    assert plan["refused"] == "" and plan["fits"]


def test_separation_is_spread_over_the_devices_of_a_host_which_send_each_other_nothing(one_chip):
    config = toy.get_config().to_dict()
    alone, spread = (make_plan(config, target, "none") for target in (one_chip, find_target("v5e:2x4")))
    assert spread["mesh"] == {"devices": 8} and spread["batch"] == 8 * alone["batch"] == 8
    assert spread["collectives"] == {} and spread["fits"]
    for said in ("examples_per_device", "flops_per_device"):
        assert spread[said] == alone[said]
    assert spread["bytes_per_device"]["work_space"] == alone["bytes_per_device"]["work_space"]
    assert make_plan(config, find_target("v5e:4x4"), "none")["mesh"] == {"devices": 4}  # as hosts of such a slice have


def test_what_a_step_sends_is_its_parameters_once_and_its_gradients_once():
    """As read from what the TPU's compiler writes, where a transfer is in the text of several fusions."""
    config = toy.get_config()
    config.model.width, config.mesh.fsdp, config.data.batch, config.compute_dtype = 16_384, 8, 64, "bfloat16"
    plan = make_plan(config.to_dict(), find_target("v5e:2x4"))
    in_bfloat16 = 2 * plan["parameters"]
    assert plan["collectives"]["all-gather"]["result_bytes"] == in_bfloat16
    parts, whole = (plan["collectives"][kind]["result_bytes"] for kind in ("reduce-scatter", "all-reduce"))
    scalars = 8  # the loss and the gradient's norm
    assert 8 * parts + whole - scalars == in_bfloat16
    assert plan["largest_gather"] == plan["largest_parameter"] == 16 * 16_384
    assert np.isclose(plan["collectives"]["all-gather"]["sent_bytes"], in_bfloat16 * 7 / 8)


@pytest.mark.slow
def test_what_layers_in_a_loop_send_counts_with_every_turn():
    """The gradients of all parameters, of which those of the layers and of the mask heads are summed in loops."""
    config = small_bs_roformer()
    config.method, config.segment, config.data.crop, config.data.batch = "deterministic", 512, 512, 4
    config.model.depth = 3
    plan = make_plan(config.to_dict(), find_target("v5e:2x2"))
    sums = plan["collectives"]["all-reduce"]["result_bytes"]
    assert 2 * plan["parameters"] <= sums <= 4.1 * plan["parameters"]  # bfloat16 and float32
