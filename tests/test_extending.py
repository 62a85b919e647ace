"""The config file of msr_jax/EXTENDING.md trains with a backbone, a loss and a solver of one's own."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.config_files import read_config
from msr_jax.errors import UserError
from msr_jax.methods.losses import DISTANCES
from msr_jax.methods.samplers import SOLVERS, noise_from_keys, refine_by_diffusion
from msr_jax.methods.stages import make_objective, make_refiner
from msr_jax.models.backbone import BACKBONES, make_backbone
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
