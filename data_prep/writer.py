"""Tracks into record shards: parallel, resumable, whole or not at all.

Beside OUT stands `.OUT.partial` while a conversion runs. First every track is decoded into a file of its own there, then
every shard is put together from those, in the order that TFDS would give (`shard_order`); both are finished by a rename and
a note beside them. Started again after a kill, a conversion with the same plan does what has no note yet; OUT appears at
the very end. TFDS's own writer could do neither; its serialiser, file names, order and metadata are used, and
`data_prep.builder` is the same data set as a TFDS builder, for clusters.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from rich.console import Console
from rich.progress import track as progress_bar
from tensorflow_datasets.core import example_serializer, naming
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from msr_jax.data.records import (
    MANIFEST,
    NAME,
    VERSION,
    check_shards,
    count_records,
    features,
    make_record,
    probes,
    read_manifest,
    record_samples,
    shard_order,
)
from msr_jax.errors import UserError
from msr_jax.process import end_with_parent

SHARD_BYTES = 256 << 20  # about; measured in README.md: it hardly matters to the speed of reading
CODINGS = {"none": "uncompressed", "zstd": "zstd:1"}  # of a record inside its shard; any reader undoes it


def make_manifest(
    stems: Sequence[str],
    sample_rate: int,
    channels: int,
    crop: int,
    margin: float = 0.0,
    seed: int = 0,
    parts: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """The manifest of a conversion before its shards are written.

    Args:
      crop: samples of a training crop.
      margin: of a record's length, what it has in common with the next.
      parts: records, without margins, that a crop is as long as.
      more: noted with the rest.
    """
    hop = -(-crop // parts)
    return {
        "stems": list(stems), "sample_rate": sample_rate, "channels": channels, "crop": crop,
        "hop": hop, "samples": record_samples(hop, margin), "seed": seed, "tool": f"msr_jax {version('msr_jax')}", **more,
    }  # fmt: skip


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for `in_parallel`; None, for this process itself, with one worker."""
    if workers <= 1:
        yield None
        return
    # Spawned: a fork of a process with threads, as the libraries here start them, can hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def in_parallel(
    function: Callable[[Any], Any], items: Sequence[Any], pool: ProcessPoolExecutor | None, what: str
) -> list:
    """function(item) for all items, in the order in which they are ready, under a progress bar on a terminal.

    Raises:
      UserError: a worker was killed.
    """
    ready: Iterable[Any] = map(function, items)
    if pool is not None:
        ready = (future.result() for future in as_completed([pool.submit(function, item) for item in items]))
    if sys.stderr.isatty():
        ready = progress_bar(ready, description=what, total=len(items), console=Console(stderr=True))
    try:
        return list(ready)
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, perhaps for want of memory; try fewer --workers") from error


def save_track(
    folder: Path,
    split: str,
    index: int,
    note: Mapping[str, Any],
    audio: tuple[np.ndarray, np.ndarray],
    manifest: Mapping[str, Any],
) -> None:
    """Put a decoded track where the shards are made from: its samples, its mixture's probes, and then its note.

    Args:
      note: has "name" and "samples".
      audio: stems (stems, samples, channels) int16, and their mixture before rounding (samples, channels) float32.
    """
    stems, mixture = audio
    base = folder / f"{split}-{index:05d}"
    np.save(base.with_suffix(".npy"), stems)
    np.save(base.with_suffix(".probe.npy"), probes(mixture, manifest["hop"], manifest["samples"]))
    save_note(folder, split, index, note)


def save_note(folder: Path, split: str, index: int, note: Mapping[str, Any]) -> None:
    """Say that a track is done with. A track that is left out has "skipped": the reason."""
    _write_json(folder / f"{split}-{index:05d}.json", note)


def _write_json(path: Path, value: Any) -> None:
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(value))
    os.replace(beside, path)


def write_records(
    out: str | Path,
    tracks: Mapping[str, Iterable[tuple[str, np.ndarray]]],
    manifest: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tracks that are in memory: per split, (name, (stems, samples, channels) int16); `shard_bytes` is about how large a shard becomes.

    Raises:
      UserError: as `convert`.
    """

    def save(folder: Path, split: str, item: tuple[int, tuple[str, np.ndarray]]) -> None:
        index, (name, stems) = item
        note = {"name": name, "samples": stems.shape[1], "checksum": hashlib.sha256(stems.data).hexdigest()}
        save_track(folder, split, index, note, (stems, stems.sum(0, dtype=np.float32) / 32768), manifest)

    listed = {split: list(enumerate(items)) for split, items in tracks.items()}
    convert(out, listed, save, manifest, plan=None, shard_bytes=shard_bytes)


def convert(
    out: str | Path,
    tracks: Mapping[str, Sequence[Any]],
    save: Callable[[Path, str, Any], None],
    manifest: Mapping[str, Any],
    plan: Any,
    workers: int = 1,
    coding: str = "none",
    shard_bytes: int = SHARD_BYTES,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any], bool]:
    """Write shards for every split into `out` (or into what it links to), whole or not at all.

    Args:
      tracks: per split, (index, track).
      save: save(folder, split, (index, track)) decodes one track, by `save_track` or `save_note`; picklable for more than
        one worker.
      manifest: from `make_manifest`.
      plan: what the records depend on beside the manifest, as JSON has it: work that was begun with another plan is thrown
        away, and `out` is left as it is if it was made with this one, unless a track that was left out can be read now.
        None always begins anew.
      coding: a name in `CODINGS`.

    Returns:
      Per split, the notes of its tracks; the finished manifest; whether anything was written.

    Raises:
      UserError: `out` exists and holds something else than records, cannot be written, or another process is writing it.
    """
    if (out := Path(os.path.realpath(out))) == Path.cwd():
        raise UserError(f"{out} is the folder that this runs in; name one inside of it")
    plan = json.loads(json.dumps([plan, manifest, coding, shard_bytes]))
    digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest() if plan[0] is not None else None
    work, same, is_more = _partial(out), None, False  # `same`: the manifest of records that were made with this plan
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        held = _held(out)
        layouts = [made.get("layout") for made in (held, manifest)]
        if None not in layouts and layouts[0] != layouts[1]:
            raise UserError(f"{out} holds records of {layouts[0]}, not {layouts[1]}; name another place, or remove it")
        if digest and held.get("plan") == digest:
            check_shards(out, held)
            same = held
    skipped = {s: [n["index"] for n in found if "skipped" in n] for s, found in same["notes"].items()} if same else {}
    if same and not any(skipped.values()) and not work.exists():
        return same["notes"], same, False
    try:
        with _alone(work), worker_pool(workers) as pool:
            try:
                _begin(work, plan if digest else None)
                read = lambda split, items: _read_tracks(work, split, items, save, pool)
                if same:  # what kept a track from being read may be over
                    retried = {s: [item for item in items if item[0] in skipped[s]] for s, items in tracks.items()}
                    if not any("samples" in note for s, items in retried.items() for note in read(s, items)):
                        shutil.rmtree(work)
                        return same["notes"], same, False
                is_more = True
                notes = {split: read(split, items) for split, items in tracks.items()}
                full = {**manifest, "plan": digest, "notes": notes, "coding": coding}
                full["tracks"] = {
                    s: [[n["name"], n["samples"]] for n in found if "samples" in n] for s, found in notes.items()
                }
                try:
                    check_usable(notes)
                except UserError:
                    shutil.rmtree(work)
                    raise
                full["shards"] = _write_shards(work, full, pool, shard_bytes)
                write_info(work / "records", full)
                _put_in_place(work, out)
                shutil.rmtree(work)
            finally:
                if digest is None:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if same and not is_more:  # nobody can write here: whole records are no fault
            return same["notes"], same, False
        again = f"; what is done is kept in {work} and a new start goes on from there" if digest else ""
        # NumPy and ArrayRecord tell of a full disk without its number.
        why = error.strerror if error.errno else f"{error.strerror or error}; is the disk full?"
        raise UserError(f"cannot write records to {out}: {why}{again}") from error
    return notes, full, True


def _read_tracks(
    work: Path,
    split: str,
    items: Sequence[tuple[int, Any]],
    save: Callable[[Path, str, Any], None],
    pool: ProcessPoolExecutor | None,
) -> list[dict[str, Any]]:
    """Decode the tracks of a split that are not decoded yet, those that were left out among them; the notes of all."""
    todo = [item for item in items if "samples" not in _note(work, split, item[0])]
    in_parallel(partial(save, work / "tracks", split), todo, pool, f"reading {split}")
    return read_notes(work, split, items)


def check_usable(notes: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raises UserError for a split without a track that can be used, from the notes of all tracks."""
    for split, found in notes.items():
        if not any("samples" in note for note in found):
            first = next((note["skipped"] for note in found), "it is empty")
            raise UserError(f"none of the {len(found)} tracks of {split} can be used; the first: {first}")


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _held(out: Path) -> dict[str, Any]:
    try:
        return read_manifest(out)
    except UserError as error:
        if out.is_dir() and (out / MANIFEST).is_file() and f'"{NAME}"' in (out / MANIFEST).read_text():
            return {}  # records, of an older version or broken
        raise UserError(f"{out} exists and holds no records; name another place") from error


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    work.parent.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(f"{work.name}.lock")
    while True:
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is preparing {work.name[1:-8]} in {work.parent}") from error
            # A process that ended may have removed it since it was opened, and a third one have locked its successor.
            if not os.path.exists(lock) or os.fstat(file.fileno()).st_ino != os.stat(lock).st_ino:
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _begin(work: Path, plan: Any) -> None:
    """Take up the work that was done with the same plan, or clear it away."""
    try:
        same = plan is not None and json.loads((work / "plan.json").read_text()) == plan
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
    for folder in ("tracks", "records", "shards"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    _write_json(work / "plan.json", plan)


def _note(work: Path, split: str, index: int) -> dict[str, Any]:
    """The note that `save_note` left of a track; empty if there is none."""
    path = work / "tracks" / f"{split}-{index:05d}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read_notes(work: Path, split: str, items: Sequence[tuple[int, Any]]) -> list[dict[str, Any]]:
    """The notes that `save_note` left of a split's tracks."""
    notes = [json.loads((work / "tracks" / f"{split}-{index:05d}.json").read_text()) for index, _ in items]
    return [{**note, "index": index} for (index, _), note in zip(items, notes, strict=True)]


def shard_names(split: str, count: int) -> list[str]:
    """File names of a split's shards, as TFDS has them."""
    template = naming.ShardedFileTemplate(
        data_dir=Path("."), dataset_name=NAME, split=split, filetype_suffix="array_record"
    )
    return [template.sharded_filepath(shard_index=k, num_shards=count).name for k in range(count)]


def _write_shards(
    work: Path, manifest: Mapping[str, Any], pool: ProcessPoolExecutor | None, shard_bytes: int
) -> dict[str, tuple[int, str]]:
    record_bytes = 2 * len(manifest["stems"]) * manifest["samples"] * manifest["channels"]
    jobs = []
    for split, tracks in manifest["tracks"].items():
        indices = [n["index"] for n in manifest["notes"][split] if "samples" in n]
        numbers = [
            (index, name, k)
            for index, (name, length) in zip(indices, tracks, strict=True)
            for k in range(count_records(length, manifest["hop"], manifest["samples"]))
        ]
        order = shard_order(split, tracks, manifest)
        count = min(len(order), max(1, -(-len(order) * record_bytes // shard_bytes)))
        bounds = [round(len(order) * k / count) for k in range(count + 1)]
        for k, name in enumerate(shard_names(split, count)):
            jobs.append((name, split, [numbers[n] for n in order[bounds[k] : bounds[k + 1]]]))
    # Shards of an earlier start hold other records if a track that was left out then is there now.
    listed = work / "listed.json"
    if not listed.exists() or json.loads(listed.read_text()) != manifest["tracks"]:
        for path in [*(work / "shards").iterdir(), *(work / "records").iterdir()]:
            path.unlink()
        _write_json(listed, manifest["tracks"])
    done = lambda name: work / "shards" / f"{name}.json"
    todo = [job for job in jobs if not done(job[0]).exists()]
    # What all shards share goes with the function, not with each of them.
    write = partial(_write_shard, work, {k: v for k, v in manifest.items() if k not in ("notes", "tracks")})
    in_parallel(write, todo, pool, "writing shards")
    return {name: json.loads(done(name).read_text()) for name, _, _ in jobs}


@lru_cache(maxsize=1)
def _serializer(shape: str) -> Any:
    schema = features(json.loads(shape))
    to_proto = example_serializer.ExampleSerializer(schema.get_serialized_info()).get_tf_example
    # An example is a map; left to itself, protobuf writes its entries in an order of the process's own.
    return lambda record: to_proto(schema.encode_example(record)).SerializeToString(deterministic=True)


def serialize(record: dict[str, Any], manifest: Mapping[str, Any]) -> bytes:
    """A record as TFDS stores it."""
    return _serializer(json.dumps({k: manifest[k] for k in ("stems", "samples", "channels")}))(record)


def _write_shard(work: Path, manifest: Mapping[str, Any], job: tuple[str, str, list[tuple[int, str, int]]]) -> None:
    name, split, numbers = job
    beside = work / "records" / f".{name}.tmp"
    load = lru_cache(maxsize=512)(partial(np.load, mmap_mode="r"))
    try:
        writer = ArrayRecordWriter(str(beside), f"group_size:1,{CODINGS[manifest['coding']]}")
        for index, track, k in numbers:
            base = work / "tracks" / f"{split}-{index:05d}"
            stems, probe = load(base.with_suffix(".npy")), load(base.with_suffix(".probe.npy"))
            writer.write(serialize(make_record(track, k, stems, probe, manifest), manifest))
        writer.close()
        held = ArrayRecordReader(str(beside)).num_records()  # a shard that was cut short opens, and is empty
    except RuntimeError as error:
        raise OSError(f"{str(error).split(';')[0]} (shard {name})") from error
    if held != len(numbers):
        raise OSError(f"the shard {name} came out with {held} of {len(numbers)} records")
    entry = shard_entry(beside)
    os.replace(beside, work / "records" / name)
    _write_json(work / "shards" / f"{name}.json", entry)


def shard_entry(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a shard, once it is on the disk."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return path.stat().st_size, digest


def write_info(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write TFDS's metadata, and the manifest into it, beside finished shards."""
    schema = features(manifest)
    checksums = {
        f"{split}/{note['name']}": note["checksum"]
        for split, found in manifest["notes"].items()
        for note in found
        if "checksum" in note
    }
    identity = DatasetIdentity(
        name=NAME,
        version=tfds.core.Version(VERSION),
        data_dir=str(folder),
        module_name="data_prep.builder",
        release_notes={name: json.dumps(value) for name, value in manifest.items()},
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Aligned stems of fixed time spans: (stems, samples, channels) int16.",
        features=schema,
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    splits = []
    for split in manifest["tracks"]:
        names = sorted(name for name in manifest["shards"] if name.startswith(f"{NAME}-{split}."))
        lengths = [ArrayRecordReader(str(folder / name)).num_records() for name in names]
        template = naming.ShardedFileTemplate(
            data_dir=folder, dataset_name=NAME, split=split, filetype_suffix="array_record"
        )
        size = sum(manifest["shards"][name][0] for name in names)
        splits.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
        )
    info.set_splits(tfds.core.SplitDict(splits))
    info.as_proto.download_checksums.update(checksums)
    info.as_proto.features.CopyFrom(schema.to_proto())
    info.write_to_directory(folder)


def _put_in_place(work: Path, out: Path) -> None:
    old = work / "old"
    if out.exists():
        os.replace(out, old)
    os.replace(work / "records", out)
