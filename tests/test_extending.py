"""The config file of msr_jax/EXTENDING.md trains with a backbone, a loss and a solver of one's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from msr_jax.cli import main
from msr_jax.config_files import read_config
from msr_jax.data.records import RecordSource
from msr_jax.errors import UserError
from msr_jax.methods.losses import DISTANCES
from msr_jax.methods.samplers import SOLVERS, noise_from_keys, refine_by_diffusion
from msr_jax.methods.stages import make_objective, make_refiner
from msr_jax.models.backbone import BACKBONES, make_backbone
from msr_jax.separate.engine import Separator
from msr_jax.weights.model_folder import load_model
from tests.conftest import TINY_SEGMENT, TINY_SIZES

PAGE = (Path(__file__).resolve().parents[1] / "msr_jax" / "EXTENDING.md").read_text()


@pytest.fixture
def mine(tmp_path):
    """The page's config file; what it puts into the tables is gone afterwards."""
    kept = [(table, dict(table)) for table in (DISTANCES, SOLVERS, BACKBONES)]
    path = tmp_path / "mine.py"
    path.write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    yield path
    for table, before in kept:
        table.clear()
        table.update(before)


def test_the_page_s_config_names_a_loss_a_solver_and_a_backbone_of_its_own(mine):
    config = read_config(str(mine), ["--config.compute_dtype=float32"])
    config["model"] |= TINY_SIZES
    backbone = make_backbone(config["model"])
    assert callable(make_objective(config, backbone)) and callable(make_refiner(config, backbone, "diffusion"))
    x = jnp.ones((2, TINY_SEGMENT, 1))
    assert DISTANCES["l1"](x, 3 * x).tolist() == [2.0, 2.0]


def test_the_page_s_config_trains_a_separator_and_its_refinement_as_the_page_says(mine, records, tmp_path, monkeypatch):
    monkeypatch.chdir(mine.parent)
    toy = {"segment": TINY_SEGMENT, "data.crop": TINY_SEGMENT, "data.validation": "", "data.batch": 2, "train.steps": 2}
    toy |= {"train.steps_per_dispatch": 2, "train.checkpoint_every": 2, "train.log_every": 2, "train.validate_every": 2}
    text, by_page = mine.read_text(), "from msr_jax.models.unet1d import make_unet1d\n"
    assert by_page in text  # which takes a minute to compile
    in_seconds = "from tests.toy import MODEL, make_toy\nmake_unet1d = lambda sizes, dtype: make_toy(MODEL, dtype)\n"
    mine.write_text(text.replace(by_page, in_seconds))
    commands = re.findall(r"^msr (train .*)$", PAGE, re.M)
    assert len(commands) == 2
    for command in commands:
        argv = command.replace("RECORDS", str(records)).split()
        assert main([*argv, *(f"--config.{name}={value}" for name, value in toy.items())]) == 0
    config = load_model(tmp_path / "runs" / "mine").config
    assert (config["model"]["name"], config["diffusion"]["sampler"]["solver"]) == ("mine", "midpoint")


def test_recipes_of_one_folder_may_share_a_module(tmp_path, monkeypatch):
    (tmp_path / "shared_sizes_of_mine.py").write_text("STEPS = 70\n")
    text = "from shared_sizes_of_mine import STEPS\nfrom msr_jax.configs import unet_det_small\n\n\ndef get_config():\n"
    (tmp_path / "det.py").write_text(
        f"{text}    config = unet_det_small.get_config()\n    config.train.steps = STEPS\n    return config\n"
    )
    monkeypatch.chdir("/")
    before = list(sys.path)
    assert read_config(str(tmp_path / "det.py"), [])["train"]["steps"] == 70 and sys.path == before


def test_what_a_solver_of_one_s_own_makes_is_not_kept_as_its_source_is_not_looked_at(tiny_model, mine):
    read_config(str(mine), [])
    model = load_model(tiny_model)
    for solver, is_kept in (("heun", True), ("midpoint", False)):
        model.config["diffusion"] = {
            **model.config["diffusion"],
            "sampler": {**model.config["diffusion"]["sampler"], "solver": solver},
        }
        assert (Separator(model, "diffusion", 1).network.settings is not None) == is_kept
    assert Separator(model, "none").network.settings is not None


def test_a_corpus_of_one_s_own_is_prepared_as_the_page_says(tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[1] / "data_prep" / "README.md").read_text()
    (tmp_path / "prepare_mine.py").write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    for k, split in enumerate(("train", "test")):
        for stem in ("vocals", "guitar", "drums"):
            audio = 0.1 * np.random.default_rng(k).standard_normal((22_050 * 9, 2))
            (tmp_path / "songs" / split / f"song {k}").mkdir(parents=True, exist_ok=True)
            soundfile.write(tmp_path / "songs" / split / f"song {k}" / f"{stem}.flac", audio, 22_050)
    command = [sys.executable, "prepare_mine.py", "songs", "records", "--workers", "1"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    source = RecordSource(tmp_path / "records", "train")
    assert source.manifest["stems"] == ["vocals", "guitar", "drums"] and source.manifest["sample_rate"] == 44_100


def test_programs_are_kept_where_a_module_of_one_s_own_has_imported_jax_first(tmp_path):
    program = "import jax; from msr_jax.machine import keep_compiled_programs as k; k(); print(jax.config.jax_compilation_cache_dir)"
    clean = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    told = subprocess.run(
        [sys.executable, "-c", program],
        env={**clean, "MSR_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.stdout.startswith(str(tmp_path / "compiled"))


def test_a_solver_of_one_s_own_samples(mine):
    read_config(str(mine), [])
    keys, estimate = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 64, 1))
    sample = lambda solver: refine_by_diffusion(
        lambda x, sigma: x / (1 + sigma[:, None, None] ** 2), estimate, np.array([0.5, 0.1, 0.0]),
        noise_from_keys(keys, estimate.shape), solver=solver,
    )  # fmt: skip
    exact = sample("midpoint")
    assert np.isfinite(exact).all() and not np.allclose(exact, sample("euler"))
    assert np.abs(exact - sample("heun")).max() < np.abs(exact - sample("euler")).max()


def test_a_name_that_nothing_was_put_under_is_one_sentence():
    config = read_config("unet_diffusion_small", [])
    backbone = make_backbone(config["model"])
    with pytest.raises(UserError, match=r"config.loss must be one of mse, log_mse, l1_multires_stft, not 'mine'"):
        make_objective({**config, "loss": "mine"}, backbone)
    config["diffusion"]["sampler"]["solver"] = "mine"
    with pytest.raises(UserError, match=r"diffusion.sampler.solver must be one of euler, heun, not 'mine'"):
        make_refiner(config, backbone, "diffusion")
    with pytest.raises(UserError, match="there is no backbone 'mine'"):
        make_backbone({"name": "mine"})
