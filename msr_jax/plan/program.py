"""`msr train --dry-run`: what a run would need and take, from shapes and compilation alone; nothing is allocated."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from msr_jax.errors import UserError
from msr_jax.models.backbone import cast_params, make_backbone
from msr_jax.models.platform import platform, traced_for
from msr_jax.plan.chips import CHIPS
from msr_jax.plan.flops import count_flops
from msr_jax.plan.hlo import collectives
from msr_jax.train.batches import check_batch
from msr_jax.train.loop import check_intervals
from msr_jax.train.sharding import make_mesh, stacked_batch_sharding, tree_sharding, with_shardings
from msr_jax.train.stage import BUILDS_ON, as_inputs, make_stage
from msr_jax.weights.model_folder import inputs_of

# Share of a chip's data-sheet rate that the expected time assumes: what a well-filled step of this kind should reach.
ASSUMED_UTILISATION = 0.45
# The program is not run: no time is spent on making its machine code quick. Memory and communication stay the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_plan(config: Mapping[str, Any], chip: str = "") -> dict[str, Any]:
    """Compile one optimiser step for the devices that JAX has and add up; plain numbers, as printed by `print_plan`.

    Args:
      chip: a name of `chips.CHIPS` to give an expected time for; "" gives none.

    Raises:
      UserError: a config that does not fit the devices, or a chip that is not known.
    """
    if chip and chip not in CHIPS:
        raise UserError(f"--chip must be one of {', '.join(CHIPS)}, not '{chip}'")
    config = {**config, "train": {**config["train"], "steps_per_dispatch": 1}}
    check_intervals(config["train"])
    mesh = make_mesh(config["mesh"])
    check_batch(config["data"]["batch"], mesh)
    # A laptop plans what an accelerator will run. (Not a GPU's fused attention, which no CPU compiles.)
    with traced_for("tpu" if platform() == "cpu" else platform()), jax.set_mesh(mesh):
        return _plan(config, chip, mesh)


def _plan(config: Mapping[str, Any], chip: str, mesh: Mesh) -> dict[str, Any]:
    backbone = make_backbone(config["model"], config["compute_dtype"])
    backbone.check_length(config["data"]["crop"])
    names = BUILDS_ON.get(config["method"], ("", ()))[1]
    frozen = {n: jax.eval_shape(lambda n=n: backbone.init(jax.random.key(0), *inputs_of(n))) for n in names}
    stage = make_stage(config, backbone, frozen, mesh)
    cast = jax.eval_shape(lambda: cast_params(_zeros(frozen), config["compute_dtype"]))
    inputs = as_inputs(with_shardings(cast, tree_sharding(mesh, cast, config["mesh"]["fsdp_min_size"])))
    traced = stage.steps.trace(stage.abstract, inputs, _batches(config, mesh))
    compiled = traced.lower().compile(compiler_options=QUICK if jax.default_backend() == "cpu" else None)
    memory, state = compiled.memory_analysis(), stage.abstract
    sent = collectives(compiled.as_text(), mesh.size)
    plan = {
        "method": config["method"],
        "mesh": dict(mesh.shape),
        "batch": config["data"]["batch"],
        "accumulate": config["optim"]["accumulate"],
        "crop": config["data"]["crop"],
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params)),
        "bytes_per_device": {
            "parameters": _bytes(state.params),
            "optimiser": _bytes(state.opt_state),
            "averages": _bytes((state.ema_params, state.target_params)),
            "frozen": _bytes(inputs),
            # From the compiler: what the step takes in (state, frozen networks, batch), and its work space at the peak.
            "arguments": int(memory.argument_size_in_bytes),
            "activations": int(memory.temp_size_in_bytes),
        },
        "flops_per_device": count_flops(traced.jaxpr) / mesh.size,
        "collectives": _summary(sent),
        "largest_gather": max((_largest(c) for c in sent if c.kind == "all-gather"), default=0),
        "largest_parameter": max(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params)),
    }
    if chip:
        plan["expected"] = expected_time(plan, chip, mesh.size)
    return plan


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


def _largest(collective: Any) -> int:
    return max(int(np.prod(shape)) for shape in collective.shapes)


def _summary(sent: list[Any]) -> dict[str, dict[str, float]]:
    kinds = sorted({c.kind for c in sent})
    return {
        kind: {
            "count": sum(c.times for c in sent if c.kind == kind),
            "result_bytes": sum(c.times * c.result_bytes for c in sent if c.kind == kind),
            "sent_bytes": sum(c.sent_bytes for c in sent if c.kind == kind),
        }
        for kind in kinds
    }


def expected_time(plan: Mapping[str, Any], chip: str, devices: int) -> dict[str, float]:
    """Seconds of a step on `devices` chips: `compute` at the assumed utilisation, `communication` if none were hidden.

    `overlapped` and `exposed` are the bounds: the larger of the two, and their sum. Communication runs at the link's rate
    inside one host, at the rate between hosts once there are several.
    """
    spec = CHIPS[chip]
    rate = spec.link if devices <= spec.per_host else spec.host_link
    compute = plan["flops_per_device"] / (spec.flops * ASSUMED_UTILISATION)
    communication = sum(kind["sent_bytes"] for kind in plan["collectives"].values()) / rate
    return {
        "compute": compute,
        "communication": communication,
        "overlapped": max(compute, communication),
        "exposed": compute + communication,
        "fits": bool(plan["bytes_per_device"]["arguments"] + plan["bytes_per_device"]["activations"] < spec.memory),
    }


def print_plan(plan: Mapping[str, Any], chip: str = "") -> None:
    """The plan as lines of text."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    print(f"mesh            {mesh}")
    print(f"batch           {plan['batch']} × {plan['accumulate']} of {plan['crop']} samples; {plan['method']}")
    print(f"parameters      {plan['parameters']:,} trained")
    print("per device, GB  " + "  ".join(f"{k} {v / 1e9:.3f}" for k, v in plan["bytes_per_device"].items()))
    print(
        f"FLOPs a step    {plan['flops_per_device']:.4g} per device, {plan['flops_per_device'] * _size(plan):.4g} in all"
    )
    for kind, row in plan["collectives"].items():
        print(
            f"{kind:<16}{row['count']:.0f}, results {row['result_bytes'] / 1e9:.3f} GB, sent {row['sent_bytes'] / 1e9:.3f} GB"
        )
    if chip:
        e = plan["expected"]
        print(
            f"on {chip:<13}{e['overlapped']:.3f} to {e['exposed']:.3f} s a step: computing {e['compute']:.3f} s at "
            f"{ASSUMED_UTILISATION:.0%} of the data-sheet rate, communication {e['communication']:.3f} s; "
            f"{'fits' if e['fits'] else 'DOES NOT FIT'} in {CHIPS[chip].memory / 1e9:.0f} GB"
        )


def _size(plan: Mapping[str, Any]) -> int:
    return int(np.prod(list(plan["mesh"].values())))
