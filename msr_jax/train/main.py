"""`msr train --config configs/NAME.py --workdir DIR [--config.a.b=value …]`."""

import argparse
import difflib
import os
import re
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from msr_jax.errors import UserError
from msr_jax.runtime import EXIT_STOPPED, keep_freed_memory


def _leaves(config: ConfigDict, prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in config.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return found


def _parse(path: str, overrides: list[str]) -> ConfigDict:
    argv = ["msr train", f"--config={path}", *overrides]
    values = flags.FlagValues()  # not the process's own: this can then be called again
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    values(argv)
    return values.config


def read_config(path: str, overrides: list[str]) -> dict[str, Any]:
    """The config of a file with overrides (`--config.a.b=value`) applied, as plain nested dicts.

    Raises:
      UserError: no such file, a file that does not give a config, an unknown key or a value of another type.
    """
    if not Path(path).is_file():
        raise UserError(f"--config {path} is not there; name a file such as configs/unet_det.py")
    try:
        known = _leaves(_parse(path, []))
    except Exception as error:  # the file is a program: it can fail in any way
        raise UserError(f"--config {path} gives no config ({type(error).__name__}: {error})") from error
    config = None
    for k, override in enumerate(overrides):
        key = re.match(r"--config\.([^=]+)=", override)
        if not key:
            raise UserError(f"cannot read '{override}'; settings are written --config.a.b=value")
        if key[1] not in known:
            near = difflib.get_close_matches(key[1], known, 3, 0.4)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise UserError(f"the config has no setting '{key[1]}'{hint}")
        try:
            config = _parse(path, overrides[: k + 1])
        except (flags.Error, TypeError, ValueError, KeyError, AttributeError, SyntaxError) as error:
            raise UserError(f"{override}: {str(error).splitlines()[0]}") from error
    return (config or _parse(path, [])).to_dict()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msr train",
        description="Train one stage of a model; goes on from its last checkpoint if --workdir holds one.",
        epilog="Every leaf of the config is a setting: --config.optim.lr=3e-4. Exit codes: 0 done, 2 bad input, "
        f"{EXIT_STOPPED} stopped by SIGTERM after saving (start again to continue).",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py", help="a file with get_config()")
    parser.add_argument("--workdir", metavar="DIR", help="checkpoints, logs and the model go here")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="trace so many steps into DIR/profile")
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
        raise UserError("--profile must be positive")
    return _train(args, config)


def _train(args: argparse.Namespace, config: dict[str, Any]) -> int:
    if not args.workdir:
        raise UserError("--workdir is missing; name the folder that checkpoints, logs and the model go to")
    # Imported late: a mistyped setting is answered at once.
    from msr_jax.train.distributed import find_cluster, initialize, is_main
    from msr_jax.train.loop import train

    keep_freed_memory()
    initialize(find_cluster(os.environ, args.coordinator, args.processes, args.process, args.distributed))
    step = int(train(config, args.workdir, profile_steps=args.profile).step)
    if step < config["train"]["steps"]:
        return EXIT_STOPPED
    if is_main():
        print(f"done: step {step}, model in {Path(args.workdir) / 'model'}")
    return 0
