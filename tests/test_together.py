"""Runs that are averaged: of one model over shifts, and of several models."""

import copy
import json
import threading

import numpy as np
import pytest
import soundfile

import msr_jax
from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.separate.chunks import abreast, shared
from msr_jax.separate.ensemble import BY, Ensemble, load_ensemble, parse_member, weighted_median
from msr_jax.separate.interface import AudioSeparator
from tests.conftest import TINY_RATE, TINY_SEGMENT

STEMS = ["bass", "drums", "guitar", "piano"]


def song(samples, channels=1, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal((samples, channels)).astype(np.float32)


class Gain(AudioSeparator):
    """Gives stems of 1, 2, … times `gain` of the song, in blocks of its own length."""

    def __init__(self, gain=1.0, block=777, stems=STEMS):
        self.gain, self.block, self.stems = gain, block, list(stems)

    def _flow(self, blocks, sample_rate, channels, frames=None, progress=None, is_live=False):
        whole = np.concatenate(list(blocks))
        for at in range(0, len(whole), self.block):
            part = whole[at : at + self.block]
            yield {stem: np.float32((k + 1) * self.gain) * part for k, stem in enumerate(self.stems)}

    def latency(self, sample_rate):
        return self.block


def test_streams_abreast_give_what_all_of_them_have():
    x = np.arange(30, dtype=np.float32).reshape(1, 30, 1)
    asked = []

    def cut(name, *lengths):
        for at, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            asked.append(name)
            yield x[:, at : at + length]

    out = list(abreast([cut("a", 20, 10), cut("b", 3, 3, 3, 11, 10), cut("c", 30)]))
    np.testing.assert_array_equal(np.concatenate(out, 2), np.stack([x, x, x]))
    assert "".join(asked) == "abcbbbab"  # the one that is behind


def test_readers_in_threads_of_their_own_get_the_same_items():
    readers, found = shared(iter(range(1000)), 3), [[], [], []]

    def read(k):
        for item in readers[k]:
            found[k].append(item)

    threads = [threading.Thread(target=read, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(range(1000))] * 3


def test_shifts_are_undone_to_the_sample_and_follow_from_the_seed(make_copier):
    x = song(3 * TINY_SEGMENT + 5, 2)
    for overlap in (0, 0.25):
        for stem, audio in make_copier(shifts=3, overlap=overlap).separate(x, TINY_RATE).items():
            expected = make_copier(overlap=overlap).separate(x, TINY_RATE)[stem]
            np.testing.assert_allclose(audio, expected, atol=1e-6)
    moves = [make_copier(shifts=4, seed=seed)._shifts(1000) for seed in (0, 0, 1)]
    assert moves[0] == moves[1] != moves[2]
    assert moves[0] == sorted(moves[0]) and moves[0][0] == 0 and 750 <= moves[0][3] < 1000


def test_the_mean_over_shifts_is_that_of_the_network_s_runs(separator):
    x = song(2 * TINY_SEGMENT)
    two, again = copy.copy(separator), copy.copy(separator)
    two.shifts = again.shifts = 2
    shift = two._shifts(TINY_SEGMENT // 2)[1]
    moved = separator.separate(np.concatenate([np.zeros((shift, 1), np.float32), x]), TINY_RATE)
    still, found, anew = (some.separate(x, TINY_RATE) for some in (separator, two, again))
    for stem in STEMS:
        assert np.array_equal(found[stem], anew[stem]) and not np.allclose(found[stem], still[stem], atol=1e-5)
    inner = slice(TINY_SEGMENT, -TINY_RATE // 4)  # away from where the song's offset is measured at its ends
    expected = (still["bass"] + moved["bass"][shift:]) / 2
    assert np.abs(found["bass"] - expected)[inner].max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("by", BY)
def test_models_count_by_their_weights(by):
    x = song(30_000, 2)
    together = Ensemble([Gain(1.0), Gain(3.0, 5000), Gain(8.0, 29_999)], [1, 1, 2], by)
    gain = 5.0 if by.startswith("mean") else 5.5  # of two halves of the weight, between 3 and 8
    for k, audio in enumerate(together.separate(x, TINY_RATE).values()):
        np.testing.assert_allclose(audio, (k + 1) * gain * x, atol=2e-5)


def test_spectra_of_models_that_disagree_in_phase_keep_their_level():
    x = song(20_000)
    opposed = [Gain(1.0), Gain(-0.5), Gain(0.9)]
    for by, level in (("mean", 1.4 / 3), ("mean-spectra", 2.4 / 3), ("median", 0.9), ("median-spectra", 0.9)):
        found = Ensemble(opposed, by=by).separate(x, TINY_RATE)["bass"]
        np.testing.assert_allclose(found, level * x, atol=2e-5)


def test_one_model_is_its_own_ensemble_and_the_rest_is_the_song_less_all():
    x = song(3000)
    for by in ("mean", "median"):
        alone, together = Gain().separate(x, TINY_RATE), Ensemble([Gain()], by=by).separate(x, TINY_RATE)
        assert all(np.array_equal(alone[stem], together[stem]) for stem in STEMS)
    for options in ({"residual": "rest"}, {"mixture_consistent": True}):
        stems = Ensemble([Gain(), Gain(2.0)], by="median", **options).separate(x, TINY_RATE)
        np.testing.assert_allclose(sum(stems.values()), x, atol=1e-5)


def test_models_at_other_rates_are_one_ensemble(make_copier):
    t = np.arange(2 * TINY_RATE)[:, None] / TINY_RATE
    x = 0.3 * np.sin(2 * np.pi * 440 * t).astype(np.float32)
    found = Ensemble([make_copier(), make_copier(sample_rate=11_025)]).separate(x, TINY_RATE)["bass"]
    inner = slice(TINY_RATE // 4, -TINY_RATE // 4)
    np.testing.assert_allclose(found[inner], x[inner], atol=1e-3)


def test_medians_are_those_of_the_values():
    values = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    for count in (1, 2, 3, 4, 5):
        found = weighted_median(values[:count], np.full(count, 1 / count))
        np.testing.assert_allclose(found, np.median(values[:count], 0), rtol=1e-6)
    np.testing.assert_array_equal(weighted_median(values[:3], np.array([0.6, 0.2, 0.2])), values[0])


def test_members_are_written_with_their_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:2").mkdir()
    assert (str(parse_member("a/b:0.5").model), parse_member("a/b:0.5").weight) == ("a/b", 0.5)
    assert [parse_member(text).weight for text in ("a", "a:2", "run:2", "c:/models")] == [1, 2, 1, 1]
    for text in ("a:0", "a:-1", "a:nan", ":2"):
        with pytest.raises(UserError, match=f"not '{text}'"):
            parse_member(text)


def test_models_with_other_stems_are_no_ensemble(tiny_model):
    with pytest.raises(UserError, match=r"same stems, but one has .*piano and another bass; .* --stems"):
        Ensemble([Gain(), Gain(stems=["bass"])])
    with pytest.raises(UserError, match="not 'max'"):
        Ensemble([Gain()], by="max")
    with pytest.raises(UserError, match="weight above 0"):
        Ensemble([Gain()], [0])
    with pytest.raises(UserError, match="weight above 0"):
        Ensemble([Gain()], ["2"])
    with pytest.raises(UserError, match="another name"):
        Ensemble([Gain()], residual="bass")
    with pytest.raises(UserError, match="where all of them are there"):
        load_ensemble([tiny_model, tiny_model], refine="none", stems=["bass"], mixture_consistent=True)
    with pytest.raises(UserError, match="at least 1 shift"):
        load_ensemble([tiny_model], shifts=0)
    both = load_ensemble([tiny_model, (tiny_model, 2.0)], refine="none", stems=["drums", "bass"])
    assert both.stems == ["bass", "drums"] and both.weights.tolist() == [1 / 3, 2 / 3]


@pytest.mark.parametrize(
    "members", ["bundled", None, [None], [("bundled", "2")], [("bundled",)], [("bundled", -1)]], ids=str
)
def test_what_is_no_list_of_members_is_said_before_any_is_loaded(members):
    with pytest.raises(UserError, match=r"^(the members of an ensemble are a list|a member of an ensemble is a model)"):
        load_ensemble(members)


def test_the_command_averages_and_says_so(tiny_model, tmp_path, capsys):
    x = song(5000, 2)
    soundfile.write(tmp_path / "song.wav", x, TINY_RATE, subtype="FLOAT")
    command = ["separate", str(tmp_path / "song.wav"), "--refine", "none", "-o", str(tmp_path / "out")]
    together = ["--shifts", "2", "--ensemble", f"{tiny_model}:2", str(tiny_model), "--ensemble-by", "median"]
    assert main([*command, *together, "--stems", "bass", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["model"] == f"{tiny_model}:2 + {tiny_model}"
    assert row["settings"]["shifts"] == 2 and row["settings"]["ensemble_by"] == "median"
    alone = msr_jax.load(tiny_model, "none", shifts=2, stems=["bass"]).separate(x, TINY_RATE)["bass"]
    np.testing.assert_allclose(soundfile.read(row["stems"]["bass"])[0], alone, atol=1e-6)
    assert main([*command, *together, "--model", str(tiny_model)]) == 2
    assert "leave --model out" in capsys.readouterr().err
    assert main([*command, "--ensemble-by", "median"]) == 2
    assert "--ensemble-by goes with --ensemble" in capsys.readouterr().err
    assert (
        main([*command, "--coordinator", "localhost:1", "--processes", "2", "--process", "1"]) == 0
    )  # of a single song
    assert not (tmp_path / "out" / "song" / "drums.wav").exists()
