"""Many songs: where their stems go, who takes which, and what is written down about each."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.separate.catalogue import check_stems, find_tasks, without_stems
from msr_jax.separate.manifest import Manifest
from tests.conftest import TINY_RATE

STEMS = ["bass", "drums", "guitar", "piano"]


@pytest.fixture
def library(tmp_path):
    """Empty files; what is called a song is enough to find it."""
    for name in (
        "a/one.WAV",
        "a/two.mp3",
        "b/one.flac",
        "b/c/three.ogg",
        "b/c/four.stem.mp4",
        "b/c/film.mp4",
        "b/cover.jpg",
        "b/._one.flac",
        "b/.trash/x.wav",
    ):
        path = tmp_path / "music" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "music"


def separate_into(song, out, model, *more):
    """The exit code."""
    return main(["separate", *map(str, (song, "-o", out, "--model", model, "--refine", "none", *more))])


def folders(tasks, out):
    return [str(task.folder.relative_to(out)) for task in tasks]


def test_a_folder_s_songs_keep_their_folders_and_nothing_else_is_a_song(library):
    out = library / "a" / "stems"
    (out / "one").mkdir(parents=True)
    (out / "one" / "bass.wav").touch()
    assert folders(find_tasks([library], out), out) == ["a/one", "a/two", "b/one", "b/c/four", "b/c/three"]


def test_patterns_and_lists_keep_folders_below_the_common_one_and_files_do_not(library, tmp_path):
    out, one, other = tmp_path / "out", library / "a" / "two.mp3", library / "b" / "one.flac"
    assert folders(find_tasks([f"{library}/**/one.*"], out), out) == ["a/one", "b/one"]
    (tmp_path / "songs.txt").write_text(f"{one}\n\n{other}\n")
    (tmp_path / "songs.jsonl").write_text("".join(json.dumps({"path": str(p), "id": 1}) + "\n" for p in (one, other)))
    for name in ("songs.txt", "songs.jsonl"):
        assert folders(find_tasks([], out, tmp_path / name), out) == ["a/two", "b/one"]
    assert folders(find_tasks([one, other, one], out), out) == ["two", "one"]
    assert folders(find_tasks([tmp_path / "...wav"], out), out) == ["...wav"]


@pytest.mark.parametrize("given", ["music", "music/**/*.wav", "file://music"])
@pytest.mark.parametrize("out", ["music", "music/stems"])
def test_stems_of_an_earlier_run_into_the_searched_folder_are_no_songs(given, out, tmp_path):
    for name in ("one.wav", "deep/two.wav"):
        (tmp_path / "music" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "music" / name).touch()
    given = given.replace("music", str(tmp_path / "music"))
    find = lambda: without_stems(find_tasks([given], tmp_path / out), STEMS)
    first = find()
    (tmp_path / "store").touch()
    for suffix in ("wav", "flac", "ogg"):
        for path in (path for task in first[:1] for path in task.paths(STEMS, suffix).values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(tmp_path / "store") if suffix == "ogg" else path.touch()
    assert find() == first and len(first) == 2
    named = next(iter(first[0].paths(STEMS, "flac").values()))
    for order in ([given, f"{named.parent}/./{named.name}"], [named, given]):
        assert len(without_stems(find_tasks(order, tmp_path / out), STEMS)) == 3
    with pytest.raises(UserError, match="would replace a song"):
        check_stems([first[0], *find_tasks([named], tmp_path / out)], STEMS, "wav", is_any_format=True)


def test_what_is_as_long_as_the_stems_beside_it_is_no_song_and_an_album_s_song_is(tmp_path):
    stem = f"one/{STEMS[0]}.wav"
    lengths = {"one.wav": 300, stem: 300, "one/rest.wav": 300, "one/01.wav": 301, "two.wav": 300, "two/rest.wav": 300}
    for name, length in lengths.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, np.zeros(length), TINY_RATE)
    (tmp_path / "one" / "02.wav").touch()  # said to be no audio when its turn comes
    left = without_stems(find_tasks([tmp_path], tmp_path), STEMS)
    songs = {"one.wav", "one/01.wav", "one/02.wav", "two.wav", "two/rest.wav"}
    assert {str(task.song.relative_to(tmp_path)) for task in left} == songs


@pytest.mark.parametrize("pattern", ["", "/**/*.*"])
def test_linked_folders_are_searched_and_each_song_is_found_once(library, tmp_path, pattern):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "four.wav").touch()
    (library / "b" / "round").symlink_to(library)
    (library / "more").symlink_to(tmp_path / "elsewhere")
    find = lambda: [task.song for task in find_tasks([f"{library}{pattern}"], tmp_path / "out")]
    songs = find()
    assert sorted(songs) == sorted({*songs}) and "four.wav" in {song.name for song in songs}
    (library / "A link to a").symlink_to("a")
    assert find() == songs, "a finished batch is not begun anew by another name of a folder"


def test_a_folder_that_cannot_be_searched_is_named(tmp_path, monkeypatch, caplog):
    def walk(folder, onerror, **_):
        onerror(PermissionError(13, "Permission denied", str(refused)))
        return [(str(tmp_path), [], ["a.wav"])]

    monkeypatch.setattr("msr_jax.separate.catalogue.os.walk", walk)
    refused = tmp_path / "locked"
    with caplog.at_level("INFO"):
        assert len(find_tasks([tmp_path], tmp_path / "out")) == 1
    assert "locked cannot be searched (Permission denied)" in caplog.text
    refused = tmp_path
    with pytest.raises(UserError, match="cannot be searched: Permission denied"):
        find_tasks([tmp_path], tmp_path / "out")


def test_stems_that_a_manifest_says_to_be_another_song_s_are_not_this_one_s(tiny_model, tmp_path, capsys):
    for k, album in enumerate("AB"):
        (tmp_path / album).mkdir()
        soundfile.write(tmp_path / album / "01.wav", (k + 1) * 0.1 * np.ones(3000), TINY_RATE)
    rest = (tmp_path / "out", tiny_model, "--manifest", tmp_path / "m.jsonl")
    separate = lambda album, *more: separate_into(tmp_path / album, *rest, *more)
    assert [separate("A"), separate("A"), separate("B"), separate("B", "--overwrite"), separate("B")] == [0, 0, 2, 0, 0]
    assert f"are stems of {tmp_path}/A/01.wav, by the manifest" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(Path(row["source"]).parent.name, bool(row["error"]), bool(row["stems"])) for row in rows] == [
        ("A", False, True), ("B", True, False), ("B", False, True)
    ]  # fmt: skip
    assert [separate("A"), separate("B")] == [2, 0], "what was replaced is the first one's no longer"


@pytest.mark.parametrize("is_whole", [True, False])
def test_stems_that_another_run_wrote_meanwhile_are_kept_and_a_broken_one_costs_one_song(
    is_whole, tiny_model, tmp_path, monkeypatch, capsys
):
    (tmp_path / "songs").mkdir()
    for name in "ab":
        soundfile.write(tmp_path / "songs" / f"{name}.wav", 0.1 * np.ones(3000), TINY_RATE)
    real = os.replace

    def meanwhile(source, place):
        if str(place) == str(tmp_path / "out" / "a"):
            shutil.copytree(source, place)
            if not is_whole:
                (Path(place) / "bass.wav").write_bytes(b"no audio")
        real(source, place)

    monkeypatch.setattr(os, "replace", meanwhile)
    code = separate_into(tmp_path / "songs", tmp_path / "out", tiny_model)
    assert code == (0 if is_whole else 1) and (tmp_path / "out" / "b" / "bass.wav").exists()
    assert "kept" in capsys.readouterr().out


def test_a_manifest_knows_what_another_process_has_written_meanwhile(tmp_path):
    early, late = Manifest(tmp_path / "m.jsonl"), Manifest(tmp_path / "m.jsonl")
    row = {"source": "A/1.wav", "sha256": "a", "stems": {"bass": "out/1/bass.wav"}, "error": None}
    early.add(row)
    assert late.other_owner("B/1.wav", "b", row["stems"].values()) == "A/1.wav"
    assert late.other_owner("copy.wav", "a", row["stems"].values()) is None
    late.add({**row, "source": "B/1.wav", "sha256": "b"})
    early.add({**row, "source": "C.wav", "stems": {}})
    assert not early.has("A/1.wav", row["stems"]) and early.has("B/1.wav", row["stems"])
    os.rename(tmp_path / "m.jsonl", tmp_path / "moved")
    late.add(row)
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 1 and late.has("A/1.wav", row["stems"])


def test_a_file_under_two_spellings_is_one_song(library):
    one = library / "a" / "one.WAV"
    assert len(find_tasks([one, library / "a" / ".." / "a" / "one.WAV", library], library.parent / "out")) == 5


def test_what_names_no_songs_is_refused(library, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "list.txt").write_text("\n")
    for given, listed, words in (
        ([tmp_path / "empty"], None, "holds no audio files"),
        ([f"{library}/*.wav"], None, "no file is called like"),
        ([], None, "no songs are named"),
        ([], tmp_path / "none.txt", "cannot be read"),
        ([], tmp_path / "list.jsonl", "line 1 is not an object with a path"),
        ([], tmp_path / "list.txt", "names no songs"),
        ([library / "a" / "one.WAV", library / "b" / "one.flac"], None, "two songs are named one"),
    ):
        with pytest.raises(UserError, match=words):
            find_tasks(given, tmp_path / "out", listed)


def test_a_pipe_or_a_name_that_is_too_long_costs_one_song_and_not_the_batch(tiny_model, tmp_path, capsys):
    music, out = tmp_path / "music", tmp_path / "out"
    music.mkdir()
    longest = "y" * 240  # legal, and so is the folder of its stems
    for name in ("a", longest, "z"):
        soundfile.write(music / f"{name}.wav", 0.1 * np.ones(3000), TINY_RATE)
    os.mkfifo(music / "b.wav")  # nobody writes into it
    command = ["separate", str(music), "-o", str(out), "--model", str(tiny_model), "--refine", "none"]
    assert main([*command, "--manifest", str(tmp_path / "manifest.jsonl")]) == 1
    assert {p.name for p in out.iterdir()} == {"a", longest, "z"} and not list(out.rglob(".*"))
    rows = {row["source"]: row for row in map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines())}
    assert (
        "is a pipe or a device" in rows[str(music / "b.wav")]["error"] and rows[str(music / "b.wav")]["sha256"] is None
    )
    assert "b.wav" in "".join(capsys.readouterr())


def test_stems_of_a_song_have_one_gain_or_none_is_added(toy_model, tmp_path, capsys):
    song, out = tmp_path / "song.wav", tmp_path / "out"
    soundfile.write(song, 30 * np.random.default_rng(0).standard_normal(3000), TINY_RATE, subtype="FLOAT")
    command = ["separate", str(song), "-o", str(out), "--model", str(toy_model), "--refine", "none", "--peak", "scale"]
    assert main([*command, "--stems", "drums"]) == 0
    assert "  drums by -" in capsys.readouterr().out
    before = (out / "song" / "drums.wav").read_bytes()
    assert main(command) == 2
    assert "has drums of song.wav already, and --peak scale is one gain for all stems" in capsys.readouterr().err
    assert [path.name for path in (out / "song").iterdir()] == ["drums.wav"]
    assert (out / "song" / "drums.wav").read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    assert "  bass, drums, guitar, piano by -" in capsys.readouterr().out
    assert main(command) == 0  # all are there


def test_shards_share_a_folder_and_the_manifest_has_every_song_once(tiny_model, tmp_path, capsys):
    music, out, manifest = tmp_path / "music", tmp_path / "out", tmp_path / "manifest.jsonl"
    for k, name in enumerate(("a", "b/a", "c")):
        (music / name).parent.mkdir(parents=True, exist_ok=True)
        audio = 0.1 * np.random.default_rng(k).standard_normal(3000)
        soundfile.write(music / f"{name}.wav", audio, TINY_RATE)
    (music / "bad.wav").write_text("no audio")
    command = ["separate", str(music), "-o", str(out), "--model", str(tiny_model), "--refine", "none"]
    command += ["--manifest", str(manifest)]
    codes = [main([*command, "--shard", f"{k}/2", "--json"]) for k in (1, 2)]
    assert sorted(codes) == [0, 1]
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert capsys.readouterr().out.splitlines() == manifest.read_text().splitlines()
    assert len(rows) == len({row["source"] for row in rows}) == 4
    by_name = {row["source"].removeprefix(f"{music}/"): row for row in rows}
    assert "cannot be read as audio" in by_name["bad.wav"]["error"] and by_name["bad.wav"]["stems"] == {}
    row = by_name["b/a.wav"]
    assert row["stems"] == {stem: str(out / "b" / "a" / f"{stem}.wav") for stem in STEMS} and len(row["sha256"]) == 64
    assert row["error"] is None and row["seconds"] == 3000 / TINY_RATE and row["settings"]["refine"] == "none"
    for stem, path in row["stems"].items():
        level = 10 * np.log10(np.square(soundfile.read(path)[0]).mean())
        assert row["levels"][stem] == pytest.approx(level, abs=0.01)
    # Started again, it separates nothing anew and adds nothing for what is there.
    assert main(command) == 1
    assert "kept bass, drums, guitar, piano" in capsys.readouterr().out
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row["source"] for row in rows if not row["error"]].count(str(music / "c.wav")) == 1 and len(rows) == 4
    soundfile.write(music / "bad.wav", audio, TINY_RATE)
    assert main(command) == 0
    last = {row["source"]: row for row in map(json.loads, manifest.read_text().splitlines())}
    assert last[str(music / "bad.wav")]["error"] is None
    manifest.write_text("[1]\n")
    assert main(command) == 2
    assert "is no manifest" in capsys.readouterr().err
