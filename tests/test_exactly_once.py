"""Over an epoch every record has its turn once: on three processes, after a kill, and on two; and the order is random."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.writer import make_manifest, write_records
from msr_jax.data.pipeline import make_train_dataset
from msr_jax.data.records import RecordSource

CROP, RATE, STEMS, RECORDS, BATCH = 16, 8000, ("bass", "drums", "guitar", "piano"), 240, 6
ROOT = Path(__file__).resolve().parents[1]
# One process of a run: reads its part of the batches from `step` on in a worker, and notes whose turn it was.
PROCESS = """
import itertools, json, sys, time
import grain
from absl import flags
from msr_jax.data.pipeline import make_train_dataset
from tests.test_exactly_once import RATE, STEMS

def main():
    data, index, count, step, stop, path = json.loads(sys.argv[1])
    flags.FLAGS.mark_as_parsed()
    dataset = make_train_dataset(data, STEMS, RATE, 0, index, count)[step:]
    batches = iter(dataset.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=1)))
    with open(path, "w") as file:
        for k in range(step, stop):
            marks = next(batches)["stems"][:, 0, 0, 0] * 32768
            print(json.dumps([k, [round(float(m)) for m in marks]]), file=file, flush=True)
            time.sleep(0.01)
    batches.close()

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """240 tracks of one record each; every sample of a track is its number."""
    out = tmp_path_factory.mktemp("marked") / "r"
    tracks = [(f"t{k:03d}", np.full((4, CROP + 3, 1), k, np.int16)) for k in range(RECORDS)]
    write_records(out, {"train": tracks}, make_manifest(STEMS, RATE, 1, CROP, 0.5))
    return out


def settings(folder):
    return {
        "train": str(folder),
        "batch": BATCH,
        "crop": CROP,
        "mix_across_songs": 0.0,
        "gain_db": (0.0, 0.0),
        "preload": False,
    }


def start(data, tmp_path, count, step, stop):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    paths = [tmp_path / f"{count}-{index}.jsonl" for index in range(count)]
    arguments = [json.dumps([data, index, count, step, stop, str(path)]) for index, path in enumerate(paths)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return [
        subprocess.Popen([sys.executable, script, a], env=environment, start_new_session=True) for a in arguments
    ], paths


def seen(paths):
    """{step: marks of the global batch} as far as all processes got."""
    parts = [[json.loads(line) for line in path.read_text().splitlines() if line.endswith("]]")] for path in paths]
    steps = min(map(len, parts))
    return {parts[0][k][0]: [mark for part in parts for mark in part[k][1]] for k in range(steps)}


@pytest.mark.multiprocess
def test_every_record_has_its_turn_once_on_three_processes_a_kill_and_two(folder, tmp_path):
    data, steps = settings(folder), RECORDS // BATCH
    processes, paths = start(data, tmp_path, 3, 0, 10**6)  # would go on for ever: none may end before it is killed
    while not all(p.exists() and len(p.read_text().splitlines()) >= 8 for p in paths):
        assert all(p.poll() is None for p in processes)
        time.sleep(0.02)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = {k: marks for k, marks in seen(paths).items() if k < steps}
    checkpoint = len(before) // 2  # a run goes on from its last checkpoint, not from where it was killed
    processes, paths = start(data, tmp_path, 2, checkpoint, steps)
    assert [process.wait() for process in processes] == [0, 0]
    after = seen(paths)
    assert all(before[k] == after[k] for k in range(checkpoint, len(before)))
    marks = [mark for k in range(steps) for mark in (before[k] if k < checkpoint else after[k])]
    assert sorted(marks) == list(range(RECORDS))


def test_neighbours_in_the_stream_are_as_far_apart_as_in_a_perfect_shuffle(folder):
    """Distances between neighbours: of a perfect shuffle of n, the mean is (n + 1) / 3 and the density falls linearly."""
    data, epochs = settings(folder), 10
    dataset = make_train_dataset({**data, "preload": True}, STEMS, RATE, 0)
    marks = np.concatenate([dataset[k]["stems"][:, 0, 0, 0] for k in range(epochs * RECORDS // BATCH)]) * 32768
    marks = marks.round().astype(int).reshape(epochs, RECORDS)
    assert (np.sort(marks, 1) == np.arange(RECORDS)).all()
    source = RecordSource(folder, "train")
    place = {source[k]["track"]: k for k in range(RECORDS)}
    in_shards = np.array([place[f"t{k:03d}"] for k in range(RECORDS)])
    for order in (marks, in_shards[marks]):  # in the order of tracks, and in that of the shards
        distance = np.abs(np.diff(order, axis=1)).ravel()
        assert distance.mean() == pytest.approx((RECORDS + 1) / 3, rel=0.06)
        found = np.histogram(distance, 6, (0.5, RECORDS + 0.5))[0] / distance.size
        perfect = np.array([sum(2 * (RECORDS - d) for d in range(40 * k + 1, 40 * k + 41)) for k in range(6)])
        assert found == pytest.approx(perfect / (RECORDS * (RECORDS - 1)), abs=0.035)
    assert (
        np.abs(np.corrcoef(marks)[np.triu_indices(epochs, 1)]).max() < 0.3
    )  # epochs have nothing to do with each other
    shard_distance = np.abs(np.diff(np.argsort(in_shards)))
    assert shard_distance.mean() == pytest.approx((RECORDS + 1) / 3, rel=0.15)  # the shards are shuffled themselves
