"""Training batches per second: both tracks at their official crops, stage by stage and as a stream.

The records are made here, of noise: coding does not shrink it, and reading does not depend on what is in it. Times are per
crop (all stems of an example), CPU seconds of this process, or wall-clock seconds of a stream with workers. There is no
peer in it, and so no ratio.
"""

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from msr_jax.bench.engines import peak_memory
from msr_jax.config import MUSDB_STEMS, SLAKH_STEMS, musdb_data, unet_base
from msr_jax.data.pipeline import make_train_dataset
from msr_jax.data.records import RecordSource
from msr_jax.errors import UserError

TRACKS, CROPS = 3, 5  # tracks written, and crops in each of them
RECORDS = {"unet": (4, 0.0), "bsrf": (8, 0.0)}  # parts of a crop and margin, as the preparations have them
SHARDS = (2 << 20, 8 << 20, 256 << 20)  # bytes; the last is the default, and here one shard
SWEEP = ((1, 1.0), (1, 0.5), (2, 0.5), (2, 0.0), (4, 0.0), (8, 0.0))
WORKERS = 2
# A training step of the deterministic network costs about three forward passes: FLOPs on an official crop. An H200 is
# taken to sustain 40 % of its 989 TFLOP/s in bfloat16.
FLOPS_PER_CROP = {"unet": 3 * 0.25e12, "bsrf": 3 * 5.82e12}
SUSTAINED = 0.4 * 989e12


def write_noise(
    folder: Path,
    stems: tuple[str, ...],
    rate: int,
    channels: int,
    crop: int,
    parts: int,
    margin: float,
    shard_bytes: int = SHARDS[-1],
) -> Path:
    """Records of noise; returns their folder."""
    try:
        from data_prep.writer import make_manifest, write_records
    except ModuleNotFoundError as error:
        raise UserError("this benchmark needs the package data_prep beside msr_jax") from error
    rng = np.random.default_rng(0)
    shape = (len(stems), CROPS * crop, channels)
    tracks = ((f"t{k}", rng.integers(-9999, 9999, shape, np.int16)) for k in range(TRACKS))
    manifest = make_manifest(stems, rate, channels, crop, margin, parts=parts)
    write_records(folder, {"train": tracks}, manifest, shard_bytes)
    return folder


def _median(function: Callable[[int], Any], repeats: int) -> float:
    function(0)
    times = []
    for k in range(1, repeats + 1):
        started = time.process_time()
        function(k)
        times.append(time.process_time() - started)
    return statistics.median(times)


def _row(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    rate = {"crops_per_second": 1 / seconds}
    return {
        "name": name,
        "seconds": seconds,
        "speedup_over_peer": None,
        "peak_memory_bytes": peak_memory(),
        **rate,
        **more,
    }


def _stages(track: str, data: dict[str, Any], stems, rate: int, channels: int, repeats: int) -> list[dict[str, Any]]:
    """CPU seconds of the parts of an example, and of examples without and with augmentation in the workers."""
    source, crop = RecordSource(data["train"], "train"), data["crop"]
    places = np.random.default_rng(0).integers(0, (CROPS - 1) * crop, 1000)
    pcm = source.read(0, 0, crop)
    rows = [
        _row(f"{track}_read_record", _median(lambda k: source[k % len(source)], 4 * repeats)),
        _row(f"{track}_read_crop", _median(lambda k: source.read(k % TRACKS, int(places[k]), crop), 4 * repeats)),
        _row(
            f"{track}_to_float", _median(lambda k: np.multiply(pcm, np.float32(2**-15), dtype=np.float32), 4 * repeats)
        ),
    ]
    for name, effects in (("", False), ("_pitch_and_stretch", True)):
        plain = {**data, "batch": 1, "augment": data["augment"] if effects else {}}
        if effects and not any(data["augment"][e] for e in ("pitch_shift", "time_stretch")):
            continue
        dataset = make_train_dataset(plain, stems, rate, 0, channels=channels)
        count = 4 * repeats if not effects else 8 * repeats
        started = time.process_time()
        for k in range(count):
            dataset[k]
        rows.append(_row(f"{track}_example{name}", (time.process_time() - started) / count))
    needed = SUSTAINED / FLOPS_PER_CROP[track]
    for row in rows[3:]:
        row["crops_per_second_of_an_h200"] = needed
        row["cores_for_an_h200"] = needed * row["seconds"]
    return rows


def _stream(
    track: str, data: dict[str, Any], stems, rate: int, channels: int, repeats: int, batch: int
) -> dict[str, Any]:
    """Wall-clock seconds per crop of a stream with worker processes."""
    flags.FLAGS.mark_as_parsed()
    dataset = make_train_dataset({**data, "batch": batch, "augment": {}}, stems, rate, 0, channels=channels)
    options = grain.MultiprocessingOptions(num_workers=WORKERS, per_worker_buffer_size=1)
    stream = iter(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)).mp_prefetch(options)
    )
    try:
        for _ in range(2 * WORKERS):
            next(stream)
        started = time.perf_counter()
        for _ in itertools.repeat(None, 4 * repeats):
            next(stream)
        seconds = (time.perf_counter() - started) / (4 * repeats)
    finally:
        stream.close()
    # The largest of the processes that have ended, which the workers of this stream are among.
    peak = peak_memory(resource.getrusage(resource.RUSAGE_CHILDREN))
    row = _row(f"{track}_stream_{WORKERS}_workers", seconds / batch, batches_per_second=1 / seconds, batch=batch)
    return {**row, "peak_memory_bytes": peak}


def _augment_row(augment: dict[str, Any], crop: int, batch: int, rate: int, repeats: int) -> dict[str, Any]:
    """Seconds per crop of the compiled augmentations on this machine's devices."""
    import jax

    from msr_jax.data.augment_step import make_augment

    x = jax.random.normal(jax.random.key(0), (batch, 4, crop, 2)) * 0.1
    function: Any = make_augment(augment, MUSDB_STEMS, rate)
    compiled = jax.jit(function)
    seconds = _median(lambda k: jax.block_until_ready(compiled(x, jax.random.key(k))), repeats)
    return _row("bsrf_compiled_augmentations", seconds / batch, device=jax.devices()[0].device_kind)


def _sweep_row(
    track: str, data: dict[str, Any], stems, rate: int, channels: int, repeats: int, records, shard_bytes=SHARDS[-1]
) -> dict[str, Any]:
    """An example from other records or shards: CPU seconds, bytes on disk over those of the samples, number of shards."""
    parts, margin = records
    with tempfile.TemporaryDirectory() as folder:
        made = write_noise(Path(folder) / "r", stems, rate, channels, data["crop"], parts, margin, shard_bytes)
        plain = {**data, "train": str(made), "batch": 1, "augment": {}}
        dataset = make_train_dataset(plain, stems, rate, 0, channels=channels)
        seconds = _median(lambda k: dataset[k], 4 * repeats)
        sizes = [f.stat().st_size for f in made.glob("*array_record*")]
    source = 2 * len(stems) * TRACKS * CROPS * data["crop"] * channels
    name = f"{track}_sweep_parts_{parts}_margin_{margin}_shards_{shard_bytes >> 20}_MiB"
    return _row(name, seconds, bytes_over_source=sum(sizes) / source, shards=len(sizes))


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: stages, streams and a sweep over records and shards for both tracks; compiled augmentations."""
    rows = []
    unet, musdb = unet_base().data.to_dict(), musdb_data().to_dict()
    crops = (4096, 8192) if args.tiny else (unet["crop"], musdb["crop"])
    for track, data, crop, stems, rate, channels, batch in (
        ("unet", unet, crops[0], SLAKH_STEMS, 22_050, 1, 8),
        ("bsrf", musdb, crops[1], MUSDB_STEMS, 44_100, 2, 4),
    ):
        with tempfile.TemporaryDirectory() as folder:
            records = write_noise(Path(folder) / "r", stems, rate, channels, crop, *RECORDS[track])
            data |= {"train": str(records), "crop": crop, "preload": False}
            rows += _stages(track, data, stems, rate, channels, args.repeats)
            rows.append(_stream(track, data, stems, rate, channels, args.repeats, batch))
        sweep = [(records, SHARDS[-1]) for records in SWEEP] + [(RECORDS[track], size) for size in SHARDS[:-1]]
        sweep = sweep[::5] if args.tiny else sweep
        rows += [_sweep_row(track, data, stems, rate, channels, args.repeats, *each) for each in sweep]
    rows.append(_augment_row(musdb["augment"], crops[1], 2, 44_100, max(1, args.repeats // 3)))
    return rows
