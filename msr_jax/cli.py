"""The console script `msr`: finds the command, runs it, turns a `UserError` into one line and exit code 2."""

import importlib
import os
import sys
from importlib.metadata import version

from msr_jax.errors import OF_A_PLACE, UserError, first_line
from msr_jax.files import LONGEST, printable
from msr_jax.machine import keep_compiled_programs, keep_freed_memory
from msr_jax.messages import print_log
from msr_jax.process import INTERRUPTED, begin, handling_sigterm, run_as_process
from msr_jax.standard_output import outlive_readers

# name: (module with `main(argv) -> int | None`, one line for the overview). Imported on use: `msr --help` stays quick.
COMMANDS = {
    "separate": ("msr_jax.separate.command", "separate songs into stems"),
    "train": ("msr_jax.train.main", "train a model from a config"),
    "plan": ("msr_jax.plan.command", "what training or separation needs on TPUs and GPUs, by their own compilers"),
    "evaluate": ("msr_jax.evaluate.command", "score a model, or any estimates, over a folder of tracks"),
    "compare": ("msr_jax.evaluate.compare", "tell which differences between results are real"),
    "tables": ("msr_jax.evaluate.tables", "the paper's tables from the models and data at hand"),
    "sweep": ("msr_jax.evaluate.sweep", "settings of a sampler over one set of deterministic features"),
    "models": ("msr_jax.weights.models_cli", "list the public models that --model NAME fetches"),
    "import": ("msr_jax.weights.import_cli", "read an official checkpoint into a model folder"),
    "export": ("msr_jax.weights.export_cli", "write a model folder as a PyTorch checkpoint"),
    "parity": ("msr_jax.parity.check", "check network fixtures against this implementation"),
    "serve": ("msr_jax.serve.command", "a page and an HTTP API that separate songs"),
    "completion": ("msr_jax.completion", "completion of all of this in bash and zsh"),
    "doctor": ("msr_jax.bench.doctor", "what this machine has, and what the commands use of it"),
    "bench": ("msr_jax.bench.main", "measure speed and memory beside the peers"),
}


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: msr COMMAND …\n\n{rows}\n\n`msr COMMAND --help` tells the rest, `msr --version` which release this is."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 done but for some songs or tracks, 2 bad input, 130 interrupted.

    Without `argv` it is the process's own command, which signals end at once.
    """
    if argv is None:
        name = f"msr {sys.argv[1]}" if len(sys.argv) > 1 else "msr"
        print_log()
        outlive_readers()
        if sys.argv[1:2] and sys.argv[1] in COMMANDS:
            keep_compiled_programs()
        return run_as_process(name, lambda: _run(sys.argv[1:]))
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print(f"msr {argv[0]}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(argv: list[str]) -> int:
    try:
        try:
            code = _command(argv)
        except SystemExit:  # after --help
            _flush()
            raise
        _flush()
        return code
    except UserError as error:
        print(f"msr {argv[0] if argv else ''}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in OF_A_PLACE or not error.filename:
            raise
        place = printable(os.fsdecode(error.filename))
        shown = place if len(place) <= LONGEST else f"{place[:LONGEST]}…"
        print(f"msr {argv[0]}: {shown} cannot be used: {error.strerror}; name another place", file=sys.stderr)
        return 2
    except MemoryError as error:
        told = f"this machine has not the memory for that ({first_line(error)}); take less at a time"
        print(f"msr {argv[0]}: {told}", file=sys.stderr)
        return 2


def _flush() -> None:
    if sys.stdout:
        sys.stdout.flush()


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"msr_jax {version('msr_jax')}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"msr: there is no command '{argv[0]}'; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    keep_freed_memory()
    begin(argv[1:])
    with handling_sigterm():
        return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
