"""Names as they come: not UTF-8, not printable where they are printed, empty, or leading elsewhere."""

import io
import json
import os
import sys

import numpy as np
import pytest
import soundfile

from data_prep.slakh2100 import main as prepare
from msr_jax import cli
from msr_jax.audio.io import audio_info, read_audio, write_audio
from msr_jax.data.records import read_manifest
from msr_jax.files import printable
from msr_jax.separate.catalogue import folder_name
from tests.conftest import TINY_RATE, make_corpus
from tests.test_media import encode, tone

LATIN = os.fsdecode(b"caf\xe9")


@pytest.fixture
def latin_corpus(tmp_path):
    """A corpus whose tracks are named in Latin-1."""
    root = make_corpus(tmp_path / "corpus", ("train", "test"), tracks=2, seconds=1.0)
    for split in ("train", "test"):
        (root / split / "Track00000").rename(root / split / LATIN)
    return root


@pytest.mark.parametrize(
    "name,folder",
    [
        ("a.wav", "a"),
        ("...wav", "...wav"),
        (".wav", ".wav"),
        ("a.b.flac", "a.b"),
        ("..a.wav", "..a"),
        ("a.Stem.mp4", "a"),
        ("...stem.mp4", "...stem.mp4"),
    ],
)
def test_a_songs_folder_is_always_inside_of_the_one_that_was_named(tmp_path, name, folder):
    assert folder_name(tmp_path / name) == folder


def test_audio_under_a_name_that_is_not_utf8_is_read_and_written(tmp_path):
    for suffix in (".wav", ".flac"):
        path = tmp_path / (LATIN + suffix)
        write_audio(path, tone(seconds=0.1), 44_100)
        assert audio_info(path).channels == 2 and len(read_audio(path)[0]) == 4410
    soundfile.write(tmp_path / "a.mp3", tone(seconds=0.1), 44_100)
    encode(tmp_path / "a.oga", [tone(seconds=0.1)])
    for suffix in (".mp3", ".oga"):
        path = (tmp_path / f"a{suffix}").rename(tmp_path / (LATIN + suffix))
        assert len(read_audio(path)[0]) == 4410


def test_tracks_under_names_that_are_not_utf8_are_prepared(latin_corpus, tmp_path, capsys):
    assert prepare([str(latin_corpus), str(tmp_path / "out"), "--crop", "2048", "--workers", "1"]) == 0
    assert [name for name, _ in read_manifest(tmp_path / "out")["tracks"]["train"]] == ["Track00001", "caf\\xe9"]


def test_tracks_under_names_that_are_not_utf8_are_evaluated(latin_corpus, tmp_path):
    estimates = tmp_path / "estimates"
    for track in (latin_corpus / "test").iterdir():
        for stem in ("bass", "drums", "guitar", "piano"):
            write_audio(estimates / track.name / f"{stem}.wav", np.full((TINY_RATE, 1), 0.1, np.float32), TINY_RATE)
    argv = [
        "evaluate",
        "--references",
        str(latin_corpus),
        "--estimates",
        str(estimates),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(argv) == 0
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["tracks"]) == ["Track00001", "caf\\xe9"]
    (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_references_in_stem_mp4_files_are_scored(tmp_path):
    names = ("drums", "bass", "other", "vocals")
    for k in range(2):
        (tmp_path / "references").mkdir(exist_ok=True)
        streams = [tone(200.0 + 100 * j) for j in range(5)]
        encode(tmp_path / "references" / f"song{k}.stem.mp4", streams, ("mp4", "aac"))
        for j, name in enumerate(names):
            write_audio(tmp_path / "estimates" / f"song{k}" / f"{name}.wav", tone(300.0 + 100 * j), 44_100)
    places = ["--references", str(tmp_path / "references"), "--estimates", str(tmp_path / "estimates")]
    assert cli.main(["evaluate", *places, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["tracks"]) == ["song0", "song1"] and results["settings"]["stems"] == list(names)
    assert results["settings"]["sample_rate"] == 44_100 and results["settings"]["channels"] == 2


def test_an_output_that_cannot_print_a_name_prints_it_otherwise(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setitem(cli.COMMANDS, "say", (__name__, ""))
    assert cli.main(["say", "日本 " + LATIN]) == 0
    out.flush()
    assert out.buffer.getvalue().strip() == rb"\u65e5\u672c caf\udce9"


def main(argv):
    print(argv[0])


@pytest.mark.parametrize(
    "argv",
    [
        ["separate", "a.wav", "-o", ""],
        ["separate", "a.wav", "--out="],
        ["separate", "", "-o", "out"],
        ["evaluate", "--data", "", "--out", "x"],
        ["export", "m", "--format", "safetensors", "-o", ""],
    ],
)
def test_an_empty_value_is_no_folder(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert "an empty value is given" in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_empty_value_is_no_corpus(capsys):
    assert prepare(["", "out"]) == 2
    assert "an empty value is given" in capsys.readouterr().err


def test_names_of_stems_on_the_command_line_are_checked(corpus, tmp_path, capsys):
    for stems in ("../x,bass", "bass,Bass", "bass,,x"):
        argv = [
            "evaluate",
            "--references",
            str(corpus),
            "--estimates",
            str(corpus),
            "--stems",
            stems,
            "--out",
            str(tmp_path),
        ]
        assert cli.main(argv) == 2
        assert "--stems must be a list of names that files can have, each once" in capsys.readouterr().err


def test_printable_names_are_themselves():
    assert printable("Ünï 日本") == "Ünï 日本" and printable(LATIN) == "caf\\xe9"
