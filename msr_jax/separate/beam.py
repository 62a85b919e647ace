"""`python -m msr_jax.separate.beam SONG … -o OUT [options of msr separate] [-- Beam's options]`: a batch by Apache Beam.

For fleets that run Beam already (extra `beam`): songs, OUT and the models must be places that all workers see. The manifest, by default
OUT/manifest.jsonl, is written when all is done; started again, songs whose stems are there are kept and told. Without Beam's options
its own local runner does the work. In a pipeline of one's own: `tasks | beam.Map(separate_task, argv)`.
"""

import functools
import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msr_jax.errors import UserError
from msr_jax.runtime import begin
from msr_jax.separate.batch import Batch, all_stems, separator_of
from msr_jax.separate.catalogue import check_stems, find_tasks, without_stems
from msr_jax.separate.command import parser_of
from msr_jax.separate.songs import Output, Task

_loading = threading.Lock()


@functools.cache
def _loaded(argv: tuple[str, ...]) -> Batch:
    args = parser_of().parse_args(argv)
    return Batch(args, separator_of(args))


def separate_task(task: Task, argv: Sequence[str]) -> dict[str, Any]:
    """Separate a song as `msr separate` with these options does; a process loads their model once.

    Returns:
      The song's row of the manifest, see `Manifest`; what is wrong with the song is its `error`.

    Raises:
      UserError: the options, or their model.
    """
    with _loading:
        batch = _loaded(tuple(argv))
    row = batch.finish(batch.begin(task)).row
    assert row is not None  # nobody has told of it
    return row


def _separate_fields(fields: tuple[Any, ...], argv: list[str]) -> dict[str, Any]:
    return separate_task(Task(*fields), argv)


def split_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of `msr separate`, and Beam's: what follows a lone `--`, or is written --name=value.

    Raises:
      UserError: one of Beam's is written otherwise; its value would be taken for a song.
    """
    before = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    _, unknown = parser_of().parse_known_args(before)
    if odd := [word for word in unknown if not (word.startswith("--") and "=" in word)]:
        raise UserError(f"{odd[0]} is no option of msr separate; Beam's follow a lone --, or are written --name=value")
    return [word for word in before if word not in unknown], [*unknown, *argv[len(before) + 1 :]]


def main(argv: list[str]) -> int:
    """Returns 0, or 1 where some songs could not be separated."""
    own, rest = split_options(argv)
    args = parser_of().parse_args(own)
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(f"this needs Apache Beam: pip install 'msr_jax[beam]' ({error})") from error
    Output(args.format, args.bits, args.peak).check()
    tasks = find_tasks(args.songs, args.out, args.list, args.filename)
    manifest = args.manifest or args.out / "manifest.jsonl"
    separator = _loaded(tuple(own)).separator  # what is wrong with the options is said here
    if not args.overwrite:
        tasks = without_stems(tasks, all_stems(separator))
    check_stems(tasks, separator.stems, args.format, is_any_format=args.overwrite)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with beam.Pipeline(options=PipelineOptions(rest)) as pipeline:
        (
            pipeline
            | "songs" >> beam.Create([tuple(task) for task in tasks])
            | "to any worker" >> beam.Reshuffle()
            | "separate" >> beam.Map(_separate_fields, own)
            | "lines" >> beam.Map(json.dumps)
            | "manifest" >> beam.io.WriteToText(str(manifest), shard_name_template="")
        )
    rows = [json.loads(line) for line in Path(manifest).read_text().splitlines()]
    bad = [row["error"] for row in rows if row["error"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} songs are in {args.out}, told in {manifest}")
    for problem in bad:
        print(f"  {problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    from msr_jax.separate.beam import main as importable_main  # Beam sends functions by name, and __main__ has none

    try:
        begin(sys.argv[1:])
        sys.exit(importable_main(sys.argv[1:]))
    except UserError as error:
        print(f"msr_jax.separate.beam: {error}", file=sys.stderr)
        sys.exit(2)
