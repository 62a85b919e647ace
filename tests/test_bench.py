"""Benchmarks run and write what others read."""

import json

import pytest

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


def test_the_data_benchmark_has_both_tracks_their_stages_and_the_sweep(tmp_path):
    assert main(["bench", "data", "--json", str(tmp_path / "b.json"), "--tiny", "--repeats", "1"]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    for track in ("unet", "bsrf"):
        for stage in ("read_record", "read_crop", "to_float", "example", "stream_2_workers"):
            assert rows[f"{track}_{stage}"]["crops_per_second"] > 0
        assert rows[f"{track}_example"]["cores_for_an_h200"] > 0
    assert rows["bsrf_example_pitch_and_stretch"]["seconds"] > rows["bsrf_example"]["seconds"]
    assert rows["bsrf_compiled_augmentations"]["seconds"] > 0
    sizes = [row["bytes_over_source"] for name, row in rows.items() if "_sweep_" in name]
    assert len(sizes) == 12 and max(sizes) > 1.5 * min(sizes)
