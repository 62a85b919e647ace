"""Files that `msr export` writes: readable by those who may read the others, whole or not at all, without its extras in a sentence;
and what it says of them, with which they come back as they were.
"""

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from msr_jax.cli import main
from msr_jax.config import bsrf_base, melrf_base
from msr_jax.devices import traced_for
from msr_jax.methods.stages import own_steps
from msr_jax.models.backbone import make_backbone
from msr_jax.weights import export_cli, programs
from msr_jax.weights.export_cli import published_tensors
from msr_jax.weights.model_folder import FIELDS, load_model, parameter_shapes, save_model, unflatten


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


@pytest.mark.torch
def test_a_full_disk_is_told_by_the_formats_of_pytorch_too(tiny_model, tmp_path, capsys):
    pytest.importorskip("torch")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        code = main(["export", str(tiny_model), "--format", "dicose", "-o", str(tmp_path / "net.ckpt")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "net.ckpt: File too large" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told_before_the_model_is_read(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_cli, "load_model", None)
    assert main(["export", str(tiny_model), "--format", "safetensors", "-o", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


UNSEEN = {"stft_win_length": 60, "stft_normalized": True, "zero_dc": False, "skip_connection": True}
TINY = {"dim": 6, "depth": 1, "num_stems": 2, "dim_head": 2, "heads": 2, "stft_hop_length": 16, **UNSEEN}


@pytest.mark.parametrize(
    "base,sizes",
    [  # the bands of the first are those of stereo too
        (bsrf_base, {"stereo": False, "stft_n_fft": 66, "freqs_per_bands": (4, 10, 20)}),
        (melrf_base, {"stereo": True, "stft_n_fft": 256, "num_bands": 8, "sample_rate": 22_050}),
    ],
)
def test_a_roformer_comes_back_with_the_yaml_that_its_export_prints(base, sizes, tmp_path, capsys):
    config = base().to_dict()
    config["model"] |= {**TINY, **sizes}
    config |= {"stems": ["Vocals", "no"], "channels": 1 + sizes["stereo"], "sample_rate": 22_050, "segment": 640}
    shapes = parameter_shapes(make_backbone(config["model"]), "deterministic")
    zeros = unflatten({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    save_model(tmp_path / "m", config, {"deterministic": zeros})
    out = tmp_path / "w.safetensors"
    assert main(["export", str(tmp_path / "m"), "--format", "safetensors", "-o", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("no tensor tells what follows; give it with the weights, as a YAML")
    (tmp_path / "c.yaml").write_text("\n".join(said[2:]))
    known = load_model(tmp_path / "m").config
    for told in (tmp_path / "c.yaml", tmp_path / "m" / "config.json"):
        assert main(["import", str(out), "-o", str(tmp_path / "again"), "--config", str(told)]) == 0
        found = load_model(tmp_path / "again").config
        assert {k: found[k] for k in FIELDS if k != "model"} == {k: known[k] for k in FIELDS if k != "model"}
        assert {k: found["model"][k] for k in {**TINY, **sizes}} == {k: known["model"][k] for k in {**TINY, **sizes}}


def test_of_a_roformer_that_is_as_import_assumes_nothing_is_to_be_told():
    config = bsrf_base().to_dict()
    assert export_cli.roformer_weights.untold(config) == {}
    assert export_cli.roformer_weights.untold(melrf_base().to_dict()) == {}


@pytest.fixture
def loud(tiny_model, tmp_path):
    """A folder of a U-Net's separator that hears mixtures at a level of its own, with other stems and another sampler."""
    shutil.copytree(tiny_model, tmp_path / "loud")
    path = tmp_path / "loud" / "config.json"
    config = json.loads(path.read_text())
    config |= {"input_level": 0.25, "stems": list("wxyz"), "sample_rate": 8000, "networks": ["deterministic"]}
    config["diffusion"]["sampler"]["rho"] = 3.0
    path.write_text(json.dumps(config))
    return tmp_path / "loud"


def test_a_u_net_comes_back_with_the_config_of_its_folder_which_its_export_names(loud, tmp_path, capsys):
    out, told = tmp_path / "w.safetensors", loud / "config.json"
    assert main(["export", str(loud), "--format", "safetensors", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert 'stems ["w", "x", "y", "z"], sample_rate 8000' in said and f"takes them from {told} by --config" in said
    assert "the program must scale each mixture to an RMS of 0.25, and the stems back" in said
    assert main(["import", str(out), "-o", str(tmp_path / "again"), "--config", str(told)]) == 0
    assert "assumed" not in capsys.readouterr().out
    assert load_model(tmp_path / "again").config == load_model(loud).config


def test_the_config_of_another_network_s_folder_is_refused(loud, tmp_path, capsys):
    (tmp_path / "c.json").write_text(
        json.dumps({**json.loads((loud / "config.json").read_text()), "model": {"name": "x"}})
    )
    assert main(["export", str(loud), "--format", "safetensors", "-o", str(tmp_path / "w.safetensors")]) == 0
    options = ["-o", str(tmp_path / "again"), "--config", str(tmp_path / "c.json")]
    assert main(["import", str(tmp_path / "w.safetensors"), *options]) == 2
    assert "is of a model folder with a x; the checkpoint holds a unet1d" in capsys.readouterr().err


def test_a_network_without_a_place_in_the_published_checkpoint_is_named(tiny_model):
    model = load_model(tiny_model)
    model = model._replace(weights={**model.weights, "det_x2": model.weights["deterministic"]})
    arch = export_cli.arch_of(model)
    said = list(export_cli._remarks(model, Path("m/config.json"), "dicose", arch))
    assert said[0] == f"left out det_x2, for which a published {arch} checkpoint has no place"


def test_a_u_net_is_not_exported_for_code_that_has_roformers_alone(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_cli, "_import_torch", lambda: None)
    assert main(["export", str(tiny_model), "--format", "msst", "-o", str(tmp_path / "net.ckpt")]) == 2
    assert "separator is a U-Net: --format dicose" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_model_over_the_limit_of_an_onnx_file_is_refused_before_it_is_traced(
    tiny_model, tmp_path, capsys, monkeypatch
):
    message = pytest.importorskip("google.protobuf.message")

    class TooLarge:
        def SerializeToString(self):
            raise message.EncodeError("Failed to serialize proto")

    traced = []
    to_onnx = lambda function, shapes: traced.append(shapes) or TooLarge()
    monkeypatch.setitem(sys.modules, "jax2onnx", SimpleNamespace(to_onnx=to_onnx))
    argv = ["export", str(tiny_model), "--format", "onnx", "-o", str(tmp_path / "net.onnx")]
    assert main(argv) == 2  # what comes to more than the parameters is known when it is written
    assert "(Failed to serialize proto); take --format stablehlo" in capsys.readouterr().err and len(traced) == 1
    monkeypatch.setattr(programs, "LARGEST", 1000)
    assert main(argv) == 2 and len(traced) == 1
    assert "too large for one ONNX file, which holds 2 GB (its parameters alone are" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
