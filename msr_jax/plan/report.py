"""A plan as lines of text."""

import math
from collections.abc import Mapping
from typing import Any

from msr_jax.plan.plan import ASSUMED_UTILISATION, GPU_SHARE
from msr_jax.plan.target import Target


def print_plan(plan: Mapping[str, Any], target: Target) -> None:
    """What `msr plan` shows of a compiled program, and of one that the compiler refused."""
    devices = math.prod(plan["mesh"].values())
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    what = "segments" if plan["program"] == "separate" else "samples"
    _line("target", f"{target.name}: {len(target.devices)} devices, hosts {target.hosts}; by {plan['compiler']}")
    is_part = plan["program"] == "separate" and target.hosts > 1
    _line("mesh", mesh + (" (of one host; several share the songs, not a song's segments)" if is_part else ""))
    size = f"{plan['batch']} × {plan['accumulate']} of {plan['crop']} samples"
    _line("batch", size + f", {plan['examples_per_device']} on a device; {plan['program']}, {plan['method']}")
    _line("parameters", f"{plan['parameters']:,} {'trained' if what == 'samples' else 'in its networks'}")
    _line(
        "per device, GB", "  ".join(f"{k.replace('_', ' ')} {v / 1e9:.3f}" for k, v in plan["bytes_per_device"].items())
    )
    _line("compiled in", f"{plan['seconds_to_compile']:.0f} s")
    if plan["refused"]:
        _line("DOES NOT FIT" if plan["needs"] else "NOT COMPILED", plan["refused"])
        return
    if plan["has"]:
        fits = "fits" if plan["fits"] else "DOES NOT FIT"
        _line(fits, f"{plan['needs'] / 1e9:.2f} of {plan['has'] / 1e9:.1f} GB on a device")
    if target.platform == "gpu" and plan["fits"] and plan["needs"] > GPU_SHARE * plan["has"]:
        _line("", f"JAX takes {GPU_SHARE:.0%} of a GPU's memory: start with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95")
    flops, moved = plan["flops_per_device"], plan["bytes_moved"]
    _line("FLOPs", f"{flops:.4g} per device, {flops * devices:.4g} in all")
    _line(
        "bytes moved",
        f"at least {moved / 1e9:.2f} GB per device, loops counted once" if moved else "the compiler does not say",
    )
    for kind, row in plan["collectives"].items():
        sizes = f"results {row['result_bytes'] / 1e9:.3f} GB, sent {row['sent_bytes'] / 1e9:.3f} GB"
        _line(kind, f"{row['count']:.0f}, {sizes}, {row['hidden']:.0f} beside products")
    if plan["collectives"] and plan["necessary_bytes"]:
        _line("necessary", _necessary(plan))
    if plan["forms"]:
        _line("forms", ", ".join(f"{name}: {count}" for name, count in plan["forms"].items()))
    if "expected" in plan:
        e = plan["expected"]
        _line(
            "time",
            f"at least {e['at_least']:.3g} s at the data sheet's rates; {e['overlapped']:.3g} to {e['exposed']:.3g} s if "
            f"computing reaches {ASSUMED_UTILISATION:.0%} of them ({e['compute']:.3g} s; sending {e['communication']:.3g} s)",
        )


def _necessary(plan: Mapping[str, Any]) -> str:
    sent = sum(row["sent_bytes"] for row in plan["collectives"].values())
    need = plan["necessary_bytes"]
    gathers, gradients, narrow = need["gathers"], need["gradients"], need["narrow_gradients"]
    said = f"parameters gathered once {gathers / 1e9:.3f} GB, gradients summed once {gradients / 1e9:.3f} GB in float32"
    if not gathers + gradients:
        return said
    said += f"; sent {sent / (gathers + gradients):.2f} times that"
    if narrow < gradients:
        said += f", {sent / (gathers + narrow):.2f} times if gradients cross in the compute precision"
    return said + (f"; each of {plan['accumulate']} micro-batches sends" if plan["accumulate"] > 1 else "")


def print_advice(advice: list[str]) -> None:
    """What would fit, a line each."""
    for k, line in enumerate(advice):
        _line("" if k else "what would do", line)


def print_fit(
    most: int, is_largest: bool, rows: list[dict[str, Any]], per_example: float | None, target: Target
) -> None:
    """The largest batch, and what was compiled to find it; that more may fit, where the next was not tried."""
    for row in rows:
        said = "fits" if row["fits"] else "does not fit"
        size = f", work space {row['work_space'] / 1e9:.2f} GB" if row["work_space"] else ""
        _line("tried", f"{row['examples']} on a device: {said}{size}")
    too_many = min((row["examples"] for row in rows if not row["fits"]), default=None)
    rest = "more was not tried" if too_many is None else f"{too_many} do not fit, nothing between was tried"
    size = f"{most}" if is_largest else f"at least {most} ({rest})"
    _line("largest batch", f"{size} on each of the devices of {target.name}, {len(rows)} compilations")
    if per_example is not None:
        _line("per example", f"{per_example / 1e9:.3f} GB of work space")


def _line(name: str, text: str) -> None:
    print(f"{name:<15} {text}")
