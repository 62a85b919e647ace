"""Config files: found by path or by name, read with overrides, checked."""

import difflib
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from msr_jax.config_fields import check_config, check_field, leaves
from msr_jax.errors import UserError

RECIPES = Path(__file__).parent / "configs"  # in a clone, a link to configs/; in a wheel, a copy of it


def find_config(name: str) -> Path:
    """The config file of a path, or of a recipe's name: `unet_det_small` and `configs/unet_det_small.py` need no clone.

    Raises:
      UserError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    recipe = RECIPES / f"{path.stem}.py"
    if path.suffix in ("", ".py") and str(path.parent) in (".", "configs") and recipe.is_file():
        return recipe
    known = sorted(p.stem for p in RECIPES.glob("*.py"))
    near = difflib.get_close_matches(path.stem, known, 3, 0.4) or ["unet_det", "bsrf_det", "unet_det_small"]
    raise UserError(f"--config {name} is not there; name a file, or a recipe of the package such as {', '.join(near)}")


def _parse(path: Path, overrides: list[str]) -> ConfigDict:
    argv = ["msr train", f"--config={path}", *overrides]
    values = flags.FlagValues()  # not the process's own: this can then be called again
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    beside = str(path.parent.resolve())
    sys.path.insert(0, beside)  # recipes of one folder may share a module
    try:
        values(argv)
    finally:
        sys.path.remove(beside)
    return values.config


def read_config(name: str, overrides: list[str]) -> dict[str, Any]:
    """The config of a file with overrides (`--config.a.b=value`) applied, as plain nested dicts.

    Raises:
      UserError: no such file, a file that does not give a config, an unknown key, or a value of another kind or out of range.
    """
    path = find_config(name)
    try:
        read = _parse(path, [])
        known = list(leaves(read.to_dict()))
    except Exception as error:  # the file is a program: it can fail in any way
        raise UserError(f"--config {name} gives no config ({type(error).__name__}: {error})") from error
    used: dict[str, str] = {}  # by key: the last one counts (absl would join lists that are given twice)
    for override in overrides:
        key = re.match(r"--config\.([^=]+)=", override)
        if not key:
            raise UserError(f"cannot read '{override}'; settings are written --config.a.b=value")
        if key[1] not in known:
            near = difflib.get_close_matches(key[1], known, 3, 0.4)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise UserError(f"the config has no setting '{key[1]}'{hint}")
        used[key[1]] = override
        try:
            read = _parse(path, list(used.values()))
        except (flags.Error, TypeError, ValueError, KeyError, AttributeError, SyntaxError) as error:
            text = override.partition("=")[2]
            with suppress(KeyError):  # one of your own, or of a network of your own
                check_field(key[1], text, "config.", model=read.model.name)
            raise UserError(
                f"config.{key[1]} cannot be '{text}'; it is to be of the kind of {leaves(read.to_dict())[key[1]]!r}"
            ) from error
    config = read.to_dict()
    check_config(config)
    return config
