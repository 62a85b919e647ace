"""The official programs, traced for a target: one optimiser step, or the separation of segments. Nothing is allocated."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msr_jax.config_fields import check_config
from msr_jax.errors import UserError
from msr_jax.methods.stages import REFINEMENTS, make_refiner, network_of
from msr_jax.models.backbone import cast_params, make_backbone
from msr_jax.models.interface import Backbone
from msr_jax.plan.necessary import necessary_bytes
from msr_jax.plan.target import Target, tracing
from msr_jax.separate.engine import batch_function
from msr_jax.separate.network import AXIS, PLACES, spread
from msr_jax.train.batches import check_batch
from msr_jax.train.sharding import make_mesh, stacked_batch_sharding, tree_sharding, with_shardings
from msr_jax.train.stage import BUILDS_ON, as_inputs, make_stage
from msr_jax.weights.model_folder import inputs_of


class Program(NamedTuple):
    """traced: to be lowered and compiled within `tracing(target)`; examples: on each device; facts: what shapes alone tell,
    plain values.
    """

    traced: Any
    mesh: Mesh
    examples: int
    facts: dict[str, Any]


def training_program(config: Mapping[str, Any], target: Target) -> Program:
    """One optimiser step of `config["method"]` on the target's mesh, as `msr train` compiles it.

    Raises:
      UserError: a config that does not fit the devices.
    """
    config = {**config, "train": {**config["train"], "steps_per_dispatch": 1}}
    check_config(config)
    mesh = make_mesh(config["mesh"], target.devices)
    check_batch(config["data"]["batch"], mesh)
    with tracing(target):
        backbone = make_backbone(config["model"], config["compute_dtype"])
        backbone.check_length(config["data"]["crop"])
        frozen = _parameter_shapes(backbone, BUILDS_ON.get(config["method"], ("", ()))[1])
        # Adapters are trained on a network that is there, whatever the stage.
        is_adapted = config["method"] not in BUILDS_ON and config["model"].get("lora_rank", 0)
        start = _parameter_shapes(backbone, ("deterministic",))["deterministic"] if is_adapted else None
        stage = make_stage(config, backbone, frozen, mesh, start)
        cast = jax.eval_shape(lambda: cast_params(_zeros(frozen), config["compute_dtype"]))
        inputs = as_inputs(with_shardings(cast, tree_sharding(mesh, cast, config["mesh"]["fsdp_min_size"])))
        with jax.set_mesh(mesh):  # no earlier: what is computed while building runs on this machine
            traced = stage.steps.trace(stage.abstract, inputs, _batches(config, mesh))
    state = stage.abstract
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params)]
    facts = {
        "program": "train",
        "method": config["method"],
        "mesh": dict(mesh.shape),
        "batch": config["data"]["batch"],
        "accumulate": config["optim"]["accumulate"],
        "crop": config["data"]["crop"],
        "parameters": sum(sizes),
        "largest_parameter": max(sizes),
        "necessary_bytes": necessary_bytes(
            mesh,
            state.params,
            (inputs, state.target_params),
            config["mesh"]["fsdp_min_size"],
            stage.sent,
            backbone.exact,
            stage.mask,
        ),
        "bytes_per_device": {
            "parameters": _bytes(state.params),
            "optimiser": _bytes(state.opt_state),
            "averages": _bytes((state.ema_params, state.target_params)),
            "frozen": _bytes(inputs),
        },
    }
    return Program(traced, mesh, config["data"]["batch"] // mesh.size, facts)


def separation_program(
    config: Mapping[str, Any], target: Target, refine: str, steps: int | None, mixtures: int = 1
) -> Program:
    """One call of the networks of `msr separate`: all stems of so many segments on each device of one host of the target, at the
    config's `compute_dtype`. (Several hosts share the songs, not the segments.)

    Raises:
      UserError: an unknown refinement, or a number of steps that it does not take.
    """
    if refine not in REFINEMENTS:
        raise UserError(f"--separate must be one of {', '.join(REFINEMENTS)}, not '{refine}'")
    mesh = Mesh(np.array(target.devices[: max(1, len(target.devices) // target.hosts)]), (AXIS,))
    batch = mixtures * mesh.size

    def place(tree: Any, spec: PartitionSpec) -> Any:
        return with_shardings(tree, jax.tree.map(lambda _: NamedSharding(mesh, spec), tree))

    with tracing(target):
        backbone = make_backbone(config["model"], config["compute_dtype"])
        backbone.check_length(config["segment"])
        refiner = make_refiner(config, backbone, refine, steps)
        weights = _parameter_shapes(backbone, sorted({"deterministic", network_of(config, refine)}))
        shapes = (
            jax.eval_shape(lambda: cast_params(_zeros(weights), config["compute_dtype"])),
            jax.ShapeDtypeStruct((batch, config["segment"], config["channels"]), np.float32),
            jax.ShapeDtypeStruct((batch, 2), np.int32),
            jax.ShapeDtypeStruct((), np.uint32),
        )
        cast, *inputs = map(place, shapes, PLACES)
        with jax.set_mesh(mesh):
            traced = jax.jit(spread(batch_function(refiner), mesh)).trace(cast, *inputs)
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(cast)]
    facts = {
        "program": "separate",
        "method": refine,
        "mesh": dict(mesh.shape),
        "batch": batch,
        "accumulate": 1,
        "crop": config["segment"],
        "parameters": sum(sizes),
        "largest_parameter": max(sizes),
        "necessary_bytes": {},
        "bytes_per_device": {"parameters": _bytes(cast), "optimiser": 0, "averages": 0, "frozen": 0},
    }
    return Program(traced, mesh, mixtures, facts)


def _parameter_shapes(backbone: Backbone, names: Any) -> dict[str, Any]:
    return {n: jax.eval_shape(lambda n=n: backbone.init(jax.random.key(0), *inputs_of(n))) for n in names}


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)


def _batches(config: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    lead = (1, config["optim"]["accumulate"], config["data"]["batch"])
    stems = len(config["stems"])
    shapes = {"stems": (*lead, stems, config["data"]["crop"], config["channels"]), "label": (*lead, stems)}
    return {
        name: jax.ShapeDtypeStruct(s, np.float32, sharding=stacked_batch_sharding(mesh)) for name, s in shapes.items()
    }


def _bytes(tree: Any) -> int:
    """Of one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
