"""The stand-in corpus: genuine layout, the same bytes for the same seed, splits without common instruments."""

import hashlib

import numpy as np
import pytest
import soundfile
import yaml

pytest.importorskip("tinysoundfont", reason="pip install --no-deps tinysoundfont")
pytest.importorskip("pretty_midi")

from data_prep.render import TEST_PROGRAMS, TRAIN_PROGRAMS, main
from msr_jax.config import SLAKH_STEMS
from msr_jax.data.tracks import find_tracks, group_of, load_track


def render(out, *more):
    return main([str(out), "--tracks", "3", "--seconds", "5", "--seed", "7", "--workers", "2", *more])


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    out = tmp_path_factory.mktemp("rendered")
    for split in ("train", "test"):
        assert render(out, "--split", split) == 0
    return out


def digests(folder):
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def described(track):
    return yaml.safe_load((track / "metadata.yaml").read_text())["stems"]


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(rendered, tmp_path):
    assert render(tmp_path / "again", "--workers", "1") == 0
    assert digests(tmp_path / "again" / "train") == digests(rendered / "train")
    assert render(tmp_path / "other", "--seed", "8") == 0
    assert not set(digests(tmp_path / "other").values()) & set(digests(rendered / "train").values())


def test_tracks_have_the_layout_of_slakh(rendered):
    for track in find_tracks(rendered / "train", SLAKH_STEMS):
        stems = described(track)
        audio = []
        for name in stems:
            samples, rate = soundfile.read(track / "stems" / f"{name}.flac", dtype="int16")
            assert rate == 44_100 and samples.shape == (5 * 44_100,)
            audio.append(samples.astype(int))
        mix, _ = soundfile.read(track / "mix.flac", dtype="int16")
        assert (np.sum(audio, 0) == mix).all()


def test_bass_and_drums_always_sound(rendered):
    for split in ("train", "test"):
        for track in find_tracks(rendered / split, SLAKH_STEMS):
            stems = load_track(track, SLAKH_STEMS, 22_050)
            assert np.isfinite(stems).all()
            assert (np.sqrt(np.square(stems[:2]).mean(1)) > 1e-3).all()


def test_test_instruments_are_not_among_those_of_training(rendered):
    used = {
        split: {
            (s["is_drum"], s["program_num"])
            for t in find_tracks(rendered / split, SLAKH_STEMS)
            for s in described(t).values()
        }
        for split in ("train", "test")
    }
    assert not {p for p in used["train"] & used["test"] if not p[0]}
    for group, programs in TEST_PROGRAMS.items():
        assert not set(programs) & set(TRAIN_PROGRAMS[group])
        if group in ("bass", "guitar", "piano"):
            assert {group_of(p, False) for p in (*programs, *TRAIN_PROGRAMS[group])} == {group}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--tracks", "0"), "--tracks"),
        (("--soundfont", "nowhere.sf2"), "nowhere.sf2"),
        (("--soundfont", __file__), "cannot be read as a SoundFont"),
    ],
)
def test_what_cannot_be_rendered_ends_in_one_sentence(tmp_path, capfd, more, says):
    assert render(tmp_path / "out", *more) == 2
    assert says in capfd.readouterr().err
