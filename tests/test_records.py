"""Records cover their tracks, come back as written, and are replaced whole or not at all."""

import hashlib

import numpy as np
import pytest

from msr_jax.data.records import (
    RecordSource,
    check_stems,
    read_manifest,
    record_samples,
    spans,
    to_pcm,
    track_records,
    write_records,
)
from msr_jax.errors import UserError

CROP = 100
MANIFEST = {"stems": ["bass", "drums"], "sample_rate": 8000, "crop": CROP}


def pcm(length, seed=0):
    return np.random.default_rng(seed).integers(-32768, 32767, (2, length), np.int16)


def sources(tracks):
    return {"train": [item for name, audio in tracks.items() for item in track_records(name, audio, CROP)]}


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("length", [1, 99, 100, 149, 150, 151, 199, 200, 250, 251, 1000, 1037])
def test_spans_reach_every_sample_and_every_crop_length(length):
    found = spans(length, CROP)
    reached = np.zeros(length, bool)
    for span in found:
        assert span.offset >= 0
        reached[span.offset : span.offset + record_samples(CROP)] = True
    assert reached.all()
    windows = [s.offset for s in found if s.is_window]
    assert windows == [k * CROP for k in range(length // CROP)]


def test_pcm_rounds_to_the_nearest_step_and_counts_clipping():
    values, clipped = to_pcm(np.array([[0.5, -1.0, 1.0, 1.5, -2.0, 0.4 / 32768]], np.float32))
    assert values.tolist() == [[16384, -32768, 32767, 32767, -32768, 0]]
    assert clipped == 3


def test_records_come_back_as_written(tmp_path):
    tracks = {"a": pcm(437), "Ünï": pcm(60, 1)}
    write_records(tmp_path / "out", sources(tracks), MANIFEST)
    assert read_manifest(tmp_path / "out") == MANIFEST
    source = RecordSource(tmp_path / "out", "train")
    assert len(source) == 4 + 1  # those of "a" reach up to 450; one for the track shorter than a crop
    for preload in (False, True):
        source = RecordSource(tmp_path / "out", "train", preload)
        for record in (source[k] for k in range(len(source))):
            track, offset = tracks[record["track"]], int(record["offset"])
            expected = track[:, offset : offset + record_samples(CROP)]
            got = record["stems"]
            assert got.dtype == np.int16 and got.shape == (2, record_samples(CROP))
            assert (got[:, : expected.shape[1]] == expected).all() and not got[:, expected.shape[1] :].any()
            assert record["valid"] == max(CROP, expected.shape[1])


def test_records_are_shuffled_and_the_same_each_time(tmp_path):
    tracks = {"a": pcm(4000)}
    for name in ("one", "two"):
        write_records(tmp_path / name, sources(tracks), MANIFEST)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    source = RecordSource(tmp_path / "one", "train")
    offsets = [int(source[k]["offset"]) for k in range(len(source))]
    assert offsets != sorted(offsets)


def test_a_failed_run_leaves_the_old_records_and_nothing_beside(tmp_path):
    out = tmp_path / "out"
    write_records(out, sources({"a": pcm(300)}), MANIFEST)
    before = digests(out)

    def failing():
        yield from track_records("b", pcm(300), CROP)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_records(out, {"train": failing()}, MANIFEST)
    assert digests(out) == before
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    write_records(out, sources({"b": pcm(500)}), MANIFEST)
    assert RecordSource(out, "train")[0]["track"] == "b"


def test_what_is_no_folder_of_records_is_not_overwritten(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("precious", "file"):
        with pytest.raises(UserError, match=name):
            write_records(tmp_path / name, sources({"a": pcm(300)}), MANIFEST)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "x"


def test_reading_asks_for_what_the_records_hold(tmp_path):
    write_records(tmp_path / "out", sources({"a": pcm(300)}), MANIFEST)
    with pytest.raises(UserError, match="no split 'test'"):
        RecordSource(tmp_path / "out", "test")
    with pytest.raises(UserError, match="holds no records"):
        RecordSource(tmp_path, "train")
    source = RecordSource(tmp_path / "out", "train")
    check_stems(source, ("bass", "drums"), 8000, CROP)
    for stems, rate, crop, what in (
        (("drums", "bass"), 8000, CROP, "stems"),
        (("bass", "drums"), 44100, CROP, "sample_rate"),
        (("bass", "drums"), 8000, CROP + 1, "crop"),
    ):
        with pytest.raises(UserError, match=what):
            check_stems(source, stems, rate, crop)
