"""`python -m data_prep.builder slakh2100|musdb18hq SRC OUT [Beam's options]`: a preparation by Apache Beam, for clusters.

The same records in the same order as `python -m data_prep.slakh2100 SRC OUT` writes, as a TFDS builder on a Beam pipeline
(extra `beam`); SRC and OUT must be places that all workers see. Without Beam's options, which are written --name=value or
follow a lone `--`, its own local runner does the work; it is Beam that decides on workers and the size of shards.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.writer import ExampleWriter

from data_prep import musdb18hq, slakh2100
from data_prep.prepare import Corpus, add_arguments, decode, plan_of, report
from data_prep.writer import CODINGS, check_usable, read_notes, save_note, shard_entry, write_info
from msr_jax.beam_options import pipeline_options, running, split_options
from msr_jax.data.records import NAME, VERSION, count_records, features, make_record, probes, record_key
from msr_jax.errors import UserError
from msr_jax.files import clear, passing
from msr_jax.process import begin, run_as_process

COMMAND = "data_prep.builder"
CORPORA = {"slakh2100": slakh2100.CORPUS, "musdb18hq": musdb18hq.CORPUS}


def track_records(
    layout: str, manifest: Mapping[str, Any], folder: str, split: str, item: tuple[int, bytes]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) of all records of a track, an index and a path; leaves the track's note in `folder`."""
    index, track = item
    note, audio = decode(layout, manifest, Path(os.fsdecode(track)))
    save_note(Path(folder), split, index, note)
    if audio is None:
        return
    stems, mixture = audio
    probe = probes(mixture, manifest["hop"], manifest["samples"])
    for k in range(count_records(stems.shape[1], manifest["hop"], manifest["samples"])):
        yield record_key(note["name"], k, manifest["seed"]), make_record(note["name"], k, stems, probe, manifest)


class _Coded(ExampleWriter):
    """Writes shards in the coding that was asked for; TFDS's own has but one."""

    def __init__(self, file_format: Any, coding: str):
        super().__init__(file_format)
        self.options = f"group_size:1,{CODINGS[coding]}"

    def write(self, path: Any, examples: Any) -> None:
        writer = ArrayRecordWriter(os.fspath(path), self.options)
        for _, example in examples:
            writer.write(example)
        writer.close()


class Segments(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The records as a TFDS data set, made from `tracks`: (index, path) of each split.

    Not registered: TFDS takes a name once, and this file is read twice where it is run as a program.
    """

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(
        self, *, records: Any, tracks: Mapping[str, Sequence[tuple[int, bytes]]], manifest: Mapping[str, Any], **kwargs
    ):
        self.records, self.tracks, self.manifest = records, tracks, manifest
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=features(self.manifest))

    def _example_writer(self) -> ExampleWriter:
        return _Coded(self.info.file_format, self.manifest["coding"])

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        import apache_beam as beam

        return {
            split: beam.Create(list(items))
            | f"spread {split}" >> beam.Reshuffle()
            | beam.FlatMap(partial(self.records, split))
            for split, items in self.tracks.items()
        }

    def _generate_examples(self):
        raise AssertionError("the splits are given as pipelines")


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.builder", description=__doc__)
    each = parser.add_subparsers(dest="corpus", required=True, metavar="slakh2100|musdb18hq")
    for name, corpus in CORPORA.items():
        one = each.add_parser(name, description=__doc__)
        add_arguments(one, corpus)
        if name == "musdb18hq":
            musdb18hq.add_arguments(one)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        begin(argv)
        own, among, after = split_options(argv, parser_of(), COMMAND)
        args = parser_of().parse_args(own)
        options = pipeline_options(among, after, COMMAND)
        manifest = _prepare(CORPORA[args.corpus], args, options)
    except UserError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    print("\n".join(report(manifest["notes"], manifest)))
    print(f"wrote {args.out} ({manifest['edition']})")
    return 0


def _prepare(corpus: Corpus, args: argparse.Namespace, options: Any) -> dict[str, Any]:
    """Write the records, whole or not at all; returns their manifest."""
    if args.out.exists():
        raise UserError(f"{args.out} exists; name another place")
    found, manifest, _ = plan_of(corpus, args)
    manifest |= {"coding": args.coding, "plan": None}
    # As bytes: Beam sends no text that is not UTF-8, as names of files may be.
    tracks = {split: [(k, os.fsencode(t.absolute())) for k, t in enumerate(paths)] for split, paths in found.items()}
    out = Path(os.path.realpath(args.out))  # of a link, what it names
    work = passing(out)
    read = lambda: {split: read_notes(work, split, items) for split, items in tracks.items()}
    try:
        with running(f"cannot write records to {args.out}"):
            (work / "tracks").mkdir(parents=True)
            records = partial(track_records, corpus.layout, manifest, str(work / "tracks"))
            builder = Segments(
                records=records, tracks=tracks, manifest=manifest, data_dir=work, file_format="array_record"
            )
            try:
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(beam_options=options))
            except Exception:
                with suppress(OSError):  # not all tracks have been read
                    check_usable(read())
                raise
            made = Path(builder.data_dir)
            manifest["notes"] = read()
            check_usable(manifest["notes"])
            manifest["tracks"] = {
                s: [[n["name"], n["samples"]] for n in notes if "samples" in n]
                for s, notes in manifest["notes"].items()
            }
            manifest["shards"] = {f.name: shard_entry(f) for f in sorted(made.glob("*.array_record-*"))}
            write_info(made, manifest)
            os.replace(made, out)
    finally:
        clear(work)
    return manifest


if __name__ == "__main__":
    from data_prep.builder import main as importable_main  # Beam sends functions by name, and __main__ has none

    sys.exit(run_as_process(COMMAND, importable_main))
