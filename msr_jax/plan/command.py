"""`msr plan --config configs/NAME.py --target v5e:8x8 [--config.a.b=value …] [--separate …] [--fit] [--json FILE]`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from msr_jax.config_files import read_config
from msr_jax.errors import UserError
from msr_jax.files import check_place, write_whole

SEPARATIONS = ("none", "diffusion", "consistency")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msr plan",
        description="What a training step or a separation needs and takes on a target, by the target's own compiler. No chip, "
        "no driver and no data are needed, and nothing is allocated.",
        epilog="Compilers come with the extras: pip install 'msr_jax[tpu]' and 'msr_jax[cuda]'. For cpu:N the forms that all "
        "accelerators share are compiled for simulated devices. Results are kept in the user's cache folder, or MSR_HOME.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py", help="a file with get_config(), or the name of a recipe"
    )
    parser.add_argument(
        "--target",
        required=True,
        metavar="KIND:SHAPE",
        help="v5e:8x8, v5p:2x2x1, v6e:2x2, h200:8, h100:2x8, a100:8, cpu:8",
    )
    parser.add_argument(
        "--separate", choices=SEPARATIONS, help="plan separation with this refinement instead of training"
    )
    parser.add_argument(
        "--steps", type=int, metavar="T", help="with --separate: refinement steps; default the config's"
    )
    parser.add_argument("--fit", action="store_true", help="find the largest batch per device that fits, by compiling")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures here too")
    return parser


def main(argv: list[str]) -> int:
    args, overrides = _parser().parse_known_args(argv)
    config = read_config(args.config, overrides)
    if args.steps is not None and args.separate not in SEPARATIONS[1:]:
        raise UserError("--steps goes with --separate diffusion or consistency")
    # Imported late: a mistyped setting is answered at once.
    from msr_jax.plan.target import find_target

    target = find_target(args.target)
    if args.json:
        check_place(args.json)
    if args.fit and target.chip is None:
        raise UserError("--fit needs a chip whose memory is known; a CPU's is not part of the target")
    print(f"compiling for {target.name}; that can take minutes", file=sys.stderr)
    plan = _separation(args, config, target) if args.separate else _training(args, config, target)
    if args.json:
        write_whole(args.json, json.dumps(plan, indent=1) + "\n")
    return 0


def _training(args: argparse.Namespace, config: dict[str, Any], target: Any) -> dict[str, Any]:
    from msr_jax.plan.advice import split_batch, what_would_fit
    from msr_jax.plan.plan import make_plan
    from msr_jax.plan.report import print_advice, print_plan
    from msr_jax.train.sharding import make_mesh

    devices = make_mesh(config["mesh"], target.devices).size
    split = split_batch(config, devices)
    config = _with_batch(config, split.batch)
    plan = make_plan(config, target)
    print_plan(plan, target)
    plan["advice"] = [*split.advice, *what_would_fit(config, plan)]
    print_advice(plan["advice"])
    if args.fit:
        plan["fit"] = _fit(
            lambda n: make_plan(_with_batch(config, n * devices), target), plan["examples_per_device"], target
        )
    return plan


def _separation(args: argparse.Namespace, config: dict[str, Any], target: Any) -> dict[str, Any]:
    from msr_jax.plan.plan import make_plan
    from msr_jax.plan.report import print_plan

    plan = make_plan(config, target, args.separate, args.steps)
    print_plan(plan, target)
    if args.fit:
        plan["fit"] = _fit(lambda n: make_plan(config, target, args.separate, args.steps, n), 1, target)
    return plan


def _with_batch(config: dict[str, Any], batch: int) -> dict[str, Any]:
    return {**config, "data": {**config["data"], "batch": batch}}


def _fit(compile_with: Any, start: int, target: Any) -> dict[str, Any]:
    from msr_jax.plan.advice import largest_batch
    from msr_jax.plan.report import print_fit

    most, is_largest, rows = largest_batch(compile_with, start)
    last = next((row for row in rows if row["examples"] == most and row["work_space"]), None)
    per_example = last["work_space"] / most if last else None
    print_fit(most, is_largest, rows, per_example, target)
    return {
        "examples_per_device": most,
        "is_largest": is_largest,
        "work_space_per_example": per_example,
        "compiled": rows,
    }
