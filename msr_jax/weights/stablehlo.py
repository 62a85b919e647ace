"""The deterministic network as a portable program: StableHLO with the weights inside, by `jax.export`."""

import jax
import jax.numpy as jnp
from jax import export

from msr_jax.errors import UserError
from msr_jax.methods.stages import make_refiner
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.model_folder import Model

PLATFORMS = ("cpu", "cuda", "tpu")


def export_program(model: Model) -> bytes:
    """Serialised program: mixture (1, segment, channels) float32 at the model's rate -> stems (1, stems, segment, channels).

    To run it, with JAX alone: `jax.export.deserialize(blob).call(mixture)`.

    Raises:
      UserError: the package that serialises is missing.
    """
    config = model.config
    refiner = make_refiner(config, make_backbone(config["model"]))
    weights = {"deterministic": jax.tree.map(jnp.asarray, model.weights["deterministic"])}
    separate = jax.jit(lambda mixture: refiner(weights, mixture, jax.random.key(0)))
    mixture = jax.ShapeDtypeStruct((1, config["segment"], config["channels"]), jnp.float32)
    try:
        return bytes(export.export(separate, platforms=PLATFORMS)(mixture).serialize())
    except ModuleNotFoundError as error:
        raise UserError(f"export to StableHLO needs {error.name}: pip install 'msr_jax[export]'") from error
