"""Training batches by Grain: element k is global step k, a pure function of the seed and k, for any number of processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from msr_jax.data.augment import EFFECTS, stretch_and_shift
from msr_jax.data.records import PCM_SCALE, RecordSource, check_stems
from msr_jax.errors import UserError
from msr_jax.metrics.si_sdr import is_silent

TAILS = ("drop", "pad")


class Draw(grain.transforms.RandomMap):
    """Record number -> (record number, seed of the example): all that is random about an example, at no cost."""

    def random_map(self, index: int, rng: np.random.Generator) -> np.ndarray:
        return np.array([index, rng.integers(2**63)])


def crop_place(source: RecordSource, index: int, crop: int, u: float) -> tuple[int, int]:
    """Track, and first sample, of a crop drawn for a record.

    The places where a crop can start are dealt out evenly among the records of a track: if u is uniform in [0, 1), so is the
    crop over the whole track. A track shorter than a crop is taken from its start.

    Args:
      index: number of the record, counted track after track.
    """
    track = int(np.searchsorted(source.first, index, side="right")) - 1
    places = max(1, source.tracks[track][1] - crop + 1)
    part = index - source.first[track] + u
    return track, int(part * places / (source.first[track + 1] - source.first[track]))


class MakeBatch(grain.transforms.Map):
    """Draws of a global batch -> this process's examples {"stems": (b, stems, crop, channels), "label": (b, stems)}.

    The label names one stem, uniformly chosen, as an example's target. As released for Slakh2100, all stems come from one
    place of one song. With probability `mix_across_songs` every stem comes from a song and place of its own: songs are
    drawn by their length, or, with `equal_songs` as released for MUSDB18, all alike. `gain_db` is the range of a uniform
    gain per stem.
    """

    def __init__(self, source: RecordSource, data: Mapping[str, Any], local: slice):
        self.source, self.crop, self.local = source, data["crop"], local
        self.mix, self.equal_songs = data["mix_across_songs"], data.get("equal_songs", False)
        low, high = data["gain_db"]
        self.gain_db = (low, high)
        augment = data.get("augment", {})
        self.effects = {name: augment[name] for name in EFFECTS if augment.get(name)}
        self.leak = augment.get("option_leak", True)

    def _somewhere(self, rng: np.random.Generator) -> tuple[int, int]:
        if self.equal_songs:
            track = int(rng.integers(len(self.source.tracks)))
            return track, int(rng.integers(max(1, self.source.tracks[track][1] - self.crop + 1)))
        return crop_place(self.source, int(rng.integers(len(self.source))), self.crop, rng.random())

    def _cut(self, place: tuple[int, int], stem: int | slice, out: np.ndarray) -> None:
        """Write a crop as float32 into zeroed `out`: straight from the records, because every copy counts here."""
        for at, piece in self.source.pieces(*place, self.crop, stem):
            np.multiply(piece, np.float32(1 / PCM_SCALE), out=out[..., at : at + piece.shape[-2], :])

    def _example(self, index: int, seed: int, stems: np.ndarray) -> np.ndarray:
        """Fill an example's zeroed stems (stems, crop, channels); returns its label."""
        rng = np.random.default_rng(seed)
        names, rate = self.source.manifest["stems"], self.source.manifest["sample_rate"]
        place = crop_place(self.source, index, self.crop, rng.random())
        if rng.random() < self.mix:
            places = [place, *(self._somewhere(rng) for _ in names[1:])]
            order = rng.permutation(len(names))
            if self.equal_songs:  # the record that is this example's turn would favour long songs
                places[0] = self._somewhere(rng)
            for k in range(len(names)):
                self._cut(places[order[k]], k, stems[k])
        else:
            self._cut(place, slice(None), stems)
        if self.effects:
            for k, name in enumerate(names):
                stems[k] = stretch_and_shift(stems[k], name, rng, self.effects, rate, self.leak)
        if self.gain_db != (0.0, 0.0):
            stems *= 10 ** (rng.uniform(*self.gain_db, len(names)).astype(np.float32) / 20)[:, None, None]
        return np.eye(len(names), dtype=np.float32)[rng.integers(len(names))]

    def map(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        held = self.source.manifest
        draws = draws[self.local]
        stems = np.zeros((len(draws), len(held["stems"]), self.crop, held["channels"]), np.float32)
        labels = [self._example(index, seed, out) for (index, seed), out in zip(draws, stems, strict=True)]
        return {"stems": stems, "label": np.stack(labels)}


def make_train_dataset(
    data: Mapping[str, Any],
    stems: Sequence[str],
    sample_rate: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    channels: int = 1,
) -> grain.MapDataset:
    """This process's part of every global batch, endlessly: element k is for step k; resume with `dataset[step:]`.

    The parts joined in order of process are the same global batch for any number of processes. In an epoch each record's
    turn comes once, in an order of its own; a crop may be of any length.

    Args:
      data: the config's `data` section; `train` names a folder of records.

    Returns:
      Batches {"stems": (batch/processes, stems, crop, channels), "label": (batch/processes, stems) one-hot}, float32.

    Raises:
      UserError: no records there, of other stems, rate or channels, or a batch that the processes do not divide.
    """
    if not data["train"]:
        raise UserError("data.train is not set; name a folder of records: --config.data.train=DIR")
    if data["batch"] % process_count:
        raise UserError(f"data.batch ({data['batch']}) must be a multiple of the number of processes ({process_count})")
    source = RecordSource(data["train"], "train", data["preload"])
    check_stems(source, stems, sample_rate, channels)
    # Every process draws for the whole batch, which costs nothing, and makes its own examples only.
    share = data["batch"] // process_count
    local = slice(process_index * share, (process_index + 1) * share)
    examples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None).random_map(Draw())
    return examples.batch(data["batch"], drop_remainder=True).map(MakeBatch(source, data, local))


def validation_windows(
    data: Mapping[str, Any], stems: Sequence[str], sample_rate: int, limit: int = 0, channels: int = 1
) -> np.ndarray:
    """Fixed windows (windows, stems, crop, channels) float32 of the split that validates.

    The windows are [k·crop, (k+1)·crop) of every track, ordered by track and place. As released for Slakh2100, the tail of a
    track is left out and at least two stems must be active (`min_active`); as released for MUSDB18, with `tail` "pad", the
    tail is padded with zeros, and none is left out.

    Args:
      limit: the most windows to take, spread evenly; 0 takes all.

    Raises:
      UserError: no such records, or no window with so many active stems.
    """
    tail, least, crop = data.get("tail", "drop"), data.get("min_active", 2), data["crop"]
    if tail not in TAILS:
        raise UserError(f"data.tail must be one of {', '.join(TAILS)}, not '{tail}'")
    split = data.get("validation_split", "validation")
    source = RecordSource(data["validation"], split)
    check_stems(source, stems, sample_rate, channels)
    windows = [
        (track, k * crop)
        for track in sorted(range(len(source.tracks)), key=lambda t: source.tracks[t])
        for k in range(-(-source.tracks[track][1] // crop) if tail == "pad" else source.tracks[track][1] // crop)
    ]
    if least:
        active = lambda stems: ~is_silent(stems.swapaxes(1, 2) / PCM_SCALE)
        windows = [w for w in windows if active(source.read(*w, crop)).sum() >= least]
    where = f"the split '{split}' of {data['validation']}"
    if not windows and all(samples < crop for _, samples in source.tracks):
        raise UserError(f"{where} has no track as long as data.crop, {crop} samples")
    if not windows:
        raise UserError(f"{where} has no window with {least} active stems")
    chosen = np.linspace(0, len(windows) - 1, min(limit or len(windows), len(windows))).round().astype(int)
    return np.stack([source.read(*windows[int(k)], crop) for k in chosen]).astype(np.float32) / np.float32(PCM_SCALE)
