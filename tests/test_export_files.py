"""Files that `msr export` writes: readable by those who may read the others, whole or not at all, without its extras in a sentence."""

import os
import resource

import pytest
from safetensors.numpy import load_file

from msr_jax.audio.devices import traced_for
from msr_jax.cli import main
from msr_jax.methods.stages import own_steps
from msr_jax.weights import programs
from msr_jax.weights.export_cli import published_tensors
from msr_jax.weights.model_folder import load_model, save_model


def test_safetensors_are_the_networks_own_and_have_the_mode_of_other_files(tiny_model, tmp_path):
    assert main(["export", str(tiny_model), "--format", "safetensors", "-o", str(tmp_path / "net.safetensors")]) == 0
    (tmp_path / "other").touch()
    assert os.stat(tmp_path / "net.safetensors").st_mode == os.stat(tmp_path / "other").st_mode
    written, expected = (
        load_file(tmp_path / "net.safetensors"),
        published_tensors(load_model(tiny_model), "deterministic"),
    )
    assert written.keys() == expected.keys() and all((written[k] == v).all() for k, v in expected.items())


def test_a_machine_with_a_gpu_exports_a_program_for_all(tiny_model):
    with traced_for("gpu"):  # whose own forms cannot be exported
        assert programs._for_all_platforms(load_model(tiny_model)).platforms == ("cpu", "cuda", "tpu")


def test_stablehlo_without_its_extra_is_a_sentence(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    assert main(["export", str(tiny_model), "--format", "stablehlo", "-o", str(tmp_path / "net")]) == 2
    assert "export to StableHLO needs flatbuffers: pip install 'msr_jax[export]'" in capsys.readouterr().err


def test_a_full_disk_is_bad_input_and_leaves_nothing(tiny_model, tmp_path, capsys):
    model = load_model(tiny_model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        code = main(["export", str(tiny_model), "--format", "safetensors", "-o", str(tmp_path / "net.safetensors")])
        with pytest.raises(Exception, match="cannot write the model folder"):
            save_model(tmp_path / "model", model.config, model.weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "cannot write" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_models_own_number_of_steps_is_told(tiny_model):
    config = load_model(tiny_model).config
    assert own_steps(config, "diffusion") == config["diffusion"]["sampler"]["num_steps"]
    assert own_steps(config, "none") is None
