"""Shared fixtures; also what must be set before JAX and absl are first used."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import flags

jax.config.update("jax_default_matmul_precision", "highest")
flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags
