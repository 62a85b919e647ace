"""`python -m msr_jax.separate.beam SONG … -o OUT [options of msr separate] [-- Beam's options]`: a batch by Apache Beam.

For fleets that run Beam already (extra `beam`): songs, OUT and the models must be places that all workers see. The manifest, by default
OUT/manifest.jsonl, gets its lines when all is done; started again, songs whose stems are there are kept and told once. Without Beam's
options its own local runner does the work. In a pipeline of one's own: `tasks | beam.Map(separate_task, argv)`.
"""

import functools
import json
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from msr_jax.beam_options import pipeline_options, running, split_options
from msr_jax.errors import UserError
from msr_jax.files import clear, passing, write_whole
from msr_jax.process import begin, run_as_process
from msr_jax.separate.batch import Batch, all_stems, separator_of
from msr_jax.separate.catalogue import check_stems, find_tasks, without_stems
from msr_jax.separate.command import check_output, parser_of
from msr_jax.separate.manifest import Manifest
from msr_jax.separate.songs import Task

COMMAND = "msr_jax.separate.beam"
NOT_HERE = ("shard", "process", "processes", "coordinator", "json")  # options of msr separate without effect under Beam
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


# Between stages Beam has text as UTF-8, which names of files need not be: all goes as JSON in ASCII, and under one key to the end.
def _packed(task: Task) -> str:
    return json.dumps([str(task.song), str(task.folder), *task[2:]])


def _separated(packed: str, argv: list[str]) -> tuple[int, str]:
    song, folder, *others = json.loads(packed)
    return 0, json.dumps(separate_task(Task(Path(song), Path(folder), *others), argv), allow_nan=False)


def _write_lines(keyed: tuple[int, Iterable[str]], path: str) -> None:
    write_whole(Path(path), "".join(f"{line}\n" for line in keyed[1]))


def main(argv: list[str]) -> int:
    """Returns 0, or 1 where some songs could not be separated."""
    own, among, after = split_options(argv, parser_of(), COMMAND)
    args = parser_of().parse_args(own)
    if given := [name for name in NOT_HERE if getattr(args, name) is not parser_of().get_default(name)]:
        raise UserError(f"--{given[0]} is not for Beam, which shares the songs among its workers; leave it out")
    check_output(args)
    options = pipeline_options(among, after, COMMAND)
    import apache_beam as beam

    tasks = find_tasks(args.songs, args.out, args.list, args.filename)
    separator = _loaded(tuple(own)).separator  # what is wrong with the options is said here
    if not args.overwrite:
        tasks = without_stems(tasks, all_stems(separator))
    check_stems(tasks, separator.stems, args.format, is_any_format=args.overwrite)
    manifest = Manifest(args.manifest or args.out / "manifest.jsonl")
    # Not by WriteToText, to which a place such as `live [1]` is a pattern.
    lines = passing(manifest.path)
    try:
        with running("not all songs were separated; start again to go on"), beam.Pipeline(options=options) as pipeline:
            (
                pipeline
                | "songs" >> beam.Create([_packed(task) for task in tasks])
                | "to any worker" >> beam.Reshuffle()
                | "separate" >> beam.Map(_separated, own)
                | "together" >> beam.GroupByKey()
                | "lines" >> beam.Map(_write_lines, str(lines))
            )
        try:
            rows = [json.loads(line) for line in lines.read_bytes().splitlines()]
        except OSError as error:
            raise UserError(f"{lines.parent} is no place that this process and the workers share") from error
    finally:
        clear(lines)
    rank = {task.source: k for k, task in enumerate(tasks)}
    rows.sort(key=lambda row: rank[row["source"]])
    for row in rows:
        is_made = row["error"] is None and len(row["kept"]) < len(row["stems"])
        if is_made or not manifest.tells(row):
            manifest.add(row)
    bad = [row["error"] for row in rows if row["error"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} songs are in {args.out}, told in {manifest.path}")
    for problem in bad:
        print(f"  {problem}", file=sys.stderr)
    return 1 if bad else 0


def _run(main_of: Any) -> int:
    try:
        begin(sys.argv[1:])
        return main_of(sys.argv[1:])
    except UserError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from msr_jax.separate.beam import main as importable_main  # Beam sends functions by name, and __main__ has none

    sys.exit(run_as_process(COMMAND, lambda: _run(importable_main)))
