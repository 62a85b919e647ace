"""The plan of a program: bytes and whether they fit, work, communication, and bounds on the time, from its compilation."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from msr_jax.errors import UserError, first_line
from msr_jax.plan.chips import CHIPS, Chip
from msr_jax.plan.compiled import compile_program
from msr_jax.plan.flops import count_flops
from msr_jax.plan.program import Program, separation_program, training_program
from msr_jax.plan.target import Target

# Share of a chip's data-sheet rate that the expected time assumes: what a well-filled step of this kind should reach.
ASSUMED_UTILISATION = 0.45
# What a process holds of a GPU beside its arrays (context, cuDNN, cuBLAS and NCCL), and the share of the memory that JAX takes
# unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. A TPU's compiler keeps its own reserve and refuses what does not fit.
GPU_RESERVE = 2e9
GPU_SHARE = 0.75


def make_plan(
    config: Mapping[str, Any], target: Target, separate: str | None = None, steps: int | None = None, mixtures: int = 1
) -> dict[str, Any]:
    """Compile one optimiser step, or with `separate` one call of the separation of so many segments, and add up.

    Returns:
      Plain numbers, as printed by `report.print_plan`; bytes and FLOPs per device. "has", and "fits" of what was compiled, are
      None for CPUs, whose memory no target tells.

    Raises:
      UserError: a config that does not fit the devices, or whose sizes no machine has.
    """
    try:
        if separate is None:
            program = training_program(config, target)
        else:
            program = separation_program(config, target, separate, steps, mixtures)
    except OverflowError as error:  # of JAX, where a product of sizes leaves 64 bits
        raise UserError(
            f"the config's sizes are beyond any machine ({first_line(error)}); take smaller ones"
        ) from error
    return plan_of(program, target, compile_program(program, target))


def plan_of(program: Program, target: Target, compiled: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a program that was compiled for the target."""
    devices = program.mesh.size
    plan: dict[str, Any] = {
        **program.facts,
        "target": target.name,
        "compiler": compiled["compiler"],
        "seconds_to_compile": compiled["seconds"],
        "key": compiled["key"],
        "refused": compiled["refused"],
        "examples_per_device": program.examples,
        "flops_per_device": count_flops(program.traced.jaxpr, target.platform) / devices,
    }
    memory = plan["bytes_per_device"]
    if compiled["refused"]:
        plan |= {"fits": False, "needs": compiled.get("needs", 0), "has": compiled.get("has", memory_of(target))}
        return plan
    # From the compiler: what the program takes in (state, frozen networks, batch), what it gives out beside what it writes
    # in place, and its work space at the peak.
    memory |= {
        "arguments": compiled["arguments"],
        "outputs": max(0, compiled["outputs"] - compiled["aliased"]),
        "work_space": compiled["work_space"],
        "code": compiled["code"],
    }
    sent = compiled["collectives"]
    plan |= {
        "needs": memory["arguments"] + memory["outputs"] + memory["work_space"] + memory["code"],
        "has": memory_of(target),
        "bytes_moved": compiled["cost"] and compiled["cost"]["bytes"],
        "collectives": _summary(sent),
        "largest_gather": max((_largest(c) for c in sent if c["kind"] == "all-gather"), default=0),
        "forms": compiled["forms"],
    }
    # A TPU's compiler has refused what does not fit; for the others it is counted.
    plan["fits"] = None
    if target.chip:
        plan["fits"] = target.platform != "gpu" or plan["needs"] <= plan["has"]
        plan["expected"] = expected_time(plan, target.chip, devices)
    return plan


def memory_of(target: Target) -> float | None:
    """Bytes of a device that a program can have; None for CPUs, of which a plan knows nothing."""
    if target.chip is None:
        return None
    return target.chip.memory - (GPU_RESERVE if target.platform == "gpu" else 0)


def _largest(collective: Mapping[str, Any]) -> int:
    return max(int(np.prod(shape)) for shape in collective["shapes"])


def _summary(sent: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    kinds = sorted({c["kind"] for c in sent})
    total = lambda kind, value: sum(value(c) for c in sent if c["kind"] == kind)
    return {
        kind: {
            "count": total(kind, lambda c: c["times"]),
            "hidden": total(kind, lambda c: c["times"] * c["hidden"]),
            "result_bytes": total(kind, lambda c: c["times"] * c["result_bytes"]),
            "sent_bytes": total(kind, lambda c: c["sent_bytes"]),
        }
        for kind in kinds
    }


def expected_time(plan: Mapping[str, Any], chip: Chip, devices: int) -> dict[str, float]:
    """Seconds of a run on so many devices.

    `at_least`: the largest of what computing, moving bytes (where the compiler counts them) and sending take at the data
    sheet's rates. `compute` is at the assumed utilisation, `communication` if none were hidden; `overlapped` is the largest of
    these and of moving bytes, and `exposed` has communication added instead. Communication runs at the link's rate inside one
    host, at the rate between hosts once there are several.
    """
    rate = chip.link if devices <= chip.per_host else chip.host_link
    fastest = plan["flops_per_device"] / chip.flops
    compute = fastest / ASSUMED_UTILISATION
    communication = sum(kind["sent_bytes"] for kind in plan["collectives"].values()) / rate
    memory = (plan.get("bytes_moved") or 0) / chip.bandwidth
    return {
        "at_least": max(fastest, memory, communication),
        "compute": compute,
        "memory": memory,
        "communication": communication,
        "overlapped": max(compute, memory, communication),
        "exposed": max(compute, memory) + communication,
    }


def chips_that_hold(needs: float) -> list[str]:
    """Chips with so many bytes of memory, the smallest first."""
    room = {n: c.memory - (GPU_RESERVE if c.gpu else 0) for n, c in CHIPS.items()}
    return [name for name in sorted(room, key=lambda n: room[n]) if room[name] >= needs]
