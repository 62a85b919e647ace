"""`python -m data_prep.verify OUT`: reads every record of a folder and checks all that can be checked without its source.

Shards against the SHA-256 of the manifest; then in each record the checksum of its samples, its place and length, and that
its stems sum to the mixture that was taken before they were rounded. Names each bad record and ends with exit code 1.
"""

import argparse
import hashlib
import os
import sys
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from data_prep.writer import in_parallel, worker_pool
from msr_jax.data.records import (
    MANIFEST,
    PROBE,
    RecordSource,
    count_records,
    features,
    read_manifest,
    shard_order,
)
from msr_jax.errors import UserError
from msr_jax.process import begin, run_as_process


def check_record(record: Mapping[str, Any], length: int, k: int, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with record k of a track of `length` samples; empty if nothing is."""
    stems, hop, samples = record["stems"], manifest["hop"], manifest["samples"]
    shape, valid = (len(manifest["stems"]), samples, manifest["channels"]), min(samples, length - k * hop)
    if stems.shape != shape:
        return [f"its stems are of shape {stems.shape}, not {shape}"]
    wrong = []
    if record["offset"] != k * hop or record["valid"] != valid or record["sample_rate"] != manifest["sample_rate"]:
        wrong.append("its place, length or rate is not the manifest's")
    if zlib.crc32(stems) != record["crc32"]:
        wrong.append("its samples do not have their checksum")
    if stems[:, valid:].any():
        wrong.append("it goes on after its track's end")
    if (stems.any((1, 2)) != record["active"]).any():
        wrong.append("its stems sound where they should not, or the other way round")
    probed = stems[:, ::PROBE].astype(np.int32)
    clipped = ((probed == 32767) | (probed == -32768)).any(0)
    apart = np.abs(np.where(clipped, 0, probed.sum(0) - record["mixture"]))
    if apart.max() > len(stems) / 2 + 1:  # each stem, and the mixture, was rounded by half a step at the most
        wrong.append(f"its stems sum to something else than the mixture, by up to {apart.max()} steps of 16 bits")
    return wrong


def check_shard(folder: Path, manifest: Mapping[str, Any], job: tuple[str, list[tuple[str, int, int]]]) -> list[str]:
    """Sentences on what is bad in a shard. `job`: its name, and (track, samples, record) of the records it should hold."""
    name, expected = job
    size, digest = manifest["shards"][name]
    with open(folder / name, "rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest() == digest
    bad = [] if whole else [f"{name}: not the {size} bytes that were written"]
    schema = features(manifest)
    try:
        reader = ArrayRecordReader(str(folder / name), options="readahead_buffer_size:0")
        count = reader.num_records()
    except RuntimeError as error:
        return [*bad, f"{name}: cannot be opened ({str(error).split(';')[0]})"]
    if count != len(expected):
        bad.append(f"{name}: has {count} records, not {len(expected)}")
    for place, (track, length, k) in enumerate(expected[:count]):
        try:
            record = schema.deserialize_example_np(reader.read([place])[0])
        except Exception as error:  # whatever a parser makes of bytes that are not its own
            bad.append(f"{name}, record {place} ({track}, {k}): cannot be read ({str(error).split(';')[0]})")
            continue
        if record["track"].decode() != track:
            bad.append(f"{name}, record {place}: is of track {record['track'].decode()}, not {track}")
            continue
        wrong = check_record(record, length, k, manifest)
        bad += [f"{name}, record {place} ({track}, {k}): {what}" for what in wrong]
    return bad


def verify(folder: str | Path, workers: int = 1) -> tuple[int, list[str]]:
    """(number of records, a sentence for each bad one) of a folder.

    Raises:
      UserError: no records there, or shards that are not those of the manifest.
    """
    folder, manifest, jobs = Path(folder), read_manifest(folder), []
    for split, tracks in manifest["tracks"].items():
        RecordSource(folder, split)  # whether it opens at all
        numbers = [
            (name, length, k)
            for name, length in tracks
            for k in range(count_records(length, manifest["hop"], manifest["samples"]))
        ]
        in_order = [numbers[n] for n in shard_order(split, tracks, manifest)]
        names = sorted(name for name in manifest["shards"] if f"-{split}." in name)
        bounds = [round(len(in_order) * k / len(names)) for k in range(len(names) + 1)]
        jobs += [(name, in_order[bounds[k] : bounds[k + 1]]) for k, name in enumerate(names)]
    shared = {k: v for k, v in manifest.items() if k not in ("tracks", "notes", "checksums")}  # goes with every job
    with worker_pool(workers) as pool:
        found = in_parallel(partial(check_shard, folder, shared), jobs, pool, "checking shards")
    return sum(len(expected) for _, expected in jobs), sorted(line for lines in found for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help=f"folder of records, with {MANIFEST}")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    try:
        begin(sys.argv[1:] if argv is None else argv)
        count, bad = verify(args.out, args.workers)
    except UserError as error:
        print(f"data_prep.verify: {error}", file=sys.stderr)
        return 2
    for line in bad:
        print(f"bad: {line}")
    print(f"{args.out}: {count} records, " + (f"{len(bad)} faults" if bad else "all good"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_as_process("data_prep.verify", main))
