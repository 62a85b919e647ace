"""Public models by name: the table, and fetching from a server that answers as the Hub does, well and badly."""

import errno
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.weights import registry
from msr_jax.weights.model_folder import load_model
from msr_jax.weights.registry import address_of, find_named, folder_of, read_table, told_of
from tests.test_roformer_import import weights_of

SHAPE = {
    "network": "mel_band_roformer", "dim": 4, "depth": 1, "stereo": True, "stft_n_fft": 64, "stft_hop_length": 16,
    "stft_win_length": 64, "mask_estimator_depth": 2, "mlp_expansion_factor": 1,
}  # fmt: skip


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download takes: its address of a file leads to another server's, which has the bytes."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub = self.server
        hub.asked.append(self.path)
        if hub.way.isdecimal():
            self.send_error(int(hub.way))
        elif self.path == "/owner/repo/resolve/main/w.safetensors" and hub.way != "gone":
            self.send_response(302)
            self.send_header("Location", "http://[bad" if hub.way == "astray" else "/cdn/0123?signed=1")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/cdn/"):
            data = {"wrong": b"x" * len(hub.data), "broken": hub.data[: len(hub.data) // 2]}.get(hub.way, hub.data)
            self.send_response(200)
            self.send_header("Content-Length", str(len(hub.data)))
            self.end_headers()
            self.wfile.write(data)
        else:
            self.send_error(404, "Entry not found")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with one file of weights, and a table that names it `tiny`."""
    sizes = {k: v for k, v in SHAPE.items() if k != "network"}
    save_file(weights_of(SHAPE["network"], **sizes, heads=8, dim_head=64), tmp_path / "w.safetensors")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.data, server.way, server.asked = (tmp_path / "w.safetensors").read_bytes(), "well", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    entry = {
        "shape": "tiny", "stems": ["Vocals", "Rest"], "chunk": 640, "author": "someone", "licence": "MIT",
        "size": len(server.data), "file": "hf:owner/repo/w.safetensors",
        "sha256": hashlib.sha256(server.data).hexdigest(),
    }  # fmt: skip
    unsummed = {k: v for k, v in entry.items() if k not in ("sha256", "licence")}
    table = {"rate": 44_100, "shapes": {"tiny": SHAPE}, "models": {"tiny": entry, "unsummed": unsummed}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    monkeypatch.setattr(registry, "TABLE", tmp_path / "table.yaml")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MSR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def left_of_downloads():
    """What is in the folder of downloads, but for locks."""
    return [path.name for path in (registry.home() / "downloads").iterdir() if path.suffix != ".lock"]


def test_a_model_is_fetched_and_imported_once_and_then_needs_no_network(hub):
    said = []
    folder = find_named("tiny", said.append)
    assert folder == folder_of("tiny") and load_model(folder).config["stems"] == ["Vocals", "Rest"]
    assert "tiny is by someone; licence: MIT" in said[0]  # before the download
    assert hub.asked == ["/owner/repo/resolve/main/w.safetensors", "/cdn/0123?signed=1"]
    assert left_of_downloads() == []
    hub.shutdown()
    said.clear()
    assert find_named("tiny", said.append) == folder and not said


@pytest.mark.parametrize(
    "way,name,words",
    [
        ("wrong", "tiny", "is not the file that the table of models knows"),
        ("wrong", "unsummed", "/owner/repo/resolve/main/w.safetensors "),  # and not the path of a file that is gone
        ("broken", "tiny", "cannot be fetched; is there a network?"),
        ("broken", "unsummed", "cannot be fetched; is there a network?"),
        ("gone", "tiny", "as the server answers 404 Entry not found"),
        ("astray", "tiny", "cannot be fetched; look at HF_ENDPOINT"),  # and not: its SHA-256 is another
        ("401", "tiny", "answers 401 Unauthorized; read the model's page, https://huggingface.co/owner/repo"),
        ("403", "tiny", "answers 403 Forbidden; read the model's page, https://huggingface.co/owner/repo"),
        *((status, "tiny", f"cannot be fetched, as the server answers {status} ") for status in ("429", "500", "503")),
    ],
)
def test_a_download_that_goes_wrong_is_said_and_leaves_nothing(hub, way, name, words):
    hub.way = way
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        find_named(name, lambda _: None)
    assert "\n" not in str(caught.value) and not folder_of(name).exists()
    assert left_of_downloads() == []
    hub.way = "well"
    assert find_named(name, lambda _: None) == folder_of(name)


def test_without_a_network_it_says_what_is_missing(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"tiny is not in .*models yet and cannot be fetched"):
        find_named("tiny", lambda _: None)


@pytest.mark.parametrize("file,cut", [("deterministic.safetensors", 9000), ("config.json", 40)])
def test_a_damaged_model_is_not_marked_as_fetched_and_the_same_command_fetches_it_again(hub, file, cut):
    folder, said = find_named("tiny", lambda _: None), []
    assert registry.is_at_hand("tiny")
    os.truncate(folder / file, cut)
    with pytest.raises(UserError, match=rf"remove {folder} and fetch"):
        load_model(folder)
    assert not registry.is_at_hand("tiny")
    assert find_named("tiny", said.append) == folder and f"{folder} is damaged, and is replaced" in said
    assert load_model(folder).weights


def test_what_is_no_model_at_a_models_place_is_named_before_anything_is_fetched(hub):
    folder_of("tiny").mkdir(parents=True)
    (folder_of("tiny") / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"models/tiny holds no model; remove it, and tiny is fetched again"):
        find_named("tiny", lambda _: None)
    assert not hub.asked and (folder_of("tiny") / "notes.txt").exists()


def test_offline_nothing_is_fetched_and_what_is_at_hand_is_taken(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"tiny is not in .*models, and HF_HUB_OFFLINE forbids to fetch it"):
        find_named("tiny", lambda _: None)
    assert not hub.asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folder = find_named("tiny", lambda _: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    assert find_named("tiny", lambda _: None) == folder


def test_an_address_on_the_web_is_told_how_it_is_imported(tmp_path, capsys):
    address = "https://huggingface.co/owner/repo/resolve/main/w.ckpt"
    assert main(["import", address, "-o", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert f"{address} is an address on the web" in said and "hf:OWNER/REPO/FILE" in said and said.count("\n") == 1
    with pytest.raises(UserError, match="is an address on the web"):
        find_named(address)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HF_ENDPOINT", "foo://127.0.0.1", "look at HF_ENDPOINT and at the proxies"),
        ("HF_ENDPOINT", "127.0.0.1", "look at HF_ENDPOINT and at the proxies"),
        ("HTTP_PROXY", "http://", "look at HF_ENDPOINT and at the proxies"),
        ("HTTP_PROXY", "foo://127.0.0.1:9", "HF_ENDPOINT"),
    ],
)
def test_a_wrong_address_or_proxy_is_not_told_as_a_wrong_file(hub, name, value, words, monkeypatch):
    if name == "HTTP_PROXY":
        monkeypatch.setenv("HF_ENDPOINT", "http://example.invalid")  # loopback may be excepted from proxies
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        find_named("tiny", lambda _: None)


def test_an_empty_endpoint_is_the_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert address_of({"file": "hf:owner/repo/w.ckpt"}) == "https://huggingface.co/owner/repo/resolve/main/w.ckpt"


def test_a_full_disk_is_not_told_as_a_missing_network(hub, monkeypatch):
    import pooch

    def fills(self, url, output_file, pooch, check_only=False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", fills)
    with pytest.raises(UserError, match=r"cannot write to .*downloads: .*No space left"):
        find_named("tiny", lambda _: None)


def test_processes_that_want_a_model_at_once_fetch_it_once(hub):
    script = (
        "import sys; from pathlib import Path; from msr_jax.weights import registry;"
        "registry.TABLE = Path(sys.argv[1]); registry.find_named('tiny')"
    )
    argv = [sys.executable, "-c", script, str(registry.TABLE)]
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(3)]
    said = [process.communicate()[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert len(hub.asked) == 2 and load_model(folder_of("tiny")).weights


def test_what_killed_downloads_left_goes_with_the_next(hub):
    left = registry.home() / "downloads" / ".tiny.0123abcd.1.tmp"  # of a machine that had another name
    left.mkdir(parents=True)
    (left / "tmpabc").write_bytes(b"half")
    find_named("tiny", lambda _: None)
    assert left_of_downloads() == []


def test_a_folder_stays_itself_and_what_is_neither_is_refused(tmp_path):
    assert find_named(tmp_path) == tmp_path
    assert find_named(tmp_path / "none") == tmp_path / "none"  # a place, of which the loader tells what it lacks
    with pytest.raises(UserError, match="no folder and no name of a public model; `msr models` lists those"):
        find_named("mel-kim-vocal")


def test_the_table_is_listed_and_a_model_of_it_described(hub, capsys, monkeypatch):
    monkeypatch.undo()
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in read_table(registry.TABLE))
    assert re.search(r"^bs-anvuew-dereverb +BS 256/12 +44100 +512 +204 +dry$", listed, re.M)
    assert main(["models", "mel-kim-vocals"]) == 0
    told = capsys.readouterr().out
    assert "kimberley jensen" in told and "stft_hop_length: 441" in told and "sha256: 87201f4d" in told
    assert main(["models", "mel-kim"]) == 2
    assert "mel-kim-vocals" in capsys.readouterr().err


def test_every_entry_has_what_is_needed_and_only_what_is_known():
    for name, entry in read_table(registry.TABLE).items():
        assert entry["size"] > 0 and entry["chunk"] > 0 and len(set(entry["stems"])) == len(entry["stems"]), name
        assert entry["model"]["network"] in ("bs_roformer", "mel_band_roformer")
        assert re.fullmatch(r"[0-9a-f]{64}", entry.get("sha256", "0" * 64)), name
        assert address_of(entry).startswith("https://") and ("figure" in entry) == ("figure_source" in entry), name
        assert told_of(entry)["model"]["num_stems"] == len(entry["stems"])
        known = {"shape", "model", "rate", "stems", "chunk", "author", "size", "file", "sha256", "licence", "figure"}
        assert set(entry) <= known | {"figure_source"}, name
        assert np.isfinite(entry["size"])
