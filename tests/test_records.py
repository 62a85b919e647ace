"""Records cover their tracks, come back as written, in the order of TFDS, and are replaced whole or not at all."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep.writer import make_manifest, write_records
from msr_jax.data.records import (
    PROBE,
    RecordSource,
    check_stems,
    count_records,
    make_record,
    probes,
    read_manifest,
    record_key,
    record_samples,
    to_pcm,
)
from msr_jax.errors import UserError

CROP = 100
MANIFEST = make_manifest(["bass", "drums"], 8000, 2, CROP, 0.5)
SAMPLES = MANIFEST["samples"]


def pcm(length, seed=0):
    return np.random.default_rng(seed).integers(-9999, 9999, (2, length, 2), np.int16)


TRACKS = {"a": pcm(437), "Ünï": pcm(60, 1), "c": pcm(151, 2)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("records") / "out"
    write_records(out, {"train": TRACKS.items()}, MANIFEST)
    return out


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 99, 100, 101, 150, 151, 200, 201, 250, 251, 1037])
def test_records_reach_every_sample_and_none_is_for_nothing(length, margin):
    size = record_samples(CROP, margin)
    count = count_records(length, CROP, size)
    assert (count - 1) * CROP + size >= length
    assert count == 1 or (count - 2) * CROP + size < length


def test_pcm_rounds_to_the_nearest_step_and_counts_clipping():
    values, clipped = to_pcm(np.array([[0.5, -1.0, 1.0, 1.5, -2.0, 0.4 / 32768]], np.float32))
    assert values.tolist() == [[16384, -32768, 32767, 32767, -32768, 0]]
    assert clipped == 3


def test_the_probes_are_samples_of_the_mixture_and_zero_after_its_end():
    crop, size = 1000, 1500
    mixture = np.arange(2600, dtype=np.float32)[:, None] / 32768
    found = probes(mixture, crop, size)
    assert found.shape == (3, 3, 1)
    assert found[1, :, 0].tolist() == [1000 + k * PROBE for k in range(3)]
    assert found[2, :, 0].tolist() == [2000, 2000 + PROBE, 0]


def test_records_come_back_as_written(written):
    for preload in (False, True):
        source = RecordSource(written, "train", preload)
        assert len(source) == 4 + 1 + 2
        for record in (source[k] for k in range(len(source))):
            track, offset = TRACKS[record["track"]], int(record["offset"])
            expected = track[:, offset : offset + SAMPLES]
            got = record["stems"]
            assert got.dtype == np.int16 and got.shape == (2, SAMPLES, 2)
            assert (got[:, : expected.shape[1]] == expected).all() and not got[:, expected.shape[1] :].any()
            assert record["valid"] == expected.shape[1] and record["sample_rate"] == 8000 and record["active"].all()


@pytest.mark.parametrize("start", [0, 10, 50, 99, 100, 150, 400])
@pytest.mark.parametrize("length", [1, 50, 100, 101, 300, 700])
def test_any_span_of_a_track_can_be_read(written, start, length):
    source = RecordSource(written, "train", preload=True)
    for track, (name, samples) in enumerate(source.tracks):
        if start >= samples:
            continue
        expected = TRACKS[name][:, start : start + length]
        got = source.read(track, start, length)
        assert got.shape == (2, length, 2)
        assert (got[:, : expected.shape[1]] == expected).all() and not got[:, expected.shape[1] :].any()
        assert (source.read(track, start, length, 1) == got[1]).all()


def test_the_manifest_is_tfds_own_and_tells_where_the_records_come_from(written):
    manifest = read_manifest(written)
    assert {k: manifest[k] for k in MANIFEST} == MANIFEST and manifest["tool"].startswith("msr_jax ")
    assert manifest["tracks"] == {"train": [["a", 437], ["Ünï", 60], ["c", 151]]}
    assert manifest["checksums"]["train/a"] == hashlib.sha256(TRACKS["a"]).hexdigest()
    shard = "segments-train.array_record-00000-of-00001"
    assert manifest["shards"] == {shard: [(written / shard).stat().st_size, digests(written)[shard]]}
    info = tfds.builder_from_directory(str(written)).info
    assert info.splits["train"].num_examples == 7 and info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    assert info.features["stems"].shape == (2, SAMPLES, 2)
    assert str(written) not in (written / "dataset_info.json").read_text()


class Plain(tfds.core.GeneratorBasedBuilder):
    """The same records written by TFDS."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        from msr_jax.data.records import features

        return tfds.core.DatasetInfo(builder=self, features=features(MANIFEST))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for name, audio in TRACKS.items():
            probe = probes(audio.sum(0, dtype=np.float32) / 32768, CROP, SAMPLES)
            for k in range(count_records(audio.shape[1], CROP, SAMPLES)):
                yield record_key(name, k, MANIFEST["seed"]), make_record(name, k, audio, probe, MANIFEST)


def test_a_tfds_builder_writes_the_same_records_in_the_same_order(written, tmp_path):
    builder = Plain(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    theirs, ours = builder.as_data_source("train"), tfds.builder_from_directory(str(written)).as_data_source("train")
    assert len(theirs) == len(ours)
    for k in range(len(ours)):
        for name, value in ours[k].items():
            assert np.array_equal(value, theirs[k][name]), (k, name)


def test_records_are_shuffled_by_the_seed_and_the_same_each_time(tmp_path):
    tracks, order = {"train": [("a", pcm(4000))]}, {}
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        write_records(tmp_path / name, tracks, {**MANIFEST, "seed": seed})
        source = RecordSource(tmp_path / name, "train")
        order[name] = [int(source[k]["offset"]) for k in range(len(source))]
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert order["one"] == order["two"] != order["three"]
    assert sorted(order["one"]) == sorted(order["three"]) == list(range(0, 4000 - 50, 100)) != order["one"]


def test_a_failed_run_leaves_the_old_records_and_nothing_beside(tmp_path):
    out = tmp_path / "out"
    write_records(out, {"train": [("a", pcm(300))]}, MANIFEST)
    before = digests(out)
    with pytest.raises(AttributeError):
        write_records(out, {"train": [("b", pcm(300)), ("c", "no samples")]}, MANIFEST)
    assert digests(out) == before
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    write_records(out, {"train": [("b", pcm(500))]}, MANIFEST)
    assert RecordSource(out, "train")[0]["track"] == "b"


def test_what_is_no_folder_of_records_is_not_overwritten(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("precious", "file"):
        with pytest.raises(UserError, match=name):
            write_records(tmp_path / name, {"train": [("a", pcm(300))]}, MANIFEST)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "x"


def test_reading_asks_for_what_the_records_hold(written):
    with pytest.raises(UserError, match="no split 'test'"):
        RecordSource(written, "test")
    with pytest.raises(UserError, match="holds no records"):
        RecordSource(written.parent, "train")
    source = RecordSource(written, "train")
    check_stems(source, ("bass", "drums"), 8000, 2)
    for stems, rate, channels, what in (
        (("drums", "bass"), 8000, 2, "stems"),
        (("bass", "drums"), 44100, 2, "sample_rate"),
        (("bass", "drums"), 8000, 1, "channels"),
    ):
        with pytest.raises(UserError, match=what):
            check_stems(source, stems, rate, channels)


@pytest.mark.parametrize(
    "field,value",
    [
        ("hop", 0),
        ("samples", "many"),
        ("tracks", {"train": [["one"]]}),
        ("tracks", [1]),
        ("shards", {"a": [1]}),
        ("stems", 4),
    ],
)
def test_a_manifest_whose_fields_are_of_another_kind_is_refused(records, tmp_path, field, value):
    shutil.copytree(records, tmp_path / "records")
    path = tmp_path / "records" / "dataset_info.json"
    held = json.loads(path.read_text())
    held["releaseNotes"][field] = json.dumps(value)
    path.write_text(json.dumps(held))
    with pytest.raises(UserError, match="holds no records of this version"):
        RecordSource(tmp_path / "records", "train")


@pytest.mark.parametrize("put", [lambda p: None, lambda p: p.mkdir(), lambda p: p.symlink_to("nowhere")])
def test_a_shard_that_is_gone_or_no_file_is_lacking(written, tmp_path, put):
    folder = shutil.copytree(written, tmp_path / "records")
    (shard,) = folder.glob("*.array_record-*")
    shard.unlink()
    put(shard)
    with pytest.raises(UserError, match=f"lacks the shard {shard.name}"):
        RecordSource(folder, "train")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda held: held["features"].update(pythonClassName="nodots"),
        lambda held: [split.update(filepathTemplate="{NOTHING}") for split in held["splits"]],
    ],
)
def test_a_schema_or_splits_that_tfds_cannot_read_are_refused(records, tmp_path, spoil):
    shutil.copytree(records, tmp_path / "records")
    path = tmp_path / "records" / "dataset_info.json"
    held = json.loads(path.read_text())
    spoil(held)
    path.write_text(json.dumps(held))
    with pytest.raises(UserError, match="does not describe records that can be read"):
        RecordSource(tmp_path / "records", "train")
