"""Songs by Apache Beam: the stems and rows of `msr separate`."""

import json

import numpy as np
import pytest
import soundfile

from msr_jax.cli import main as msr
from msr_jax.errors import UserError
from msr_jax.separate import beam as by_beam
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
    assert by_beam.split_options([*ours, "--runner=DirectRunner"]) == (ours, ["--runner=DirectRunner"])
    assert by_beam.split_options([*ours, "--", "--direct_num_workers", "4"]) == (ours, ["--direct_num_workers", "4"])
    with pytest.raises(UserError, match="--direct_num_workers is no option of msr separate; Beam's follow a lone --"):
        by_beam.split_options([*ours, "--direct_num_workers", "4"])


def test_a_task_s_row_is_that_of_the_command(songs, tiny_model, tmp_path):
    from msr_jax.separate.catalogue import find_tasks

    argv = [str(songs), "-o", str(tmp_path / "out"), "--model", str(tiny_model), "--refine", "none"]
    rows = [by_beam.separate_task(task, argv) for task in find_tasks([songs], tmp_path / "out")]
    assert msr(["separate", *argv, "--overwrite", "--manifest", str(tmp_path / "m.jsonl")]) == 1
    told = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    timeless = lambda row: {k: v for k, v in row.items() if k != "work_seconds"}
    assert [timeless(row) for row in rows] == [timeless(row) for row in told] and len(rows) == 4


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
