"""Fixtures say by fields what their tensors do not; where they don't, the recorded output tells; nothing is a traceback."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

from msr_jax.errors import UserError
from msr_jax.models import layers
from msr_jax.parity.check import check_fixture
from msr_jax.weights.model_folder import flatten
from msr_jax.weights.torch_names import to_torch


@pytest.fixture(scope="module")
def six_groups():
    """A residual block of 12 channels in 6 groups, under the fixtures' names and order of axes."""
    x, z = (np.asarray(jax.random.normal(jax.random.key(k), s)) for k, s in enumerate(((1, 8, 12), (1, 5))))
    block = layers.ResidualBlock(12, 6)
    shapes = nn.meta.unbox(jax.eval_shape(block.init, jax.random.key(2), x, z))["params"]
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), shapes)
    tensors = {f"resnet/state_dict/{k}": np.asarray(v) for k, v in to_torch(flatten(params)).items()}
    y = block.apply({"params": params}, jnp.asarray(x), jnp.asarray(z))
    arrays = {"resnet/in/0": x.swapaxes(1, 2), "resnet/in/1": z, "resnet/out": np.asarray(y).swapaxes(1, 2)}
    return {k: np.ascontiguousarray(v) for k, v in (tensors | arrays).items()}


def write(folder, arrays, description, name="unet_blocks"):
    save_file(arrays, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(description))
    return folder / f"{name}.json"


@pytest.mark.parametrize("told", [{"groups": 6}, {"kind": "resnet", "groups": 6}, "in words, of whatever groups", None])
def test_a_block_of_six_groups_is_checked(tmp_path, six_groups, told):
    (check,) = check_fixture(write(tmp_path, six_groups, {"blocks": {"resnet": told}}))
    assert check.name == "resnet/out" and check.error <= check.tolerance


def test_fields_that_are_wrong_are_found_out(tmp_path, six_groups):
    (check,) = check_fixture(write(tmp_path, six_groups, {"blocks": {"resnet": {"groups": 3}}}))
    assert check.error > check.tolerance
    for told, words in (
        ({"groups": 5}, "the block 'resnet' does not fit its tensors"),
        ({"groups": "six"}, "groups must be a whole number"),
        ({"kind": "mamba"}, "a block of the kind 'mamba' is not known"),
    ):
        with pytest.raises(UserError, match=words):
            check_fixture(write(tmp_path, six_groups, {"blocks": {"resnet": told}}))


@pytest.mark.parametrize("name", ["unet_det_x", "bsrf_det_x", "loss_x", "demix_x", "ckpt_x"])
def test_a_fixture_without_its_description_is_one_sentence(tmp_path, six_groups, name):
    with pytest.raises(UserError):
        check_fixture(write(tmp_path, six_groups, {}, name))
