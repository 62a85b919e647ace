"""Evaluation: conventions for silence, strict results, and what is refused."""

import json

import numpy as np
import pytest

from msr_jax.cli import main
from msr_jax.data.tracks import find_tracks, load_track
from msr_jax.infer.evaluate import evaluate, mixture_as_estimate
from msr_jax.metrics.bss_eval import bss_eval, museval_metrics
from msr_jax.metrics.si_sdr import score_windows, si_sdr, windows

STEMS = ["bass", "drums", "guitar", "piano"]
RATE = 8000


def test_si_sdr_ignores_scale_and_knows_orthogonal_noise():
    rng = np.random.default_rng(0)
    s, n = rng.standard_normal((2, 8000))
    n -= (n @ s) / (s @ s) * s
    n *= np.linalg.norm(s) / np.linalg.norm(n) / 10
    assert si_sdr(3 * (s + n), s) == pytest.approx(20, abs=1e-6)
    assert si_sdr(s, s) > 80


def test_windows_are_four_seconds_every_two_and_the_last_is_cut():
    assert [(w.start, w.stop) for w in windows(262_144, 22_050)][-1] == (4 * 2 * 22_050, 262_144)
    assert len(list(windows(262_144, 22_050))) == 5
    assert len(list(windows(2 * 22_050, 22_050))) == 0


def test_the_mixture_improves_nothing_and_conventions_differ_in_silence_alone(corpus):
    tracks = find_tracks(corpus / "test", STEMS)
    results = evaluate(mixture_as_estimate(STEMS), tracks, STEMS, RATE)
    for metric in ("si_sdri_active", "si_sdri_msdm"):
        assert all(abs(v) < 1e-6 for v in results["aggregate"][metric].values())
    # The second track has no guitar: its windows count in one convention and not in the other.
    active, msdm = (results["counts"][m] for m in ("si_sdri_active", "si_sdri_msdm"))
    assert active["guitar"] * 2 == msdm["guitar"] == msdm["bass"] == active["bass"]
    # The stem that is silent throughout does not take the others' SDR with it.
    assert results["counts"]["sdr"]["guitar"] * 2 == results["counts"]["sdr"]["bass"] == 26


def test_estimates_at_60_db_score_so_in_every_measure(corpus):
    tracks = find_tracks(corpus / "test", STEMS)[:1]
    references = load_track(tracks[0], STEMS, RATE)
    noise = np.random.default_rng(0).standard_normal(references.shape)
    near = references + 1e-3 * np.sqrt(np.square(references).mean(-1, keepdims=True)) * noise
    aggregate = evaluate(lambda mixture, rate: dict(zip(STEMS, near, strict=True)), tracks, STEMS, RATE)["aggregate"]
    assert aggregate["si_sdri_active"]["average"] > 50 and aggregate["sdr"]["average"] > 50


def test_windows_with_fewer_than_two_active_stems_are_left_out():
    references = np.zeros((4, 1, 10 * RATE))
    references[0] = np.random.default_rng(0).standard_normal((1, 10 * RATE))
    assert len(score_windows(references, references, RATE).start) == 0
    references[1, :, 5 * RATE :] = references[0, :, 5 * RATE :]
    assert (score_windows(references, references, RATE).start >= 2 * RATE).all()


def test_museval_runs_without_ffmpeg_and_solves_singular_systems(monkeypatch):
    monkeypatch.setenv("PATH", "")
    museval_metrics.cache_clear()
    x = np.random.default_rng(0).standard_normal((1, 1, 2 * RATE))
    twins = np.concatenate([x, x])  # the same reference twice: no unique filters
    estimates = twins + 0.1 * np.random.default_rng(1).standard_normal(twins.shape)
    np.testing.assert_allclose(bss_eval(estimates, twins, RATE).sdr, 20, atol=1)


def test_the_command_writes_strict_results(corpus, tmp_path, capsys):
    assert main(["evaluate", "--data", str(corpus), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "taking the split test" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    for metric in ("si_sdri_active", "si_sdri_msdm", "sdr"):
        assert list(results["aggregate"][metric]) == [*STEMS, "average"]
    assert results["settings"]["tracks"] == 2 and "versions" in results["settings"]
    assert "| SDR (dB) |" in (tmp_path / "out" / "results.md").read_text()


def test_a_model_is_evaluated(corpus, tiny_model, tmp_path):
    argv = [
        "evaluate",
        "--data",
        str(corpus / "test"),
        "--model",
        str(tiny_model),
        "--refine",
        "consistency",
        "--steps",
        "1",
    ]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["refine"] == "consistency" and results["rtf"] > 0


def test_bad_input_gets_one_sentence(corpus, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for data, out, words in (
        (tmp_path / "none", tmp_path / "out", "is no folder"),
        (tmp_path / "empty", tmp_path / "out", "holds no tracks"),
        (corpus, tmp_path / "file" / "out", "cannot write to --out"),
    ):
        assert main(["evaluate", "--data", str(data), "--out", str(out)]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
        assert not (out / "results.json").exists()
