"""`msr train --config configs/NAME.py --workdir DIR [--config.a.b=value …]`."""

import argparse
import difflib
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from msr_jax.errors import UserError


def _leaves(config: ConfigDict, prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return found


def read_config(path: str, overrides: list[str]) -> dict[str, Any]:
    """The config of a file with overrides (`--config.a.b=value`) applied, as plain nested dicts.

    Raises:
      UserError: no such file, a file that does not give a config, an unknown key or a value of another type.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    try:
        values(["msr train", f"--config={path}"])
        plain: ConfigDict = values.config
    except FileNotFoundError as error:
        raise UserError(f"--config {path} does not exist; name a file such as configs/unet_det.py") from error
    except (AttributeError, ImportError, SyntaxError, TypeError, IsADirectoryError, flags.Error, ValueError) as error:
        raise UserError(f"--config {path} is no config file ({type(error).__name__}: {error})") from error
    known = _leaves(plain)
    for override in overrides:
        key = re.match(r"--config\.([^=]+)", override)
        if not key or "=" not in override:
            raise UserError(f"cannot read '{override}'; settings are written --config.a.b=value")
        if key[1] not in known and not any(k.startswith(key[1] + ".") for k in known):
            near = difflib.get_close_matches(key[1], known, 3, 0.4)
            raise UserError(f"the config has no key '{key[1]}'" + (f"; near it are {', '.join(near)}" if near else ""))
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    try:
        values(["msr train", f"--config={path}", *overrides])
        return values.config.to_dict()
    except (flags.Error, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"cannot set {' '.join(overrides)}: {str(error).splitlines()[0]}") from error


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="msr train", description=__doc__, epilog="Every leaf of the config is a setting: --config.optim.lr=3e-4"
    )
    parser.add_argument("--config", required=True, metavar="FILE.py", help="a file with get_config()")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, logs and the model go here")
    args, overrides = parser.parse_known_args(argv)
    config = read_config(args.config, overrides)
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags
    # Imported late: a mistyped setting is answered at once.
    from msr_jax.train.loop import enable_compilation_cache, train

    enable_compilation_cache()
    state = train(config, args.workdir)
    print(f"done: step {int(state.step)}, model in {args.workdir}/model")
    return 0
