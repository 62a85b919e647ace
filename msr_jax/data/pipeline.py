"""Training batches by Grain: element k is global step k, a pure function of the seed and k, for any number of processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from msr_jax.data.indexing import is_silent
from msr_jax.data.records import PCM_SCALE, RecordSource, check_stems
from msr_jax.errors import UserError


class Draw(grain.transforms.RandomMap):
    """Record index -> (record index, seed of the example): all that is random about an example, at no cost."""

    def random_map(self, index: int, rng: np.random.Generator) -> np.ndarray:
        return np.array([index, rng.integers(2**63)])


class MakeBatch(grain.transforms.Map):
    """Draws of a global batch -> this process's examples {"stems": (b, stems, crop, 1), "label": (b, stems)}.

    The label names one stem, uniformly chosen, as an example's target. As released, all stems come from one place of one song. With
    probability `mix_across_songs` every stem comes from a song and place of its own; `gain_db` is the range of a
    uniform gain per stem.
    """

    def __init__(
        self, source: RecordSource, crop: int, mix_across_songs: float, gain_db: Sequence[float], local: slice
    ):
        self.source, self.crop, self.mix, self.local = source, crop, mix_across_songs, local
        self.gain_db = tuple(gain_db)

    def _cut(self, record: Mapping[str, Any], rng: np.random.Generator, stem: int | slice) -> np.ndarray:
        start = int(rng.integers(int(record["valid"]) - self.crop + 1))
        return record["stems"][stem, start : start + self.crop].astype(np.float32) / PCM_SCALE

    def _example(self, index: int, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        record = self.source[index]
        count = len(record["stems"])
        if rng.random() < self.mix:
            others = [record, *(self.source[rng.integers(len(self.source))] for _ in range(count - 1))]
            order = rng.permutation(count)
            stems = np.stack([self._cut(others[order[k]], rng, k) for k in range(count)])
        else:
            stems = self._cut(record, rng, slice(None))
        if self.gain_db != (0.0, 0.0):
            stems = stems * 10 ** (rng.uniform(*self.gain_db, (count, 1)).astype(np.float32) / 20)
        target = int(rng.integers(count))
        label = np.zeros(count, np.float32)
        label[target] = 1
        return {"stems": stems[..., None], "label": label}

    def map(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        examples = [self._example(index, seed) for index, seed in draws[self.local]]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def make_train_dataset(
    data: Mapping[str, Any],
    stems: Sequence[str],
    sample_rate: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """This process's part of every global batch, endlessly: element k is for step k; resume with `dataset[step:]`.

    The parts joined in order of process are the same global batch for any number of processes.

    Args:
      data: the config's `data` section; `train` names a folder of records.

    Returns:
      Batches {"stems": (batch/processes, stems, crop, 1), "label": (batch/processes, stems) one-hot}, float32.

    Raises:
      UserError: no records there, of other stems or rate, or a batch that the processes do not divide.
    """
    if not data["train"]:
        raise UserError("data.train is not set; name a folder of records: --config.data.train=DIR")
    if data["batch"] % process_count:
        raise UserError(f"data.batch ({data['batch']}) must be a multiple of the number of processes ({process_count})")
    source = RecordSource(data["train"], "train", data["preload"])
    check_stems(source, stems, sample_rate, data["crop"])
    # Every process draws for the whole batch, which costs nothing, and makes its own examples only.
    share = data["batch"] // process_count
    local = slice(process_index * share, (process_index + 1) * share)
    examples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None).random_map(Draw())
    make = MakeBatch(source, data["crop"], data["mix_across_songs"], data["gain_db"], local)
    return examples.batch(data["batch"], drop_remainder=True).map(make)


def validation_windows(data: Mapping[str, Any], stems: Sequence[str], sample_rate: int, limit: int = 0) -> np.ndarray:
    """Fixed windows (windows, stems, crop) float32 of the validation split: at least two stems active, as released.

    The windows are [k·crop, (k+1)·crop) of every track, ordered by track and place, the tail of a track left out. If
    the records were made for a longer crop, they begin anew at its multiples.

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
        if not record["is_window"]:
            continue
        for start in range(0, source.manifest["crop"] - data["crop"] + 1, data["crop"]):
            window = record["stems"][:, start : start + data["crop"]].astype(np.float32) / PCM_SCALE
            if (~is_silent(window)).sum() >= 2:
                found.append((record["track"], int(record["offset"]) + start, window))
    if not found:
        raise UserError(f"{data['validation']} has no validation window with two active stems")
    found.sort(key=lambda item: item[:2])
    chosen = np.linspace(0, len(found) - 1, min(limit or len(found), len(found))).round().astype(int)
    return np.stack([found[k][2] for k in chosen])
