"""Results put together: shards of several machines, two passes side by side, real time factors, the mixture of any data set."""

import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from msr_jax.data.tracks import find_tracks
from msr_jax.evaluate import systems
from msr_jax.evaluate.score import Plan, evaluate_tracks, summary
from tests.conftest import launch_script
from tests.test_evaluate import MUSDB, RATE, results_in, run, stereo_song, two_tools


@pytest.mark.parametrize(("broken", "in_run", "in_det"), [("refined", 1, 1), ("none", 2, 1)])
def test_a_deterministic_estimate_is_compared_on_the_tracks_that_both_have(
    short_corpus, toy_model, tmp_path, monkeypatch, capsys, broken, in_run, in_det
):
    real = systems.model_runs

    def runs(model, refine, *rest, **options):
        _, plan, first = real(model, refine, *rest, **options)
        is_broken = (refine == "none") == (broken == "none")
        bad = lambda folder: is_broken and folder.name == "Track00001"
        return [lambda folder, references: (references * (np.nan if bad(folder) else 0.5), [])], plan, first

    monkeypatch.setattr(systems, "model_runs", runs)
    argv = ("--data", short_corpus, "--model", toy_model, "--refine", "consistency", "--steps", 1, "--out", tmp_path)
    assert run(*argv) == (broken == "refined")
    results = results_in(tmp_path)
    assert len(results["tracks"]) == in_run and list(results["deterministic"]["tracks"]) == ["Track00000"]
    if broken == "refined":  # nothing differs but the tracks
        assert results["deterministic"]["aggregate"] == results["aggregate"]
    for text in (capsys.readouterr().out, (tmp_path / "report.html").read_text()):
        said = "deterministic estimate of 1 tracks was not scored: its figures are of the others"
        assert (said in text) == (in_det < in_run)
    assert ("on 1 of the 2 tracks" in (tmp_path / "report.html").read_text()) == (in_det < in_run)


def test_the_real_time_factor_leaves_out_every_track_that_paid_for_compilation(tmp_path):
    for k in range(4):
        stereo_song(tmp_path / "data" / f"song {k}", seconds=1, channels=1, seed=k)
    tracks, plan = find_tracks(tmp_path / "data", MUSDB), Plan(MUSDB, RATE)

    def compiled():
        waits = [1.0]

        def estimate(folder, references):
            time.sleep(waits.pop() if waits else 0)
            return 0.5 * references, []

        return estimate

    for shard in range(2):  # a process each
        evaluate_tracks(tracks[shard::2], [compiled()], plan, tmp_path / "kept")
    scored, problems, kept = evaluate_tracks(tracks, [compiled()], plan, tmp_path / "kept")
    assert kept == 4 and [track["first"] for track in scored.values()] == [True, True, False, False]
    assert 0 < summary(scored, problems, plan)["rtf"] < 0.2
    alone = {"song 0": scored["song 0"]}
    assert summary(alone, [], plan)["rtf"] is None
    old = [{k: v for k, v in scored[f"song {n}"].items() if k != "first"} for n in (0, 2)]
    assert summary({"a": old[0]}, [], plan)["rtf"] >= 1
    assert summary({"a": old[0], "b": old[1]}, [], plan)["rtf"] < 0.2


def test_the_time_to_read_files_is_no_real_time_factor(tmp_path, capsys):
    a, _ = two_tools(tmp_path, ("song", "song 2"))
    assert run(*a) == 0
    assert results_in(tmp_path / "out")["rtf"] is None
    assert "Real time factor: –" in (tmp_path / "out" / "results.md").read_text()
    assert run("--data", tmp_path / "references", "--out", tmp_path / "mixture") == 0
    assert results_in(tmp_path / "mixture")["rtf"] is None
    capsys.readouterr()
    launch_script("study/table").main(tmp_path, ["mixture"])
    assert capsys.readouterr().out.strip().endswith("| – |")


def test_shards_of_other_devices_are_joined_and_what_is_scored_anew_says_why(tmp_path, monkeypatch, capsys):
    a, _ = two_tools(tmp_path, ("song", "song 2"))
    here = [device.device_kind for device in jax.local_devices()]
    assert run(*a, "--shard", "1/2") == 0
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(jax, "local_devices", lambda: [SimpleNamespace(device_kind="another chip")])
        assert run(*a, "--shard", "2/2") == 0
    assert run(*a) == 0
    said = capsys.readouterr().out
    assert "2 of 2 tracks were scored before" in said and "anew" not in said
    results = results_in(tmp_path / "out")
    assert results["settings"]["devices"] == sorted({*here, "another chip"})
    assert results["tracks"]["song 2"]["devices"] == ["another chip"]
    assert run(*a, "--stems", "bass,drums") == 0
    assert "2 of 2 tracks have scores of other stems: scored anew" in capsys.readouterr().out
    stereo_song(tmp_path / "A" / "song", ["bass", "drums"], seconds=1, channels=1, seed=9)
    assert run(*a, "--stems", "bass,drums") == 0
    assert "1 of 2 tracks have scores of other files: scored anew" in capsys.readouterr().out
    (tmp_path / "out" / "tracks" / "song.json").write_text('{"stamp": 1}')
    assert run(*a, "--stems", "bass,drums") == 0


def test_the_mixture_is_scored_for_the_stems_that_a_data_set_has(tmp_path):
    stereo_song(tmp_path / "data" / "song")
    assert run("--data", tmp_path / "data", "--out", tmp_path / "all") == 0
    settings = results_in(tmp_path / "all")["settings"]
    assert (settings["stems"], settings["channels"], settings["sample_rate"]) == (MUSDB, 2, RATE)
    assert run("--data", tmp_path / "data", "--stems", "vocals", "--out", tmp_path / "one") == 0
    results = results_in(tmp_path / "one")
    assert results["settings"]["stems"] == ["vocals", "rest"]
    assert all(abs(v) < 1e-6 for v in results["aggregate"]["si_sdri_active"].values())
