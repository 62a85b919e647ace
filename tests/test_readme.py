"""The commands of the README run, one after the other, on sizes that take seconds; those that take longer are looked at."""

import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from msr_jax.cli import main
from msr_jax.config_files import read_config
from msr_jax.models.backbone import BACKBONES
from msr_jax.weights.model_folder import load_model
from msr_jax.weights.registry import TABLE, read_table
from tests.conftest import TINY_SEGMENT
from tests.toy import MODEL, make_toy

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]
BENCH, TABLES = ((ROOT / "tests" / f"test_{name}.py").read_text() for name in ("bench", "tables"))
PREPARE = (ROOT / "data_prep" / "prepare.py").read_text()
# (Five seconds are no segment of the paper's protocol, which test_evaluate.py runs.)
SHRUNK = {"--tracks": "1", "--seconds": "5", "--crop": str(TINY_SEGMENT), "--protocol": "song"}
YAML = """
audio: {sample_rate: 44100, chunk_size: 8192}
model: {dim: 8, depth: 1, stereo: true, num_stems: 4, time_transformer_depth: 1, freq_transformer_depth: 1,
  dim_head: 4, heads: 2, freqs_per_bands: !!python/tuple [2, 3, 4, 8], stft_n_fft: 32, stft_hop_length: 8,
  stft_win_length: 32, mask_estimator_depth: 2, mlp_expansion_factor: 2}
training: {instruments: [drums, bass, other, vocals]}
"""
TRAINING = {
    "model.name": "toy",  # commands are what is tried here: the networks' own tests train them
    "segment": TINY_SEGMENT,
    "data.crop": TINY_SEGMENT,
    "data.batch": 2,
    "compute_dtype": "float32",
    "consistency.num_levels": 3,
    "optim.accumulate": 2,
    **{f"train.{k}": 1 for k in ("steps", "steps_per_dispatch", "log_every", "validate_every", "checkpoint_every")},
}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", lambda sizes, dtype: make_toy(MODEL, dtype))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", place / "configs")
    shutil.copytree(ROOT / "tests" / "fixtures", place / "tests" / "fixtures")
    fixtures = ROOT / "tests" / "fixtures"
    shutil.copy(fixtures / "unet" / "ckpt" / "unet_cd_mini.ckpt", place / "model.ckpt")
    shutil.copy(fixtures / "bs_roformer" / "ckpt_micro_msst_raw.ckpt", place / "weights.ckpt")
    (place / "weights.yaml").write_text(YAML)
    noise = 0.1 * np.random.default_rng(0).standard_normal((22_050, 2))
    for name in ("song.mp3", "song.flac"):
        soundfile.write(place / name, noise, 22_050)
    return place


def other_tool(corpus, folder):
    """Estimates as another program would leave them: here, a third of the mixture."""
    for track in corpus.iterdir():
        audio, rate = soundfile.read(track / "mix.flac")
        (folder / track.name).mkdir(parents=True)
        for stem in ("bass", "drums", "guitar", "piano"):
            soundfile.write(folder / track.name / f"{stem}.wav", audio / 3, rate)


def by_hand(words):
    """Whether a command is not run here, but by hand: it starts what takes hours or a cluster, or does not end."""
    if words[0] in ("source", "sbatch") or words[0].startswith("NAME="):
        return True
    if words[:2] in (["msr", "serve"], ["msr", "plan"]):  # they run in tests of their own
        return True
    if words[:2] == ["msr", "train"]:  # the U-Net's small stages are run; these differ by the config alone
        return not (words[3].startswith("unet_") and words[3].endswith("_small"))
    if words[:2] == ["msr", "separate"] and is_fetched(words):
        return True
    return words[:3] == ["python3", "-m", "venv"] or "musdb" in words


def is_fetched(words):
    """Whether the model of a command is one of the registry's, which comes over the network."""
    return "--model" in words and words[words.index("--model") + 1] in read_table(TABLE)


def look(words):
    """What can be said of a command by hand without running it: its script is there, its config and settings are right."""
    scripts = [w for w in words if w.startswith("launch/")]
    assert all(subprocess.run(["bash", "-n", ROOT / script]).returncode == 0 for script in scripts), words
    if "--config" in words:
        read_config(words[words.index("--config") + 1], [w for w in words if w.startswith("--config.")])
    if words[:2] == ["msr", "separate"]:
        stem = words[words.index("--residual") + 1]
        assert stem not in read_table(TABLE)[words[words.index("--model") + 1]]["stems"], words
    if words[:2] == ["python", "-m"] and words[2].startswith("data_prep"):
        module = importlib.import_module(words[2])
        assert all(option in inspect.getsource(module) + PREPARE for option in words if option.startswith("--")), words


def run(words):
    """Run one command in this process; returns its exit code."""
    if words[0] == "msr":
        if words[1] == "train":
            words += [f"--config.{k}={v}" for k, v in TRAINING.items()]
        if words[1] == "bench":  # they run there
            assert words[3] == "--json" and len(words) == 5 and f'"bench", "{words[2]}", "--json"' in BENCH, words
            return 0
        if words[1] == "tables":  # so do these, which take as long as all else here
            assert all(f'"{word}"' in TABLES for word in words[1:] if word.startswith("--")), words
            return 0
        return main([SHRUNK.get(before, word) for before, word in pairwise(words)])
    if words[:2] == ["python", "-m"]:
        module = importlib.import_module(words[2])
        return module.main([SHRUNK.get(before, word) for before, word in pairwise(words[2:])])
    if words[0] == "bash":
        return subprocess.run(["bash", "-n", ROOT / words[1]]).returncode
    assert words[:2] == ["pip", "install"], words
    return 0


def test_every_command_of_the_readme_runs_or_is_looked_at(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert len(COMMANDS) > 25 and sum(by_hand(shlex.split(command)) for command in COMMANDS) < 14
    for command in COMMANDS:
        for part in command.split("&&"):
            words = shlex.split(part)
            if by_hand(words):
                look(words)
                continue
            if words[:3] == ["msr", "evaluate", "--estimates"]:
                other_tool(Path("corpus/test"), Path(words[3]))
            is_torch = words[:2] == ["msr", "export"] and {"dicose", "msst"} & set(words)
            needs_torch = is_torch and importlib.util.find_spec("torch") is None
            assert run(words) == (2 if needs_torch else 0), (command, capsys.readouterr().err)
    names = lambda place: sorted(p.name for p in Path(place).iterdir() if p.suffix in (".wav", ".flac"))
    assert names("stems/song") == ["bass.wav", "drums.wav", "guitar.wav", "piano.wav"]
    assert names("vocal_stems/song") == ["instrumental.wav", "vocals.wav"]
    assert names("trained/mix") == ["bass.flac", "drums.flac", "guitar.flac", "piano.flac"]


def test_the_three_stages_of_the_readme_gave_one_model(folder):
    model = load_model(folder / "runs" / "consistency")
    assert sorted(model.weights) == ["consistency", "deterministic", "diffusion", "target"]
    first = load_model(folder / "runs" / "det").weights["deterministic"]
    jax.tree.map(np.testing.assert_array_equal, model.weights["deterministic"], first)
    second = load_model(folder / "runs" / "diffusion").weights["diffusion"]
    jax.tree.map(np.testing.assert_array_equal, model.weights["diffusion"], second)
    rows = [json.loads(line) for line in (folder / "runs" / "consistency" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_distillation", "loss_denoising", "grad_norm", "lr"} <= set(rows[0])
    validated = (folder / "runs" / "det" / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(validated[-1])["validation_si_sdr"])
    assert list((folder / "runs" / "consistency" / "tensorboard").iterdir())


def test_the_python_example_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    scope = {}
    exec(code, scope)  # the README's own three lines
    assert sorted(scope["stems"]) == ["bass", "drums", "guitar", "piano"]
