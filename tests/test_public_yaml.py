"""Every distinct `model:` section of the public YAMLs, made small: imported and answered alike, or refused by name."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from msr_jax.cli import main
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.model_folder import load_model, parameter_shapes
from msr_jax.weights.roformer_names import published_network, published_shapes
from msr_jax.weights.yaml_config import told_sizes
from tests.make_public_yaml import digest, mixture, samples_of, weights
from tests.parity.fixtures import SHIPPED

MADE = json.loads((SHIPPED / "public_yaml.json").read_text())
ANSWERED = [section for section in MADE["sections"] if "answer" in section]
NUMBERS = range(len(MADE["answers"]))
# Compiling is most of the time: in the ordinary run answer a BS-RoFormer with biases and a Mel-Band RoFormer.
ORDINARY = (3, 8)
ANSWERS = [pytest.param(n, marks=[] if n in ORDINARY else [pytest.mark.slow]) for n in NUMBERS]


def write_yaml(section, path):
    """The YAML as the public ones are, with the public tag on the tuple of windows."""
    training = {"instruments": section["stems"], "target_instrument": section["target"]}
    audio = {"sample_rate": section["rate"] or 44_100, "chunk_size": section["chunk"] or 352_800}
    told = {"audio": audio, "model": section["fields"], "training": training}
    windows = "  multi_stft_resolutions_window_sizes: !!python/tuple\n  - 4096\n  - 2048\n"
    path.write_text(yaml.safe_dump(told, sort_keys=False).replace("model:\n", f"model:\n{windows}"))


def reference_weights(section):
    """The reference class's state dict: its names and shapes, as recorded, and weights by the rule."""
    name = "mel_band_roformer" if "num_bands" in section["fields"] else "bs_roformer"
    is_biased = bool(section["fields"].get("use_shared_bias"))
    model = {"name": name, **told_sizes(section["fields"], name, "the section"), "attention_bias": is_biased}
    backbone = make_backbone(model)
    shapes = published_shapes(published_network(model, "deterministic"), parameter_shapes(backbone, "deterministic"))
    if is_biased:
        shapes |= {"shared_qkv_bias": (24,), "shared_out_bias": (4,)}
    assert digest(shapes) == MADE["answers"][section["answer"]]["keys"]
    tensors = weights(shapes)
    if is_biased:
        top = {"to_qkv.bias": "shared_qkv_bias", "to_out.0.bias": "shared_out_bias"}
        tensors |= {k: tensors[top[end]] for end in top for k in tensors if k.endswith(end)}
    return tensors


@pytest.mark.parametrize("number", ANSWERS)
def test_a_public_section_is_imported_and_answers_as_its_program(number, tmp_path):
    answer, samples = MADE["answers"][number], None
    for section in (section for section in ANSWERED if section["answer"] == number):
        save_file(reference_weights(section), tmp_path / "w.safetensors")
        write_yaml(section, tmp_path / "c.yaml")
        options = ["--config", str(tmp_path / "c.yaml"), "-o", str(tmp_path / "m")]
        assert main(["import", str(tmp_path / "w.safetensors"), *options]) == 0
        model = load_model(tmp_path / "m")
        assert model.config["stems"] == ([section["target"]] if section["target"] else section["stems"])
        if samples is None:  # those of one answer differ in dropout and the like alone
            x = mixture(8 * section["fields"]["stft_hop_length"]).swapaxes(1, 2)
            stems, _ = make_backbone(model.config["model"]).separate(model.weights["deterministic"], x)
            samples = samples_of(np.asarray(stems).swapaxes(2, 3))
    assert np.abs(samples - answer["samples"]).max() <= 2e-5 * answer["peak"]


@pytest.mark.parametrize("section", [s for s in MADE["sections"] if "answer" not in s], ids=lambda s: s["family"])
def test_a_section_of_another_network_is_refused_by_its_name(section, tmp_path, capsys):
    save_file(reference_weights(ANSWERED[0]), tmp_path / "w.safetensors")
    write_yaml(section, tmp_path / "c.yaml")
    options = ["--config", str(tmp_path / "c.yaml"), "-o", str(tmp_path / "m")]
    assert main(["import", str(tmp_path / "w.safetensors"), *options]) == 2
    message = capsys.readouterr().err
    assert "conformer" in message and "time_conformer_depth" in message and not (tmp_path / "m").exists()
