"""The preparation by Apache Beam writes what the local one writes."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from data_prep.builder import main
from data_prep.slakh2100 import main as prepare_locally
from data_prep.verify import verify
from msr_jax.data.records import RecordSource, read_manifest
from tests.test_slakh2100 import CROP, slakh_corpus


def test_without_beam_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam.options.pipeline_options", None)
    assert main(["slakh2100", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "msr_jax[beam]" in capsys.readouterr().err


def test_it_starts_as_a_program():
    done = subprocess.run([sys.executable, "-m", "data_prep.builder", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "slakh2100" in done.stdout, done.stderr[-500:]


@pytest.mark.parametrize("option", ["--workers", "--shard-bytes", "--validation", "--sed"])
def test_options_without_effect_are_refused(tmp_path, capsys, option):
    assert main(["slakh2100", str(tmp_path), str(tmp_path / "out"), option, "5"]) == 2
    assert f"{option} is no option of data_prep.builder" in capsys.readouterr().err


def test_what_cannot_be_prepared_ends_in_one_sentence(tmp_path, capsys):
    pytest.importorskip("apache_beam", reason="pip install 'msr_jax[beam]'")
    corpus = slakh_corpus(tmp_path / "corpus")
    (tmp_path / "file").touch()
    for path in (corpus / "test").rglob("*.flac"):
        path.write_bytes(b"")
    for out, words in (
        (tmp_path / "file" / "out", "cannot write records to .*file/out: Not a directory"),
        (tmp_path / "out", "none of the 1 tracks of test can be used; the first: .*S00.flac is an empty file"),
    ):
        assert main(["slakh2100", str(corpus), str(out), "--crop", str(CROP)]) == 2
        assert re.fullmatch(f"data_prep.builder: {words}", capsys.readouterr().err.splitlines()[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "file"]
    assert main(["slakh2100", str(corpus), str(tmp_path / "out"), "--sed=5"]) == 2
    assert "--sed is no option of data_prep.builder, nor of Beam" in capsys.readouterr().err


def test_a_name_that_is_not_utf_8_is_prepared_by_beam_too(tmp_path, capsys):
    pytest.importorskip("apache_beam", reason="pip install 'msr_jax[beam]'")
    corpus = slakh_corpus(tmp_path / "corpus")
    os.rename(corpus / "test" / "Track00003", os.fsencode(corpus / "test") + b"/caf\xe9")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "records")
    assert main(["slakh2100", str(corpus), str(tmp_path / "out"), "--crop", str(CROP)]) == 0
    assert read_manifest(tmp_path / "disk" / "records")["tracks"]["test"][0][0] == "caf\\xe9"


def test_beams_local_runner_writes_the_same_records_in_the_same_order(tmp_path, capsys):
    pytest.importorskip("apache_beam", reason="pip install 'msr_jax[beam]'")
    corpus = slakh_corpus(tmp_path / "corpus")
    (corpus / "train" / "Track00001" / "stems" / "S00.flac").write_bytes(b"")
    assert prepare_locally([str(corpus), str(tmp_path / "local"), "--crop", str(CROP), "--workers", "1"]) == 0
    assert main(["slakh2100", str(corpus), str(tmp_path / "beam"), "--crop", str(CROP)]) == 0
    assert "train: 2 of 3 tracks" in capsys.readouterr().out
    one, two = (read_manifest(tmp_path / name) for name in ("local", "beam"))
    assert {k: one[k] for k in one if k not in ("plan", "shards")} == {
        k: two[k] for k in two if k not in ("plan", "shards")
    }
    for split in ("train", "test"):
        ours, theirs = (RecordSource(tmp_path / name, split) for name in ("local", "beam"))
        assert len(ours) == len(theirs)
        for k in range(len(ours)):
            a, b = ours[k], theirs[k]
            assert all(np.array_equal(a[name], b[name]) for name in a), k
    assert verify(tmp_path / "beam")[1] == []
