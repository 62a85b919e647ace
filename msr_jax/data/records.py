"""Training records: time spans of fixed length with all stems, in pre-shuffled ArrayRecord shards written by TFDS.

ArrayRecord cannot read part of a record, so each holds half a crop more than a crop, which leaves room for a random one.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from msr_jax.errors import UserError

MANIFEST = "msr_jax.json"
PCM_SCALE = 32768.0
MARGIN = 0.5  # of a crop


class Span(NamedTuple):
    """Where a record lies in its track; `is_window` marks the non-overlapping evaluation windows [k·crop, (k+1)·crop)."""

    offset: int
    is_window: bool


def record_samples(crop: int) -> int:
    """Length of a record in samples."""
    return crop + int(MARGIN * crop)


def spans(length: int, crop: int) -> list[Span]:
    """Records that cover a track of `length` samples: one per crop, and one more for a tail that none reaches."""
    found = [Span(k * crop, True) for k in range(length // crop)] or [Span(0, False)]
    reached = found[-1].offset + record_samples(crop)
    return found if reached >= length else [*found, Span(length - record_samples(crop), False)]


def to_pcm(stems: np.ndarray) -> tuple[np.ndarray, int]:
    """Float32 in [-1, 1) -> int16, and the number of samples that had to be clipped."""
    scaled = np.rint(stems * PCM_SCALE)
    clipped = int(((scaled < -32768) | (scaled > 32767)).sum())
    return np.clip(scaled, -32768, 32767).astype(np.int16), clipped


def track_records(name: str, stems: np.ndarray, crop: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) for every span of a track's int16 stems (stems, samples)."""
    size = record_samples(crop)
    for span in spans(stems.shape[1], crop):
        audio = stems[:, span.offset : span.offset + size]
        valid = max(audio.shape[1], crop)  # a track shorter than a crop counts the silence after it
        audio = np.pad(audio, ((0, 0), (0, size - audio.shape[1])))
        record = {
            "stems": audio,
            "track": name,
            "offset": span.offset,
            "valid": valid,
            "is_window": span.is_window,
        }
        yield f"{name}@{span.offset}", record


class Segments(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder; `sources` gives, per split, the (key, record) pairs. Made by `write_records` alone."""

    VERSION = tfds.core.Version("1.0.0")
    name = "segments"

    def __init__(self, *, sources: dict[str, Iterable], num_stems: int, samples: int, **kwargs):
        self.sources, self.shape = sources, (num_stems, samples)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        pcm = tfds.features.Tensor(shape=self.shape, dtype=np.int16, encoding=tfds.features.Encoding.BYTES)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Aligned stems of fixed time spans; a record is (stems, samples) int16.",
            features=tfds.features.FeaturesDict(
                {
                    "stems": pcm,
                    "track": tfds.features.Text(),
                    "offset": np.int64,
                    "valid": np.int64,
                    "is_window": np.bool_,
                }
            ),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterable]:
        return dict(self.sources)

    def _generate_examples(self):
        raise AssertionError("the splits are given as iterables")


def write_records(out: str | Path, sources: dict[str, Iterable], manifest: dict[str, Any]) -> None:
    """Write shards for every split into `out`, whole or not at all.

    Args:
      sources: per split, an iterable of (unique key, record) as `track_records` gives.
      manifest: must name "stems", "sample_rate" and "crop"; kept beside the shards.

    Raises:
      UserError: `out` exists and holds something else than records, or cannot be written.
    """
    out = Path(out)
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and holds no records; name another place")
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        builder = Segments(
            sources=sources, num_stems=len(manifest["stems"]), samples=record_samples(manifest["crop"]),
            data_dir=beside, file_format="array_record",
        )  # fmt: skip
        tfds.display_progress_bar(False)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of a download, which this is not
            builder.download_and_prepare()
        made = Path(builder.data_dir)
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if out.exists():
            shutil.rmtree(out)
        os.replace(made, out)
    except OSError as error:
        raise UserError(f"cannot write records to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `write_records` was told.

    Raises:
      UserError: the folder holds no records.
    """
    path = Path(folder) / MANIFEST
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no records; make them with python -m data_prep.slakh2100") from error


class RecordSource:
    """Random access to the records of one split: `source[k]` is a dict with "stems" (stems, samples) int16, "track",
    "offset" and "valid" in samples, and "is_window".

    With `preload`, all records are decoded into memory once: for small corpora and few cores.
    """

    def __init__(self, folder: str | Path, split: str, preload: bool = False):
        self.manifest = read_manifest(folder)
        builder = tfds.builder_from_directory(str(folder))
        if split not in builder.info.splits:
            raise UserError(f"{folder} has no split '{split}'; it has {', '.join(builder.info.splits)}")
        self._data: Any = builder.as_data_source(split)
        if preload:
            self._data = [self._data[k] for k in range(len(self._data))]

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._data[int(index)]
        return {**record, "track": record["track"].decode()}


def check_stems(source: RecordSource, stems: Sequence[str], sample_rate: int, crop: int) -> None:
    """Raises UserError unless the records hold what a config asks for."""
    held = source.manifest
    for what, wanted in (("stems", list(stems)), ("sample_rate", sample_rate)):
        if held[what] != wanted:
            raise UserError(
                f"the records hold {what} {held[what]}, the config asks for {wanted}; prepare the data again"
            )
    if crop > held["crop"]:
        raise UserError(f"data.crop is {crop} samples, the records were made for crops of {held['crop']} at most")
