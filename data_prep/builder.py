"""`python -m data_prep.builder slakh2100|musdb18hq SRC OUT [Beam's options]`: a preparation by Apache Beam, for clusters.

The same records in the same order as `python -m data_prep.slakh2100 SRC OUT` writes, as a TFDS builder on a Beam pipeline
(extra `beam`); SRC and OUT must be places that all workers see. Without options Beam's own local runner does the work.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.writer import ExampleWriter

from data_prep import musdb18hq, slakh2100
from data_prep.prepare import add_arguments, decode, plan_of, report
from data_prep.writer import CODINGS, read_notes, save_note, shard_entry, write_info
from msr_jax.data.records import NAME, VERSION, count_records, features, make_record, probes, record_key
from msr_jax.errors import UserError
from msr_jax.runtime import begin, clear, passing

CORPORA = {"slakh2100": slakh2100.CORPUS, "musdb18hq": musdb18hq.CORPUS}


def track_records(
    layout: str, manifest: Mapping[str, Any], folder: str, split: str, item: tuple[int, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) of all records of a track; leaves the track's note in `folder`."""
    index, track = item
    note, audio = decode(layout, manifest, Path(track))
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
        self, *, records: Any, tracks: Mapping[str, Sequence[tuple[int, str]]], manifest: Mapping[str, Any], **kwargs
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.builder", description=__doc__)
    parser.add_argument("corpus", choices=CORPORA)
    argv = sys.argv[1:] if argv is None else argv
    corpus = CORPORA.get(argv[0] if argv else "", slakh2100.CORPUS)
    add_arguments(parser, corpus)
    parser.add_argument("--validation", action="store_true", help="MUSDB18: hold out the field's 14 validation songs")
    args, rest = parser.parse_known_args(argv)
    work = passing(args.out.absolute())
    try:
        begin(argv)
        try:
            from apache_beam.options.pipeline_options import PipelineOptions
        except ModuleNotFoundError as error:
            raise UserError("this needs Apache Beam: pip install 'msr_jax[beam]'") from error
        if args.out.exists():
            raise UserError(f"{args.out} exists; name another place")
        found, manifest, _ = plan_of(corpus, args)
        manifest |= {"coding": args.coding, "plan": None}
        tracks = {split: [(k, str(t.absolute())) for k, t in enumerate(paths)] for split, paths in found.items()}
        work.mkdir(parents=True)
        (work / "tracks").mkdir()
        records = partial(track_records, corpus.layout, manifest, str(work / "tracks"))
        builder = Segments(records=records, tracks=tracks, manifest=manifest, data_dir=work, file_format="array_record")
        config = tfds.download.DownloadConfig(beam_options=PipelineOptions(rest))
        builder.download_and_prepare(download_config=config)
        made = Path(builder.data_dir)
        manifest["notes"] = {split: read_notes(work, split, items) for split, items in tracks.items()}
        manifest["tracks"] = {
            s: [[n["name"], n["samples"]] for n in notes if "samples" in n] for s, notes in manifest["notes"].items()
        }
        manifest["shards"] = {f.name: shard_entry(f) for f in sorted(made.glob("*.array_record-*"))}
        write_info(made, manifest)
        os.replace(made, args.out)
    except UserError as error:
        print(f"data_prep.builder: {error}", file=sys.stderr)
        return 2
    finally:
        clear(work)
    print("\n".join(report(manifest["notes"], manifest)))
    print(f"wrote {args.out} ({manifest['edition']})")
    return 0


if __name__ == "__main__":
    from data_prep.builder import main as importable_main  # Beam sends functions by name, and __main__ has none

    sys.exit(importable_main())
