"""`msr train --config configs/NAME.py --workdir DIR [--config.a.b=value …]`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from msr_jax.config_fields import tables
from msr_jax.config_files import read_config
from msr_jax.errors import UserError
from msr_jax.machine import keep_freed_memory
from msr_jax.process import EXIT_STOPPED


class _HelpConfig(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(tables())
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msr train",
        description="Train one stage of a model; goes on from its last checkpoint if --workdir holds one.",
        epilog="Every leaf of the config is a setting: --config.optim.lr=3e-4. Exit codes: 0 done, 2 bad input, "
        f"{EXIT_STOPPED} stopped by SIGTERM after saving (start again to continue).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py", help="a file with get_config(), or the name of a recipe"
    )
    parser.add_argument("--help-config", action=_HelpConfig, nargs=0, help="list every setting of a config and exit")
    parser.add_argument("--workdir", metavar="DIR", help="checkpoints, logs and the model go here")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="trace so many steps into DIR/profile")
    parser.add_argument(
        "--accept-new-data",
        action="store_true",
        help="go on although the records were made anew since the last checkpoint",
    )
    many = parser.add_argument_group(
        "several processes", "SLURM, Open MPI and GKE are recognised by themselves; see launch/README.md"
    )
    many.add_argument("--distributed", action="store_true", help="JAX finds the others, as on a TPU VM slice")
    many.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    many.add_argument("--processes", type=int, metavar="N")
    many.add_argument("--process", type=int, metavar="K", help="this one's number, from 0")
    return parser


def main(argv: list[str]) -> int:
    gone = [flag for flag in argv if flag.partition("=")[0] in ("--dry-run", "--chip", "--devices")]
    if gone:
        raise UserError(
            f"{gone[0]} is gone: msr plan --config FILE.py --target v5e:8x8 plans by the chip's own compiler"
        )
    args, overrides = _parser().parse_known_args(argv)
    config = read_config(args.config, overrides)
    if args.profile < 0:
        raise UserError("--profile must be 0 or more")
    return _train(args, config)


def _train(args: argparse.Namespace, config: dict[str, Any]) -> int:
    if not args.workdir:
        raise UserError("--workdir is missing; name the folder that checkpoints, logs and the model go to")
    # Imported late: a mistyped setting is answered at once.
    import jax

    from msr_jax.train.distributed import find_cluster, initialize, is_main
    from msr_jax.train.loop import train

    keep_freed_memory()
    initialize(find_cluster(os.environ, args.coordinator, args.processes, args.process, args.distributed))
    try:
        step = int(train(config, args.workdir, None, args.profile, args.accept_new_data).step)
    except UserError as error:
        if jax.process_count() == 1:
            raise
        # Said before the wait: where the others do not end, JAX aborts this one after minutes.
        print(f"msr train: {error}", file=sys.stderr, flush=True)
        _leave_together()
        return 2
    code = EXIT_STOPPED if step < config["train"]["steps"] else 0
    if code == 0 and is_main():
        print(f"done: step {step}, model in {Path(args.workdir) / 'model'}")
    _leave_together()
    return code


def _leave_together() -> None:
    """Wait for the run's other processes, as they end too: those who miss one of them abort.

    JAX would do it at the interpreter's exit, which `run_as_process` leaves out.
    """
    import jax

    if jax.process_count() > 1:
        jax.distributed.shutdown()
