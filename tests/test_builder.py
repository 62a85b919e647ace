"""The preparation by Apache Beam writes what the local one writes."""

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
