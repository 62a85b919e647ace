"""Element k of the training data is a function of the seed and k, and nothing else."""

import itertools

import numpy as np
import pytest

from data_prep.writer import make_manifest, write_records
from msr_jax.data.pipeline import crop_place, make_train_dataset, validation_windows
from msr_jax.data.records import PCM_SCALE, RecordSource
from msr_jax.errors import UserError

CROP, RATE = 64, 8000
STEMS = ("bass", "drums", "guitar", "piano")
MANIFEST = make_manifest(STEMS, RATE, 1, CROP, 0.5)


def ramps(song, length):
    """Every sample tells its song, stem and place: int16, distinct for all within a test."""
    return (song * 8000 + 2000 * np.arange(4)[:, None] + np.arange(length)).astype(np.int16) - 20000


@pytest.fixture(scope="module")
def ramp_records(tmp_path_factory):
    out = tmp_path_factory.mktemp("ramps") / "records"
    write_records(out, {"train": [(f"song{k}", ramps(k, 1000)[..., None]) for k in range(4)]}, MANIFEST)
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


def test_an_epoch_gives_every_record_its_turn_and_the_next_in_another_order(data):
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
    assert places.min() < 20 and places.max() > 1000 - CROP - 20
    counts = np.histogram(places, 8, (0, 1000 - CROP + 1))[0]
    assert (np.abs(counts / 150 - 1) < 0.35).all()  # 1200 draws; the deviation of a bin is 8 %


@pytest.mark.parametrize("crop", [1, 10, CROP, 200, 1000, 1300])
def test_the_records_of_a_track_share_its_places_out_evenly(data, crop):
    source = RecordSource(data["train"], "train")
    count = int(source.first[2] - source.first[1])
    fine = [
        crop_place(source, source.first[1] + k, crop, u) for k in range(count) for u in (np.arange(200) + 0.5) / 200
    ]
    assert {track for track, _ in fine} == {1}
    starts = np.array([start for _, start in fine])
    assert (np.diff(starts) >= 0).all() and starts[0] == 0 and starts[-1] == max(0, 1000 - crop)
    counts = np.bincount(starts)
    assert counts.max() - counts.min() <= 2


def test_crops_longer_than_a_record_and_than_a_song_are_joined_and_padded(data):
    for crop in (300, 1100):
        for stems in pcm(dataset({**data, "crop": crop})[0]["stems"][..., 0]):
            song, place = divmod(int(stems[0, 0]) + 20000, 8000)
            expected = ramps(song, 1000)[:, place : place + crop].astype(int)
            assert (stems[:, : expected.shape[1]] == expected).all() and not stems[:, expected.shape[1] :].any()


def test_songs_can_be_drawn_alike_whatever_their_length(tmp_path):
    songs = [("long", np.full((4, 5000, 1), 100, np.int16)), ("short", np.full((4, 500, 1), 200, np.int16))]
    write_records(tmp_path / "r", {"train": songs}, MANIFEST)
    data = {"train": str(tmp_path / "r"), "batch": 50, "crop": CROP, "mix_across_songs": 1.0, "gain_db": (0.0, 0.0)}
    share = {}
    for equal in (True, False):
        batches = [dataset({**data, "preload": True, "equal_songs": equal})[k] for k in range(4)]
        share[equal] = np.mean([pcm(b["stems"][:, :, 0, 0]) == 200 for b in batches])
    assert share[True] == pytest.approx(0.5, abs=0.06)
    assert share[False] == pytest.approx(500 / 5500, abs=0.04)


def test_stereo_comes_through(tmp_path):
    audio = np.random.default_rng(0).integers(-9999, 9999, (4, 500, 2), np.int16)
    write_records(tmp_path / "r", {"train": [("a", audio)]}, make_manifest(STEMS, RATE, 2, CROP, 0.5))
    data = {"train": str(tmp_path / "r"), "batch": 2, "crop": CROP, "mix_across_songs": 0.0, "gain_db": (0.0, 0.0)}
    batch = make_train_dataset({**data, "preload": False}, STEMS, RATE, 0, channels=2)[0]
    assert batch["stems"].shape == (2, 4, CROP, 2)
    windows = np.lib.stride_tricks.sliding_window_view(audio, CROP, 1).swapaxes(2, 3)  # (stems, place, crop, channels)
    for stems in pcm(batch["stems"]):
        assert (windows == stems[:, None]).all((0, 2, 3)).sum() == 1
    with pytest.raises(UserError, match="channels"):
        make_train_dataset({**data, "preload": False}, STEMS, RATE, 0)


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
    write_records(tmp_path / "r", {"validation": [("a", stems[..., None])]}, MANIFEST)
    return {"validation": str(tmp_path / "r"), "crop": CROP}


def test_validation_takes_whole_windows_with_two_active_stems(sparse):
    windows = validation_windows(sparse, STEMS, RATE)
    # Crops 2, 3, 7; crop 6 has one loud stem and one below the threshold.
    assert windows.shape == (3, 4, CROP, 1)
    assert [(w > 0).any((1, 2)).sum() for w in windows] == [2, 3, 3]


def test_validation_windows_can_be_limited_and_shorter_than_the_records_crops(sparse):
    whole = validation_windows(sparse, STEMS, RATE)
    assert (validation_windows(sparse, STEMS, RATE, limit=2) == whole[[0, 2]]).all()
    halves = validation_windows({**sparse, "crop": CROP // 2}, STEMS, RATE)
    assert (halves.reshape(3, 2, 4, CROP // 2).swapaxes(1, 2).reshape(whole.shape) == whole).all()


def test_windows_of_musdb_take_all_and_pad_the_tail(sparse):
    windows = validation_windows({**sparse, "tail": "pad", "min_active": 0}, STEMS, RATE)
    assert windows.shape == (10, 4, CROP, 1)
    assert windows[9, 0, CROP - 11] > 0 and not windows[9, :, CROP - 10 :].any()
    spread = validation_windows({**sparse, "tail": "pad", "min_active": 0}, STEMS, RATE, limit=5)
    assert (spread == windows[[0, 2, 4, 7, 9]]).all()  # the nearest to 0, 2.25, 4.5, 6.75 and 9
    with pytest.raises(UserError, match=r"data\.tail"):
        validation_windows({**sparse, "tail": "cut"}, STEMS, RATE)


def test_validation_without_an_active_window_is_refused(tmp_path):
    write_records(tmp_path / "r", {"validation": [("a", np.zeros((4, 500, 1), np.int16))]}, MANIFEST)
    with pytest.raises(UserError, match=r"^the split 'validation' of .* has no window with 2 active stems$"):
        validation_windows({"validation": str(tmp_path / "r"), "crop": CROP}, STEMS, RATE)


def test_the_split_that_lacks_a_window_is_named(data):
    with pytest.raises(UserError, match=r"^the split 'train' of .* has no track as long as data\.crop, 1001 samples$"):
        validation_windows({**data, "validation_split": "train", "crop": 1001}, STEMS, RATE)
