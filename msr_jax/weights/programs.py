"""The deterministic network as a program with its weights inside: StableHLO by `jax.export`, ONNX by jax2onnx.

Both take a mixture (1, segment, channels) float32 at the model's rate to stems (1, stems, segment, channels).
"""

import logging
from collections.abc import Callable
from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jax import export

from msr_jax.audio.fft import transforms_by_products
from msr_jax.devices import traced_for
from msr_jax.errors import UserError
from msr_jax.methods.stages import make_refiner
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.model_folder import Model

PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 2**31 - 1  # bytes of an ONNX file, which protobuf counts so
TOO_LARGE = "the model is too large for one ONNX file, which holds 2 GB"
FORMS = "cpu"  # a program for all of them has the forms that all can run, whatever machine exports it


def _separator(model: Model) -> tuple[Callable[[jax.Array], jax.Array], jax.ShapeDtypeStruct]:
    config = model.config
    refiner = make_refiner(config, make_backbone(config["model"]))
    weights = {"deterministic": jax.tree.map(jnp.asarray, model.weights["deterministic"])}
    mixture = jax.ShapeDtypeStruct((1, config["segment"], config["channels"]), jnp.float32)
    return lambda x: refiner(weights, x, jax.random.key(0)), mixture


def check_stablehlo() -> None:
    """Raises UserError where the package that serialises a program is missing."""
    if find_spec("flatbuffers") is None:
        raise UserError("export to StableHLO needs flatbuffers: pip install 'msr_jax[export]'")


def export_stablehlo(model: Model) -> bytes:
    """To run it, with JAX alone: `jax.export.deserialize(blob).call(mixture)`.

    Raises:
      UserError: as `check_stablehlo`.
    """
    check_stablehlo()
    return bytes(_for_all_platforms(model).serialize())


def _for_all_platforms(model: Model) -> export.Exported:
    with traced_for(FORMS):
        separate, mixture = _separator(model)
        return export.export(jax.jit(separate), platforms=PLATFORMS)(mixture)


def export_onnx(model: Model) -> bytes:
    """For onnxruntime and its like; the STFT is matrix products inside, so that no complex numbers are needed.

    Raises:
      UserError: the package that converts is missing, or the program would pass the 2 GB that one ONNX file can hold.
    """
    # On import it warns, with tracebacks, of examples of its own whose libraries are not there.
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)
    try:
        from google.protobuf.message import EncodeError
        from jax2onnx import to_onnx
    except ModuleNotFoundError as error:
        raise UserError(
            f"export to ONNX needs {error.name}: pip install 'msr_jax[export]', and pip install --no-deps jax2onnx==0.17.1"
        ) from error
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.weights["deterministic"]))
    if size > LARGEST:  # said before minutes of tracing
        raise UserError(f"{TOO_LARGE} (its parameters alone are {size / 1e9:.1f} GB); take --format stablehlo")
    with traced_for(FORMS), transforms_by_products():
        separate, mixture = _separator(model)
        program = to_onnx(separate, [mixture.shape])
    try:
        return program.SerializeToString()
    except (ValueError, RuntimeError, EncodeError) as error:
        raise UserError(f"{TOO_LARGE} ({error}); take --format stablehlo") from error
