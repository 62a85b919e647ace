"""Official checkpoints in and out: the right tensors, and nothing in the file is ever run."""

import io
import json
import os
import pickle
import shutil
import sys
import zipfile

import jax
import numpy as np
import pytest

from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.export_cli import arch_of, published_tensors, pypi_tensors, state_dict
from msr_jax.weights.lightning import read_checkpoint
from msr_jax.weights.model_folder import flatten, load_model, parameter_shapes, write_tensors
from msr_jax.weights.torch_names import PREFIXES, from_torch, to_name, to_path, to_torch
from tests.conftest import TINY_SIZES
from tests.parity.fixtures import load, parity_folders

ARCHS = {"det": "unet_det", "diff": "unet_diffusion", "cd": "unet_consistency"}


def fixture_file(name):
    found = [
        p for folder in parity_folders() for p in folder.rglob(name.rsplit("/")[-1]) if str(p).endswith("/" + name)
    ]
    assert found, f"{name} is shipped in tests/fixtures"
    return found[0]


@pytest.mark.parametrize("kind", ARCHS)
def test_every_tensor_of_the_official_checkpoints_has_its_place(kind):
    keys = json.loads(fixture_file(f"unet/keys_{kind}_full.json").read_text())
    backbone = make_backbone({"name": "unet1d"})
    for network, prefix in PREFIXES[ARCHS[kind]].items():
        theirs = {
            k.removeprefix(prefix): np.empty(v["shape"], np.int8) for k, v in keys.items() if k.startswith(prefix)
        }
        ours = from_torch(theirs)
        assert {k: v.shape for k, v in ours.items()} == parameter_shapes(backbone, network)
        assert {k: v.shape for k, v in to_torch(ours).items()} == {k: v.shape for k, v in theirs.items()}
        assert all(to_name(to_path(k)) == k for k in theirs)


@pytest.mark.parametrize("kind", ARCHS)
def test_a_training_checkpoint_is_imported_and_exported_bit_for_bit(kind, tmp_path, capsys):
    source = fixture_file(f"unet_{kind}_mini.ckpt")
    assert main(["import", str(source), "--arch", ARCHS[kind], "-o", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "ignored optimizer_states" in said and "read deterministic" in said
    original = read_checkpoint(source).state_dict
    exported = state_dict(load_model(tmp_path / "model"), ARCHS[kind])
    assert set(exported) == set(original)
    for name, tensor in original.items():
        np.testing.assert_array_equal(exported[name], tensor.read(), err_msg=name)
        assert exported[name].shape == tensor.shape


def separator(tmp_path):
    """The shipped separator: its tensors by published name, and its model folder, imported with all that is known."""
    source = fixture_file("unet_det_mini.ckpt")
    assert main(["import", str(source), "-o", str(tmp_path / "model")]) == 0
    tensors = {name: tensor.read() for name, tensor in read_checkpoint(source).state_dict.items()}
    return tensors, load_model(tmp_path / "model")


RENAMED = {
    "bare": lambda name: name.removeprefix("model.unet."),
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "compiled whole": lambda name: f"_orig_mod.{name}",
}


@pytest.mark.parametrize("how", [*RENAMED, "more", "averages"])
def test_a_separator_is_found_under_any_wrapper(how, tmp_path, capsys):
    tensors, known = separator(tmp_path)
    renamed = {RENAMED.get(how, str)(name): value for name, value in tensors.items()}
    if how == "more":
        renamed["loss.window"] = np.zeros(4, np.float32)
    if how == "averages":
        renamed |= {f"ema_models.0.{name}": 2 * value for name, value in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", renamed, np.float32)
    sizes = known.config["model"]
    (tmp_path / "sizes.json").write_text(
        json.dumps({k: sizes[k] for k in ("resnet_groups", "attention_heads", "attention_features")})
    )
    capsys.readouterr()
    argv = [
        "import",
        str(tmp_path / "x.safetensors"),
        "-o",
        str(tmp_path / "again"),
        "--config",
        str(tmp_path / "sizes.json"),
    ]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert ("loss.window" in said) == (how == "more") and ("ema_models.0" in said) == (how == "averages")
    assert "assumed" not in said
    again = load_model(tmp_path / "again")
    assert again.config["model"] == sizes
    jax.tree.map(np.testing.assert_array_equal, again.weights, known.weights)


def test_what_no_tensor_of_a_separator_tells_is_said_to_be_assumed(tmp_path, capsys):
    tensors, _ = separator(tmp_path)
    write_tensors(tmp_path / "x.safetensors", tensors, np.float32)
    argv = ["import", str(tmp_path / "x.safetensors"), "-o", str(tmp_path / "again"), "--heads", "1"]
    main(argv)
    assert "assumed resnet_groups 8, which no tensor tells" in capsys.readouterr().out


def test_heads_that_were_assumed_and_do_not_fit_are_asked_for(tmp_path, capsys):
    tensors, _ = separator(tmp_path)
    write_tensors(tmp_path / "x.safetensors", tensors, np.float32)
    assert main(["import", str(tmp_path / "x.safetensors"), "-o", str(tmp_path / "again")]) == 2
    assert "attention_heads were assumed: --heads, --groups or --config tells them" in capsys.readouterr().err


def test_a_separator_of_other_stems_and_channels_gets_names_and_separates(tmp_path, capsys):
    sizes = {**TINY_SIZES, "in_channels": 2, "context_features": 3}
    params = make_backbone({"name": "unet1d", **sizes}).init(jax.random.key(0), False)
    tensors = {f"model.unet.{k}": v for k, v in to_torch(flatten(jax.device_get(params))).items()}
    write_tensors(tmp_path / "x.safetensors", tensors, np.float32)
    (tmp_path / "sizes.json").write_text(
        json.dumps({k: sizes[k] for k in ("resnet_groups", "attention_heads", "attention_features") if k in sizes})
    )
    argv = [
        "import",
        str(tmp_path / "x.safetensors"),
        "-o",
        str(tmp_path / "m"),
        "--config",
        str(tmp_path / "sizes.json"),
    ]
    assert main(argv) == 0
    assert "assumed the names stem_0, stem_1, stem_2" in capsys.readouterr().out
    config = load_model(tmp_path / "m").config
    assert config["channels"] == 2 and config["stems"] == ["stem_0", "stem_1", "stem_2"]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"attention_heads": "two"}, "model.attention_heads must be a whole number"),
        ({"unet": [1]}, "holds no mapping of a U-Net's sizes"),
        ({"kernel_multiplier_downsample": 3}, "take the config that these weights were made with"),
    ],
)
def test_sizes_that_cannot_be_are_one_sentence(told, words, tmp_path, capsys):
    (tmp_path / "sizes.json").write_text(json.dumps(told))
    source = str(fixture_file("unet_det_mini.ckpt"))
    assert main(["import", source, "-o", str(tmp_path / "m"), "--config", str(tmp_path / "sizes.json")]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and not (tmp_path / "m").exists()


def test_linear_attention_is_not_exported_for_a_package_without_it(tiny_model):
    model = load_model(tiny_model)
    sizes = {"name": "bs_roformer", "linear_transformer_depth": 1}
    with pytest.raises(UserError, match="has no linear attention: take --format msst"):
        pypi_tensors(model._replace(config={**model.config, "model": sizes}))


def test_a_backbone_of_ones_own_is_exported_to_no_published_program(tiny_model):
    model = load_model(tiny_model)
    own = model._replace(config={**model.config, "model": {**model.config["model"], "name": "mine"}})
    for export in (arch_of, lambda m: published_tensors(m, "deterministic"), pypi_tensors):
        with pytest.raises(UserError, match="no published program has the backbone 'mine'"):
            export(own)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ARCHS)
def test_the_exported_file_loads_in_torch_without_running_code(kind, tmp_path):
    torch = pytest.importorskip("torch")
    source = fixture_file(f"unet_{kind}_mini.ckpt")
    assert main(["import", str(source), "--arch", ARCHS[kind], "-o", str(tmp_path / "model")]) == 0
    out = tmp_path / "out.ckpt"
    assert main(["export", str(tmp_path / "model"), "--format", "dicose", "-o", str(out)]) == 0
    loaded = torch.load(out, weights_only=True)
    assert isinstance(loaded["pytorch-lightning_version"], str)
    for name, tensor in read_checkpoint(source).state_dict.items():
        np.testing.assert_array_equal(loaded["state_dict"][name].numpy(), tensor.read())


def test_export_without_torch_says_what_to_install(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["export", str(tiny_model), "--format", "dicose", "-o", str(tmp_path / "x.ckpt")]) == 2
    assert "msr_jax[torch]" in capsys.readouterr().err
    assert not (tmp_path / "x.ckpt").exists()


class Attack:
    """Unpickled by pickle.load, this would run a command."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def write_checkpoint(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)


def test_a_hostile_pickle_runs_nothing(tmp_path, capsys):
    marker = tmp_path / "ran"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        attacks = [
            pickle.dumps({"state_dict": Attack(os.system, f"touch {marker}")}),
            pickle.dumps({"state_dict": {"a": Attack(eval, f"open({str(marker)!r}, 'w')")}}),
            pickle.dumps({"state_dict": {}, "x": Attack(exec, f"open({str(marker)!r}, 'w')")}),
            b"\x80\x02cevil_module\nanything\n.",
            b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.",
        ]
        for k, attack in enumerate(attacks):
            path = tmp_path / f"{k}.ckpt"
            write_checkpoint(path, attack)
            assert main(["import", str(path), "--arch", "unet_det", "-o", str(tmp_path / "model")]) == 2
            assert capsys.readouterr().err.count("\n") == 1
            assert not marker.exists() and "evil_module" not in sys.modules and not (tmp_path / "model").exists()
        with pytest.raises(FileNotFoundError):  # the marker is one that an attack would leave
            open(marker).close()
        pickle.load(io.BytesIO(attacks[1]))
        assert marker.exists()
    finally:
        sys.path.remove(str(tmp_path))


def test_damaged_and_foreign_checkpoints_are_refused_in_one_sentence(tmp_path, capsys):
    whole = fixture_file("unet_det_mini.ckpt")
    short = tmp_path / "short.ckpt"
    short.write_bytes(whole.read_bytes()[:100_000])
    parts = tmp_path / "parts.ckpt"  # whose end says that it is one zip of several
    parts.write_bytes(whole.read_bytes()[:-36] + b"\xff" * 5 + whole.read_bytes()[-31:])
    text = tmp_path / "text.ckpt"
    text.write_text("not a checkpoint")
    shutil.copy(whole, tmp_path / "det.ckpt")
    for path, arch, words in (
        (tmp_path / "none.ckpt", "unet_det", "does not exist"),
        (short, "unet_det", "not a PyTorch checkpoint in zip format, or is cut off"),
        (parts, "unet_det", "not a PyTorch checkpoint in zip format, or is cut off"),
        (text, "unet_det", "not a PyTorch checkpoint"),
        (tmp_path / "det.ckpt", "unet_diffusion", "is no unet_diffusion checkpoint"),
        (fixture_file("unet_diff_mini.ckpt"), "unet_det", "not a deterministic checkpoint"),
    ):
        assert main(["import", str(path), "--arch", arch, "-o", str(tmp_path / "model")]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
        assert not (tmp_path / "model").exists()


def test_a_tensor_that_reaches_outside_its_data_is_refused(tmp_path):
    arrays, _ = load(fixture_file("unet_det_mini.safetensors"))
    assert arrays
    checkpoint = read_checkpoint(fixture_file("unet_det_mini.ckpt"))
    tensor = next(iter(checkpoint.state_dict.values()))
    tensor.shape = (10**6, *tensor.shape[1:])
    with pytest.raises(UserError, match="reaches outside its data"):
        tensor.read()
