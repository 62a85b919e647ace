"""What the programs on Apache Beam share: which options are whose, and what goes wrong in a pipeline as one sentence."""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from msr_jax.errors import UserError, first_line

SIGNALS = ("KeyboardInterrupt", "msr_jax.process.Ended")  # raised inside a step, Beam makes RuntimeErrors of them
WHERE = " [while running "  # Beam's, and the name of a step, after what was raised in it


def split_options(
    argv: Sequence[str], parser: argparse.ArgumentParser, command: str
) -> tuple[list[str], list[str], list[str]]:
    """Those of a parser; Beam's among them, written --name=value; and Beam's after a lone `--`.

    Raises:
      UserError: one of Beam's is written otherwise; its value would be taken for an argument.
    """
    before = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    _, unknown = parser.parse_known_args(before)
    if odd := [word for word in unknown if not (word.startswith("--") and "=" in word)]:
        raise UserError(f"{odd[0]} is no option of {command}; Beam's follow a lone --, or are written --name=value")
    return [word for word in before if word not in unknown], unknown, list(argv[len(before) + 1 :])


def pipeline_options(among: Sequence[str], after: Sequence[str], command: str) -> Any:
    """Beam's options, as `split_options` gives them.

    Raises:
      UserError: Beam is not installed, or has no option that stands among the program's own: a mistyped one, which Beam would
        pass over. (After `--` it may be one of a runner that Beam here does not know.)
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(f"this needs Apache Beam: pip install 'msr_jax[beam]' ({error})") from error
    told = lambda options: set(PipelineOptions(options).get_all_options(retain_unknown_options=True))
    for word in among:
        if told([word]) - told([]):
            name = word.partition("=")[0]
            raise UserError(f"{name} is no option of {command}, nor of Beam; those of a runner follow a lone --")
    return PipelineOptions([*among, *after])


@contextmanager
def running(doing: str) -> Iterator[None]:
    """Inside a pipeline runs; what a disk, a worker or Beam says of its end becomes a UserError that begins with `doing`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, UserError) as error:
        if isinstance(error, UserError) and WHERE not in str(error):
            raise  # not out of the pipeline
        reason = _reason(error)
        if reason.startswith(SIGNALS):
            raise  # to `run_as_process`, which knows what it was
        raise UserError(f"{doing}: {reason}") from error


def _reason(error: BaseException) -> str:
    """Of a worker's error Beam may have the whole traceback, whose last line says what it was, and where in the pipeline."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    raised = [line for line in lines[1:] if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    told = raised[-1] if raised else first_line(error)
    return re.sub(r"^(RuntimeError: |msr_jax\.errors\.UserError: )+", "", told).partition(WHERE)[0]
