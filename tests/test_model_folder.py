"""Model folders: written whole, read strictly."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msr_jax import load
from msr_jax.errors import UserError
from msr_jax.models.backbone import cast_params
from msr_jax.weights.model_folder import flatten, load_model, save_model
from msr_jax.weights.torch_names import to_torch


def test_a_model_comes_back_as_it_was_saved(tiny_model, tmp_path):
    model = load_model(tiny_model)
    assert sorted(model.weights) == ["consistency", "deterministic", "diffusion", "target"]
    save_model(tmp_path / "copy", model.config, model.weights)
    assert len({path.stat().st_mode for path in (tmp_path / "copy").iterdir()}) == 1  # who reads one reads all
    again = load_model(tmp_path / "copy")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.weights, model.weights)
    save_model(
        tmp_path / "copy", model.config, {"deterministic": model.weights["deterministic"]}
    )  # replaced, not mixed
    assert list(load_model(tmp_path / "copy").weights) == ["deterministic"]
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_model_is_read_in_the_precision_that_it_will_run_in(tiny_model, bfloat16_units):
    exact, narrow = (load_model(tiny_model, dtype=dtype).weights for dtype in ("float32", "bfloat16"))
    cast = {name: cast_params(params, "bfloat16") for name, params in exact.items()}
    jax.tree.map(np.testing.assert_array_equal, narrow, cast)
    leaves = jax.tree.leaves(exact)
    shared = [jax.device_put(leaf).unsafe_buffer_pointer() == leaf.ctypes.data for leaf in leaves if leaf.size]
    assert all(shared)  # JAX computes with what was read, without a copy
    assert not any(leaf.flags.writeable for leaf in leaves)


def test_a_folder_that_is_being_replaced_is_there_again_if_that_is_ended(tiny_model, tmp_path, monkeypatch):
    model, folder = load_model(tiny_model), tmp_path / "copy"
    save_model(folder, model.config, model.weights)
    before, replace = sorted(p.name for p in folder.iterdir()), os.replace

    def ended_between_the_two(source, target):
        if target == folder and not source.name.endswith(".old"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", ended_between_the_two)
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, model.config, {"deterministic": model.weights["deterministic"]})
    assert [p.name for p in tmp_path.iterdir()] == ["copy"] and sorted(p.name for p in folder.iterdir()) == before
    replace(folder, tmp_path / ".copy.99999999.old")  # where a kill between the two leaves it
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, model.config, {"deterministic": model.weights["deterministic"]})
    assert [p.name for p in tmp_path.iterdir()] == ["copy"] and sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize(
    "reorder",
    [np.asfortranarray, lambda x: np.flip(np.flip(x).copy()), lambda x: np.repeat(x, 2, -1)[..., ::2]],
    ids=["columns first", "backwards", "every other one"],
)
def test_arrays_are_written_by_their_values_however_they_lie_in_memory(tiny_model, tmp_path, reorder):
    """safetensors 0.8.0 itself writes arrays that are not C-contiguous in the order of memory, and says nothing."""
    model = load_model(tiny_model)
    weights = jax.tree.map(reorder, {"deterministic": model.weights["deterministic"]})
    assert not all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(weights))
    save_model(tmp_path / "copy", model.config, weights)
    again = load_model(tmp_path / "copy").weights
    jax.tree.map(np.testing.assert_array_equal, again["deterministic"], model.weights["deterministic"])
    assert all(leaf.flags.c_contiguous for leaf in to_torch(flatten(weights["deterministic"])).values())


def test_the_refinement_that_a_folder_takes_by_default_stays_with_it(tiny_model, tmp_path):
    model = load_model(tiny_model)
    save_model(tmp_path / "plain", model.config | {"default_refine": "none"}, model.weights)
    assert load_model(tmp_path / "plain").config["default_refine"] == "none"
    assert load(tmp_path / "plain").refine == "none"
    assert load(tmp_path / "plain", refine="diffusion").refine == "diffusion"
    for odd in ("magic", None, ["none"], "det_x2"):
        save_model(tmp_path / "plain", model.config | {"default_refine": odd}, model.weights)
        with pytest.raises(UserError, match=r"config.json has default_refine .*it can be none, diffusion, consistency"):
            load_model(tmp_path / "plain")


@pytest.mark.parametrize(
    "damage,words",
    [
        (lambda t: t.pop("to_mapping_0/weight"), "lacks to_mapping_0/weight"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "does not know: extra"),
        (
            lambda t: t.update({"to_mapping_0/bias": np.zeros(3, np.float32)}),
            r"to_mapping_0/bias is \(3,\), not \(64,\)",
        ),
        (lambda t: t.update({"to_mapping_0/bias": np.zeros(64, np.float64)}), "must be float32 or float16"),
    ],
)
def test_a_tensor_that_is_missing_surplus_or_wrong_is_named(tiny_model, tmp_path, damage, words):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(folder / "diffusion.safetensors")
    damage(tensors)
    save_file(tensors, folder / "diffusion.safetensors")
    with pytest.raises(UserError, match=words):
        load_model(folder)


def test_half_the_bytes_come_back_in_float32_to_half_precision(tiny_model, tmp_path):
    model = load_model(tiny_model)
    save_model(tmp_path / "half", model.config, model.weights, np.float16)
    whole, half = (load_file(f / "diffusion.safetensors") for f in (tiny_model, tmp_path / "half"))
    assert {v.dtype for v in half.values()} == {np.dtype(np.float16)} and half.keys() == whole.keys()
    again = load_model(tmp_path / "half").weights
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-11, atol=2**-25), again, model.weights)


def test_other_folders_are_refused_and_left_alone(tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = load_model(tiny_model)
    with pytest.raises(UserError, match="is no model folder"):
        save_model(tmp_path, model.config, model.weights)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is no folder"):
        load_model(tmp_path / "nowhere")
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for text, words in (
        ("{", f"not readable as JSON .*; remove {folder} and fetch or save the model again"),
        ("{}", "lacks format"),
        (json.dumps({**config, "format": 9}), "format 9"),
        (json.dumps({**config, "networks": None}), "has networks null; they must be a list of deterministic"),
        (json.dumps({**config, "networks": ["../up"]}), r'has networks \["\.\./up"\]'),
        (json.dumps({**config, "stems": {}}), "stems must be a list of names"),
        (
            json.dumps({**config, "diffusion": {**config["diffusion"], "sampler": 3.5}}),
            r"diffusion\.sampler must be a section",
        ),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            load_model(folder)
