"""Element k of the training data is a function of the seed and k, and nothing else."""

import itertools

import numpy as np
import pytest

from msr_jax.data.pipeline import make_train_dataset, validation_windows
from msr_jax.data.records import PCM_SCALE, RecordSource, track_records, write_records
from msr_jax.errors import UserError

CROP, RATE = 64, 8000
STEMS = ("bass", "drums", "guitar", "piano")
MANIFEST = {"stems": list(STEMS), "sample_rate": RATE, "crop": CROP}


def ramps(song, length):
    """Every sample tells its song, stem and place: int16, distinct for all within a test."""
    return (song * 8000 + 2000 * np.arange(4)[:, None] + np.arange(length)).astype(np.int16) - 20000


@pytest.fixture(scope="module")
def ramp_records(tmp_path_factory):
    out = tmp_path_factory.mktemp("ramps") / "records"
    songs = [item for k in range(4) for item in track_records(f"song{k}", ramps(k, 1000), CROP)]
    write_records(out, {"train": songs}, MANIFEST)
    return out


@pytest.fixture
def data(ramp_records):
    return {
        "train": str(ramp_records),
        "validation": str(ramp_records),
        "batch": 4,
        "crop": CROP,
        "mix_across_songs": 0.0,
        "gain_db": (0.0, 0.0),
        "preload": False,
    }


def dataset(data, seed=0, index=0, count=1):
    return make_train_dataset(data, STEMS, RATE, seed, index, count)


def same(a, b):
    return all((a[name] == b[name]).all() for name in ("stems", "label"))


def target(batch):
    """The stem of each example that its label names: (batch, crop, 1)."""
    return batch["stems"][np.arange(len(batch["label"])), batch["label"].argmax(1)]


def pcm(audio):
    return np.rint(audio * PCM_SCALE).astype(int)


def test_batches_have_the_promised_shapes(data):
    batch = dataset(data)[0]
    assert batch["stems"].shape == (4, len(STEMS), CROP, 1)
    assert batch["label"].shape == (4, len(STEMS))
    assert {v.dtype for v in batch.values()} == {np.dtype(np.float32)}
    assert (batch["label"].sum(1) == 1).all()


def test_the_same_seed_gives_the_same_batches_another_one_others(data):
    one, two, other = dataset(data), dataset({**data, "preload": True}), dataset(data, seed=1)
    assert all(same(one[k], two[k]) for k in (0, 7, 100))
    assert not same(one[0], other[0])
    assert not same(one[0], one[1])


def test_resuming_continues_where_the_run_stopped(data):
    whole = list(itertools.islice(dataset(data).to_iter_dataset(), 30))
    resumed = list(itertools.islice(dataset(data)[20:].to_iter_dataset(), 10))
    assert all(same(a, b) for a, b in zip(whole[20:], resumed, strict=True))


@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(data, count):
    data.update(mix_across_songs=0.5, gain_db=(-6.0, 6.0))
    whole = dataset(data)
    parts = [dataset(data, index=index, count=count) for index in range(count)]
    for k in (0, 3, 50):
        joined = {name: np.concatenate([part[k][name] for part in parts]) for name in whole[k]}
        assert same(joined, whole[k])


def test_stems_come_from_one_place_of_one_song(data):
    for k in range(20):
        batch = dataset(data)[k]
        for stems in pcm(batch["stems"][..., 0]):
            song, place = divmod(int(stems[0, 0]) + 20000, 8000)
            assert (stems == ramps(song, 1000)[:, place : place + CROP].astype(int)).all()


def test_an_epoch_visits_every_record_once_and_the_next_in_another_order(data):
    count = len(RecordSource(data["train"], "train"))
    assert count % 4 == 0
    steps = count // 4
    songs = []
    for epoch in range(2):
        batches = [dataset(data)[epoch * steps + k] for k in range(steps)]
        stems = np.concatenate([b["label"].argmax(1) for b in batches])
        first = np.concatenate([pcm(target(b))[:, 0, 0] for b in batches])
        songs.append((first + 20000 - 2000 * stems) // 8000)
    assert all((np.bincount(s) == count // 4).all() for s in songs)
    assert (songs[0] != songs[1]).any()


def test_crops_start_anywhere_and_targets_are_drawn_evenly(data):
    batches = [dataset(data)[k] for k in range(300)]
    stems = np.concatenate([b["label"].argmax(1) for b in batches])
    assert (np.abs(np.bincount(stems, minlength=4) / len(stems) - 0.25) < 0.05).all()
    first = np.concatenate([pcm(target(b))[:, 0, 0] for b in batches])
    places = (first + 20000 - 2000 * stems) % 8000
    # A record leaves room for half a crop: 33 starts in each of 15 spans of a song, and 1200 draws reach most.
    assert len(np.unique(places)) > 0.8 * 15 * (CROP // 2 + 1)


def test_mixing_across_songs_takes_each_stem_from_a_place_of_its_own(data):
    mixed = dataset({**data, "mix_across_songs": 1.0})[0]
    stems = pcm(mixed["stems"][..., 0])
    plain = {tuple(ramps(s, 1000)[:, p].astype(int)) for s in range(4) for p in range(1000 - CROP)}
    assert any(tuple(first) not in plain for first in stems[..., 0])
    assert (np.diff(stems, axis=-1) == 1).all()


def test_every_stem_has_a_gain_of_its_own_in_the_range(data):
    batch = dataset({**data, "gain_db": (-6.0, 6.0)})[0]
    slope = np.diff(batch["stems"][..., 0], axis=-1).mean(-1) * PCM_SCALE  # 1 without gain
    assert (slope > 10**-0.31).all() and (slope < 10**0.31).all()
    assert np.unique(slope.round(4)).size == slope.size


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": ""}, "data.train is not set"),
        ({"train": "nowhere"}, "nowhere holds no records"),
        ({"batch": 5}, "multiple of the number of processes"),
        ({"crop": CROP + 1}, "data.crop"),
    ],
)
def test_configs_that_do_not_fit_are_refused(data, change, says):
    with pytest.raises(UserError, match=says):
        dataset({**data, **change}, count=2)


@pytest.fixture
def sparse(tmp_path):
    """One song of ten crops: crop k has k % 4 loud stems, the last crop is cut short; one stem of crop 6 is just silent."""
    stems = np.zeros((4, 10 * CROP - 10), np.int16)
    for k in range(10):
        stems[: k % 4, k * CROP : (k + 1) * CROP] = 1000
    # Active from a norm of 1.5e-5 times the samples on: an amplitude of 4 for a crop, 3 for half of one.
    stems[0, 6 * CROP : 7 * CROP] = 2
    write_records(tmp_path / "r", {"validation": list(track_records("a", stems, CROP))}, MANIFEST)
    return {"validation": str(tmp_path / "r"), "crop": CROP}


def test_validation_takes_whole_windows_with_two_active_stems(sparse):
    windows = validation_windows(sparse, STEMS, RATE)
    assert windows.shape == (
        3,
        4,
        CROP,
    )  # crops 2, 3, 7; crop 6 has one loud stem and one below the threshold
    assert [(w > 0).any(1).sum() for w in windows] == [2, 3, 3]


def test_validation_windows_can_be_limited_and_shorter_than_the_records_crops(sparse):
    whole = validation_windows(sparse, STEMS, RATE)
    assert (validation_windows(sparse, STEMS, RATE, limit=2) == whole[[0, 2]]).all()
    halves = validation_windows({**sparse, "crop": CROP // 2}, STEMS, RATE)
    assert (halves.reshape(3, 2, 4, CROP // 2).swapaxes(1, 2).reshape(whole.shape) == whole).all()


def test_validation_without_an_active_window_is_refused(tmp_path):
    silence = np.zeros((4, 500), np.int16)
    write_records(tmp_path / "r", {"validation": list(track_records("a", silence, CROP))}, MANIFEST)
    with pytest.raises(UserError, match="no validation window"):
        validation_windows({"validation": str(tmp_path / "r"), "crop": CROP}, STEMS, RATE)
