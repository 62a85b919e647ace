"""Comparisons tell what is real from what is not, on the same tracks only."""

import json

import numpy as np
import pytest

from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.evaluate.compare import compare, interval, read_results
from msr_jax.evaluate.protocols import METRICS


def results(gain=0.0, tracks=20, seed=0, protocol="song", channels=2):
    """Results whose tracks differ by decibels among each other, and by `gain` and a little noise from seed to seed."""
    rng = np.random.default_rng(seed)
    level = np.random.default_rng(99).normal(5, 4, tracks)
    scores = lambda t: {s: (level[t] + gain * (s == "a") + rng.normal(0, 0.2, 8)).tolist() for s in "ab"}
    found = {f"track{t}": {m: scores(t) for m in METRICS} for t in range(tracks)}
    settings = {
        "stems": ["a", "b"],
        "protocol": protocol,
        "sample_rate": 8000,
        "channels": channels,
        "split": "test",
        "bss_backend": "jax",
    }
    return {"tracks": found, "settings": settings, "aggregate": {}}


def test_a_gain_far_below_the_spread_of_tracks_is_seen_where_it_is():
    found = {(d.metric, d.stem): d for d in compare(results(), results(0.5, seed=1))}
    gained, same = found["sdr", "a"], found["sdr", "b"]
    assert gained.verdict == "real" and gained.low < 0.5 < gained.high and gained.tracks == 20
    assert same.verdict != "real" and same.low < 0.1 and same.high > -0.1
    assert found["si_sdri_active", "average"].mean == pytest.approx(0.25, abs=0.1)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for tracks in (5, 40):
        held = [low < 0 < high for low, high in (interval(rng.normal(0, 1, tracks), 0.95) for _ in range(2000))]
        assert 0.93 < np.mean(held) < 0.97


@pytest.mark.parametrize("tracks", [5, 8, 20])
def test_of_results_that_differ_by_chance_alone_one_comparison_in_twenty_says_real(tracks):
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        noise = lambda: {m: {s: [float(rng.normal())] for s in "ab"} for m in METRICS}
        a, b = ({**results(tracks=0), "tracks": {f"track{t}": noise() for t in range(tracks)}} for _ in range(2))
        wrong += any(d.verdict == "real" for d in compare(a, b))
    assert wrong <= 20


def test_an_average_is_over_the_stems_that_both_results_have():
    lacking = results(seed=1)
    for track in lacking["tracks"].values():
        track["sir"]["b"] = []
    found = {d.stem: d for d in compare(results(), lacking, ["sir"])}
    assert found["average"].mean == found["a"].mean and abs(found["a"].mean) < 1


def test_few_tracks_decide_nothing():
    assert {d.verdict for d in compare(results(tracks=4), results(3, tracks=4, seed=1))} == {"too few tracks"}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (results(protocol="paper"), "differ in protocol"),
        (results(channels=1), "differ in channels"),
        (results() | {"settings": {**results()["settings"], "split": "validation"}}, "differ in split"),
        (results() | {"settings": {**results()["settings"], "bss_backend": "museval"}}, "differ in bss_backend"),
        (results() | {"tracks": {}}, "no track in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, words):
    with pytest.raises(UserError, match=words):
        compare(results(), other)


def test_older_results_do_not_tell_their_channels_and_are_compared():
    older = results()
    del older["settings"]["channels"]
    assert compare(older, results(seed=1))


def test_the_command_reads_folders_names_what_does_not_match_and_writes(tmp_path, capsys):
    for name, told in (("a", results()), ("b", results(0.5, tracks=18, seed=1))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(told))
    argv = ["compare", str(tmp_path / "a"), str(tmp_path / "b" / "results.json"), "--json", str(tmp_path / "c.json")]
    assert main([*argv, "--metrics", "sdr"]) == 0
    said = capsys.readouterr().out
    assert "track18, track19" in said and "| SDR (dB) | a | 18 | +0." in said and "real" in said
    (told,) = json.loads((tmp_path / "c.json").read_text())
    assert told["unmatched"] == ["track18", "track19"] and len(told["differences"]) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: told.update(tracks=[1]), "lacks tracks"),
        (lambda told: told["settings"].update(stems=None), "name no stems"),
        (lambda told: told["tracks"].update(track1=None), "no results.json"),
        (lambda told: told["tracks"]["track1"]["sdr"].pop("b"), "sdr of track1 is not a list of numbers"),
        (lambda told: told["tracks"]["track1"].update(sir=3.5), "no results.json"),
        (lambda told: told["tracks"]["track1"].update(sar={"a": [1], "b": ["441"]}), "sar of track1 is not a list"),
        (lambda told: told["tracks"]["track1"].pop("sdr"), "track1 has no sdr"),
    ],
)
def test_results_that_were_changed_by_hand_are_a_sentence(tmp_path, capsys, change, words):
    for name in ("a", "b"):
        told = results()
        if name == "b":
            change(told)
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert words in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_bad_input_gets_one_sentence(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "good.json").write_text(json.dumps(results()))
    good, other = str(tmp_path / "good.json"), str(tmp_path / "other.json")
    for argv, words in (
        ([good], "two results"),
        ([good, other], "is no results.json"),
        ([good, str(tmp_path / "none.json")], "is no results.json"),
        ([good, good, "--metrics", "loudness"], "no metric 'loudness'"),
    ):
        assert main(["compare", *argv]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    assert read_results(tmp_path / "good.json")["settings"]["stems"] == ["a", "b"]
