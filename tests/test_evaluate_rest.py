"""A model, or estimates, of some of the stems are scored on the mixture of all: what nobody asked for is scored together."""

import numpy as np
import pytest
import soundfile

from msr_jax.config import MUSDB_STEMS as MUSDB
from msr_jax.errors import UserError
from msr_jax.evaluate.score import evaluate
from msr_jax.evaluate.songs import REST, check_all_stems, others_of
from tests.test_evaluate import RATE, results_in, run, stereo_song


@pytest.fixture
def song(tmp_path):
    """A reference track, and estimates of its stems that are 20 dB near."""
    stereo_song(tmp_path / "references" / "song", seconds=8)
    for k, stem in enumerate(MUSDB):
        audio, _ = soundfile.read(tmp_path / "references" / "song" / f"{stem}.wav")
        noise = 0.01 * np.random.default_rng(k).standard_normal(audio.shape)
        (tmp_path / "estimates" / "song").mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "estimates" / "song" / f"{stem}.wav", audio + noise, RATE, subtype="FLOAT")
    return tmp_path


def test_one_stem_s_figures_against_the_mixture_are_those_that_it_has_among_all(song, capsys):
    command = ("--references", song / "references", "--estimates", song / "estimates")
    assert run(*command, "--out", song / "all") == 0
    assert run(*command, "--out", song / "one", "--stems", "vocals") == 0
    assert "drums, bass, other are in the mixture too: scored together as 'rest'" in capsys.readouterr().out
    whole, one = (results_in(song / name)["tracks"]["song"] for name in ("all", "one"))
    for metric in ("si_sdri_active", "si_sdri_msdm", "si_sdr", "snr", "log_wmse"):
        np.testing.assert_allclose(one[metric]["vocals"], whole[metric]["vocals"], atol=1e-4)
    np.testing.assert_allclose(np.median(one["sdr"]["vocals"]), 20, atol=0.5)
    assert results_in(song / "one")["settings"]["stems"] == ["vocals", REST]
    # The rest is the mixture less the vocals: its error is theirs, and it is three times as strong.
    np.testing.assert_allclose(
        np.mean(one["si_sdr"][REST]), np.mean(one["si_sdr"]["vocals"]) + 10 * np.log10(3), atol=0.1
    )


@pytest.mark.parametrize("protocol", ["song", "msdm", "paper"])
def test_a_separator_of_one_stem_hears_the_mixture_of_all(song, protocol):
    stereo_song(song / "long" / "song", seconds=12)
    tracks, heard = [song / "long" / "song"], []

    def separate(mixture, rate):
        heard.append(mixture)
        return {"vocals": mixture / 4}

    found = evaluate(separate, tracks, ["vocals"], RATE, 2, protocol)
    total = sum(soundfile.read(tracks[0] / f"{stem}.wav")[0] for stem in MUSDB)
    length = min(len(heard[0]), len(total))
    np.testing.assert_allclose(heard[0][:length], total[:length], atol=1e-6)
    assert list(found["aggregate"]["si_sdr"]) == ["vocals", REST, "average"]


def test_a_file_of_the_rest_is_taken_where_there_is_one(song):
    soundfile.write(song / "estimates" / "song" / "rest.wav", np.full((8 * RATE, 2), 0.1), RATE)
    command = ("--references", song / "references", "--estimates", song / "estimates", "--stems", "vocals")
    run(*command, "--out", song / "one")
    assert np.mean(results_in(song / "one")["tracks"]["song"]["si_sdr"][REST]) < 0


def test_data_of_one_s_own_has_the_stems_that_are_asked_for(tmp_path):
    stereo_song(tmp_path / "song", ["voice", "noise"])
    assert others_of(tmp_path, ["voice"]) == []
    stereo_song(tmp_path / "two" / "song", ["bass", "vocals"])
    assert others_of(tmp_path / "two", ["bass", "vocals"]) == []


def test_a_stem_that_is_the_sum_of_others_is_one_of_a_partition_of_one_s_own(song):
    track = song / "references" / "song"
    total = sum(soundfile.read(track / f"{stem}.wav")[0] for stem in MUSDB)
    soundfile.write(track / "instrumental.wav", total - soundfile.read(track / "vocals.wav")[0], RATE, subtype="FLOAT")
    assert others_of(song / "references", ["vocals", "instrumental"]) == []
    heard = []
    separate = lambda mixture, rate: heard.append(mixture) or {"vocals": mixture / 2, "instrumental": mixture / 2}
    evaluate(separate, [track], ["vocals", "instrumental"], RATE, 2)
    np.testing.assert_allclose(heard[0], total, atol=1e-6)


def test_a_stem_of_one_s_own_that_is_called_rest_is_not_made_up(tmp_path, capsys):
    stereo_song(tmp_path / "references" / "song", ["speech", "rest"])
    stereo_song(tmp_path / "estimates" / "song", ["speech"])
    command = (
        "--references",
        tmp_path / "references",
        "--estimates",
        tmp_path / "estimates",
        "--out",
        tmp_path / "out",
    )
    assert run(*command, "--stems", "rest,speech") == 2
    assert "lacks the estimates of rest" in capsys.readouterr().err


def test_data_that_are_not_there_are_named(toy_model, tmp_path, capsys):
    assert run("--data", tmp_path / "nowhere", "--model", toy_model, "--out", tmp_path / "out") == 2
    assert "nowhere is no folder; name one that holds track folders" in capsys.readouterr().err


def test_a_stem_of_that_name_and_commands_that_need_all_stems_are_refused(song):
    with pytest.raises(UserError, match="a stem called 'rest' leaves no name"):
        others_of(song / "references", ["vocals", "rest"])
    with pytest.raises(UserError, match="has drums, bass, other in its mixtures too"):
        check_all_stems(song / "references", ["vocals"])
