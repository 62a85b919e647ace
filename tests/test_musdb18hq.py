"""MUSDB18-HQ becomes records sample by sample; what is wrong with a song is named, and a broken one left out."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from data_prep.musdb18hq import SAMPLE_RATE, VALIDATION, main
from msr_jax.config import MUSDB_STEMS
from msr_jax.data.records import RecordSource, read_manifest
from tests.test_media import encode, tone

CROP = 8192


def write_song(folder, samples=3 * CROP + 100, seed=0, **changes):
    """A song of stereo noise as distributed; `changes` replaces stems (None leaves one out)."""
    rng = np.random.default_rng(seed)
    stems = {name: rng.integers(-5000, 5000, (samples, 2), np.int16) for name in MUSDB_STEMS} | changes
    folder.mkdir(parents=True)
    for name, audio in stems.items():
        if audio is not None:
            soundfile.write(folder / f"{name}.wav", audio, SAMPLE_RATE, subtype="PCM_16")
    if all(audio is not None and len(audio) == samples for audio in stems.values()):
        soundfile.write(folder / "mixture.wav", sum(stems.values()), SAMPLE_RATE, subtype="PCM_16")
    return stems


def prepare(src, out, *more):
    return main([str(src), str(out), "--crop", str(CROP), "--workers", "1", *more])


def test_every_sample_of_every_stem_is_in_the_records(tmp_path, capsys):
    songs = {
        (split, name): write_song(tmp_path / "c" / split / name, seed=k)
        for k, (split, name) in enumerate([("train", "A's, Ünï - b"), ("train", "c"), ("test", "d")])
    }
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "train: 2 of 2 tracks" in said and "0 tracks skipped, 0 remarks" in said
    manifest = read_manifest(tmp_path / "out")
    assert manifest["channels"] == 2 and manifest["stems"] == list(MUSDB_STEMS)
    for split in ("train", "test"):
        source = RecordSource(tmp_path / "out", split)
        for track, (name, samples) in enumerate(source.tracks):
            got = source.read(track, 0, samples)
            assert (got == np.stack([songs[split, name][stem] for stem in MUSDB_STEMS])).all()


def test_a_whole_song_at_another_rate_is_not_said_to_differ_from_its_mixture(tmp_path, capsys):
    write_song(tmp_path / "c" / "train" / "song")
    for path in (tmp_path / "c" / "train" / "song").iterdir():
        soundfile.write(path, soundfile.read(path, dtype="int16")[0], 48_000)
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    assert "from the sum of stems" not in capsys.readouterr().out


def test_the_validation_songs_of_the_field_can_be_held_out(tmp_path, capsys):
    for name in (VALIDATION[0], "another"):
        write_song(tmp_path / "c" / "train" / name)
    assert prepare(tmp_path / "c", tmp_path / "out", "--validation") == 0
    tracks = read_manifest(tmp_path / "out")["tracks"]
    assert [t[0] for t in tracks["validation"]] == [VALIDATION[0]] and [t[0] for t in tracks["train"]] == ["another"]
    assert "train with --config.data.validation_split=validation" in capsys.readouterr().out


def test_the_validation_songs_are_those_of_the_package_musdb():
    package = Path(find_spec("musdb").origin).parent  # not imported: that would ask for ffmpeg
    listed = yaml.safe_load((package / "configs" / "mus.yaml").read_text())
    assert sorted(VALIDATION) == sorted(listed["validation_tracks"]) and len(VALIDATION) == 14


def cut_off(folder):
    data = (folder / "bass.wav").read_bytes()
    (folder / "bass.wav").write_bytes(data[: len(data) // 2])


def empty(folder):
    (folder / "bass.wav").write_bytes(b"")


def missing(folder):
    (folder / "bass.wav").unlink()


def much_shorter(folder):
    soundfile.write(folder / "bass.wav", np.ones((CROP, 2), np.int16), SAMPLE_RATE)


def silent(folder):
    for name in MUSDB_STEMS:
        soundfile.write(folder / f"{name}.wav", np.zeros((3 * CROP, 2), np.int16), SAMPLE_RATE)


def of_three_channels(folder):
    soundfile.write(folder / "bass.wav", np.ones((3 * CROP + 100, 3), np.int16), SAMPLE_RATE)


def without_files(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def with_a_mixture_alone(folder):
    for name in MUSDB_STEMS:
        (folder / f"{name}.wav").unlink()


def in_another_format(folder):
    (folder / "bass.wav").rename(folder / "bass.aiff")


@pytest.mark.parametrize(
    "spoil",
    [
        cut_off, empty, missing, much_shorter, silent, of_three_channels, without_files, with_a_mixture_alone, in_another_format,
    ],
)  # fmt: skip
def test_a_song_that_cannot_be_trusted_is_left_out_counted_and_named(tmp_path, capsys, spoil):
    write_song(tmp_path / "c" / "train" / "good")
    write_song(tmp_path / "c" / "train" / "bad")
    spoil(tmp_path / "c" / "train" / "bad")
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "train: 1 of 2 tracks" in said and "1 tracks skipped" in said
    assert len([line for line in said.splitlines() if line.startswith("skipped: ") and "bad" in line]) == 1
    assert [t[0] for t in read_manifest(tmp_path / "out")["tracks"]["train"]] == ["good"]


def a_little_shorter(folder):
    audio, rate = soundfile.read(folder / "bass.wav", dtype="int16")
    soundfile.write(folder / "bass.wav", audio[:-50], rate)


def of_48_khz(folder):
    rng = np.random.default_rng(0)
    samples = round((3 * CROP + 100) / SAMPLE_RATE * 48_000)
    soundfile.write(folder / "bass.wav", rng.integers(-99, 99, (samples, 2), np.int16), 48_000)


def mono(folder):
    audio, rate = soundfile.read(folder / "bass.wav", dtype="int16")
    soundfile.write(folder / "bass.wav", audio[:, 0], rate)


def another_mixture(folder):
    audio, rate = soundfile.read(folder / "mixture.wav", dtype="int16")
    audio[100] += 77
    soundfile.write(folder / "mixture.wav", audio, rate)


def with_an_offset(folder):
    audio, rate = soundfile.read(folder / "bass.wav", dtype="int16")
    soundfile.write(folder / "bass.wav", audio + np.int16(1000), rate)


def shorter_than_a_crop(folder):
    shutil.rmtree(folder)
    write_song(folder, samples=CROP // 2)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (a_little_shorter, "differ in length by"),
        (of_48_khz, "48000 Hz"),
        (another_mixture, "up to 77 steps"),
        (with_an_offset, "offset of 0.03"),
        (shorter_than_a_crop, "shorter than a crop"),
    ],
)
def test_a_song_that_is_only_odd_is_taken_and_named(tmp_path, capsys, spoil, says):
    write_song(tmp_path / "c" / "train" / "odd")
    spoil(tmp_path / "c" / "train" / "odd")
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "train: 1 of 1 tracks" in said
    assert any(says in line for line in said.splitlines() if line.startswith("noted: train/odd: "))


def test_a_mono_stem_counts_on_both_sides(tmp_path):
    write_song(tmp_path / "c" / "train" / "odd")
    mono(tmp_path / "c" / "train" / "odd")
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    bass = RecordSource(tmp_path / "out", "train").read(0, 0, 1000, 1)
    assert bass.any() and (bass[:, 0] == bass[:, 1]).all()


def test_the_same_song_twice_is_named(tmp_path, capsys):
    for split in ("train", "test"):
        write_song(tmp_path / "c" / split / "song")
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    assert "test/song has the same files as train/song" in capsys.readouterr().out


def test_a_folder_that_is_not_the_corpus_ends_in_one_sentence(tmp_path, capsys):
    (tmp_path / "photos" / "train" / "2019").mkdir(parents=True)
    for src in ("photos", "nowhere"):
        assert prepare(tmp_path / src, tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert said.startswith("data_prep.musdb18hq: ") and said.count("\n") == 1 and src in said
    assert not (tmp_path / "out").exists()


def test_records_of_another_corpus_are_not_replaced(tmp_path, capsys, monkeypatch):
    write_song(tmp_path / "src" / "train" / "song")
    write_song(tmp_path / "src" / "test" / "song")
    assert prepare(tmp_path / "src", tmp_path / "out") == 0
    own = read_manifest(tmp_path / "out")["layout"]
    monkeypatch.setattr("data_prep.writer.read_manifest", lambda folder: {**read_manifest(folder), "layout": "Another"})
    capsys.readouterr()
    assert prepare(tmp_path / "src", tmp_path / "out") == 2
    assert f"holds records of Another, not {own}; name another place, or remove it" in capsys.readouterr().err
    for margin in ("nan", "inf", "1e12"):
        assert prepare(tmp_path / "src", tmp_path / "other", "--margin", margin) == 2
        assert "--margin from 0 to 100" in capsys.readouterr().err


def test_stem_mp4_without_a_decoder_is_left_out_and_says_what_is_missing(tmp_path, capsys, monkeypatch):
    write_song(tmp_path / "c" / "train" / "a folder")
    (tmp_path / "c" / "train" / "b.stem.mp4").write_bytes(b"\0\0\0\x08ftyp")
    monkeypatch.setattr("msr_jax.audio.media.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    assert "b.stem.mp4 needs PyAV or ffmpeg" in capsys.readouterr().out


def test_stem_mp4_is_prepared(tmp_path):
    tones = dict(zip(("mixture", *MUSDB_STEMS), (100.0, 200.0, 300.0, 500.0, 700.0), strict=True))
    (tmp_path / "c" / "test").mkdir(parents=True)
    seconds = 4 * CROP / SAMPLE_RATE
    streams = [tone(frequency, seconds) for frequency in tones.values()]
    encode(tmp_path / "c" / "test" / "song.stem.mp4", streams, ("mp4", "aac"))
    assert prepare(tmp_path / "c", tmp_path / "out") == 0
    source = RecordSource(tmp_path / "out", "test")
    assert source.tracks[0][0] == "song"
    got = source.read(0, 0, 3 * CROP)[..., 0]
    for name, audio in zip(MUSDB_STEMS, got, strict=True):
        strongest = np.abs(np.fft.rfft(audio)).argmax() * SAMPLE_RATE / len(audio)
        assert strongest == pytest.approx(tones[name], abs=4)


def test_the_shared_sample_of_genuine_layout_can_be_prepared(tmp_path, capsys):
    sample = Path(__file__).resolve().parents[2] / "shared" / "data" / "sample_musdb"
    if not sample.is_dir():
        pytest.skip("the sample tracks are not here")
    assert main([str(sample), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "0 tracks skipped, 0 remarks" in capsys.readouterr().out
    for split in ("train", "test"):
        source = RecordSource(tmp_path / "out", split)
        for track, (name, samples) in enumerate(source.tracks):
            for stem, audio in zip(MUSDB_STEMS, source.read(track, 0, samples), strict=True):
                assert (audio == soundfile.read(sample / split / name / f"{stem}.wav", dtype="int16")[0]).all()
