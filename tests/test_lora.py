"""Low-rank adapters and frozen parameters: what is trained, what stays, and what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msr_jax.config import unet_base
from msr_jax.errors import UserError
from msr_jax.models.backbone import make_backbone
from msr_jax.models.lora import init_lora, merge_lora
from msr_jax.train.optim import hold_frozen, make_optimizer, make_schedule, trained_mask
from msr_jax.train.sharding import make_mesh
from msr_jax.train.stage import make_stage, trained_networks
from msr_jax.weights.model_folder import flatten, load_model, parameter_shapes, save_model
from tests.conftest import TINY_SEGMENT, TINY_SIZES

STEMS = 4


@pytest.fixture(scope="module")
def config():
    """Of the deterministic stage on a tiny U-Net, with adapters of rank 4: plain nested dicts."""
    config = unet_base()
    config.model.update({**TINY_SIZES, "lora_rank": 4})
    config.segment = config.data.crop = TINY_SEGMENT
    config.compute_dtype, config.optim.lr = "float32", 1e-2
    return config.to_dict()


@pytest.fixture(scope="module")
def backbone(config):
    return make_backbone(config["model"])


@pytest.fixture(scope="module")
def source(backbone):
    """The parameters that fine-tuning starts from."""
    return jax.device_get(backbone.init(jax.random.key(3), False))


@pytest.fixture(scope="module")
def step(config, backbone, source):
    """State before and after one step of training with adapters."""
    mesh = make_mesh(config["mesh"])
    stage = make_stage(config, backbone, {"deterministic": source}, mesh)
    rng = np.random.default_rng(0)
    batch = {
        "stems": 0.1 * rng.standard_normal((1, 1, STEMS, STEMS, TINY_SEGMENT, 1)).astype(np.float32),
        "label": np.eye(STEMS, dtype=np.float32)[None, None],
    }
    before = stage.start()
    kept = jax.device_get(before)
    with jax.set_mesh(mesh):
        after, metrics = stage.steps(before, {}, batch)
    assert np.isfinite(metrics["loss"]).all()
    return kept, jax.device_get(after)


def test_a_step_with_adapters_leaves_the_network_bit_equal_and_changes_them_alone(step, source):
    before, after = step
    own = {k: v for k, v in after.params.items() if k != "lora"}
    assert {k: v.tobytes() for k, v in flatten(own).items()} == {k: v.tobytes() for k, v in flatten(source).items()}
    lora = flatten(after.params["lora"])
    assert all("attention" in path or "feed_forward" in path for path in lora)
    assert any((value != flatten(before.params["lora"])[path]).any() for path, value in lora.items())


def test_the_merged_export_answers_as_the_network_with_its_adapters(step, backbone, source):
    before, after = step
    x, label = np.random.default_rng(1).standard_normal((1, TINY_SEGMENT, 1)).astype(np.float32), np.eye(STEMS)[:1]
    answer = lambda params: np.asarray(backbone.separate(params, x, label)[0])
    np.testing.assert_array_equal(answer(merge_lora(before.params)), answer(source))
    exported = trained_networks("deterministic", after)["deterministic"]
    assert {k: v.shape for k, v in flatten(exported).items()} == parameter_shapes(backbone, "deterministic")
    lora = flatten(after.params["lora"])
    for path in (k.removesuffix("/down") for k in lora if k.endswith("/down")):
        expected = flatten(source)[path] + lora[f"{path}/down"] @ lora[f"{path}/up"]
        np.testing.assert_allclose(flatten(exported)[path], expected, atol=1e-6)
    assert np.abs(answer(exported) - answer(source)).max() > 1e-5


def test_a_roformer_has_adapters_in_attention_and_feed_forward_of_every_layer():
    small = {"dim": 8, "depth": 2, "heads": 2, "dim_head": 4, "freqs_per_bands": (5, 12), "stft_n_fft": 32}
    backbone = make_backbone({"name": "bs_roformer", **small, "stft_win_length": 32, "stft_hop_length": 8})
    shapes = jax.eval_shape(lambda: backbone.init(jax.random.key(0), True))
    lora = flatten(jax.eval_shape(lambda: init_lora(jax.random.key(0), shapes, 3)))
    found = {k.removesuffix("/down") for k in lora if k.endswith("/down")}
    names = ("attention/to_qkv", "attention/to_out", "feed_forward/to_hidden", "feed_forward/to_out")
    assert found == {f"layers/{axis}_{k}/{name}" for axis in ("time", "freq") for k in (0, 1) for name in names}
    assert lora["layers/time_0/attention/to_qkv/down"].shape == (2, 8, 3)


def test_what_a_pattern_freezes_stays_to_the_bit_and_has_no_moments():
    params = {"band_split": {"w": jnp.array([-0.0, 0.0, 1.5])}, "heads": {"w": jnp.ones(3)}}
    mask = trained_mask(params, ("band_split/*",))
    optim = {**unet_base().optim.to_dict(), "name": "adamw", "weight_decay": 0.1, "clip_norm": 1.0, "lr": 0.1}
    tx = make_optimizer(optim, make_schedule(optim, 10), mask)
    state = tx.init(params)
    grads = jax.grad(lambda p: sum(jnp.sum(v["w"] ** 2) for v in hold_frozen(p, mask).values()))(params)
    updates, _ = tx.update(grads, state, params)
    after = optax.apply_updates(params, updates)
    assert np.asarray(after["band_split"]["w"]).tobytes() == np.asarray(params["band_split"]["w"]).tobytes()
    assert (after["heads"]["w"] < 1).all()
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * 3


def test_a_pattern_freezes_the_adapters_of_what_it_names_too():
    params = {"layers": {"to_qkv": jnp.ones(3)}, "masks": {"w": jnp.ones(3)}}
    params["lora"] = {k: {n: {"down": jnp.ones(3), "up": jnp.ones(3)} for n in params[k]} for k in ("layers", "masks")}
    mask = trained_mask(params, ("layers/*",))
    assert not any(jax.tree.leaves(mask["lora"]["layers"])) and all(jax.tree.leaves(mask["lora"]["masks"]))


def test_patterns_that_match_nothing_or_everything_are_refused(config, backbone, source):
    for freeze, words in ((("mask_heads*",), "is no parameter's path"), (("*",), "leaves no parameter to train")):
        frozen = {**config, "optim": {**config["optim"], "freeze": freeze}}
        with pytest.raises(UserError, match=words):
            make_stage(frozen, backbone, {"deterministic": source}, make_mesh(config["mesh"]))


def test_adapters_without_a_network_are_refused(config, backbone):
    with pytest.raises(UserError, match="a network that is there already"):
        make_stage(config, backbone, {}, make_mesh(config["mesh"]))


@pytest.mark.parametrize("method", ["diffusion", "det_x2"])
def test_adapters_for_a_network_that_begins_are_refused(config, backbone, source, method):
    with pytest.raises(UserError, match=f"lora_rank trains adapters on a network that is there already, and {method}"):
        make_stage(
            {**config, "method": method}, backbone, {"deterministic": source}, make_mesh({"data": -1, "fsdp": 1})
        )


def test_a_run_with_adapters_writes_a_plain_model_folder(config, source, records, tmp_path):
    from msr_jax.train.loop import train

    save_model(tmp_path / "separator", config, {"deterministic": source})
    init = {**config["init_from"], "deterministic": str(tmp_path / "separator")}
    data = {**config["data"], "train": str(records), "batch": 2}
    lengths = dict.fromkeys(("steps", "log_every", "validate_every", "checkpoint_every", "steps_per_dispatch"), 1)
    train({**config, "init_from": init, "data": data, "train": {**config["train"], **lengths}}, tmp_path / "run")
    model = load_model(tmp_path / "run")
    assert "lora_rank" not in model.config["model"]
    assert set(flatten(model.weights["deterministic"])) == set(flatten(source))
