"""BS-RoFormer checkpoints in and out, and what their configs may say."""

import errno
import functools
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from msr_jax import weights
from msr_jax.cli import main
from msr_jax.config import bsrf_base
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.export_cli import state_dict
from msr_jax.weights.lightning import read_checkpoint
from msr_jax.weights.model_folder import flatten, load_model, parameter_shapes, unflatten
from msr_jax.weights.roformer_names import published_network, published_shapes, stack_tensors, unstack_tensors
from msr_jax.weights.yaml_config import find_section, read_yaml
from tests.parity.fixtures import SHIPPED, parity_folders

ARCHS = {"det": "bsrf_det", "diff": "bsrf_diffusion", "cd": "bsrf_consistency"}
YAML = """
audio: {chunk_size: 512, sample_rate: 44100}
model:
  dim: 8
  depth: 1
  stereo: true
  num_stems: 4
  time_transformer_depth: 1
  freq_transformer_depth: 1
  freqs_per_bands: !!python/tuple [2, 3, 4, 8]
  dim_head: 4
  heads: 2
  stft_n_fft: 32
  stft_hop_length: 8
  stft_win_length: 32
  mlp_expansion_factor: 2
training: {instruments: [kick, bass, other, vocals], target_instrument: null}
"""


def fixture(name):
    found = [folder / "bs_roformer" / name for folder in parity_folders() if (folder / "bs_roformer" / name).exists()]
    if not found:
        pytest.skip(f"{name} is not shipped; set MSR_PARITY_DIR")
    return found[0]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(YAML)
    return tmp_path / "config.yaml"


def import_into(path, arch, out, *options):
    return main(["import", str(path), "--arch", arch, "-o", str(out), *map(str, options)])


@pytest.mark.parametrize("kind", ARCHS)
def test_a_training_checkpoint_is_imported_and_exported_bit_for_bit(kind, tmp_path, capsys):
    source = fixture(f"ckpt_micro_{kind}.ckpt")
    assert import_into(source, ARCHS[kind], tmp_path / "model") == 0
    assert "ignored optimizer_states" in capsys.readouterr().out
    original = read_checkpoint(source).state_dict
    exported = state_dict(load_model(tmp_path / "model"), ARCHS[kind])
    assert set(exported) == set(original)
    for name, tensor in original.items():
        np.testing.assert_array_equal(exported[name], tensor.read(), err_msg=name)


@pytest.mark.parametrize("kind", ["msst_raw", "msst_full"])
def test_public_weights_go_through_a_model_folder_to_safetensors_and_back(kind, config, tmp_path):
    source = fixture(f"ckpt_micro_{kind}.ckpt")
    assert import_into(source, "bsrf_det", tmp_path / "model", "--config", config) == 0
    model = load_model(tmp_path / "model")
    assert model.config["stems"] == ["kick", "bass", "other", "vocals"] and model.config["segment"] == 512
    assert model.config["model"]["stft_hop_length"] == 8 and model.config["channels"] == 2
    out = tmp_path / "out.safetensors"
    assert main(["export", str(tmp_path / "model"), "--format", "safetensors", "-o", str(out)]) == 0
    original, exported = read_checkpoint(source).state_dict, read_checkpoint(out).state_dict
    assert set(exported) == set(original)
    assert all((exported[k].read() == original[k].read()).all() for k in original)
    assert import_into(out, "bsrf_det", tmp_path / "again", "--config", config) == 0
    again = load_model(tmp_path / "again").weights
    jax.tree.map(np.testing.assert_array_equal, again, model.weights)


@pytest.mark.parametrize(
    "keys,sizes",
    [
        ("keys_det_full", {}),
        ("keys_msst_384_8", {}),
        ("keys_msst_viperx_ep317", {"dim": 512, "depth": 12, "num_stems": 1, "mlp_expansion_factor": 4}),
        ("keys_msst_viperx_ep937", {"depth": 12, "num_stems": 1, "mlp_expansion_factor": 4}),
        ("keys_diff_full", {}),
        ("keys_cd_full", {}),
    ],
)
def test_every_tensor_of_the_official_checkpoints_has_its_place(keys, sizes):
    listed = json.loads(fixture(f"{keys}.json").read_text())["state_dict"]
    listed = {k: tuple(v["shape"]) for k, v in listed.items()}
    model = {**bsrf_base().model.to_dict(), **sizes}
    backbone = make_backbone(model)
    for network, prefix in (
        ("deterministic", ""),
        ("deterministic", "model.unet."),
        ("deterministic", "pre_trained_mixture_feature_extractor_model.model.unet."),
        ("diffusion", "model.unet."),
        ("consistency", "net.model.unet."),
    ):
        own = {k.removeprefix(prefix): v for k, v in listed.items() if k.startswith(prefix)}
        if "band_split.to_features.0.0.gamma" in own and ("to_time.0.1.weight" in own) == (network != "deterministic"):
            net = published_network(model, network)
            assert published_shapes(net, parameter_shapes(backbone, network)) == own
            break
    else:
        raise AssertionError(f"{keys} holds no network")


def test_stacking_and_unstacking_are_inverse_for_every_option():
    for change in ({}, {"linear_transformer_depth": 1}, {"time_transformer_depth": 2}, {"mask_estimator_depth": 3}):
        tiny = {
            "dim": 6,
            "depth": 2,
            "num_stems": 2,
            "dim_head": 2,
            "heads": 2,
            "stft_n_fft": 16,
            "stft_win_length": 16,
        }
        model = {**bsrf_base().model.to_dict(), **tiny, "stft_hop_length": 4, "freqs_per_bands": (1, 1, 3, 4), **change}
        backbone = make_backbone(model)
        for network in ("deterministic", "det_x2", "diffusion"):
            net, shapes = published_network(model, network), parameter_shapes(backbone, network)
            rng = np.random.default_rng(0)
            tensors = {k: rng.standard_normal(s).astype(np.float32) for k, s in published_shapes(net, shapes).items()}
            params = stack_tensors(net, tensors, shapes)
            assert sum(v.size for v in params.values()) == sum(v.size for v in tensors.values())
            back = unstack_tensors(net, params)
            assert all((back[k] == tensors[k]).all() for k in tensors)


def test_a_scale_of_the_masks_goes_into_the_published_tensors():
    tiny = {"dim": 8, "depth": 1, "num_stems": 4, "dim_head": 4, "heads": 2, "stft_n_fft": 32, "stft_win_length": 32}
    model = {**bsrf_base().model.to_dict(), **tiny, "stft_hop_length": 8, "freqs_per_bands": (2, 3, 4, 8)}
    model.update(stereo=False, mask_scale=0.1)
    scaled, plain = make_backbone(model), make_backbone({**model, "mask_scale": 1.0})
    params = scaled.init(jax.random.key(0), True)
    net, shapes = published_network(model, "diffusion"), parameter_shapes(scaled, "diffusion")
    published = unstack_tensors(net, {k: np.asarray(v) for k, v in flatten(params).items()})
    back = unflatten(stack_tensors(net, published, shapes))
    x, label = jax.random.normal(jax.random.key(1), (1, 512, 1)), np.eye(4)[:1]
    _, features = scaled.separate(scaled.init(jax.random.key(2), False), x)
    answers = [
        b.refine(p, x, label, np.zeros(1), b.condition(p, features)) for b, p in ((scaled, params), (plain, back))
    ]
    assert np.any(answers[0])
    np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-6)


def test_bad_files_and_configs_are_refused_in_one_sentence(config, tmp_path, capsys):
    det, diff, raw = (fixture(f"ckpt_micro_{kind}.ckpt") for kind in ("det", "diff", "msst_raw"))
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(det.read_bytes()[:50_000])
    marker = tmp_path / "ran"
    variants = {
        "tag.yaml": f'model: !!python/object/apply:os.system ["touch {marker}"]',
        "other.yaml": YAML.replace("dim: 8", "dim: 16"),
        "stems.yaml": YAML.replace("[kick, bass, other, vocals]", "[vocals]"),
        "adapter.yaml": YAML.replace("depth: 1\n", "depth: 1\n  stft_adapter_type: depthwise\n", 1),
        "broken.yaml": "model: [",
        "list.yaml": "- 1",
    }
    for name, text in variants.items():
        (tmp_path / name).write_text(text)
    for path, arch, options, words in (
        (diff, "bsrf_det", (), "has a refining network"),
        (det, "bsrf_diffusion", (), "holds no network deterministic"),
        (det, "bsrf_consistency", (), "holds no network deterministic"),
        (raw, "unet_det", (), "holds no network"),
        (cut, "bsrf_det", (), "is cut off"),
        (raw, "bsrf_det", ("--config", tmp_path / "tag.yaml"), "nothing in it was run"),
        (raw, "bsrf_det", ("--config", tmp_path / "other.yaml"), "says dim = 16, but the weights"),
        (raw, "bsrf_det", ("--config", tmp_path / "stems.yaml"), "names 1 stems (vocals), but the weights have 4"),
        (raw, "bsrf_det", ("--config", tmp_path / "adapter.yaml"), "only conv2d is supported"),
        (raw, "bsrf_det", ("--config", tmp_path / "broken.yaml"), "is not plain YAML"),
        (raw, "bsrf_det", ("--config", tmp_path / "list.yaml"), "holds no fields"),
        (raw, "bsrf_det", ("--config", tmp_path / "none.yaml"), "cannot be read"),
        ("hf:only", "bsrf_det", (), "is no address on the Hub"),
    ):
        assert import_into(path, arch, tmp_path / "model", *options) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1, message
        assert not (tmp_path / "model").exists() and not marker.exists()


def test_missing_surplus_and_misshapen_tensors_are_named(config, tmp_path, capsys):
    tensors = {k: t.read() for k, t in read_checkpoint(fixture("ckpt_micro_msst_raw.ckpt")).state_dict.items()}
    name = "layers.0.1.layers.0.1.net.4.bias"
    path = tmp_path / "w.safetensors"
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != name}, f"lacks {name}"),
        ({**tensors, "extra": tensors[name]}, "holds what the config does not know: extra"),
        ({**tensors, name: np.zeros(3, np.float32)}, f"contradicts the config: {name} is (3,), not (8,)"),
    ):
        save_file(changed, path)
        assert import_into(path, "bsrf_det", tmp_path / "model", "--config", config) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "model").exists()


def test_an_assumed_hop_is_said(config, tmp_path, capsys):
    small = {"dim": 8, "depth": 1, "heads": 2, "dim_head": 4, "num_stems": 1, "mlp_expansion_factor": 1}
    sizes = {**bsrf_base().model.to_dict(), **small}
    shapes = parameter_shapes(make_backbone(sizes), "deterministic")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(unstack_tensors(published_network(sizes, "deterministic"), zeros), tmp_path / "raw.safetensors")
    assert import_into(tmp_path / "raw.safetensors", "bsrf_det", tmp_path / "bare") == 0
    assert "assumed an STFT hop of 441 samples" in capsys.readouterr().out
    raw = fixture("ckpt_micro_msst_raw.ckpt")
    assert import_into(raw, "bsrf_det", tmp_path / "told", "--config", config) == 0
    assert "STFT hop" not in capsys.readouterr().out


def test_tuples_are_read_and_sections_found_at_any_depth(config):
    told = read_yaml(config)
    assert told["model"]["freqs_per_bands"] == (2, 3, 4, 8)
    assert find_section({"a": {"b": {"dim": 1, "depth": 2}}}, "dim", "depth") == {"dim": 1, "depth": 2}
    assert find_section({"a": 1}, "dim") == {}


@pytest.fixture
def short(tmp_path):
    """(model folder whose segment is 203 samples, a mixture of it, its stems)."""
    folder = tmp_path / "model"
    assert import_into(fixture("ckpt_micro_det.ckpt"), "bsrf_det", folder) == 0
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "segment": 203}))
    x = np.random.default_rng(0).standard_normal((1, 203, 2)).astype(np.float32)
    model = load_model(folder)
    return folder, x, make_backbone(model.config["model"]).separate(model.weights["deterministic"], x)[0]


def test_the_stablehlo_program_runs_on_jax_alone_and_separates_alike(short, tmp_path):
    pytest.importorskip("flatbuffers")
    folder, x, expected = short
    assert main(["export", str(folder), "--format", "stablehlo", "-o", str(tmp_path / "net.bin")]) == 0
    program = jax.export.deserialize((tmp_path / "net.bin").read_bytes())
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    np.testing.assert_allclose(program.call(x), expected, atol=1e-6)


def test_the_onnx_program_runs_in_onnxruntime_and_separates_alike(short, tmp_path):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    folder, x, expected = short
    assert main(["export", str(folder), "--format", "onnx", "-o", str(tmp_path / "net.onnx")]) == 0
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x})[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.torch
def test_weights_and_outputs_are_those_of_the_pypi_package_both_ways(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("bs_roformer")
    from msr_jax.bench.roformers import make_peer

    sizes = {**bsrf_base().model.to_dict(), "dim": 32, "depth": 2, "num_stems": 2, "zero_dc": False}
    net = make_peer(sizes)
    theirs = {k: v.numpy() for k, v in net.state_dict().items()}
    backbone, module = make_backbone(sizes), published_network(sizes, "deterministic")
    shapes = parameter_shapes(backbone, "deterministic")
    flat = stack_tensors(module, theirs, shapes)
    x = 0.1 * np.random.default_rng(0).standard_normal((1, 2, 441 * 40)).astype(np.float32)
    with torch.inference_mode():
        expected = net(torch.from_numpy(x)).numpy()
        net.load_state_dict({k: torch.from_numpy(v) for k, v in unstack_tensors(module, flat).items()}, strict=True)
        np.testing.assert_array_equal(net(torch.from_numpy(x)).numpy(), expected)
    stems, _ = jax.jit(backbone.separate)(unflatten(flat), x.swapaxes(1, 2))
    np.testing.assert_allclose(np.asarray(stems).swapaxes(-1, -2), expected, atol=1e-4)


@pytest.mark.torch
def test_the_lines_of_the_weights_readme_load_an_export_in_plain_pytorch(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("bs_roformer")
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(SHIPPED / "bs_roformer" / "ckpt_micro_det.ckpt"), "-o", "bsrf"]) == 0
    described = json.loads(Path("bsrf/config.json").read_text())
    described["model"]["zero_dc"] = False  # which that package does not know
    Path("bsrf/config.json").write_text(json.dumps(described))
    assert main(["export", "bsrf", "--format", "safetensors", "-o", "separator.safetensors"]) == 0
    page = (Path(weights.__file__).parent / "README.md").read_text()
    scope = {}
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], scope)
    x = 0.1 * np.random.default_rng(0).standard_normal((1, 2, 2048)).astype(np.float32)
    with torch.inference_mode():
        expected = scope["net"](torch.from_numpy(x)).numpy()
    model = load_model("bsrf")
    stems, _ = make_backbone(model.config["model"]).separate(model.weights["deterministic"], x.swapaxes(1, 2))
    np.testing.assert_allclose(np.asarray(stems).swapaxes(-1, -2), expected, atol=1e-6)


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download takes: the list of files, and one file with its checksum and ranges."""

    def __init__(self, data, asked, *args):
        self.data, self.asked = data, asked
        self.checksum = hashlib.sha256(data).hexdigest()
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append((self.command, self.path))
        if self.path.startswith("/api/models/owner/repo/tree"):
            body = json.dumps([{"type": "file", "path": "w.ckpt", "size": len(self.data), "oid": "0" * 40}]).encode()
            headers = {"Content-Type": "application/json"}
        elif self.path.startswith("/api/models/owner/repo"):
            body = json.dumps({"id": "owner/repo", "sha": "0" * 40, "siblings": [{"rfilename": "w.ckpt"}]}).encode()
            headers = {"Content-Type": "application/json"}
        elif self.path == "/owner/repo/resolve/main/w.ckpt" or self.path.endswith("0" * 40 + "/w.ckpt"):
            tag = f'"{self.checksum}"'
            body, headers = self.data, {"ETag": tag, "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
            if self.command == "GET" and self.server.is_faulty:
                body = bytes(len(body))
        else:
            known = "EntryNotFound" if "/owner/repo/" in self.path else "RepoNotFound"
            owner = self.path.split("/")[1]
            bare = (int(owner.removeprefix("answers-")), "") if owner.startswith("answers-") else (404, known)
            status, code = {"gated": (401, "GatedRepo"), "away": (503, "")}.get(owner, bare)
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback: `asked` is what it was asked for; while `is_faulty`, files arrive as zeros."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    asked = []
    handler = functools.partial(_Hub, fixture("ckpt_micro_det.ckpt").read_bytes(), asked)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.is_faulty = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    server.asked = asked
    yield server
    server.shutdown()


@pytest.mark.parametrize("address", ["hf:owner/repo", "hf:owner/repo/w.ckpt"])
def test_a_file_of_the_hub_is_imported_and_kept(hub, address, tmp_path, capsys):
    assert import_into(address, "bsrf_det", tmp_path / "model") == 0, capsys.readouterr().err
    assert load_model(tmp_path / "model").weights
    fetched = [path for command, path in hub.asked if command == "GET" and path.endswith("w.ckpt")]
    assert len(fetched) == 1
    assert import_into(address, "bsrf_det", tmp_path / "again") == 0
    assert [path for command, path in hub.asked if command == "GET" and path.endswith("w.ckpt")] == fetched


def test_a_file_that_arrives_damaged_is_refused_and_fetched_again(hub, tmp_path, capsys):
    hub.is_faulty = True
    assert import_into("hf:owner/repo/w.ckpt", "bsrf_det", tmp_path / "model") == 2
    assert "arrived damaged" in capsys.readouterr().err and not (tmp_path / "model").exists()
    hub.is_faulty = False
    assert import_into("hf:owner/repo/w.ckpt", "bsrf_det", tmp_path / "model") == 0


def test_what_the_hub_has_not_is_said_in_a_sentence(hub, tmp_path, capsys):
    for address in ("hf:owner/repo/none.ckpt", "hf:nobody/nothing/w.ckpt"):
        assert import_into(address, "bsrf_det", tmp_path / "model") == 2
        message = capsys.readouterr().err
        assert "the Hub has no such file" in message and message.count("\n") == 1, message


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf:gated/repo/w.ckpt", "asks for its terms to be accepted"),
        ("hf:away/repo/w.ckpt", "hf:away/repo/w.ckpt cannot be fetched"),
        ("hf:answers-200/repo/w.ckpt", "as the Hub answers"),  # and does not tell what file it is
        ("hf:answers-403/repo/w.ckpt", "403 Forbidden"),
        ("hf:answers-404/repo/w.ckpt", "404 Not Found"),
        ("hf:answers-429/repo/w.ckpt", "429 Too Many Requests"),
        ("hf:answers-500/repo/w.ckpt", "500 Internal Server Error"),
    ],
)
def test_a_hub_that_refuses_or_is_away_is_not_told_as_a_missing_file(
    hub, address, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("time.sleep", lambda _: None)  # before it asks again
    assert import_into(address, "bsrf_det", tmp_path / "model") == 2
    message = capsys.readouterr().err
    assert words in message and "no such file" not in message and "a network" not in message, message


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."), "ALL_PROXY (Using SOCKS proxy"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write to the Hub's cache"),
        (ConnectionError("offline mode is enabled"), "is there a network? (offline mode is enabled)"),
    ],
)
def test_errors_of_the_hubs_library_are_told_by_their_cause(hub, raised, words, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    def fails(*_):
        raise raised

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    assert import_into("hf:owner/repo/w.ckpt", "bsrf_det", tmp_path / "model") == 2
    assert words in capsys.readouterr().err


def test_without_a_network_or_the_library_it_says_so(monkeypatch, tmp_path, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert import_into("hf:owner/repo", "bsrf_det", tmp_path / "model") == 2
    assert "msr_jax[web]" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
