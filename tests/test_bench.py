"""Benchmarks run and write what others read."""

import json

import pytest

from msr_jax.bench.bs_roformer import count_flops
from msr_jax.cli import main


def bench(tmp_path, *options):
    assert main(["bench", "unet", "--json", str(tmp_path / "b.json"), "--tiny", "--repeats", "2", *options]) == 0
    return json.loads((tmp_path / "b.json").read_text())


def test_the_unet_benchmark_writes_machine_and_rows(tmp_path, capsys):
    result = bench(tmp_path, "--no-peer")
    assert "cores" in result["machine"]
    assert [row["name"] for row in result["rows"]] == ["unet_float32", "unet_bfloat16"]
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["peak_memory_bytes"] > 1e7 and row["speedup_over_peer"] is None
    assert "unet_bfloat16" in capsys.readouterr().out


@pytest.mark.torch
def test_the_peer_has_the_same_number_of_parameters(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("audio_diffusion_pytorch")
    result = bench(tmp_path)
    assert len({row["parameters"] for row in result["rows"]}) == 1
    assert all(row["speedup_over_peer"] > 0 for row in result["rows"][:2])


def test_without_the_peer_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "unet", "--tiny"]) == 2
    assert "msr_jax[torch]" in capsys.readouterr().err


def test_the_bs_roformer_benchmark_adds_its_measures(tmp_path, capsys):
    path = tmp_path / "b.json"
    assert main(["bench", "bs_roformer", "--json", str(path), "--tiny", "--repeats", "1", "--no-peer"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["bs_roformer_float32", "bs_roformer_bfloat16"]
    for row in rows:
        assert row["seconds"] > 0 and row["peak_memory_bytes"] > 1e7 and row["speedup_over_peer"] is None
        assert row["rtf"] == pytest.approx(row["seconds"] / 0.1) and 0 < row["share_of_matmul_rate"] < 1
    assert "RTF" in capsys.readouterr().out


def test_flops_of_the_official_segment_are_those_of_the_specification():
    from msr_jax.config import bsrf_base

    assert count_flops(bsrf_base().model.to_dict(), 485_100) == pytest.approx(5.82e12, rel=0.002)


@pytest.mark.torch
def test_the_bs_roformer_s_peer_runs_beside_it(tmp_path):
    pytest.importorskip("bs_roformer")
    path = tmp_path / "b.json"
    assert main(["bench", "bs_roformer", "--json", str(path), "--tiny", "--repeats", "1"]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["bs_roformer_float32"]["speedup_over_peer"] > 0 and "peer_float32" in rows
