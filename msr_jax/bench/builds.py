"""Builds of this package that a benchmark compares: this one, and an older one that `--against` names."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msr_jax.errors import UserError


class Build(NamedTuple):
    """A build of this package: the interpreter and the folder of sources (none: it is installed there)."""

    python: str
    sources: Path | None
    home: Path  # for what it keeps
    options: tuple[str, ...] = ()


def own_build(folder: Path) -> Build:
    """This build, with what it keeps in `folder`: what an older one runs beside on equal terms."""
    return Build(sys.executable, Path(__file__).resolve().parents[2], folder / "home")


def older_build(against: str, folder: Path) -> Build:
    """The build that `--against` names: a commit of the repository that this one is in, a folder of sources, or an environment
    that has it installed.

    Raises:
      UserError: neither.
    """
    given, home = Path(against), folder / "home_older"
    if given.is_dir():
        if (python := given / "bin" / "python").exists():
            return Build(str(python.absolute()), None, home)
        if (given / "msr_jax").is_dir():
            return Build(sys.executable, given.resolve(), home)
        raise UserError(
            f"--against {against} holds neither msr_jax/ nor bin/python; name sources, an environment or a commit"
        )
    sources = folder / "older"
    sources.mkdir()
    repository = Path(__file__).resolve().parents[2]
    git = subprocess.Popen(
        ["git", "-C", str(repository), "archive", against, "msr_jax"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    unpacked = subprocess.run(["tar", "-x", "-C", str(sources)], stdin=git.stdout, stderr=subprocess.PIPE)
    _, told = git.communicate()
    if git.returncode or unpacked.returncode:
        reason = told.decode(errors="replace").strip().splitlines()
        raise UserError(
            f"--against {against} is neither a folder nor a commit of {repository} ({reason[0] if reason else 'git'})"
        )
    return Build(sys.executable, sources, home)


def environment_of(build: Build, without: Sequence[str] = ()) -> dict[str, str]:
    """The variables of a process that runs `build`: this one's, but for what names other sources, caches or is in `without`."""
    dropped = ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", *without)
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment["MSR_HOME"] = str(build.home)
    if build.sources:
        environment["PYTHONPATH"] = str(build.sources)
    return environment


def has_module(build: Build, module: str) -> bool:
    """Whether the build has this module."""
    program = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    folder = build.sources or build.home.parent
    return not subprocess.run([build.python, "-c", program], env=environment_of(build), cwd=folder).returncode
