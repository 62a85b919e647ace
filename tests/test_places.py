"""Lists and songs that lie somewhere else, and where stems go in the end; what a batch of processes shares."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.files import HOST, PASSING, clear
from msr_jax.separate.catalogue import find_shard, find_tasks
from msr_jax.separate.manifest import Manifest
from msr_jax.separate.places import at_hand, find_urls, name_of, read_list
from tests.conftest import TINY_RATE

STEMS = ["bass", "drums", "guitar", "piano"]


@pytest.fixture
def bucket():
    """A store in memory with three songs in it."""
    store = fsspec.filesystem("memory")
    for k, name in enumerate(("b/one.wav", "b/deep/two.wav", "b/.hidden/three.wav")):
        with store.open(f"/{name}", "wb") as file:
            audio = 0.1 * np.random.default_rng(k).standard_normal(3000)
            soundfile.write(file, audio, TINY_RATE, format="WAV")
    store.pipe("/b/cover.jpg", b"")
    yield store
    store.rm("/b", recursive=True)


def places(tasks, out):
    return [str(path.relative_to(out)) for task in tasks for path in task.paths(["bass"], "wav").values()]


def write_table(place, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), place)


def test_lists_may_be_tables_here_or_elsewhere(bucket, tmp_path):
    paths = ["/music/a/one.wav", "gs://bucket/two.wav"]
    write_table(tmp_path / "songs.parquet", id=[1, 2], path=paths)
    lines = "".join(json.dumps({"id": k, "path": path}) + "\n" for k, path in enumerate(paths))
    bucket.pipe("/b/songs.jsonl", lines.encode())
    bucket.pipe("/b/songs.parquet", (tmp_path / "songs.parquet").read_bytes())
    (tmp_path / "songs.txt").write_bytes("﻿/music/a/one.wav\r\ngs://bucket/two.wav\r\n\r\n".encode())
    (tmp_path / "wide.txt").write_bytes("/music/a/one.wav\r\ngs://bucket/two.wav\r\n".encode("utf-16"))
    for place in (
        tmp_path / "songs.parquet",
        tmp_path / "songs.txt",
        tmp_path / "wide.txt",
        "memory://b/songs.jsonl",
        "memory://b/songs.parquet",
    ):
        assert read_list(str(place)) == paths


def test_what_is_no_list_is_refused(bucket, tmp_path):
    write_table(tmp_path / "other.parquet", file=["a"])
    write_table(tmp_path / "numbers.parquet", path=[1])
    (tmp_path / "nothing.txt").write_text("/a.wav\n/b\0.wav\n")
    (tmp_path / "half.jsonl").write_text('{"path": "/a.wav"}\n\n{"path": "/\\ud800.wav"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    bucket.pipe("/b/list.jsonl", b"[1]\n")
    for place, words in (
        (tmp_path / "other.parquet", "a table with a column path"),
        (tmp_path / "numbers.parquet", "row 1 is not a path"),
        (tmp_path / "nothing.txt", "line 2 is not a path"),
        (tmp_path / "half.jsonl", "line 3 is not an object with a path"),
        (tmp_path / "broken.parquet", "a table with a column path"),
        ("memory://b/list.jsonl", "line 1 is not an object with a path"),
        ("memory://b/none.txt", "cannot be read"),
        ("nowhere://b/none.txt", "nowhere"),
    ):
        with pytest.raises(UserError, match=words):
            read_list(str(place))


def test_songs_elsewhere_are_found_as_those_here_are(bucket, tmp_path):
    find = lambda *given, **options: places(find_tasks(given, tmp_path, **options), tmp_path)
    assert find("memory://b") == ["deep/two/bass.wav", "one/bass.wav"]
    assert find("memory://b/d*/*.wav", "memory://b/one.wav") == ["two/bass.wav", "one/bass.wav"]
    assert find("memory://b/one.wav") == ["one/bass.wav"]
    (tmp_path / "list").write_text("memory://b/one.wav\nmemory://b/deep/two.wav\n")
    assert find(listed=tmp_path / "list") == ["one/bass.wav", "deep/two/bass.wav"]
    with pytest.raises(UserError, match="no file is called like"):
        find("memory://b/*.flac")
    assert find("memory://b/.hidden") == find("memory://b/.h*/*.wav") == ["three/bass.wav"]
    assert find("memory://b/*/*.wav") == ["two/bass.wav"]


def test_the_keys_of_a_store_are_what_they_are_and_the_web_s_addresses_are_quoted(tmp_path):
    songs = [tmp_path / "Song #1 [live]?.wav", tmp_path / "50%20off.wav"]
    for song in songs:
        song.touch()
    found = find_tasks([f"file://{song}" for song in songs], tmp_path / "out")
    assert [task.folder.name for task in found] == ["Song #1 [live]?", "50%20off"]
    assert name_of("https://example.org/a/My%20song.mp3?key=1#t") == "My song.mp3"
    (tmp_path / "list").write_text("https://example.org/An%20album/1.mp3?k=/a/b\nhttps://example.org/other/1.mp3\n")
    found = find_tasks([], tmp_path / "out", tmp_path / "list")
    assert places(found, tmp_path / "out") == ["An album/1/bass.wav", "other/1/bass.wav"]
    assert [name_of(f"https://{rest}") for rest in ("[host/1.mp3", "host/%00.mp3")] == ["1.mp3", "%00.mp3"]


def test_no_name_leads_out_of_the_folder_of_stems(tmp_path):
    """`..` is a step of a path, which is taken, and a name like any other in a store, which is kept as one."""
    listed, out = tmp_path / "list", tmp_path / "out"
    inside = lambda: [str(task.folder.resolve().relative_to(out)) for task in find_tasks([], out, listed)]
    for scheme in ("", "file://", "local://"):
        listed.write_text(f"{scheme}{tmp_path}/m/a/one.wav\n{scheme}{tmp_path}/m/a/../../x/../m/b/two.wav\n")
        assert inside() == ["a/one", "b/two"]
    listed.write_text("s3://b/m/one.wav\ns3://b/m/../../two.wav\ns3://b/m/%2E%2E/two.wav\ns3://b/m/..\n")
    assert inside() == ["one", "%2E%2E/%2E%2E/two", "%2E%2E/two", "song"]
    listed.write_text(f"{tmp_path}/m/a/one.wav\nfile://{tmp_path}/m/a/one.wav\nlocal://{tmp_path}/m/b/../a/one.wav\n")
    assert inside() == ["one"]


def test_songs_of_this_machine_keep_their_names_under_all_of_its_schemes(tmp_path):
    (tmp_path / "one.wav").touch()
    for scheme in ("file", "local"):
        assert find_urls(f"{scheme}://{tmp_path}/", frozenset({".wav"})) == (
            [f"{scheme}://{tmp_path}/one.wav"],
            f"{scheme}://{tmp_path}",
        )


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("s3://b/one.wav", ImportError("Install s3fs"), r"needs the extra `cloud`.*Install s3fs"),
        ("abfs://b/one.wav", ImportError("Install adlfs"), r"needs what is not installed here \(Install adlfs"),
        ("hdfs://b/one.wav", OSError("no libjvm\nhere nor there"), r"cannot be opened \(no libjvm\)"),
    ],
)
def test_a_store_that_cannot_be_opened_is_one_sentence_that_helps(monkeypatch, url, error, words):
    def url_to_fs(url):
        raise error

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    with pytest.raises(UserError, match=words):
        find_urls(url, frozenset())


def test_what_is_wrong_with_a_song_elsewhere_is_said_of_its_url_and_told_once(bucket, tiny_model, tmp_path):
    bucket.pipe("/b/one.wav", b"no audio")
    manifest, out = tmp_path / "manifest.jsonl", tmp_path / "out"
    command = ["separate", "memory://b", "-o", str(out), "--model", str(tiny_model), "--refine", "none"]
    for _ in range(2):
        assert main([*command, "--manifest", str(manifest)]) == 1
    errors = [row["error"] for row in map(json.loads, manifest.read_text().splitlines()) if row["error"]]
    assert errors == ["memory://b/one.wav cannot be read as audio (Format not recognised)"]


def test_a_fetched_song_is_there_for_a_moment_whatever_ends_it(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (task,) = find_tasks(["memory://b/one.wav"], tmp_path / "out")
    with pytest.raises(KeyError), at_hand(task) as here:
        assert here.song.read_bytes() == bucket.cat_file("/b/one.wav") and here.song.parent in PASSING
        raise KeyError
    assert not list(tmp_path.iterdir())
    with at_hand(task) as here:
        clear(here.song.parent)  # as the process's end does
        assert not list(tmp_path.iterdir())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".msr-1.{HOST}.{gone.pid}.tmp").mkdir()
    with at_hand(task) as here:
        assert list(tmp_path.iterdir()) == [here.song.parent]


def test_stems_go_where_a_pattern_says(tmp_path):
    (tmp_path / "list").write_text("/m/a/one.wav\n/m/b/{two}.wav\n")
    for pattern, expected in (
        (None, ["a/one/bass.wav", "b/{two}/bass.wav"]),
        ("{stem}/{folder}/{track}.{ext}", ["bass/a/one.wav", "bass/b/{two}.wav"]),
        ("{track}_{stem}.{ext}", ["one_bass.wav", "{two}_bass.wav"]),
        ("x/{track}/{track} {stem}.{ext}", ["x/one/one bass.wav", "x/{two}/{two} bass.wav"]),
    ):
        assert places(find_tasks([], tmp_path, tmp_path / "list", pattern), tmp_path) == expected
    for pattern in (
        "{stem}.{ext}",
        "{track}.wav",
        "{track}/{stem}",
        "../{track}/{stem}.{ext}",
        "{track!r}{stem}.{ext}",
        "{",
        "{track}{stem}.{ext}x",
    ):
        with pytest.raises(UserError, match="--filename is"):
            find_tasks([], tmp_path, tmp_path / "list", pattern)
    (tmp_path / "list").write_text("/m/a/one.wav\n/m/b/one.wav\n")
    with pytest.raises(UserError, match=r"the stems of two songs are \{stem\}/one"):
        find_tasks([], tmp_path, tmp_path / "list", "{stem}/{track}.{ext}")


def test_processes_know_their_share_without_each_other():
    share = lambda env, given=None, processes=None, process=None: find_shard(given, env, processes, process)
    slurm = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}
    assert share({}) == (1, 1) and share(slurm) == (3, 4) and share(slurm, "1/2") == (1, 2)
    assert share(slurm, processes=8, process=7) == (8, 8)
    assert share({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "3", **slurm}) == (1, 3)
    assert share({"JOB_COMPLETION_INDEX": "1", "JAX_NUM_PROCESSES": "2"}) == (2, 2)
    assert share({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}) == (2, 2)
    assert share({"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}) == (4, 4)
    assert share({"SLURM_PROCID": "0"}) == (1, 1)  # of a batch script
    for env, given in (
        ({"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "4"}, ()),
        ({}, (None, 2, 2)),
        ({}, (None, 2)),
        ({}, ("0/2",)),
        ({}, ("²/3",)),  # digits, but no number
        ({"SLURM_PROCID": "²", "SLURM_STEP_NUM_TASKS": "4"}, ()),
    ):
        with pytest.raises(UserError):
            share(env, *given)


def test_a_song_elsewhere_is_separated_as_one_here(bucket, tiny_model, tmp_path, capsys):
    command = ["separate", "-o", str(tmp_path / "out"), "--model", str(tiny_model), "--refine", "none"]
    manifest = tmp_path / "manifest.jsonl"
    many = [
        *command,
        "memory://b",
        "memory://b/none.wav",
        "--manifest",
        str(manifest),
        "--filename",
        "{stem}/{folder}/{track}.{ext}",
    ]
    assert main(many) == 1
    assert "memory://b/none.wav cannot be read" in capsys.readouterr().err
    rows = {row["source"]: row for row in map(json.loads, manifest.read_text().splitlines())}
    assert list(rows) == ["memory://b/deep/two.wav", "memory://b/one.wav", "memory://b/none.wav"]
    row = rows["memory://b/deep/two.wav"]
    assert row["stems"] == {stem: str(tmp_path / "out" / stem / "deep" / "two.wav") for stem in STEMS}
    here = tmp_path / "two.wav"
    here.write_bytes(bucket.cat_file("/b/deep/two.wav"))
    assert main([*command, str(here)]) == 0
    for stem, path in row["stems"].items():
        assert Path(path).read_bytes() == (tmp_path / "out" / "two" / f"{stem}.wav").read_bytes()
    # A kill between the stems' names and their line: the line comes with the next start, complete.
    kept = [line for line in manifest.read_text().splitlines() if "deep" not in line]
    manifest.write_text("\n".join(kept) + "\n")
    assert main(many) == 1
    again = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [r["source"] for r in again if not r["error"]] == ["memory://b/one.wav", "memory://b/deep/two.wav"]
    anew = next(r for r in again if r["source"] == row["source"])
    assert anew["kept"] == STEMS and anew["levels"] == pytest.approx(row["levels"], abs=0.01)
    assert {k: anew[k] for k in ("sha256", "stems", "seconds", "model", "settings")} == {
        k: row[k] for k in ("sha256", "stems", "seconds", "model", "settings")
    }


def test_of_a_source_s_lines_the_last_one_counts(tmp_path):
    manifest = Manifest(tmp_path / "manifest.jsonl")
    row = {"source": "a.wav", "stems": {"bass": "a/bass.wav"}, "error": None}
    manifest.add(row)
    assert manifest.tells(row) and manifest.has("a.wav", row["stems"])
    broken = {**row, "stems": {}, "error": "it is damaged"}
    manifest.add(broken)
    for again in (manifest, Manifest(tmp_path / "manifest.jsonl")):
        assert again.tells(broken) and not again.tells(row) and not again.has("a.wav", row["stems"])


def test_a_manifest_s_line_that_was_cut_off_is_gone(tmp_path):
    path = tmp_path / "m.jsonl"
    whole = {"source": "a", "stems": {"bass": "x"}, "error": None}
    Manifest(path).add(whole)
    with open(path, "a") as file:
        file.write('{"source": "b", "st')
    manifest = Manifest(path)
    assert manifest.has("a", {"bass": "x"}) and not manifest.has("a", {"bass": "y"})
    manifest.add({**whole, "source": "c"})
    assert [json.loads(line)["source"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_a_file_that_is_no_manifest_is_left_as_it_is(tmp_path):
    for k, text in enumerate(("one line without an end", "[1]\n", '{"source": "a", "error": "no"}\nhalf of a note')):
        (tmp_path / str(k)).write_text(text)
        with pytest.raises(UserError, match="is no manifest"):
            Manifest(tmp_path / str(k))
        assert (tmp_path / str(k)).read_text() == text


def test_stems_are_written_to_this_machine(capsys):
    for options in (["-o", "gs://bucket/stems"], ["-o", "stems", "--manifest", "s3://bucket/manifest.jsonl"]):
        with pytest.raises(SystemExit, match="2"):
            main(["separate", "song.wav", *options])
        assert "mount the store" in capsys.readouterr().err
