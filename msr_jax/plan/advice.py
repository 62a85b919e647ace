"""What would make a plan fit: fewer examples at once for the same batch of a step, splitting the state, computing again."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from msr_jax.errors import UserError
from msr_jax.plan.plan import chips_that_hold

MOST_COMPILATIONS = 8


class Split(NamedTuple):
    """A batch that devices cannot share equally: what is planned instead, and the advice that goes with it."""

    batch: int
    advice: list[str]


def split_batch(config: Mapping[str, Any], devices: int) -> Split:
    """The config's batch where the devices divide it, else the next larger that they divide, and how to get near it.

    Raises:
      UserError: no example at all.
    """
    batch, accumulate = config["data"]["batch"], config["optim"]["accumulate"]
    if batch < 1:
        raise UserError(
            f"data.batch ({batch}) must be a multiple of the {devices} devices of the mesh, such as {devices}"
        )
    if batch % devices == 0:
        return Split(batch, [])
    above, below = -(-batch // devices) * devices, batch // devices * devices
    near = [f"--config.data.batch={size}" for size in (below, above) if size]
    fewer = [n for n in range(devices - 1, 0, -1) if batch % n == 0][:2]
    advice = [
        f"{devices} devices do not divide data.batch={batch}; this is the plan of {above} ({above // devices} on each)",
        f"take {' or '.join(near)} (multiples of {devices}), optim.accumulate={accumulate}",
        f"exactly {batch} examples a step run on {' or '.join(str(n) for n in fewer)} devices",
    ]
    return Split(above, advice)


def what_would_fit(config: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """Settings under which a training step that does not fit would; estimates but for what `--fit` has compiled."""
    if plan["fits"] is not False or plan["has"] is None or plan["program"] != "train":
        return []
    advice = []
    devices, memory = math.prod(plan["mesh"].values()), plan["bytes_per_device"]
    each, fixed = plan["examples_per_device"], memory["parameters"] + memory["optimiser"] + memory["averages"]
    per_example = max(0.0, plan["needs"] - fixed - memory["frozen"]) / each
    room = plan["has"] - fixed - memory["frozen"]
    smaller = [n for n in range(each - 1, 0, -1) if each % n == 0]
    if fixed > plan["has"] / 4 and plan["mesh"]["fsdp"] * plan["mesh"].get("fsdp_inner", 1) < devices:
        advice.append(
            f"--config.mesh.fsdp={devices} --config.mesh.data=1: the state of {fixed / 1e9:.1f} GB is then split over "
            f"{devices} devices"
        )
    if smaller:
        fits = next((n for n in smaller if n * per_example <= room), smaller[-1])
        advice.append(
            f"--config.data.batch={fits * devices} --config.optim.accumulate={plan['accumulate'] * each // fits}: the same "
            f"{plan['batch'] * plan['accumulate']} examples a step, {fits} at once on a device"
            + (" (an estimate; --fit compiles)" if plan["needs"] else " (to be tried; --fit compiles)")
        )
    remat = _rematerialised(config["model"])
    if remat:
        advice.append(f"{remat}: activations are computed again for the gradient instead of kept")
    if not smaller and plan["needs"]:
        larger = chips_that_hold(plan["needs"])
        held = f"one example needs {plan['needs'] / 1e9:.1f} GB"
        advice.append(
            f"{held}: {', '.join(larger)} have it" if larger else f"{held}, more than any chip of the table has"
        )
        advice.append("a shorter --config.data.crop")
    return advice


def _rematerialised(model: Mapping[str, Any]) -> str:
    """The setting by which more is computed again; "" if nothing more can be."""
    remat = model.get("remat")
    if isinstance(remat, bool):
        return "" if remat else "--config.model.remat=True"
    levels = tuple(range(len(model.get("factors", ()))))
    if remat is None or not levels or tuple(remat) == levels:
        return ""
    return f'--config.model.remat="{levels}"'


def largest_batch(
    compile_with: Callable[[int], Mapping[str, Any]], start: int, most: int = 1024
) -> tuple[int, bool, list[dict[str, Any]]]:
    """The largest number of examples per device that fits, by compiling a handful of times.

    Memory is nearly a straight line in the batch: each guess is where the line through the last two would reach the limit.
    No more than `most`, or `start` where that is more, are tried.

    Args:
      compile_with: examples per device -> plan ("fits", "needs", "has").

    Returns:
      (examples per device, 0 if not even one fits; whether one more was seen not to fit, so that it is the largest; what was
      tried, in order).
    """
    tried: dict[int, Mapping[str, Any]] = {}

    def fits(size: int) -> bool:
        if size not in tried:
            tried[size] = compile_with(size)
        return bool(tried[size]["fits"])

    low, high = 0, max(most, start) + 1
    guess = max(1, start)
    while low + 1 < high and len(tried) < MOST_COMPILATIONS:
        if fits(guess):
            low = max(low, guess)
        else:
            high = min(high, guess)
        guess = _next(tried, low, high)
    rows = [
        {
            "examples": n,
            "fits": plan["fits"],
            "needs": plan["needs"],
            "work_space": plan["bytes_per_device"].get("work_space"),
        }
        for n, plan in tried.items()
    ]
    return low, low + 1 in tried, rows


def _next(tried: Mapping[int, Mapping[str, Any]], low: int, high: int) -> int:
    """A size strictly between, where there is one."""
    known = sorted(n for n, plan in tried.items() if plan["needs"])
    if len(known) < 2:
        guess = low * 2 if low else high // 2
    else:
        first, last = known[-2], known[-1]
        slope = (tried[last]["needs"] - tried[first]["needs"]) / (last - first)
        room = tried[last]["has"] - tried[last]["needs"]
        guess = last + math.floor(room / slope) if slope > 0 else low * 2
        if guess <= low:  # the line says that the next does not fit: seen, not only said
            guess = low + 1
    return min(max(guess, low + 1), high - 1)
