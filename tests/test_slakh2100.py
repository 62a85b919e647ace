"""The preparation turns a corpus of either layout into records, leaves out what is damaged, and says so."""

import shutil
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import soxr
import yaml

from data_prep.slakh2100 import SAMPLE_RATE, edition, main
from msr_jax.config import SLAKH_STEMS
from msr_jax.data.records import PCM_SCALE, RecordSource, read_manifest
from msr_jax.data.tracks import load_track

CROP = 4096


def slakh_corpus(root, seconds=1.5):
    """train: 3 tracks with bass, drums, two guitars and strings; test: 1. Noise at 44.1 kHz."""
    programs = {"S00": 33, "S01": 128, "S02": 26, "S04": 30, "S05": 48}
    for k, split in enumerate(["train", "train", "train", "test"]):
        rng = np.random.default_rng(k)
        folder = root / split / f"Track{k:05d}"
        (folder / "stems").mkdir(parents=True)
        for name in programs:
            audio = 0.05 * rng.standard_normal(int(seconds * 44_100))
            soundfile.write(folder / "stems" / f"{name}.flac", audio, 44_100, subtype="PCM_16")
        stems = {n: {"program_num": p, "is_drum": p == 128, "audio_rendered": True} for n, p in programs.items()}
        (folder / "metadata.yaml").write_text(yaml.safe_dump({"stems": stems}))
    return root


def prepare(src, out, *more):
    return main([str(src), str(out), "--crop", str(CROP), "--workers", "1", *more])


def test_records_hold_the_grouped_stems_at_22050_hz(tmp_path, capsys):
    corpus = slakh_corpus(tmp_path / "corpus")
    assert prepare(corpus, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "train: 3 of 3 tracks" in said and "test: 1 of 1 tracks" in said and "piano 0 %" in said
    manifest = read_manifest(tmp_path / "out")
    assert manifest["stems"] == list(SLAKH_STEMS) and manifest["sample_rate"] == SAMPLE_RATE == 22_050
    source = RecordSource(tmp_path / "out", "train")
    assert {source[k]["track"] for k in range(len(source))} == {f"Track{k:05d}" for k in range(3)}
    for record in (source[k] for k in range(len(source))):
        expected = load_track(corpus / "train" / record["track"], SLAKH_STEMS, SAMPLE_RATE)
        part = expected[:, record["offset"] : record["offset"] + record["valid"]]
        assert np.abs(record["stems"][:, : part.shape[1], 0] / PCM_SCALE - part).max() <= 0.5 / PCM_SCALE + 1e-7
        assert not record["stems"][3].any()


def test_the_number_of_workers_changes_nothing(tmp_path):
    corpus = slakh_corpus(tmp_path / "corpus")
    for workers in ("1", "2"):
        assert prepare(corpus, tmp_path / workers, "--workers", workers) == 0
    for one in (tmp_path / "1").iterdir():
        assert one.read_bytes() == (tmp_path / "2" / one.name).read_bytes(), one.name


def test_damaged_tracks_are_left_out_and_named(tmp_path, capsys):
    corpus = slakh_corpus(tmp_path / "corpus")
    flac = corpus / "train" / "Track00001" / "stems" / "S02.flac"
    flac.write_bytes(flac.read_bytes()[:9000])
    (corpus / "train" / "._Track00002").mkdir()
    assert prepare(corpus, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "train: 2 of 3 tracks" in said and "skipped: " in said and "S02.flac" in said
    source = RecordSource(tmp_path / "out", "train")
    assert {source[k]["track"] for k in range(len(source))} == {"Track00000", "Track00002"}


def test_every_folder_of_a_split_is_counted_and_what_is_no_track_named(tmp_path, capsys):
    corpus = slakh_corpus(tmp_path / "corpus")
    (corpus / "train" / "Track00001" / "metadata.yaml").unlink()
    (corpus / "train" / "Track00009").mkdir()
    (corpus / "train" / "__MACOSX").mkdir()
    assert prepare(corpus, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "train: 2 of 4 tracks" in said and "2 tracks skipped" in said
    assert "Track00001 has stems/ but no metadata.yaml" in said and "Track00009 is empty" in said


def test_a_remark_on_many_tracks_is_one_line(tmp_path, capsys):
    for k in range(7):
        path = tmp_path / "c" / "train" / f"t{k}" / "bass.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, np.full(2 * CROP, 0.001 * (k + 1)), SAMPLE_RATE)
        if k:
            shutil.copy(path, path.with_name("drums.wav"))
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "noted: train: 7 tracks (t0, t1, t2, t3, t4, …): it has no guitar; silence stands for it" in said
    assert "noted: train/t0: it has no drums; silence stands for it" in said and said.count("no guitar") == 1


def test_clipped_samples_are_counted(tmp_path, capsys):
    for stem in ("bass", "drums"):
        path = tmp_path / "c" / "train" / "a" / f"{stem}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        audio = np.zeros(3 * CROP, np.float32)
        audio[100:107] = 1.5 if stem == "bass" else 0.5
        soundfile.write(path, audio, SAMPLE_RATE, subtype="FLOAT")
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    assert " 7 clipped samples" in capsys.readouterr().out


def converted(root):
    """One track in the form of the published preparation: stems at 22,050 Hz, no file for a silent one."""
    rng = np.random.default_rng(0)
    stems = {name: rng.integers(-9999, 9999, 2 * CROP, np.int16) for name in ("bass", "drums", "piano")}
    for name, audio in stems.items():
        path = root / "test" / "Track00001" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio, SAMPLE_RATE, subtype="PCM_16")
    return stems


def test_what_is_at_the_target_rate_comes_through_to_the_bit(tmp_path):
    stems = converted(tmp_path / "c")
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    audio = RecordSource(tmp_path / "out", "test").read(0, 0, 2 * CROP)[..., 0]
    for name, got in zip(SLAKH_STEMS, audio, strict=True):
        assert (got == stems.get(name, 0)).all()


def test_resampling_is_that_of_soxr_and_near_librosas(tmp_path):
    corpus = slakh_corpus(tmp_path / "corpus")
    assert prepare(corpus, tmp_path / "out") == 0
    source = RecordSource(tmp_path / "out", "test")
    bass, rate = soundfile.read(corpus / "test" / "Track00003" / "stems" / "S00.flac", dtype="float32")
    got = source.read(0, 0, source.tracks[0][1])[0, :, 0] / PCM_SCALE
    by_soxr = soxr.resample(bass, rate, SAMPLE_RATE, quality="HQ")
    by_librosa = librosa.resample(bass, orig_sr=rate, target_sr=SAMPLE_RATE)  # its default, soxr_hq
    assert np.abs(got - by_soxr[: len(got)]).max() <= 0.5 / PCM_SCALE + 1e-7
    assert np.abs(got - by_librosa[: len(got)]).max() <= 0.5 / PCM_SCALE + 1e-6


def test_splits_are_named_by_their_numbers_of_tracks():
    assert edition({"train": 1500, "validation": 375, "test": 225}).endswith("original or split2")
    assert edition({"train": 1289, "validation": 270, "test": 151}).endswith("redux")
    assert edition({"train": 3}).endswith("none of the published splits")


def no_source(root):
    return root / "nowhere"


def no_splits(root):
    (root / "c").mkdir()
    return root / "c"


def empty_split(root):
    (root / "c" / "train").mkdir(parents=True)
    return root / "c"


def only_damage(root):
    corpus = slakh_corpus(root / "c")
    for path in (corpus / "train").rglob("S00.flac"):
        path.write_bytes(b"")
    return corpus


@pytest.mark.parametrize("make", [no_source, no_splits, empty_split, only_damage])
def test_what_cannot_be_prepared_ends_in_one_sentence_and_no_records(tmp_path, capsys, make):
    assert prepare(make(tmp_path), tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("data_prep.slakh2100: ") and said.count("\n") == 1
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith((".", "out"))] == []


def test_the_shared_sample_of_genuine_layout_can_be_prepared(tmp_path, capsys):
    sample = Path(__file__).resolve().parents[2] / "shared" / "data" / "sample_slakh"
    if not sample.is_dir():
        pytest.skip("the sample tracks are not here")
    assert prepare(sample, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "train: 6 of 6" in said and "validation: 2 of 2" in said and "test: 3 of 3" in said
