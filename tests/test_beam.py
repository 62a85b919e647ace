"""Songs by Apache Beam: the stems and rows of `msr separate`."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from msr_jax.beam_options import running, split_options
from msr_jax.cli import main as msr
from msr_jax.errors import UserError
from msr_jax.separate import beam as by_beam
from msr_jax.separate.catalogue import find_tasks
from msr_jax.separate.command import parser_of
from tests.conftest import TINY_RATE


@pytest.fixture
def songs(tmp_path):
    for k in range(3):
        audio = 0.1 * np.random.default_rng(k).standard_normal(3000 + 100 * k)
        (tmp_path / "songs" / str(k)).mkdir(parents=True)
        soundfile.write(tmp_path / "songs" / str(k) / "song.wav", audio, TINY_RATE)
    (tmp_path / "songs" / "bad.wav").write_text("no audio")
    return tmp_path / "songs"


def test_without_beam_it_says_what_to_install(songs, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"msr_jax\[beam\]"):
        by_beam.main([str(songs), "-o", str(tmp_path / "out")])


def test_beam_s_options_are_told_from_ours():
    ours = ["a.wav", "-o", "out", "--shifts", "4"]
    split = lambda *more: split_options([*ours, *more], parser_of(), "msr separate")
    assert split("--runner=DirectRunner") == (ours, ["--runner=DirectRunner"], [])
    assert split("--", "--direct_num_workers", "4") == (ours, [], ["--direct_num_workers", "4"])
    with pytest.raises(UserError, match="--direct_num_workers is no option of msr separate; Beam's follow a lone --"):
        split("--direct_num_workers", "4")


@pytest.mark.parametrize("option", ["--shard=1/2", "--json", "--process=0", "--processes=2"])
def test_options_without_effect_are_refused(songs, tmp_path, option):
    with pytest.raises(UserError, match="is not for Beam"):
        by_beam.main([str(songs), "-o", str(tmp_path / "out"), option])
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_a_file_is_refused(songs):
    with pytest.raises(UserError, match=r"bad.wav is a file; -o must name a folder"):
        by_beam.main([str(songs), "-o", str(songs / "bad.wav")])


def test_what_ends_a_pipeline_is_one_sentence_and_a_signal_is_left_to_the_process():
    lines = "Traceback (most recent call last):\n  File x, in y\n{} [while running 'separate']\n"
    for error, words in (
        (
            RuntimeError(lines.format("RuntimeError: OSError: [Errno 28] No space left")),
            r"OSError: \[Errno 28\] No space",
        ),
        (RuntimeError(lines.format("msr_jax.errors.UserError: it is full")), "it is full"),
        (UserError("it is full [while running 'lines']"), "it is full"),
        (PermissionError(13, "Permission denied", "/here/.out.tmp"), "Permission denied"),
    ):
        with pytest.raises(UserError, match=f"^cannot write: {words}[a-z ]*$"), running("cannot write"):
            raise error
    with pytest.raises(UserError, match=r"^none can be used$"), running("cannot write"):
        raise UserError("none can be used")
    with pytest.raises(RuntimeError), running("cannot write"):
        raise RuntimeError("KeyboardInterrupt [while running 'separate']")


def test_a_name_that_is_not_utf8_passes_between_stages(songs, tiny_model, tmp_path):
    song = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    shutil.copy(songs / "0" / "song.wav", song)
    (task,) = find_tasks([song], tmp_path / "out")
    key, line = by_beam._separated(
        by_beam._packed(task), [str(song), "-o", str(tmp_path / "out"), "--model", str(tiny_model), "--refine", "none"]
    )
    row = json.loads(line)
    assert line.isascii() and row["source"] == str(song) and row["error"] is None
    by_beam._write_lines((key, [line]), str(tmp_path / "[lines"))
    assert json.loads((tmp_path / "[lines").read_text()) == row


def test_a_task_s_row_is_that_of_the_command(songs, tiny_model, tmp_path):
    argv = [str(songs), "-o", str(tmp_path / "out"), "--model", str(tiny_model), "--refine", "none"]
    rows = [by_beam.separate_task(task, argv) for task in find_tasks([songs], tmp_path / "out")]
    assert msr(["separate", *argv, "--overwrite", "--manifest", str(tmp_path / "m.jsonl")]) == 1
    told = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    timeless = lambda row: {k: v for k, v in row.items() if k != "work_seconds"}
    assert [timeless(row) for row in rows] == [timeless(row) for row in told] and len(rows) == 4


def test_batches_are_added_to_a_manifest_wherever_it_is_and_another_file_is_left_alone(songs, tiny_model, tmp_path):
    pytest.importorskip("apache_beam", reason="pip install 'msr_jax[beam]'")
    shutil.copy(songs / "0" / "song.wav", os.fsencode(songs) + b"/caf\xe9.wav")
    out = tmp_path / "live [1]"
    argv = ["-o", str(out), "--model", str(tiny_model), "--refine", "none"]
    assert by_beam.main([str(songs / "0"), *argv]) == 0
    for _ in range(2):
        assert by_beam.main([str(songs), *argv]) == 1
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and len([row for row in rows if row["error"]]) == 1  # song 0 has two places
    assert not [path for path in out.iterdir() if path.suffix == ".tmp" or "beam" in path.name]
    with pytest.raises(UserError, match=r"bad.wav is no manifest"):
        by_beam.main([str(songs), *argv, "--manifest", str(songs / "bad.wav")])
    assert (songs / "bad.wav").read_text() == "no audio"
    with pytest.raises(UserError, match=r"--shfts is no option of msr_jax.separate.beam, nor of Beam"):
        by_beam.main([str(songs), *argv, "--shfts=4"])


def test_several_workers_separate_every_song_once(songs, tiny_model, tmp_path, capsys):
    pytest.importorskip("apache_beam", reason="pip install 'msr_jax[beam]'")
    out = tmp_path / "out"
    argv = [str(songs), "-o", str(out), "--model", str(tiny_model), "--refine", "none"]
    beams = ["--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    assert by_beam.main([*argv, *beams]) == 1
    assert "3 of 4 songs" in capsys.readouterr().out
    rows = {row["source"]: row for row in map(json.loads, (out / "manifest.jsonl").read_text().splitlines())}
    assert len(rows) == 4 and sum(row["error"] is not None for row in rows.values()) == 1
    assert msr(["separate", argv[0], "-o", str(tmp_path / "alone"), *argv[3:]]) == 1
    for row in rows.values():
        for path in row["stems"].values():
            alone = path.replace(str(out), str(tmp_path / "alone"))
            assert open(path, "rb").read() == open(alone, "rb").read()
