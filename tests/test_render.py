"""The stand-in corpora: genuine layouts, the same bytes for the same seed, splits without common pieces and instruments."""

import hashlib
import sys

import numpy as np
import pytest
import soundfile
import yaml

pytest.importorskip("tinysoundfont", reason="pip install --no-deps tinysoundfont")
pytest.importorskip("pretty_midi")

import pretty_midi

from data_prep.arranger import HAT, KICK, OPEN, SNARE, TOMS, Note, Part
from data_prep.kits import PITCHES, drum_sounds, shared_drums
from data_prep.render import EVERY_PROGRAM, PROGRAMS, main, split_counts
from data_prep.timbre import RATE, default_soundfont, integrated_loudness, patch_part, presets, render_part, sample_part
from msr_jax.config import MUSDB_STEMS, SLAKH_STEMS
from msr_jax.data.tracks import find_tracks, group_of, load_track
from msr_jax.errors import UserError


def render(out, *more):
    return main([str(out), "--tracks", "3", "--seconds", "5", "--seed", "7", "--workers", "1", *more])


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Two tracks of train and one each of validation and test, in the layout of Slakh2100."""
    out = tmp_path_factory.mktemp("rendered")
    assert render(out, "--tracks", "4") == 0
    return out


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    out = tmp_path_factory.mktemp("songs")
    assert render(out, "--layout", "musdb18hq", "--tracks", "2") == 0
    return out


def digests(folder):
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def described(track):
    return yaml.safe_load((track / "metadata.yaml").read_text())["stems"]


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(rendered, tmp_path):
    assert render(tmp_path / "again", "--split", "train", "--tracks", "2", "--workers", "2") == 0
    assert digests(tmp_path / "again" / "train") == digests(rendered / "train")
    assert render(tmp_path / "other", "--split", "train", "--tracks", "1", "--seed", "8") == 0
    assert not set(digests(tmp_path / "other").values()) & set(digests(rendered / "train").values())


def test_no_piece_is_in_two_splits(rendered):
    scores = [digests(track)["all_src.mid"] for split in PROGRAMS for track in (rendered / split).iterdir()]
    assert len(scores) == 4 == len(set(scores))


def test_tracks_have_the_layout_of_slakh(rendered):
    for track in find_tracks(rendered / "train", SLAKH_STEMS):
        stems = described(track)
        audio = []
        for name in stems:
            samples, rate = soundfile.read(track / "stems" / f"{name}.flac", dtype="int16")
            assert rate == 44_100 and samples.shape == (5 * 44_100,)
            audio.append(samples.astype(int))
            midi = pretty_midi.PrettyMIDI(str(track / "MIDI" / f"{name}.mid"))
            assert [i.is_drum for i in midi.instruments] == [stems[name]["is_drum"]]
            assert {"audio_rendered", "inst_class", "integrated_loudness", "plugin_name"} < set(stems[name])
        mix, _ = soundfile.read(track / "mix.flac", dtype="int16")
        assert (np.sum(audio, 0) == mix).all()
        assert len(pretty_midi.PrettyMIDI(str(track / "all_src.mid")).instruments) == len(stems)


def test_songs_have_the_layout_of_musdb_and_two_sides_that_differ(songs):
    for split in ("train", "test"):
        (song,) = (songs / split).iterdir()
        audio = {f.stem: soundfile.read(f, dtype="int16") for f in song.iterdir()}
        assert sorted(audio) == sorted([*MUSDB_STEMS, "mixture"])
        assert {(rate, x.shape) for x, rate in audio.values()} == {(44_100, (5 * 44_100, 2))}
        assert (sum(audio[stem][0].astype(int) for stem in MUSDB_STEMS) == audio["mixture"][0]).all()
        for stem in ("drums", "bass", "vocals"):
            assert audio[stem][0].any() and (audio[stem][0][:, 0] != audio[stem][0][:, 1]).any()


def test_loudness_is_that_of_the_standard():
    """BS.1770: a sine of 997 Hz at full scale, in one channel, is at -3.01 LUFS."""
    sine = np.sin(2 * np.pi * 997 * np.arange(3 * RATE) / RATE)
    assert integrated_loudness(sine) == pytest.approx(-3.01, abs=0.05)
    assert integrated_loudness(np.concatenate([0.1 * sine, 0 * sine])) == pytest.approx(-23.01, abs=0.3)
    assert integrated_loudness(0 * sine) == -70


def test_tracks_are_dealt_out_to_the_splits():
    assert split_counts("slakh2100", None, 60) == {"train": 40, "validation": 10, "test": 10}
    assert split_counts("musdb18hq", None, 60) == {"train": 50, "test": 10}
    assert split_counts("slakh2100", "test", 5) == {"test": 5}
    with pytest.raises(UserError, match="too few"):
        split_counts("slakh2100", None, 2)
    with pytest.raises(UserError, match="no split validation"):
        split_counts("musdb18hq", "validation", 2)


def test_bass_and_drums_always_sound(rendered):
    for split in PROGRAMS:
        for track in find_tracks(rendered / split, SLAKH_STEMS):
            stems = load_track(track, SLAKH_STEMS, 22_050)
            assert np.isfinite(stems).all()
            assert (np.sqrt(np.square(stems[:2]).mean(1)) > 1e-3).all()


def test_the_splits_have_no_instrument_in_common(rendered):
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for group in PROGRAMS[a].keys() & PROGRAMS[b].keys():
            assert not set(PROGRAMS[a][group]) & set(PROGRAMS[b][group])
    for split, groups in PROGRAMS.items():
        for group in ("bass", "guitar", "piano"):
            assert {group_of(program, False) for program in groups[group]} == {group}
        for track in find_tracks(rendered / split, SLAKH_STEMS):
            played = {(group_of(s["program_num"], s["is_drum"]), s["program_num"]) for s in described(track).values()}
            assert all(group == "drums" or program in groups[group or "other"] for group, program in played)


def test_no_drum_of_a_split_is_played_by_a_sample_that_another_split_has(rendered):
    """By the bit and by correlation, for every drum of General MIDI that a split's kits play."""
    font, kits = default_soundfont(), {split: PROGRAMS[split]["drums"] for split in PROGRAMS}
    left_out = shared_drums([font], kits)
    played = {
        split: np.concatenate([
            [x for p, x in zip(PITCHES, drum_sounds(font, kit), strict=True) if p not in left_out[split][kit]] for kit in own
        ])
        for split, own in kits.items()
    }  # fmt: skip
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert (played[a] @ played[b].T).max() < 0.99
    # What every split keeps: kick, snare, hi-hat, toms.
    for split, own in left_out.items():
        for pitches in own.values():
            assert not pitches & {KICK, SNARE, HAT, OPEN, *TOMS}, split
    for split in PROGRAMS:
        for track in find_tracks(rendered / split, SLAKH_STEMS):
            notes = [
                note.pitch
                for instrument in pretty_midi.PrettyMIDI(str(track / "all_src.mid")).instruments
                if instrument.is_drum
                for note in instrument.notes
                if note.pitch in left_out[split][instrument.program]
            ]
            assert not notes


def test_kits_of_the_default_soundfont_are_told_apart_by_their_samples():
    assert presets(default_soundfont(), True) == EVERY_PROGRAM["drums"]
    jazz_after_standard = shared_drums([default_soundfont()], {"train": [0], "test": [32]})["test"][32]
    assert jazz_after_standard >= set(range(35, 60)) - {54, 56, 58}
    with pytest.raises(UserError, match=r"TimGM6mb\.sf2 has no kit 1 for test, only 0, 8"):
        shared_drums([default_soundfont()], {"train": [0], "test": [1]})
    with pytest.raises(UserError, match="has no kit 56"):
        sample_part(Part("drums", 56, [Note(0.0, 0.5, 40, 90)]), 1.0, default_soundfont(), 0.0)


def test_every_program_is_all_that_the_splits_have():
    assert EVERY_PROGRAM["bass"] == tuple(range(32, 40)) and EVERY_PROGRAM["guitar"] == tuple(range(24, 32))
    for groups in PROGRAMS.values():
        for group, programs in groups.items():
            assert set(programs) <= set(EVERY_PROGRAM[group])


TIMIDITY = """#!{python}
import sys
import numpy as np
import pretty_midi

*options, score = sys.argv[1:]
needed = "--config-file=some.cfg --preserve-silence --sampling-freq={rate} --output-mode=r --output-mono --output-16bit"
assert set(needed.split()) <= set(options) and options[-2:] == ["-o", "-"], options
audio = pretty_midi.PrettyMIDI(score).synthesize({rate})
sys.stdout.buffer.write(np.rint(8000 * audio).astype("<i2").tobytes())
"""


def test_a_patch_set_plays_notes_at_their_time(monkeypatch, tmp_path):
    """Through a stand-in for TiMidity++ that plays the MIDI file as sines: what is asked of it, and what is made of its answer."""
    plays = tmp_path / "timidity"
    plays.write_text(TIMIDITY.format(python=sys.executable, rate=RATE))
    plays.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    audio = render_part(np.random.default_rng(0), Part("piano", 0, [Note(0.5, 0.4, 60, 90)]), 3.0, ["some.cfg"], 0.0)
    assert audio.shape == (3 * RATE,) and audio.dtype == np.float32
    audio = patch_part(Part("piano", 0, [Note(0.5, 0.4, 60, 90)]), 3.0, "some.cfg")
    assert np.argmax(np.abs(audio) > 1e-3) / RATE == pytest.approx(0.5, abs=0.01)
    assert len(audio) == 3 * RATE and not audio[int(1.2 * RATE) :].any()  # silence follows, and no repetition
    spectrum = np.abs(np.fft.rfft(audio[RATE // 2 : RATE]))
    assert 2 * spectrum.argmax() == pytest.approx(261.6, abs=3)  # middle C
    assert len(patch_part(Part("piano", 0, [Note(0.5, 0.4, 60, 90)]), 0.7, "some.cfg")) == int(0.7 * RATE)


def test_a_patch_set_says_what_it_lacks(monkeypatch, tmp_path):
    part = Part("piano", 0, [Note(0.5, 0.4, 60, 90)])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs timidity; install it"):
        patch_part(part, 1.0, "some.cfg")
    fails = tmp_path / "timidity"
    fails.write_text("#!/bin/sh\necho 'some.cfg: no such patch' >&2\nexit 3\n")
    fails.chmod(0o755)
    with pytest.raises(UserError, match=r"cannot play with some\.cfg: some\.cfg: no such patch"):
        patch_part(part, 1.0, "some.cfg")


def test_a_soundfont_without_the_program_is_named():
    part = Part("bass", 33, [Note(0.0, 0.5, 40, 90)])
    sample_part(part, 1.0, default_soundfont(), 0.0)
    with pytest.raises(UserError, match=r"TimGM6mb\.sf2 has no program 200"):
        sample_part(part._replace(program=200), 1.0, default_soundfont(), 0.0)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--tracks", "0"), "--tracks"),
        (("--tracks", "2"), "too few"),
        (("--soundfont", "nowhere.sf2"), "nowhere.sf2"),
        (("--soundfont", __file__), "cannot be read as a SoundFont"),
        (("--seconds", "nan"), "--seconds more than 1"),
        (("--seconds", "inf"), "--seconds more than 1"),
        (("--seed", "-1"), "--seed at least 0"),
        (("--synthesised", "2"), "--synthesised must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_rendered_ends_in_one_sentence(tmp_path, capfd, more, says):
    assert render(tmp_path / "out", *more) == 2
    assert says in capfd.readouterr().err
