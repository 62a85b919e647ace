"""Public RoFormers in whatever file they come: which network it is, and the weights of it; others by their names."""

import argparse
import json
import re
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from msr_jax.cli import main
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.model_folder import flatten, load_model, parameter_shapes
from msr_jax.weights.roformer_names import published_network, published_shapes, renumber, unstack_tensors
from tests.parity.fixtures import SHIPPED
from tests.torch_files import as_dtype, write_torch

SHARED = {
    "dim": 6, "depth": 2, "stereo": True, "num_stems": 2, "time_transformer_depth": 1, "freq_transformer_depth": 1,
    "dim_head": 4, "heads": 2, "stft_hop_length": 16, "stft_n_fft": 64, "stft_win_length": 64, "mask_estimator_depth": 2,
    "attn_dropout": 0.0, "ff_dropout": 0.0,
}  # fmt: skip
SIZES = {
    "bs_roformer": {**SHARED, "freqs_per_bands": (3, 10, 20)},
    "mel_band_roformer": {**SHARED, "num_bands": 8, "sample_rate": 44_100},
}
KINDS = list(SIZES)
README = (Path(__file__).parents[1] / "msr_jax" / "weights" / "README.md").read_text()


def weights_of(kind, **changed):
    """A random published state dict of a network of these sizes."""
    model = {"name": kind, **SIZES[kind], **changed}
    shapes = published_shapes(
        published_network(model, "deterministic"), parameter_shapes(make_backbone(model), "deterministic")
    )
    rng = np.random.default_rng(0)
    tensors = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    table = lambda half: (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    return {k: table(len(v)) if k.endswith("freqs") else v for k, v in tensors.items()}


@pytest.fixture
def told(tmp_path):
    """kind -> the YAML of these weights."""

    def write(kind, stems=("Vocals", "No Vocals"), **changed):
        path = tmp_path / f"{kind}.yaml"
        audio = {"chunk_size": 640, "sample_rate": 44_100}
        sections = {"model": {**SIZES[kind], **changed}, "audio": audio, "training": {"instruments": stems}}
        path.write_text(yaml.safe_dump(json.loads(json.dumps(sections))))
        return str(path)

    return write


def imported(path, out, *options):
    """Published state dict of the imported folder."""
    assert main(["import", str(path), "-o", str(out), *options]) == 0
    model = load_model(out)
    params = flatten(model.weights["deterministic"])
    return model, unstack_tensors(published_network(model.config["model"], "deterministic"), params)


def refused(path, out, capsys, *options):
    """The sentence with which a file is refused."""
    assert main(["import", str(path), "-o", str(out), *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and not out.exists(), message
    return message


def assert_same(found, expected, tolerance=0.0):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrapper,prefix",
    [
        ("", ""),
        ("state", "module."),
        ("state_dict", "model."),
        ("model_state_dict", "_orig_mod."),
        ("model", "module._orig_mod."),
        ("ema", "model.unet."),
    ],
)
def test_wrappers_and_prefixes_do_not_hide_a_network(kind, wrapper, prefix, told, tmp_path):
    tensors = weights_of(kind)
    state = {prefix + k: v for k, v in tensors.items()}
    write_torch(tmp_path / "w.ckpt", {"epoch": 3, wrapper: state} if wrapper else state)
    model, found = imported(tmp_path / "w.ckpt", tmp_path / "model", "--config", told(kind))
    assert model.config["model"]["name"] == kind and model.config["stems"] == ["Vocals", "No Vocals"]
    assert_same(found, tensors)


@pytest.mark.parametrize(
    ("nest", "left"),
    [
        (lambda state, counter: {"model": {"state_dict": state}}, ""),
        (lambda state, counter: {"ema": {"module": state, "decay": 0.9}}, ""),
        (lambda state, counter: {"model": {"state_dict": state, "step": counter}}, ""),
        (lambda state, counter: {"state": {"model": {"a": counter}}, "state_dict": state}, "state"),
        (lambda state, counter: {"ema": {"n_averaged": counter, **_under("module.", state)}}, "n_averaged"),
        (lambda state, counter: {"state_dict": {"loss.window": counter, **_under("model.", state)}}, "loss.window"),
        (lambda state, counter: {"ema": _under("x.", state), "model": state}, "ema"),
    ],
)
def test_what_lies_beside_a_network_or_around_it_is_told_and_left(nest, left, told, tmp_path, capsys):
    tensors = weights_of("mel_band_roformer")
    write_torch(tmp_path / "w.ckpt", nest(tensors, np.ones(1, np.float32)))
    _, found = imported(tmp_path / "w.ckpt", tmp_path / "m", "--config", told("mel_band_roformer"))
    assert_same(found, tensors)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("ignored ")] == (
        [
            f"ignored {left}.* (1 tensors of no known network)"
            if left in ("n_averaged", "loss.window")
            else f"ignored {left}"
        ]
        if left
        else []
    )


def _under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def test_of_two_networks_in_a_file_both_are_named(told, tmp_path, capsys):
    tensors = weights_of("bs_roformer")
    write_torch(tmp_path / "w.ckpt", {"state_dict": {**_under("model.", tensors), **_under("ema_model.", tensors)}})
    message = refused(tmp_path / "w.ckpt", tmp_path / "m", capsys, "--config", told("bs_roformer"))
    assert "holds 2 networks, among them model.… and ema_model.…" in message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_every_precision_is_read_from_every_form(dtype, form, told, tmp_path):
    tensors = weights_of("mel_band_roformer")
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    stored = as_dtype(tensors, dtype)
    if form == "safetensors":
        save_file(stored, path)
    else:
        write_torch(path, stored, is_old=form == "old")
    _, found = imported(path, tmp_path / "model", "--config", told("mel_band_roformer"))
    assert_same(found, {k: v.astype(np.float32) for k, v in stored.items()})


def test_tensors_that_safetensors_stores_once_have_all_their_names(told, tmp_path):
    tensors = weights_of("bs_roformer")
    tables = [k for k in tensors if k.endswith("freqs")]
    kept = {k: v for k, v in tensors.items() if k not in tables[1:]}
    save_file(kept, tmp_path / "w.safetensors", metadata=dict.fromkeys(tables[1:], tables[0]))
    assert_same(imported(tmp_path / "w.safetensors", tmp_path / "m", "--config", told("bs_roformer"))[1], tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_rotary_tables_follow_from_the_width_of_a_head(kind, told, tmp_path):
    tensors = weights_of(kind)
    save_file({k: v for k, v in tensors.items() if not k.endswith("freqs")}, tmp_path / "w.safetensors")
    assert_same(imported(tmp_path / "w.safetensors", tmp_path / "m", "--config", told(kind))[1], tensors, 1e-6)


@pytest.mark.parametrize("name", ["raw", "msst_full", "lightning", "fp16"])
def test_a_public_checkpoint_of_either_form_answers_as_its_program(name, tmp_path):
    source = SHIPPED / "mel_band_roformer"
    options = ["--config", str(source / "melrf_ckpt_micro.yaml")]
    model, _ = imported(source / f"melrf_ckpt_micro_{name}.ckpt", tmp_path / "m", *options)
    assert model.config["stems"] == ["vocals"] and model.config["segment"] == 640
    arrays = load_file(source / "melrf_ckpt_micro_expected.safetensors")
    expected = arrays[f"out/sources_{'raw' if name == 'msst_full' else name}"]  # no stem axis
    backbone = make_backbone(model.config["model"])
    stems, _ = backbone.separate(model.weights["deterministic"], arrays["in/mixture"].swapaxes(1, 2))
    found = np.asarray(stems)[:, 0, : expected.shape[-1]].swapaxes(1, 2)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["own", "shared", "both"])
def test_biases_of_attention_are_read_whether_each_block_has_its_own_or_all_share_them(form, told, tmp_path):
    tensors = weights_of("bs_roformer", attention_bias=True)
    shared = {"shared_qkv_bias": np.arange(24, dtype=np.float32), "shared_out_bias": np.arange(6, dtype=np.float32)}
    if form != "own":
        of = lambda name: shared["shared_qkv_bias" if "to_qkv" in name else "shared_out_bias"]
        tensors = {k: of(k) if k.endswith(("to_qkv.bias", "to_out.0.bias")) else v for k, v in tensors.items()}
    stored = {k: v for k, v in tensors.items() if form != "shared" or not k.endswith(("to_qkv.bias", "to_out.0.bias"))}
    save_file(stored | (shared if form != "own" else {}), tmp_path / "w.safetensors")
    config = told("bs_roformer", use_shared_bias=form != "own")
    model, found = imported(tmp_path / "w.safetensors", tmp_path / "m", "--config", config)
    assert_same(found, tensors)
    assert model.config["model"]["attention_bias"]


def test_the_numbers_of_the_pypi_package_are_understood_and_it_keeps_the_lowest_bin(told, tmp_path):
    tensors = weights_of("mel_band_roformer")
    save_file(renumber(tensors, 1), tmp_path / "w.safetensors")
    model, found = imported(tmp_path / "w.safetensors", tmp_path / "m", "--config", told("mel_band_roformer"))
    assert_same(found, tensors)
    assert model.config["model"]["zero_dc"] is False


def test_what_no_tensor_tells_comes_from_the_yaml_or_is_its_program_s_default(told, tmp_path):
    save_file(weights_of("mel_band_roformer"), tmp_path / "w.safetensors")
    unseen = {"skip_connection": True, "match_input_audio_length": True}
    model, _ = imported(tmp_path / "w.safetensors", tmp_path / "m", "--config", told("mel_band_roformer", **unseen))
    sizes = model.config["model"]
    assert sizes["skip_connection"] and sizes["match_input_audio_length"] and sizes["zero_dc"]
    assert sizes["stft_hop_length"] == 16 and model.config["segment"] == 640


@pytest.mark.parametrize("text", [None, "training: {instruments: [a, b]}"])
def test_without_a_yaml_or_its_model_section_a_hop_of_441_is_assumed_and_said(text, tmp_path, capsys):
    bands = {"freqs_per_bands": (500, 525), "stft_n_fft": 2048, "stft_win_length": 2048}
    save_file(weights_of("bs_roformer", **bands), tmp_path / "w.safetensors")
    (tmp_path / "c.yaml").write_text(text or "")
    options = ["--config", str(tmp_path / "c.yaml")] if text else []
    model, _ = imported(tmp_path / "w.safetensors", tmp_path / "m", *options)
    assert model.config["model"]["stft_hop_length"] == 441
    assert "assumed an STFT hop of 441 samples" in capsys.readouterr().out
    assert model.config["stems"] == (["a", "b"] if text else ["stem_0", "stem_1"])


SOME = "stft_hop_length: 16, zero_dc: false, skip_connection: true"
WHOLE = f"dim: 6, depth: 2, stft_win_length: 64, {SOME}"
CHUNK = "{chunk_size: 640, sample_rate: 22050}"


@pytest.mark.parametrize(
    "text", [f"model: {{{SOME}}}", f"{{{SOME}}}", f"augment: {{dim: 1, depth: 2}}\nmodel: {{{SOME}}}"]
)
def test_a_yaml_of_some_fields_tells_those_and_what_it_leaves_out_is_said(text, tmp_path, capsys):
    save_file(weights_of("bs_roformer"), tmp_path / "w.safetensors")
    (tmp_path / "c.yaml").write_text(text)
    model, _ = imported(tmp_path / "w.safetensors", tmp_path / "m", "--config", str(tmp_path / "c.yaml"))
    sizes = model.config["model"]
    assert (sizes["stft_hop_length"], sizes["zero_dc"], sizes["skip_connection"]) == (16, False, True)
    said = capsys.readouterr().out
    assert "assumed stft_win_length 64, stft_normalized false, which no tensor tells" in said and "zero_dc" not in said
    assert "assumed the stems' names stem_0, stem_1, chunks of 485100 samples, songs of 44100 Hz" in said


@pytest.mark.parametrize(
    "text",
    [
        f"size: &size {{dim: 6, depth: 2}}\naudio: {CHUNK}\nmodel: {{<<: *size, stft_win_length: 64, {SOME}}}\ntraining: {{instruments: [a, b]}}",
        f"config: {{audio: {CHUNK}, model: {{{WHOLE}}}, training: {{instruments: [a, b]}}}}",
    ],
)
def test_the_sections_are_those_around_the_one_called_model_at_whatever_level(text, tmp_path, capsys):
    save_file(weights_of("bs_roformer"), tmp_path / "w.safetensors")
    (tmp_path / "c.yaml").write_text(text)
    model, _ = imported(tmp_path / "w.safetensors", tmp_path / "m", "--config", str(tmp_path / "c.yaml"))
    assert model.config["model"]["stft_hop_length"] == 16 and model.config["model"]["skip_connection"]
    assert model.config["stems"] == ["a", "b"]
    assert (model.config["segment"], model.config["sample_rate"]) == (640, 22_050)
    assert "assumed" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["hello: {a: 1}", "model: {zerodc: false}\ntraining: {batch_size: 1}"])
def test_a_yaml_that_tells_nothing_is_refused(text, tmp_path, capsys):
    save_file(weights_of("bs_roformer"), tmp_path / "w.safetensors")
    (tmp_path / "c.yaml").write_text(text)
    message = refused(tmp_path / "w.safetensors", tmp_path / "m", capsys, "--config", str(tmp_path / "c.yaml"))
    assert "--config tells nothing of" in message and "such as model.dim" in message


def test_mel_bands_without_a_yaml_tell_rate_and_fft(tmp_path):
    bands = {"num_bands": 12, "sample_rate": 48_000, "stft_n_fft": 2048, "stft_win_length": 2048}
    save_file(weights_of("mel_band_roformer", **bands), tmp_path / "w.safetensors")
    model, _ = imported(tmp_path / "w.safetensors", tmp_path / "m")
    assert {k: model.config["model"][k] for k in bands} == bands and model.config["model"]["stereo"]
    assert model.config["sample_rate"] == 48_000


def test_a_rate_of_the_songs_that_is_not_that_of_the_mel_bands_is_taken_and_said(told, tmp_path, capsys):
    bands = {"num_bands": 12, "sample_rate": 48_000, "stft_n_fft": 1024, "stft_win_length": 1024}
    save_file(weights_of("mel_band_roformer", **bands), tmp_path / "w.safetensors")
    model, _ = imported(tmp_path / "w.safetensors", tmp_path / "m", "--config", told("mel_band_roformer", **bands))
    assert model.config["sample_rate"] == 44_100
    assert "assumed songs of 44100 Hz, as audio.sample_rate says, though" in capsys.readouterr().out


def test_bands_that_fit_mono_and_stereo_are_what_the_yaml_says(told, tmp_path):
    mono = {"stft_n_fft": 66, "stft_win_length": 66, "freqs_per_bands": (4, 10, 20), "stereo": False}
    save_file(weights_of("bs_roformer", **mono), tmp_path / "w.safetensors")
    model, _ = imported(tmp_path / "w.safetensors", tmp_path / "m", "--config", told("bs_roformer", **mono))
    assert model.config["channels"] == 1 and tuple(model.config["model"]["freqs_per_bands"]) == (4, 10, 20)


def test_an_import_holds_one_tensor_at_a_time(told, tmp_path):
    wide = {"dim": 128, "num_stems": 8}
    path = tmp_path / "w.safetensors"
    save_file(weights_of("bs_roformer", **wide), path)
    config = told("bs_roformer", list("abcdefgh"), **wide)
    tracemalloc.start()
    try:
        assert main(["import", str(path), "-o", str(tmp_path / "m"), "--config", config]) == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.5 * path.stat().st_size


FOREIGN = {
    "mask_estimators.0.segm.0.conv.weight": "HyperACE",
    "layers.0.0.layers.0.0.pope_embed.bias": "PolarFormer",
    "layers.0.0.layers.0.conv.net.1.weight": "conformer",
    "layers.0.0.forward_blocks.0.mixer.A_log": "Mamba2",
    "layers.0.0.layers.0.0.branch.to_qkv.weight": "hyper-connections",
    "layers.0.0.layers.0.0.wsa.sink": "windowed sink attention",
    "layers.1.0.layers.0.0.to_value_residual_mix.weight": "value residuals",
    "net.0.band_net.input_norm.weight": "Apollo",
    "encoder.0.SDlayer.convs.0.weight": "SCNet",
    "encoder_blocks.0.tfc_tdf.blocks.0.tfc1.2.weight": "MDX23C",
    "crosstransformer.layers.0.self_attn.in_proj_weight": "HT Demucs",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_network_is_named_with_the_tensor_that_told_so(name, tmp_path, capsys):
    own = weights_of("bs_roformer") if "." in name and name.startswith(("layers", "mask")) else {}
    save_file({**own, name: np.zeros(2, np.float32)}, tmp_path / "w.safetensors")
    for options in ((), ("--arch", "bsrf_det")):
        message = refused(tmp_path / "w.safetensors", tmp_path / "m", capsys, *options)
        assert FOREIGN[name] in message and name in message
        assert "choose another --arch" not in message and "take the config" not in message


@pytest.mark.parametrize(
    "field,value,words",
    [
        ("time_conformer_depth", 1, "conformer"),
        ("use_pope", True, "PolarFormer"),
        ("num_residual_streams", 4, "hyper-connections"),
        ("num_bands", 60, "Mel-Band"),
    ],
)
def test_the_yaml_of_another_network_is_named(field, value, words, told, tmp_path, capsys):
    save_file(weights_of("bs_roformer"), tmp_path / "w.safetensors")
    message = refused(
        tmp_path / "w.safetensors", tmp_path / "m", capsys, "--config", told("bs_roformer", **{field: value})
    )
    assert words in message and field in message


def test_ten_kinds_of_bad_files_get_a_sentence_each(told, tmp_path, capsys):
    tensors, kind = weights_of("mel_band_roformer"), "mel_band_roformer"
    config = told(kind)
    whole = tmp_path / "whole.ckpt"
    write_torch(whole, tensors)
    bytes_of = {
        "cut.ckpt": whole.read_bytes()[:-4000],
        "page.ckpt": b"<!DOCTYPE html><html>login</html>",
        "pointer.ckpt": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "pickle.pkl": b"\x80\x04K\x01.",
        "damaged.safetensors": b"\x10\0\0\0\0\0\0\0{not a header  }",
    }
    for name, data in bytes_of.items():
        (tmp_path / name).write_bytes(data)
    write_torch(tmp_path / "nothing.ckpt", {"epoch": 3, "model": {}})
    write_torch(tmp_path / "module.ckpt", {"model": argparse.Namespace(layers=3)})
    name = "layers.0.1.layers.0.1.net.4.bias"
    write_torch(tmp_path / "lacking.ckpt", {k: v for k, v in tensors.items() if k != name})
    write_torch(tmp_path / "surplus.ckpt", {**tensors, "layers.0.0.layers.0.0.extra": tensors[name]})
    bands = {k: v for k, v in tensors.items() if not k.startswith("band_split.to_features.3")}
    write_torch(tmp_path / "bands.ckpt", bands)
    write_torch(tmp_path / "number.ckpt", {**tensors, 0: tensors[name]})
    write_torch(tmp_path / "whole_numbers.ckpt", {k: v.astype(np.int64) for k, v in tensors.items()})
    quantised = {k: np.zeros(v.shape, ml_dtypes.float8_e4m3fn) for k, v in tensors.items()}
    header, end = {}, 0
    for k, v in quantised.items():
        header[k] = {"dtype": "F8_E4M3", "shape": list(v.shape), "data_offsets": [end, end := end + v.nbytes]}
    text = json.dumps(header).encode()
    data = b"".join(v.tobytes() for v in quantised.values())
    (tmp_path / "quantised.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    told_of = []
    for name, words in (
        ("none.ckpt", "does not exist"),
        ("cut.ckpt", "is cut off"),
        ("page.ckpt", "a web page"),
        ("pointer.ckpt", "a pointer to one (Git LFS)"),
        ("pickle.pkl", "is a pickle but no PyTorch checkpoint; nothing in it was run"),
        ("damaged.safetensors", "cannot be read as safetensors"),
        ("nothing.ckpt", "holds no state_dict"),
        ("module.ckpt", "an object of the class"),
        ("lacking.ckpt", "lacks layers.0.1.layers.0.1.net.4.bias; the file is damaged, or of a variant"),
        ("surplus.ckpt", "holds what the config does not know: layers.0.0.layers.0.0.extra; the file is damaged"),
        ("bands.ckpt", "lacks tensors of a RoFormer"),
        ("number.ckpt", "the state_dict entry 0 is no name of a tensor"),
        ("whole_numbers.ckpt", "as int64, and weights are read in float16"),
        ("quantised.safetensors", "as F8_E4M3, and weights are read in float16"),
    ):
        message = refused(tmp_path / name, tmp_path / "m", capsys, "--config", config)
        assert words in message and "--arch" not in message, message
        if row := re.search(rf"^\| `{name}`.* \| (.*) \|$", README, re.MULTILINE):
            assert re.fullmatch(re.escape(row[1]).replace("…", ".*"), message.split(f"{tmp_path / name} ")[1].strip())
            told_of.append(name)
    assert len(told_of) == 11, "the page has these kinds as they are"
    message = refused(whole, tmp_path / "m", capsys, "--config", told(kind, sample_rate=22_050))
    assert "mel bands are not those of 22050 Hz" in message and "band " in message
    message = refused(whole, tmp_path / "m", capsys, "--config", told(kind, dim=7))
    assert "says dim = 7, but the weights of" in message
    message = refused(whole, tmp_path / "m", capsys, "--config", told(kind, stft_hop_length=65))
    assert "whole.ckpt with --config: stft_hop_length (65) <" in message
    message = refused(whole, tmp_path / "m", capsys, "--config", told(kind, freq_transformer_depth=0))
    assert "says freq_transformer_depth = 0; a network without such transformers" in message
    message = refused(whole, tmp_path / "m", capsys, "--config", config, "--arch", "bsrf_det")
    assert "holds a mel_band_roformer and is no bsrf_det checkpoint; leave --arch out" in message
