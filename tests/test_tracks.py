"""Tracks of both layouts load into four aligned stems; faulty ones are refused with their reason."""

import numpy as np
import pytest
import soundfile
import yaml

from msr_jax.config import MUSDB_STEMS, SLAKH_STEMS
from msr_jax.data.tracks import find_tracks, group_of, load_track, read_track, split_of
from msr_jax.errors import UserError
from msr_jax.messages import log

RATE = 8000


def tone(frequency, seconds=1.0, rate=RATE):
    return 0.1 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


def write(path, audio, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype="PCM_16")


def slakh_track(folder, entries):
    """Write a track as Slakh2100 is distributed; entries: name -> (metadata of the stem, audio or None)."""
    folder.mkdir(parents=True)
    described = {name: entry for name, (entry, _) in entries.items()}
    (folder / "metadata.yaml").write_text(yaml.safe_dump({"UUID": "x", "stems": described}))
    for name, (_, audio) in entries.items():
        if audio is not None:
            write(folder / "stems" / f"{name}.flac", audio)
    return folder


@pytest.mark.parametrize(
    ("program", "is_drum", "group"),
    [
        *((p, False, "piano") for p in (0, 7)),
        *((p, False, "guitar") for p in (24, 31)),
        *((p, False, "bass") for p in (32, 39)),
        *((p, False, None) for p in (8, 23, 40, 127)),
        (128, False, "drums"),
        (0, True, "drums"),
    ],
)
def test_programs_belong_to_the_groups_of_the_paper(program, is_drum, group):
    assert group_of(program, is_drum) == group


def test_slakh_sources_of_one_group_are_summed_and_others_left_out(tmp_path):
    track = slakh_track(
        tmp_path / "Track1",
        {
            "S00": ({"program_num": 26, "is_drum": False}, tone(300)),
            "S03": ({"program_num": 30, "is_drum": False}, tone(500)),
            "S04": ({"program_num": 128, "is_drum": True}, tone(100)),
            "S05": ({"program_num": 48, "is_drum": False}, tone(900)),
            "S07": ({"program_num": 33, "is_drum": False, "audio_rendered": False}, None),
        },
    )
    bass, drums, guitar, piano = load_track(track, SLAKH_STEMS, RATE)
    assert np.abs(guitar - tone(300) - tone(500)).max() < 2**-14
    assert np.abs(drums - tone(100)).max() < 2**-15
    assert not bass.any() and not piano.any()


def test_metadata_without_programs_is_read_by_class(tmp_path):
    described = {"S00": ({"inst_class": "Bass"}, tone(60)), "S01": ({"inst_class": "Drums"}, tone(90))}
    stems = load_track(slakh_track(tmp_path / "Track1", described), SLAKH_STEMS, RATE)
    assert stems[0].any() and stems[1].any() and not stems[2:].any()


def test_plain_layout_takes_a_missing_file_as_silence(tmp_path):
    write(tmp_path / "Ünïcode" / "piano.wav", tone(700))
    stems = load_track(tmp_path / "Ünïcode", SLAKH_STEMS, RATE)
    assert stems.shape == (4, RATE) and stems.dtype == np.float32
    assert stems[3].any() and not stems[:3].any()


@pytest.mark.parametrize("names", [("guitar.WAV", "bass.wav"), ("GUITAR.WAV", "BASS.WAV"), ("Guitar.Flac", "Bass.Wav")])
def test_names_and_suffixes_are_compared_without_case(tmp_path, names):
    for name, frequency in zip(names, (300, 60), strict=True):
        (tmp_path / "t").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "t" / name, tone(frequency), RATE, format=name[-4:].strip(".").upper())
    assert find_tracks(tmp_path, SLAKH_STEMS) == [tmp_path / "t"]
    bass, drums, guitar, _ = load_track(tmp_path / "t", SLAKH_STEMS, RATE)
    assert np.abs(bass - tone(60)).max() < 1e-4 and np.abs(guitar - tone(300)).max() < 1e-4 and not drums.any()


def test_a_track_as_distributed_may_be_in_capitals(tmp_path):
    track = slakh_track(
        tmp_path / "TRACK1", {"S00": ({"program_num": 33}, tone(60)), "S01": ({"is_drum": True}, tone(90))}
    )
    for path in sorted(track.rglob("*"), reverse=True):
        path.rename(path.with_name(path.name.upper()))
    assert find_tracks(tmp_path, SLAKH_STEMS) == [track]
    stems = load_track(track, SLAKH_STEMS, RATE)
    assert stems[0].any() and stems[1].any() and not stems[2:].any()


def test_of_two_files_that_differ_in_case_the_plain_name_counts(tmp_path):
    write(tmp_path / "t" / "bass.wav", tone(60))
    write(tmp_path / "t" / "Bass.wav", tone(400))
    assert np.abs(load_track(tmp_path / "t", SLAKH_STEMS, RATE)[0] - tone(60)).max() < 1e-4


def test_a_song_of_musdb18_that_lacks_a_stem_is_refused(tmp_path):
    for stem in ("drums", "bass", "vocals"):
        write(tmp_path / "song" / f"{stem}.wav", tone(60))
    with pytest.raises(UserError, match="song lacks the stem other"):
        load_track(tmp_path / "song", MUSDB_STEMS, RATE)


@pytest.mark.parametrize("is_link", [True, False])
@pytest.mark.parametrize("stems", [MUSDB_STEMS, SLAKH_STEMS])
def test_a_stem_that_is_a_link_to_nothing_or_a_folder_is_refused_and_never_silent(tmp_path, stems, is_link):
    for stem in stems:
        write(tmp_path / "song" / f"{stem}.wav", tone(60))
    spoiled = tmp_path / "song" / "drums.wav"
    spoiled.rename(tmp_path / "drums.wav")
    spoiled.symlink_to(tmp_path / "none.wav") if is_link else spoiled.mkdir()
    with pytest.raises(UserError, match="drums.wav is a " + ("link to what does not exist" if is_link else "folder")):
        load_track(tmp_path / "song", stems, RATE)
    write(tmp_path / "song" / "drums.flac", tone(60))
    assert load_track(tmp_path / "song", stems, RATE)[stems.index("drums")].any()


@pytest.mark.parametrize("kind", ["musdb18", "slakh2100", "converted"])
def test_a_track_of_another_data_set_is_refused(tmp_path, kind):
    if kind == "slakh2100":
        slakh_track(tmp_path / "t", {"S00": ({"program_num": 33}, tone(60))})
    for stem in {"musdb18": MUSDB_STEMS, "slakh2100": (), "converted": SLAKH_STEMS}[kind]:
        write(tmp_path / "t" / f"{stem}.wav", tone(60))
    other = SLAKH_STEMS if kind == "musdb18" else MUSDB_STEMS
    words = {
        "musdb18": "MUSDB18.*no guitar and no piano",
        "slakh2100": "Slakh2100.*no other and no vocals",
        "converted": "lacks the stem other",
    }
    with pytest.raises(UserError, match=words[kind]):
        load_track(tmp_path / "t", other, RATE)


def test_numbers_and_flags_of_metadata_may_be_text(tmp_path):
    track = slakh_track(
        tmp_path / "t",
        {
            "S00": ({"program_num": "25", "is_drum": "false", "audio_rendered": "true"}, tone(300)),
            "S01": ({"program_num": "0", "is_drum": "True"}, tone(100)),
            "S02": ({"program_num": 33.0, "is_drum": "no"}, tone(60)),
            "S03": ({"program_num": "1", "audio_rendered": "false"}, None),
        },
    )
    bass, drums, guitar, piano = load_track(track, SLAKH_STEMS, RATE)
    for stem, frequency in ((bass, 60), (drums, 100), (guitar, 300)):
        assert np.abs(stem - tone(frequency)).max() < 1e-4
    assert not piano.any()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"program_num": "guitar"}, "program_num 'guitar'"),
        ({"program_num": 25.5}, "program_num 25.5"),
        ({"program_num": 200}, "from 0 to 128"),
        ({"program_num": True}, "program_num True"),
        ({"program_num": 25, "is_drum": "perhaps"}, "is_drum 'perhaps'"),
        ("bass", "cannot be read as Slakh2100 metadata"),
    ],
)
def test_metadata_of_another_kind_is_refused(tmp_path, entry, words):
    track = slakh_track(tmp_path / "Track7", {"S00": (entry, tone(60))})
    with pytest.raises(UserError, match=words):
        load_track(track, SLAKH_STEMS, RATE)


def test_stereo_is_averaged_and_other_rates_are_resampled(tmp_path):
    write(tmp_path / "t" / "bass.wav", np.stack([tone(200, rate=48_000), 0 * tone(200, rate=48_000)], 1), 48_000)
    write(tmp_path / "t" / "drums.wav", tone(100))
    bass = load_track(tmp_path / "t", SLAKH_STEMS, RATE)[0]
    middle = slice(500, -500)
    assert np.abs(bass[middle] - 0.5 * tone(200)[middle]).max() < 1e-3


def test_small_differences_of_length_are_cut_large_ones_refused(tmp_path):
    write(tmp_path / "near" / "bass.wav", tone(60, 1.0))
    write(tmp_path / "near" / "drums.wav", tone(60, 1.14))
    assert load_track(tmp_path / "near", SLAKH_STEMS, RATE).shape == (4, RATE)
    write(tmp_path / "far" / "bass.wav", tone(60, 1.0))
    write(tmp_path / "far" / "drums.wav", tone(60, 1.16))
    with pytest.raises(UserError, match="one length"):
        load_track(tmp_path / "far", SLAKH_STEMS, RATE)


def empty_stem(track):
    (track / "stems" / "S00.flac").write_bytes(b"")


def no_stem(track):
    (track / "stems" / "S00.flac").unlink()


def cut_stem(track):
    data = (track / "stems" / "S00.flac").read_bytes()
    (track / "stems" / "S00.flac").write_bytes(data[: len(data) // 2])


def no_yaml(track):
    (track / "metadata.yaml").write_text("stems: [unclosed")


def yaml_of_another_kind(track):
    (track / "metadata.yaml").write_text("UUID: y\n")


@pytest.mark.parametrize("spoil", [empty_stem, no_stem, cut_stem, no_yaml, yaml_of_another_kind])
def test_damaged_tracks_are_named(tmp_path, spoil):
    entry = {"program_num": 33, "is_drum": False, "audio_rendered": True}
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    track = slakh_track(tmp_path / "Track7", {"S00": (entry, noise)})
    load_track(track, SLAKH_STEMS, RATE)
    spoil(track)
    with pytest.raises(UserError, match="Track7"):
        load_track(track, SLAKH_STEMS, RATE)


def test_find_tracks_sorts_by_name_and_passes_over_what_is_none(tmp_path):
    for name in ("Track2", "Track10", "._Track2", "__MACOSX"):
        write(tmp_path / name / "bass.wav", tone(60))
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("hello")
    assert [t.name for t in find_tracks(tmp_path, SLAKH_STEMS)] == ["Track10", "Track2"]


def test_folders_that_are_passed_over_are_said_and_with_every_folder_refused_by_name(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    write(tmp_path / "good" / "bass.wav", tone(60))
    write(tmp_path / "no yaml" / "stems" / "S00.flac", tone(60))
    for name in ("empty", "no audio/deeper", ".hidden", "__MACOSX"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "readme.txt").write_text("hello")
    with caplog.at_level("INFO", "msr_jax"):
        assert find_tracks(tmp_path, SLAKH_STEMS) == [tmp_path / "good"]
    assert caplog.text.rstrip().endswith("in it: empty, gone, no audio, no yaml")
    caplog.clear()
    unusable = {}
    for track in find_tracks(tmp_path, SLAKH_STEMS, every_folder=True):
        try:
            load_track(track, SLAKH_STEMS, RATE)
        except UserError as error:
            unusable[track.name] = str(error).removeprefix(f"{track} ").partition(";")[0]
    assert not caplog.text and unusable == {
        "empty": "is empty",
        "gone": "is a link to what does not exist",
        "no audio": "holds no audio for any of bass, drums, guitar, piano",
        "no yaml": "has stems/ but no metadata.yaml",
    }


@pytest.mark.parametrize("name", ["guitar.mp3", "GUITAR.AIFF", "guitar.ogg", "guitar.wave"])
@pytest.mark.parametrize("is_slakh", [True, False])
def test_a_stem_in_another_format_is_refused_and_never_silent(tmp_path, name, is_slakh):
    track, folder = tmp_path / "t", tmp_path / "t"
    if is_slakh:  # whose metadata does not say what was rendered
        slakh_track(track, {"bass": ({"program_num": 33}, tone(60)), "guitar": ({"program_num": 26}, None)})
        folder = track / "stems"
    write(folder / "bass.wav", tone(60))
    (folder / "guitar.mid").touch()
    load_track(track, SLAKH_STEMS, RATE)
    (folder / name).write_bytes(b"some audio")
    with pytest.raises(UserError, match=f"{name} is no .wav or .flac file"):
        load_track(track, SLAKH_STEMS, RATE)
    write(folder / "guitar.wav", tone(300))
    assert load_track(track, SLAKH_STEMS, RATE)[2].any()


def test_a_stem_without_a_file_is_noted_where_each_stem_has_one(tmp_path):
    write(tmp_path / "plain" / "bass.wav", tone(60))
    slakh_track(tmp_path / "slakh", {"S00": ({"program_num": 33}, tone(60))})
    silent = [f"it has no {stem}; silence stands for it" for stem in ("drums", "guitar", "piano")]
    assert read_track(tmp_path / "plain", SLAKH_STEMS, RATE).notes == silent
    assert read_track(tmp_path / "slakh", SLAKH_STEMS, RATE).notes == []


def test_a_song_of_one_s_own_that_lacks_a_stem_is_no_song_of_musdb18(tmp_path):
    for stem in ("vocals", "bass", "drums"):
        write(tmp_path / "song" / f"{stem}.wav", tone(60))
    stems = load_track(tmp_path / "song", ("guitar", "bass", "drums"), RATE)
    assert stems[1:].any() and not stems[0].any()


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_tracks_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        find_tracks(tmp_path / name, SLAKH_STEMS)


def test_a_split_is_its_folder_or_a_bare_folder_of_tracks(tmp_path):
    (tmp_path / "test").mkdir()
    assert split_of(tmp_path, "test") == split_of(tmp_path, "Test") == tmp_path / "test"
    with pytest.raises(UserError, match="has no split 'train'; it has test"):
        split_of(tmp_path, "train")
    (tmp_path / "test" / "vocals.wav").touch()  # a song of that name
    assert split_of(tmp_path, "train") == tmp_path
