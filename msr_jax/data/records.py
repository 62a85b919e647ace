"""Training records: time spans of fixed length with all stems, in ArrayRecord shards that TFDS reads too.

Record k of a track holds the samples from k·hop on. ArrayRecord cannot read part of a record, so records are short beside
the crops of training, and a crop, of any length, is joined from records in a row: measured, that reads less and keeps less
than long records with a margin (data_prep/README.md). The order of records in the shards is TFDS's own, by a hash of their keys, so
that the place of each follows from the list of tracks and no index has to be kept.

`dataset_info.json` is the manifest: TFDS's fields, with `features` and (as `downloadChecksums`) a SHA-256 per source track;
what TFDS has no field for stands in `releaseNotes`, the one map of that file which is free, as JSON values.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.hashing import Hasher

from msr_jax.errors import UserError, first_line

MANIFEST = "dataset_info.json"
NAME, VERSION = "segments", "2.0.0"
PCM_SCALE = 32768.0
PROBE = 512  # samples between two places of the mixture that a record keeps for `data_prep.verify`


def record_samples(hop: int, margin: float) -> int:
    """Length of a record in samples; `margin` is the part of a hop that two neighbours have in common."""
    return hop + int(margin * hop)


def count_records(length: int, hop: int, samples: int) -> int:
    """Number of records, one every `hop` samples, that cover a track of `length` samples."""
    return 1 + max(0, -(-(length - samples) // hop))


def to_pcm(stems: np.ndarray) -> tuple[np.ndarray, int]:
    """Float32 in [-1, 1) -> int16, and the number of samples that had to be clipped."""
    scaled = np.rint(stems * PCM_SCALE)
    clipped = int(((scaled < -32768) | (scaled > 32767)).sum())
    return np.clip(scaled, -32768, 32767).astype(np.int16), clipped


def probes(mixture: np.ndarray, hop: int, samples: int) -> np.ndarray:
    """The mixture at every `PROBE`th sample of each record: (samples, channels) float32 -> (records, places, channels) int32.

    It is summed before the stems are rounded, so that the sum of stored stems can be checked against it.
    """
    count = count_records(len(mixture), hop, samples)
    place = hop * np.arange(count)[:, None] + np.arange(0, samples, PROBE)
    pcm = np.rint(mixture * PCM_SCALE).astype(np.int32)
    return np.where((place < len(pcm))[..., None], pcm[np.minimum(place, len(pcm) - 1)], 0)


def features(manifest: Mapping[str, Any]) -> tfds.features.FeaturesDict:
    """The schema of a record; see `make_record`."""
    stems, samples, channels = len(manifest["stems"]), manifest["samples"], manifest["channels"]
    fixed = lambda shape, dtype: tfds.features.Tensor(
        shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES
    )  # fmt: skip
    return tfds.features.FeaturesDict(
        {
            "stems": fixed((stems, samples, channels), np.int16),
            "track": tfds.features.Text(),
            "offset": np.int64,
            "valid": np.int64,
            "sample_rate": np.int64,
            "active": fixed((stems,), np.bool_),
            "crc32": np.int64,
            "mixture": fixed((-(-samples // PROBE), channels), np.int32),
        }
    )


def make_record(
    track: str, k: int, stems: np.ndarray, probe: np.ndarray, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Record k of a track.

    Args:
      stems: the whole track, (stems, samples, channels) int16.
      probe: `probes` of the track.

    Returns:
      "stems" (stems, record's samples, channels) int16, zeros after the track's end; "track"; "offset" and "valid" (how
      much of it lies inside the track) in samples; "sample_rate" in Hz; "active" (stems,): which stems are not all zero;
      "crc32" of the stems; "mixture" (places, channels) int32.
    """
    offset, size = k * manifest["hop"], manifest["samples"]
    audio = np.ascontiguousarray(stems[:, offset : offset + size])
    valid = audio.shape[1]
    if valid < size:
        audio = np.pad(audio, ((0, 0), (0, size - valid), (0, 0)))
    return {
        "stems": audio,
        "track": track,
        "offset": offset,
        "valid": valid,
        "sample_rate": manifest["sample_rate"],
        "active": audio.any((1, 2)),
        "crc32": zlib.crc32(audio.data),
        "mixture": probe[k],
    }


def record_key(track: str, k: int, seed: int) -> str:
    """Unique within a split; its hash decides the record's place."""
    return f"{seed}/{track}@{k}"


def shard_order(split: str, tracks: Sequence[tuple[str, int]], manifest: Mapping[str, Any]) -> np.ndarray:
    """Numbers of a split's records (track after track) in the order in which the shards hold them.

    Args:
      tracks: (name, samples) of each.
    """
    hasher, hop, samples = Hasher(split), manifest["hop"], manifest["samples"]
    hashes = [
        hasher.hash_key(record_key(name, k, manifest["seed"]))
        for name, length in tracks
        for k in range(count_records(length, hop, samples))
    ]
    return np.array(sorted(range(len(hashes)), key=hashes.__getitem__), np.int64)


def _is_described(notes: Mapping[str, Any]) -> bool:
    """Whether what a manifest notes has the fields that reading needs, each of its kind."""
    whole = lambda n: isinstance(n, int) and not isinstance(n, bool)
    return (
        all(whole(notes[name]) and notes[name] > 0 for name in ("sample_rate", "channels", "hop", "samples"))
        and whole(notes["seed"])
        and all(isinstance(stem, str) for stem in notes["stems"])
        and all(
            isinstance(name, str) and whole(length) and length > 0
            for tracks in notes["tracks"].values()
            for name, length in tracks
        )
        and all(whole(size) and isinstance(digest, str) for size, digest in notes["shards"].values())
    )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What is known of a folder of records.

    Returns:
      "stems", "sample_rate", "channels", "crop" (of training, that it was made for), "hop" and "samples" (of records), "seed", "tool", "tracks" ({split: [[name,
      samples], …]}), "shards" ({file name: [bytes, SHA-256]}), "checksums" ({"split/track": SHA-256 of its source files}),
      and more that the preparation noted.

    Raises:
      UserError: the folder holds no records, or records of an older version.
    """
    try:
        held = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        notes = {name: json.loads(value) for name, value in held["releaseNotes"].items()}
        if held["version"] != VERSION or not _is_described(notes):
            raise ValueError(held["version"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} holds no records of this version; make them with data_prep") from error
    return {**notes, "checksums": held.get("downloadChecksums", {})}


def check_shards(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError unless the shards in a folder are those of its manifest, each of the right size."""
    folder, listed = Path(folder), manifest["shards"]
    try:
        # Of a folder, or of a link to nowhere, there is no size.
        found = {
            f.name: f.stat().st_size if f.is_file() else None for f in folder.iterdir() if ".array_record-" in f.name
        }
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error
    for name in sorted(found.keys() - listed.keys()):
        raise UserError(f"{folder / name} is not in {MANIFEST}; prepare the data again, or remove that file")
    for name, (size, _) in sorted(listed.items()):
        if found.get(name) is None:
            raise UserError(f"{folder} lacks the shard {name}; prepare the data again")
        if found[name] != size:
            raise UserError(
                f"{folder / name} has not the {size} bytes that it was written with; prepare the data again"
            )


class RecordSource:
    """Random access to one split: `source[k]` is the record at place k of the shards, `source.read` any span of any track.

    `tracks` has [name, samples] of each track; `first` the number of each one's first record, counted track after track, and
    at the end the number of records. With `preload`, all records are decoded into memory once: for small corpora and few
    cores.

    Raises:
      UserError: no records, no such split, or shards that are not those of the manifest.
    """

    def __init__(self, folder: str | Path, split: str, preload: bool = False):
        self.folder, self.split, self.manifest = Path(folder), split, read_manifest(folder)
        check_shards(folder, self.manifest)
        try:
            builder = tfds.builder_from_directory(str(folder))
            splits = list(builder.info.splits)
            self._data: Any = builder.as_data_source(split) if split in splits else None
        except Exception as error:  # it reads classes and shapes from the JSON files, and fails on others in any way
            raise UserError(
                f"{folder} does not describe records that can be read ({first_line(error)}); prepare the data again"
            ) from error
        if self._data is None:
            raise UserError(f"{folder} has no split '{split}'; it has {', '.join(splits)}")
        self.tracks: list[tuple[str, int]] = [(name, length) for name, length in self.manifest["tracks"][split]]
        counts = [count_records(n, self.manifest["hop"], self.manifest["samples"]) for _, n in self.tracks]
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        order = shard_order(split, self.tracks, self.manifest)
        if len(order) != len(self._data):
            raise UserError(f"the tracks of {folder} come to {len(order)} records, its shards hold {len(self._data)}")
        self._place = np.argsort(order)
        if preload:
            self._data = [self[k] for k in range(len(self._data))]

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """The record at a place of the shards, as `make_record` gives. UserError if the shard is damaged there."""
        try:
            record = self._data[int(place)]
        except RuntimeError as error:
            raise UserError(
                f"record {place} of split {self.split} in {self.folder} is damaged ({str(error).split(';')[0]}); "
                f"python -m data_prep.verify {self.folder} lists all such records"
            ) from error
        return record if isinstance(record["track"], str) else {**record, "track": record["track"].decode()}

    def pieces(
        self, track: int, start: int, length: int, stem: int | slice = slice(None)
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The parts, from records in a row, that a span of a track is joined from; arguments as `read`.

        Yields:
          (place in the span, ([stems,] samples, channels) int16). Nothing comes after the track's end.
        """
        hop, last = self.manifest["hop"], self.first[track + 1] - self.first[track] - 1
        done = 0
        while done < length:
            k = min((start + done) // hop, last)
            begin = start + done - k * hop
            if begin >= self.manifest["samples"]:
                return
            piece = self[self._place[self.first[track] + k]]["stems"][stem, begin : begin + length - done]
            yield done, piece
            done += piece.shape[-2]

    def read(self, track: int, start: int, length: int, stem: int | slice = slice(None)) -> np.ndarray:
        """A span of a track: ([stems,] length, channels) int16, zeros after the track's end.

        Args:
          track: index into `tracks`.
          start, length: in samples; any.
          stem: index or slice of stems.
        """
        stems = () if isinstance(stem, int) else (len(range(len(self.manifest["stems"]))[stem]),)
        out = np.zeros((*stems, length, self.manifest["channels"]), np.int16)
        for at, piece in self.pieces(track, start, length, stem):
            out[..., at : at + piece.shape[-2], :] = piece
        return out


def check_stems(source: RecordSource, stems: Sequence[str], sample_rate: int, channels: int) -> None:
    """Raises UserError unless the records hold what a config asks for."""
    held = source.manifest
    for what, wanted in (("stems", list(stems)), ("sample_rate", sample_rate), ("channels", channels)):
        if held[what] != wanted:
            raise UserError(
                f"the records in {source.folder} hold {what} {held[what]}, the config asks for {wanted}; prepare the data again"
            )
