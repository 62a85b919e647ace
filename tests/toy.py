"""A backbone that compiles in a second, for tests of what surrounds a network; `python -m tests.toy` is `msr` with it.

As `--config tests/toy.py` it is the config of a run on two devices' worth of small batches.
"""

import sys

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from msr_jax.config import unet_base
from msr_jax.models import backbone
from msr_jax.models.interface import Backbone

PATCH, SEGMENT = 16, 256
MODEL = {"name": "toy", "width": 64}


def make_toy(sizes, dtype):
    """Two layers over patches of 16 samples: parameters large enough for fsdp to split at `fsdp_min_size` 64."""
    width, labels = sizes["width"], 4

    def init(key, timed, conditioned=None):
        shapes = {"in": (PATCH, width), "label": (labels, width), "out": (width, PATCH), "tau": (width,)}
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {
            n: {"kernel": jax.random.normal(keys[n], s) / s[0] ** 0.5} for n, s in shapes.items() if timed or n != "tau"
        }

    def network(params, x, label, tau, features):
        p = {name: module["kernel"].astype(dtype) for name, module in params.items()}
        hidden = x.reshape(len(x), -1, PATCH).astype(dtype) @ p["in"] + (label.astype(dtype) @ p["label"])[:, None]
        if tau is not None:
            hidden = hidden + tau[:, None, None].astype(dtype) * p["tau"]
        hidden = hidden if features is None else hidden + features.astype(dtype)
        return (jnp.tanh(hidden) @ p["out"]).astype(jnp.float32).reshape(x.shape), hidden

    def separate(params, mixture, label, key=None):
        return network(params, mixture, label, None, None)

    def refine(params, x, label, tau, conditioning, key=None):
        label = jnp.tile(label, (len(x) // len(label), 1))
        return network(params, x, label, tau, jnp.repeat(conditioning, len(x) // len(conditioning), 0))[0]

    return Backbone(init, separate, lambda params, features: features, refine, PATCH)


backbone.BACKBONES["toy"] = make_toy


def get_config():
    config = unet_base()
    config.model = ConfigDict(MODEL)
    config.segment = config.data.crop = SEGMENT
    config.compute_dtype = "float32"
    config.data.batch = 8
    config.mesh.fsdp_min_size = 64
    config.optim.lr = 1e-2
    config.train.update(
        {"steps": 12, "log_every": 1, "validate_every": 1000, "checkpoint_every": 4, "validation_windows": 2}
    )
    return config


if __name__ == "__main__":
    from msr_jax.cli import main

    sys.exit(main())
