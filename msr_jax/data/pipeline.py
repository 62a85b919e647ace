"""Training batches by Grain: element k is global step k, a pure function of the seed and k, for any number of processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from msr_jax.data.records import PCM_SCALE, RecordSource, check_stems
from msr_jax.errors import UserError

SILENT = 1.5e-5  # norm over samples, the threshold of the published data set


class MakeExample(grain.transforms.RandomMap):
    """Record index -> {"mixture", "target": (crop, 1), "label": (stems,)}, with one uniformly chosen target stem.

    As released, all stems come from one place of one song. With probability `mix_across_songs` every stem comes from a
    song and place of its own; `gain_db` is the range of a uniform gain per stem.
    """

    def __init__(self, source: RecordSource, crop: int, mix_across_songs: float, gain_db: tuple[float, float]):
        self.source, self.crop, self.mix, self.gain_db = source, crop, mix_across_songs, gain_db

    def _cut(self, record: Mapping[str, Any], rng: np.random.Generator, stem: int | slice) -> np.ndarray:
        start = int(rng.integers(int(record["valid"]) - self.crop + 1))
        return record["stems"][stem, start : start + self.crop].astype(np.float32) / PCM_SCALE

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        record = self.source[index]
        count = len(record["stems"])
        if rng.random() < self.mix:
            others = [record, *(self.source[rng.integers(len(self.source))] for _ in range(count - 1))]
            order = rng.permutation(count)
            stems = np.stack([self._cut(others[order[k]], rng, k) for k in range(count)])
        else:
            stems = self._cut(record, rng, slice(None))
        if tuple(self.gain_db) != (0.0, 0.0):
            stems = stems * 10 ** (rng.uniform(*self.gain_db, (count, 1)).astype(np.float32) / 20)
        target = int(rng.integers(count))
        label = np.zeros(count, np.float32)
        label[target] = 1
        return {"mixture": stems.sum(0)[:, None], "target": stems[target][:, None], "label": label}


def make_train_dataset(
    data: Mapping[str, Any],
    stems: Sequence[str],
    sample_rate: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """This process's part of every global batch, endlessly: element k is for step k; resume with `dataset[step:]`.

    Args:
      data: the config's `data` section; `train` names a folder of records.

    Returns:
      Batches {"mixture", "target": (batch/processes, crop, 1), "label": (batch/processes, stems)}, float32.

    Raises:
      UserError: no records there, of other stems or rate, or a batch that the processes do not divide.
    """
    if not data["train"]:
        raise UserError("data.train is not set; name a folder of records: --config.data.train=DIR")
    if data["batch"] % process_count:
        raise UserError(f"data.batch ({data['batch']}) must be a multiple of the number of processes ({process_count})")
    source = RecordSource(data["train"], "train", data["preload"])
    check_stems(source, stems, sample_rate, data["crop"])
    example = MakeExample(source, data["crop"], data["mix_across_songs"], tuple(data["gain_db"]))
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    # Random maps come before the slice: an example is augmented alike whatever process it lands on.
    dataset = dataset.random_map(example)[process_index::process_count]
    return dataset.batch(data["batch"] // process_count, drop_remainder=True)


def is_silent(audio: np.ndarray) -> np.ndarray:
    """Silence test of the published data set over the last axis: ‖x‖₂ / samples < 1.5e-5 (so quiet passages count too)."""
    return np.linalg.norm(audio, axis=-1) / audio.shape[-1] < SILENT


def validation_windows(data: Mapping[str, Any], stems: Sequence[str], sample_rate: int, limit: int = 0) -> np.ndarray:
    """Fixed windows (windows, stems, crop) float32 of the validation split: at least two stems active, as released.

    The windows are [k·crop, (k+1)·crop) of every track, ordered by track and place, the tail of a track left out.

    Args:
      limit: the most windows to take, spread evenly; 0 takes all.

    Raises:
      UserError: no such records, or none with two active stems.
    """
    source = RecordSource(data["validation"], "validation")
    check_stems(source, stems, sample_rate, data["crop"])
    found = []
    for k in range(len(source)):
        record = source[k]
        window = record["stems"][:, : data["crop"]].astype(np.float32) / PCM_SCALE
        if record["is_window"] and (~is_silent(window)).sum() >= 2:
            found.append((str(record["track"]), int(record["offset"]), window))
    if not found:
        raise UserError(f"{data['validation']} has no validation window with two active stems")
    found.sort(key=lambda item: item[:2])
    chosen = np.linspace(0, len(found) - 1, min(limit or len(found), len(found))).round().astype(int)
    return np.stack([found[k][2] for k in chosen])
