"""Verification passes what is whole and names each record that is not."""

import json

import numpy as np
import pytest

from data_prep.verify import check_record, main, verify
from data_prep.writer import convert, make_manifest, save_track, write_records
from msr_jax.data.records import PCM_SCALE, RecordSource, read_manifest, to_pcm
from msr_jax.errors import UserError

MANIFEST = make_manifest(["a", "b", "c"], 8000, 2, 1000, 0.5)
SHARD = "segments-train.array_record-00000-of-00001"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    tracks = [(f"song{k}", rng.integers(-9999, 9999, (3, 700 + 1100 * k, 2), np.int16)) for k in range(3)]
    write_records(tmp_path / "r", {"train": tracks}, MANIFEST)
    return tmp_path / "r"


def test_whole_records_pass(folder, capsys):
    count, bad = verify(folder)
    assert count == len(RecordSource(folder, "train")) == 6 and bad == []
    assert main([str(folder), "--workers", "1"]) == 0
    assert "6 records, all good" in capsys.readouterr().out


def test_stems_that_were_rounded_still_sum_to_the_mixture_and_clipped_ones_too(tmp_path):
    audio = np.random.default_rng(0).uniform(-1.1, 1.1, (3, 2000, 2)).astype(np.float32)

    def save(folder, split, item):
        save_track(folder, split, 0, {"name": "a", "samples": 2000}, (to_pcm(audio)[0], audio.sum(0)), MANIFEST)

    convert(tmp_path / "r", {"train": [(0, None)]}, save, MANIFEST, plan=None)
    assert verify(tmp_path / "r")[1] == []


def test_a_shard_byte_that_changed_is_found_and_its_record_named_when_verified_and_when_read(folder, capsys):
    data = bytearray((folder / SHARD).read_bytes())
    one, hit = (RecordSource(folder, "train")[k] for k in (1, 2))
    at = data.find(hit["stems"].tobytes())
    data[at + 10] ^= 1
    (folder / SHARD).write_bytes(data)
    assert main([str(folder), "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert f"{SHARD}: not the" in said and f"{SHARD}, record 2 ({hit['track']}, " in said and "2 faults" in said
    damaged = RecordSource(folder, "train")
    with pytest.raises(UserError, match=r"record 2 of split train .* is damaged .* data_prep.verify"):
        damaged[2]
    assert damaged[1]["track"] == one["track"]


def cut_short(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def lost(folder):
    (folder / SHARD).unlink()


def not_listed(folder):
    (folder / "segments-train.array_record-00001-of-00002").write_bytes((folder / SHARD).read_bytes())


def dropped_from_the_manifest(folder):
    held = json.loads((folder / "dataset_info.json").read_text())
    held["releaseNotes"]["shards"] = "{}"
    (folder / "dataset_info.json").write_text(json.dumps(held))


def no_manifest(folder):
    (folder / "dataset_info.json").write_text("{")


@pytest.mark.parametrize("spoil", [cut_short, lost, not_listed, dropped_from_the_manifest, no_manifest])
def test_a_folder_that_is_not_whole_stops_with_one_sentence_when_verified_and_when_opened(folder, capsys, spoil):
    spoil(folder)
    assert main([str(folder), "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("data_prep.verify: ") and said.count("\n") == 1
    with pytest.raises(UserError):
        RecordSource(folder, "train")


def other_samples(record):
    record["stems"] = record["stems"] + np.int16(1)


def other_mixture(record):
    record["mixture"] = record["mixture"] + np.int32(4)


def other_place(record):
    record["offset"] += 1


def other_activity(record):
    record["active"] = ~record["active"]


def after_the_end(record):
    record["valid"] -= 100


def other_shape(record):
    record["stems"] = record["stems"][:2]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_samples, "checksum"),
        (other_mixture, "mixture, by up to 4 steps"),
        (other_place, "place, length or rate"),
        (other_activity, "sound where"),
        (after_the_end, "place, length or rate"),
        (other_shape, "of shape"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(folder, spoil, says):
    source, manifest = RecordSource(folder, "train"), read_manifest(folder)
    record = dict(source[0])
    length, k = dict(source.tracks)[record["track"]], record["offset"] // manifest["crop"]
    assert check_record(record, length, k, manifest) == []
    spoil(record)
    assert any(says in what for what in check_record(record, length, k, manifest))
    assert PCM_SCALE == 32768
