"""Benchmarks run and write what others read."""

import json
import textwrap
from pathlib import Path

import pytest

from msr_jax.bench import separate
from msr_jax.bench.roformers import SHAPES, count_flops, sizes_of
from msr_jax.bench.separate import Run
from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.weights.model_folder import load_model
from tests import toy

TOY = toy.__file__


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


def test_the_training_benchmark_relates_the_step_to_a_measured_product(tmp_path, capsys):
    argv = ["bench", "train", "--tiny", "--config", TOY, "--batch", "4", "--repeats", "2"]
    assert main([*argv, "--json", str(tmp_path / "b.json")]) == 0
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    rate = row["flops_per_device"] / row["seconds"]
    assert row["utilisation_of_matmul"] == pytest.approx(rate / row["matmul_flops_per_second"])
    assert row["batch"] == 4 and row["seconds"] > 0 and row["mfu"] is None  # no data sheet of a CPU
    assert "of the measured matrix product" in capsys.readouterr().out


def test_the_dispatch_benchmark_has_a_row_for_each_number_of_steps(tmp_path):
    assert main(["bench", "dispatch", "--tiny", "--repeats", "1", "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dispatch_1", "dispatch_10", "dispatch_100"]
    assert all(row["steps_per_second"] == pytest.approx(1 / row["seconds"]) for row in rows)


def test_an_older_build_s_engines_take_their_turns(tmp_path):
    folder = tmp_path / "old" / "msr_jax" / "bench"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    program = """
        import json, sys
        print(json.dumps({"parameters": 1}), flush=True)
        for _ in sys.stdin:
            print(1000.0, 1, flush=True)  # builds that measured no rates yet
    """
    (folder / "unet.py").write_text(textwrap.dedent(program))
    rows = {r["name"]: r for r in bench(tmp_path, "--no-peer", "--against", str(tmp_path / "old"))["rows"]}
    assert list(rows) == ["unet_float32", "unet_bfloat16", "unet_float32_older", "unet_bfloat16_older"]
    for name in ("unet_float32", "unet_bfloat16"):
        assert rows[name]["speedup_over_older"] == pytest.approx(1000 / rows[name]["seconds"])
        assert rows[name + "_older"]["seconds"] == 1000 and rows[name + "_older"]["speedup_over_older"] is None


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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["unet", "--config", "x"], "--config goes with train, not with unet"),
        (["train", "--batch", "-3"], "--batch must be at least 1"),
        (["separate", "--seconds", "inf"], "--seconds must be at least 0.1"),
        (["dispatch", "--json", "."], "cannot write .: Is a directory"),
    ],
)
def test_what_a_benchmark_cannot_take_is_said_before_it_measures(options, says, capsys):
    assert main(["bench", *options, "--tiny"]) == 2
    assert says in capsys.readouterr().err


def test_the_evaluation_benchmark_measures_ours_against_museval(tmp_path):
    argv = ["bench", "evaluate", "--json", str(tmp_path / "b.json"), "--tiny", "--repeats", "1"]
    assert main(argv) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    assert list(rows) == ["bss_eval", "si_sdri", "peer_museval"]
    assert rows["bss_eval"]["speedup_over_peer"] == pytest.approx(
        rows["peer_museval"]["seconds"] / rows["bss_eval"]["seconds"]
    )
    assert len(rows["bss_eval"]["all_seconds"]) == 2 and rows["si_sdri"]["speedup_over_peer"] is None


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
    assert len(sizes) == 4 and max(sizes) > 1.5 * min(sizes)


@pytest.mark.slow  # `roformers` is measured the same way
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


def test_the_mel_band_roformer_s_operations_are_those_of_the_published_formula():
    assert count_flops(sizes_of("mel_384_6"), SHAPES["mel_384_6"].segment) == pytest.approx(2 * 1553e9, rel=0.002)


def test_the_roformers_benchmark_measures_the_public_networks(tmp_path, monkeypatch):
    monkeypatch.setattr("msr_jax.bench.roformers.SHAPES", {"mel_384_6": SHAPES["mel_384_6"]})
    path = tmp_path / "b.json"
    assert main(["bench", "roformers", "--json", str(path), "--tiny", "--repeats", "1", "--no-peer"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["mel_384_6_float32", "mel_384_6_bfloat16"]
    assert all(row["share_of_matmul_rate"] > 0 and row["computed_in"] in ("float32", "bfloat16") for row in rows)
    assert main(["bench", "roformers", "--seconds", "0", "--no-peer"]) == 2


def test_separation_is_measured_beside_an_older_build(tmp_path, monkeypatch):
    """The processes are stood in for: each would start JAX anew."""
    seen = []

    def run(build, songs, out, refine, byte_code):
        there = [song.exists() for song in songs]
        seen.append((build.sources and build.sources.name, build.home.name, refine, there, build.options))
        is_older = build.home.name.endswith("_older")
        return Run(*((2.0, 2.0, 3.0, 10**9) if is_older else (1.0, 0.5, 1.5, 10**8)))

    monkeypatch.setattr(separate, "run_build", run)
    (tmp_path / "old" / "msr_jax").mkdir(parents=True)
    argv = ["bench", "separate", "--tiny", "--repeats", "1", "--against", str(tmp_path / "old")]
    assert main([*argv, "--json", str(tmp_path / "b.json")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    cases = ["none_3s", "consistency_3s", "first_run_3s", "second_run_3s"]
    long, short = ("", "_one_mask", "_older"), ("", "_older")
    assert list(rows) == [case + ending for case in cases for ending in (short if "run" in case else long)]
    own = [row for name, row in rows.items() if not name.endswith("_older")]
    assert all(row["speedup_over_peer"] == 2 and row["rtf"] == pytest.approx(1 / 3) for row in own)
    assert [options for *_, options in seen if options] == [("--one-mask",)] * 4
    assert rows["consistency_3s"]["share_of_matmul_rate"] > 2 * rows["none_3s"]["share_of_matmul_rate"] > 0
    assert all(all(songs) for *_, songs, _ in seen) and {"old", Path(separate.__file__).parents[2].name} == {
        s[0] for s in seen
    }


def test_a_build_runs_in_its_own_process_and_its_failure_is_a_sentence(tmp_path):
    sources = tmp_path / "other"
    (sources / "msr_jax").mkdir(parents=True)
    (sources / "msr_jax" / "__init__.py").write_text("")
    program = """
        import os, pathlib, sys
        def main():
            if "bad" in sys.argv[2]:
                sys.exit("no such song")
            folder = pathlib.Path(sys.argv[sys.argv.index("-o") + 1]) / "song"
            folder.mkdir(parents=True)
            (folder / "bass.wav").write_text(os.environ["MSR_HOME"])
    """
    (sources / "msr_jax" / "cli.py").write_text(textwrap.dedent(program))
    build = separate.older_build(str(sources), tmp_path)
    done = separate.run_build(build, [tmp_path / "song.wav"], tmp_path / "out", "none", tmp_path / "byte_code")
    assert 0 < done.first_stem <= done.seconds and done.cpu > 0 and done.peak > 1e6
    assert (tmp_path / "out" / "song" / "bass.wav").read_text() == str(build.home)
    with pytest.raises(UserError, match="exit code 1: no such song"):
        separate.run_build(build, [tmp_path / "bad.wav"], tmp_path / "out", "none", tmp_path / "byte_code")
    with pytest.raises(UserError, match="neither a folder nor a commit"):
        separate.older_build("no-such-commit", tmp_path)


def test_a_song_through_the_official_network_is_measured_in_both_precisions(tmp_path, monkeypatch):
    seen = []

    def run(build, songs, out, refine, byte_code):
        seen.append(build.options[build.options.index("--dtype") + 1])
        assert load_model(build.options[1]).config["segment"] == 4410
        return Run(1.0, 0.5, 1.5, 10**8)

    monkeypatch.setattr("msr_jax.bench.song.run_build", run)
    monkeypatch.setattr("msr_jax.bench.song.limit_threads", lambda: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which it sets: given back afterwards
    argv = ["bench", "song", "--tiny", "--repeats", "1", "--no-peer", "--json", str(tmp_path / "b.json")]
    assert main(argv) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["song_float32", "song_bfloat16"]
    assert seen == ["float32", "bfloat16"] * 2  # the first of each for its compiled programs


@pytest.mark.torch
def test_the_bs_roformer_s_peer_runs_beside_it(tmp_path):
    pytest.importorskip("bs_roformer")
    path = tmp_path / "b.json"
    assert main(["bench", "bs_roformer", "--json", str(path), "--tiny", "--repeats", "1"]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["bs_roformer_float32"]["speedup_over_peer"] > 0 and "peer_float32" in rows


@pytest.mark.torch
def test_the_song_s_peer_reads_our_weights_and_writes_stems(tmp_path, monkeypatch):
    pytest.importorskip("bs_roformer")
    monkeypatch.setattr("msr_jax.bench.song.limit_threads", lambda: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    path = tmp_path / "b.json"
    assert main(["bench", "song", "--json", str(path), "--tiny", "--repeats", "1"]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["song_float32"]["speedup_over_peer"] > 0 and rows["peer_float32"]["first_stem_seconds"] > 0
