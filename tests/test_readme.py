"""Every command of the README runs, one after the other, on sizes that take seconds."""

import importlib.util
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
from msr_jax.weights.model_folder import load_model
from tests.conftest import TINY_SEGMENT, TINY_SIZES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]
BENCH = (ROOT / "tests" / "test_bench.py").read_text()
SHRUNK = {"--tracks": "1", "--seconds": "5", "--crop": str(TINY_SEGMENT)}
TRAINING = {
    "segment": TINY_SEGMENT,
    "data.crop": TINY_SEGMENT,
    "data.batch": 2,
    "compute_dtype": "float32",
    "consistency.num_levels": 3,
    "optim.accumulate": 2,
    **{f"train.{k}": 1 for k in ("steps", "steps_per_dispatch", "log_every", "validate_every", "checkpoint_every")},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", place / "configs")
    shutil.copytree(ROOT / "tests" / "fixtures", place / "tests" / "fixtures")
    shutil.copy(ROOT / "tests" / "fixtures" / "unet" / "ckpt" / "unet_cd_mini.ckpt", place / "model.ckpt")
    return place


def other_tool(corpus, folder):
    """Estimates as another program would leave them: here, a third of the mixture."""
    for track in corpus.iterdir():
        audio, rate = soundfile.read(track / "mix.flac")
        (folder / track.name).mkdir(parents=True)
        for stem in ("bass", "drums", "guitar", "piano"):
            soundfile.write(folder / track.name / f"{stem}.wav", audio / 3, rate)


def run(words):
    """Run one command in this process; returns its exit code."""
    if words[0] == "msr":
        if words[1] == "train":
            sizes = {**TINY_SIZES, "patch_factor": 16}  # at 22,050 Hz, so half as many patches
            words += [f"--config.model.{k}={v}".replace(" ", "") for k, v in sizes.items()]
            words += [f"--config.{k}={v}" for k, v in TRAINING.items()]
        if words[1] == "bench":  # they run there
            assert words[3] == "--json" and len(words) == 5 and f'"bench", "{words[2]}", "--json"' in BENCH, words
            return 0
        return main(words[1:])
    if words[:2] == ["python", "-m"]:
        module = importlib.import_module(words[2])
        return module.main([SHRUNK.get(before, word) for before, word in pairwise(words[2:])])
    if words[0] == "bash":
        return subprocess.run(["bash", "-n", ROOT / words[1]]).returncode
    assert words[:2] == ["pip", "install"], words
    return 0


def test_every_command_of_the_readme_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert len(COMMANDS) > 12
    for command in COMMANDS:
        for part in command.split("&&"):
            words = shlex.split(part)
            if words[:2] == ["msr", "separate"] and not Path("song.flac").exists():
                shutil.copy("corpus/test/Track00000/mix.flac", "song.flac")
            if words[:3] == ["msr", "evaluate", "--estimates"]:
                other_tool(Path("corpus/test"), Path(words[3]))
            is_torch = words[:2] == ["msr", "export"] and {"dicose", "msst"} & set(words)
            needs_torch = is_torch and importlib.util.find_spec("torch") is None
            assert run(words) == (2 if needs_torch else 0), (command, capsys.readouterr().err)
    assert sorted(p.name for p in Path("stems/song").iterdir() if p.suffix == ".flac") == [
        f"{s}.flac" for s in ("bass", "drums", "guitar", "piano")
    ]


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
