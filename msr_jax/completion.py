"""`msr completion bash|zsh`: the script by which a shell completes commands, options, their choices and files.

bash: msr completion bash > ~/.local/share/bash-completion/completions/msr
zsh: msr completion zsh > "${fpath[1]}/_msr"
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from msr_jax.cli import COMMANDS
from msr_jax.errors import UserError

SHELLS = ("bash", "zsh")
# Metavars, or what stands in one between bars.
FILES = {"FILE", "FILE.py", "SONG", "FIXTURE", "MODEL[:WEIGHT]", "RESULTS"}
FOLDERS = {"DIR", "FOLDER"}


class _Parser(Exception):
    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def _stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
    raise _Parser(parser)


def parser_of(module: str) -> argparse.ArgumentParser:
    """What a command parses its arguments with: every `main` begins with that, and is stopped there."""
    usual = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = _stop  # type: ignore[method-assign,assignment]
    try:
        importlib.import_module(module).main([])
    except _Parser as found:
        return found.parser
    finally:
        argparse.ArgumentParser.parse_known_args = usual  # type: ignore[method-assign]
    raise AssertionError(f"{module} parses no arguments")


def whole_parser() -> argparse.ArgumentParser:
    """Of `msr` with all of its commands."""
    whole = argparse.ArgumentParser(prog="msr")
    whole.add_argument("--version", action="store_true", help="which release this is")
    commands = whole.add_subparsers()
    for name, (module, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
        commands.choices[name] = own_parser() if module == __name__ else parser_of(module)
        commands.choices[name].prog = f"msr {name}"
    return whole


def own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msr completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: Sequence[str]) -> int:
    shell = own_parser().parse_args(argv).shell
    try:
        import shtab
    except ImportError as error:
        raise UserError(f"this needs shtab: pip install shtab ({error})") from error
    whole = whole_parser()
    for command in whole._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for action in command._actions:
            shown = action.metavar if isinstance(action.metavar, str) else ""
            words = shown.split("|")
            if FILES & {*words}:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif FOLDERS & {*words}:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif len(words) > 1 and shown.islower():  # what it may be, in the order that help shows
                action.choices = words
            if shell == "zsh" and shown:
                action.metavar = shown.replace(":", r"\:")  # zsh would run what follows a colon
    text = shtab.complete(whole, shell)
    if shell == "zsh":  # songs and the like, of which there may be several: shtab has the first alone
        text = text.replace('"(*)::', '"*:').replace('"(*):', '"*:')
    print(text)
    return 0
