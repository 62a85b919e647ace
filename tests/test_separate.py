"""Separation: chunks and overlap-add lose nothing, whatever the length, rate, channels or batch."""

import json
import shutil
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

import msr_jax
from msr_jax.errors import UserError
from msr_jax.separate.chunks import cut_chunks, overlap_add, run_groups
from msr_jax.separate.engine import Separator
from msr_jax.separate.mixture import Shares, without_offset
from msr_jax.separate.network import Network
from msr_jax.weights.model_folder import load_model, save_model
from tests.conftest import TINY_RATE, TINY_SEGMENT

RATE = TINY_RATE
STEMS = ["bass", "drums", "guitar", "piano"]


def song(samples, channels=1, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal((samples, channels)).astype(np.float32)


@pytest.fixture
def copier(separator, monkeypatch):
    """A separator whose network returns the mixture times 1, 2, 3 and 4: what its surroundings change is what is seen."""
    gains = np.arange(1, 5, dtype=np.float32)[:, None, None]
    monkeypatch.setattr(separator, "_run_chunks", lambda chunks, first: chunks[:, None] * gains)
    return separator


@pytest.mark.parametrize("overlap", [0, 10, 25, 50])
@pytest.mark.parametrize("group", [1, 3])
def test_overlap_add_of_the_identity_is_the_identity(overlap, group):
    for samples in (1, 5, 99, 100, 101, 175, 176, 250, 1000):
        x = song(samples, 2)
        blocks = (x[i : i + 37] for i in range(0, samples, 37))
        chunks = cut_chunks(blocks, 100, 100 - overlap)
        twice = lambda c, first: np.stack([c, 2 * c], 1)
        out = np.concatenate(list(overlap_add(run_groups(chunks, twice, group), 100, overlap)), 1)
        np.testing.assert_allclose(out, np.stack([x, 2 * x]), atol=1e-6)


def test_neighbouring_chunks_are_cross_faded():
    numbered = lambda chunks, first: np.broadcast_to(
        np.arange(first, first + len(chunks), dtype=np.float32)[:, None, None, None], chunks[:, None].shape
    )
    out = np.concatenate(list(overlap_add(run_groups(cut_chunks([song(250)], 100, 75), numbered, 2), 100, 25)), 1)[
        0, :, 0
    ]
    assert (out[:75] == 0).all() and (out[100:150] == 1).all() and (out[175:] == 2).all()
    np.testing.assert_allclose(np.diff(out[74:101]), 1 / 26, rtol=1e-5)


def test_what_is_final_comes_before_the_next_chunk_is_run():
    run = []
    network = lambda chunks, first: run.append(first) or chunks[:, None]
    blocks = overlap_add(run_groups(cut_chunks([song(250)], 100, 75), network, 1), 100, 25)
    assert [(block.shape[1], len(run)) for block in blocks] == [(75, 1), (75, 2), (100, 3)]


def test_the_last_chunk_is_full():
    starts = [(start, length) for start, length, _ in cut_chunks([song(2100)], 1000, 750)]
    assert starts == [(0, 1000), (750, 1000), (1100, 1000)]


def test_memory_does_not_grow_with_the_song(copier):
    def peak(minutes):
        blocks = (np.zeros((44_100, 2), np.float32) for _ in range(60 * minutes))
        tracemalloc.start()
        done = sum(len(part["bass"]) for part in copier.stream(blocks, 44_100, 2))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert done == 60 * minutes * 44_100
        return most

    short, long = peak(1), peak(5)
    four_minutes = 4 * 60 * RATE * 2 * 4  # bytes at the model's rate: the least that any stage would keep more of
    assert long - short < four_minutes / 4  # how full the queues between threads get is chance, up to their few blocks
    assert long < 16e6  # the song itself: 106 MB


@pytest.mark.parametrize("samples", [1, 700, TINY_SEGMENT, 3 * TINY_SEGMENT + 17])
def test_stems_have_the_song_s_shape(separator, samples):
    for audio in (song(samples)[:, 0], song(samples, 2)):
        stems = separator.separate(audio, RATE)
        assert list(stems) == STEMS
        assert all(s.shape == audio.shape and s.dtype == np.float32 and np.isfinite(s).all() for s in stems.values())


@pytest.mark.parametrize("rate", [6000, 44_100, 48_000])
def test_at_other_rates_stems_stay_in_time_with_the_song(copier, rate):
    t = np.arange(3 * rate + 1) / rate
    audio = np.stack([0.5 * np.sin(2 * np.pi * 440 * t), 0.3 * np.cos(2 * np.pi * 1000 * t)], 1).astype(np.float32)
    inside = slice(rate // 20, -rate // 20)  # a tone that begins at once rings a little in any resampler
    for gain, stem in enumerate(copier.separate(audio, rate).values(), 1):
        assert stem.shape == audio.shape
        np.testing.assert_allclose(stem[inside] / gain, audio[inside], atol=1e-4)


@pytest.mark.parametrize("rate", [6000, 48_000, 192_000])
@pytest.mark.parametrize("samples", [1, 2, 777])
def test_the_shortest_songs_keep_their_length_at_any_rate(copier, rate, samples):
    assert {s.shape for s in copier.separate(song(samples, 3), rate).values()} == {(samples, 3)}


def test_the_result_does_not_depend_on_the_batch_and_the_seed_decides_the_noise(tiny_model):
    mixture = song(2 * TINY_SEGMENT, 2)
    load = lambda size: msr_jax.load(tiny_model, refine="consistency", num_steps=2, batch_size=size)
    single, many = load(3), load(16)
    one, all_at_once = single.separate(mixture, RATE), many.separate(mixture, RATE)
    many.seed = 1
    other = many.separate(mixture, RATE)
    for stem in STEMS:
        np.testing.assert_allclose(one[stem], all_at_once[stem], atol=1e-5)
    assert np.abs(one["bass"] - other["bass"]).max() > 1e-4


def test_one_compilation_serves_every_length_and_channel_count(tiny_model):
    separator = msr_jax.load(tiny_model, "none")
    separator.separate(song(10), RATE)
    for samples, channels in ((1, 1), (TINY_SEGMENT + 1, 2), (5 * TINY_SEGMENT, 3)):
        separator.separate(song(samples, channels), RATE)
    assert separator.network.lengths() == [TINY_SEGMENT] and len(separator.network._programs) == 1


def test_channels_are_separated_each_on_its_own(separator):
    mixture = song(TINY_SEGMENT, 2)
    both, left = separator.separate(mixture, RATE), separator.separate(mixture[:, 0], RATE)
    np.testing.assert_allclose(both["piano"][:, 0], left["piano"], atol=1e-5)


def test_the_best_refinement_is_the_default_and_a_missing_one_is_named(tiny_model, tmp_path):
    assert msr_jax.load(tiny_model).refine == "consistency"
    poor = shutil.copytree(tiny_model, tmp_path / "poor")
    config = json.loads((poor / "config.json").read_text())
    (poor / "config.json").write_text(json.dumps({**config, "networks": ["deterministic"]}))
    assert msr_jax.load(poor).refine == "none"
    with pytest.raises(UserError, match="cannot refine by diffusion: its folder holds the networks deterministic"):
        msr_jax.load(poor, refine="diffusion")


def test_bad_arguments_are_refused(tiny_model, separator):
    for options, words in (
        ({"refine": "magic"}, "refine must be one of"),
        ({"num_steps": 0}, "at least 1"),
        ({"num_steps": 2.0}, r"a whole number, at least 1, not 2\.0$"),
        ({"num_steps": "2"}, "at least 1, not '2'$"),
        ({"refine": "none", "num_steps": 2}, "a number of steps goes with"),
        ({"seed": 2**32}, "seed must lie between"),
        ({"overlap": 0.6}, "overlap must lie between"),
        ({"overlap": "0.5"}, "overlap must lie between .* not '0.5'$"),
        ({"stems": "bass"}, "stems is a list of names"),
        ({"stems": 5}, "stems is a list of names"),
        ({"stems": []}, "no stem is named"),
        ({"shifts": 1.5}, "at least 1 shift"),
        ({"memory": -1}, "memory must be a whole number above 0"),
    ):
        with pytest.raises(UserError, match=words):
            msr_jax.load(tiny_model, **options)
    with pytest.raises(UserError, match=r"^a model is named by its folder .* not by None$"):
        msr_jax.load(None)
    for audio, rate, words in (
        (np.zeros(0), RATE, "at least one sample"),
        (np.zeros((4, 2, 2)), RATE, "must be"),
        (np.array([0.0, np.nan]), RATE, "NaN"),
        (np.zeros(100, np.int16), RATE, "floating-point"),
        (np.zeros((2, 5000)), RATE, "transposed"),
        (np.zeros(100), 0, "rate must be positive"),
        (np.zeros(100), np.nan, "rate must be positive"),
        (np.zeros(100), "44100", "rate must be positive"),
    ):
        with pytest.raises(UserError, match=words):
            separator.separate(audio, rate)


@pytest.mark.parametrize("rate", [RATE, 6000, 22_050])
def test_stems_add_up_to_the_song_at_any_rate_on_request(tiny_model, rate):
    mixture = song(2 * TINY_SEGMENT, 2) + 0.02
    free, bound, rest = (
        msr_jax.load(tiny_model, "none", **options).separate(mixture, rate)
        for options in ({}, {"mixture_consistent": True}, {"residual": "other"})
    )
    assert np.abs(sum(free.values()) - mixture).max() > 0.01
    for stems in (bound, rest):
        assert np.abs(sum(stems.values()) - mixture).max() < 1e-5  # -80 dB of its level, by stems that are louder
    assert list(rest) == [*STEMS, "other"]
    assert all((rest[stem] == free[stem]).all() for stem in STEMS)


def test_one_stem_cannot_add_up_but_has_a_residual(tiny_model):
    model = load_model(tiny_model)
    alone = model._replace(config={**model.config, "stems": ["bass"]})
    with pytest.raises(UserError, match="gives the mixture itself as bass"):
        Separator(alone, "none", mixture_consistent=True)
    for options, words in (
        ({"residual": "Bass"}, "another name than the stems"),
        ({"residual": "../other"}, "a file's name without a folder, not '../other'"),
        ({"residual": "other", "mixture_consistent": True}, "add up to the song already"),
    ):
        with pytest.raises(UserError, match=words):
            msr_jax.load(tiny_model, **options)


def test_what_is_missing_goes_to_the_loud_stems():
    stems = np.zeros((3, 1000, 1), np.float32)
    stems[0], stems[1] = 2.0, 1.0
    shares = Shares(RATE)
    done = [
        shares.add(stems[:, :700], np.full((700, 1), 8, np.float32)),
        shares.add(stems[:, 700:], np.full((300, 1), 8, np.float32), is_last=True),
    ]
    assert done[0].shape[1] < 700
    shared = np.concatenate(done, 1)
    for stem, value in zip(shared, (2 + 5 * 0.8, 1 + 5 * 0.2, 0), strict=True):
        np.testing.assert_allclose(stem, value, rtol=1e-6)
    lost = Shares(RATE).add(0 * stems, np.ones((1000, 1), np.float32), is_last=True)
    np.testing.assert_allclose(lost.sum(0), 1, rtol=1e-6)


def test_an_offset_does_not_reach_the_network(separator, copier):
    t = np.arange(3 * RATE) / RATE
    tone = 0.3 * np.sin(2 * np.pi * 50 * t)
    drifting = tone + 0.02 + 0.01 * np.sin(2 * np.pi * 0.2 * t)
    for audio in (tone, tone + 0.02):
        assert abs(copier.separate(audio, RATE)["bass"].mean()) < 1e-4
    for audio in (tone, tone + 0.02, drifting):  # (what drifts is held at the ends)
        found = copier.separate(audio, RATE)["bass"]
        np.testing.assert_allclose(found[RATE:-RATE], tone[RATE:-RATE], atol=1e-3)
    short = copier.separate((tone + 0.02)[: RATE // 4], RATE)["bass"]
    assert abs(short.mean()) < 1e-4
    blocks = [(tone + 0.02).astype(np.float32)[at : at + 777, None] for at in range(0, len(tone), 777)]
    parts = np.concatenate([part["bass"] for part in copier.stream(blocks, RATE, 1)])
    np.testing.assert_allclose(parts[:, 0], copier.separate(tone + 0.02, RATE)["bass"], atol=1e-6)


def test_an_offset_that_belongs_to_notes_reaches_the_network(copier):
    notes = 0.1 + 0.3 * (np.arange(3 * RATE) // (RATE // 8) % 2)  # four a second, all above zero
    found = copier.separate(notes, RATE)["bass"]
    np.testing.assert_allclose(found[RATE:-RATE], notes[RATE:-RATE] - notes.mean(), atol=0.01)


@pytest.mark.parametrize("rate", [RATE, 22_050])
def test_silence_stays_exactly_silent(tiny_model, rate):
    noise = 0.1 * np.random.default_rng(0).standard_normal((4 * rate, 2)).astype(np.float32)
    quiet = slice(rate, 2 * rate + 17)
    noise[quiet] = 0
    noise[-rate // 2 :] = 0
    noise[3 * rate : 3 * rate + 5] = 0  # no silence
    noise[2 * rate + 100, 0] = 0
    for stems in (
        msr_jax.load(tiny_model, "consistency", num_steps=1).separate(noise, rate),
        msr_jax.load(tiny_model, "none", residual="other").separate(noise, rate),
    ):
        for audio in stems.values():
            assert not audio[quiet].any() and not audio[-rate // 2 :].any()
            assert audio[3 * rate : 3 * rate + 5].all() and audio[: rate - 1].any()
    nothing = msr_jax.load(tiny_model, "consistency", num_steps=1).separate(np.zeros(rate), rate)
    assert not any(audio.any() for audio in nothing.values())


def test_the_identity_network_gives_the_song_back_less_its_offset(separator, monkeypatch):
    same = lambda one_by_one: lambda weights, mixture, place, seed: jnp.stack([mixture] * 4, 1)
    monkeypatch.setattr(separator, "network", Network(same, {}, 4))
    for rate, overlap in ((RATE, 0.5), (22_050, 0.0625), (44_100, 0.0)):
        monkeypatch.setattr(separator, "sample_rate", rate)
        monkeypatch.setattr(separator, "overlap", overlap)
        for samples in (1, 7, TINY_SEGMENT - 1, TINY_SEGMENT, TINY_SEGMENT + 1, 3 * TINY_SEGMENT + 5, 20_011):
            x = song(samples, 2, samples)
            expected = np.concatenate(list(without_offset([x], rate)))
            for audio in separator.separate(x, rate).values():
                assert np.abs(audio - expected).max() <= 1e-6 * np.abs(x).max()


def test_neither_blocks_nor_the_order_of_songs_change_a_bit(separator):
    songs = [song(3 * TINY_SEGMENT, 2), song(TINY_SEGMENT + 100, 2)[::-1]]
    first = [separator.separate(x, RATE) for x in songs]
    again = [separator.separate(x, RATE) for x in songs[::-1]][::-1]
    for x, one, other in zip(songs, first, again, strict=True):
        blocks = [x[at : at + 333] for at in range(0, len(x), 333)]
        parts = list(separator.stream(blocks, RATE, frames=len(x)))
        for stem in STEMS:
            np.testing.assert_array_equal(one[stem], other[stem])
            np.testing.assert_array_equal(one[stem], np.concatenate([part[stem] for part in parts]))


def test_chunks_are_as_many_segments_as_the_model_says_and_a_short_song_needs(tiny_model, tmp_path):
    long = msr_jax.load(tiny_model, "none", segments=4, overlap=0.125)
    segments = lambda needed: long._chunk(needed * TINY_SEGMENT)[0] // TINY_SEGMENT
    assert [segments(n) for n in (0.01, 1, 1.01, 2.5, 4, 4.01, 500)] == [1, 1, 2, 4, 4, 4, 4]
    assert long._chunk(None) == (4 * TINY_SEGMENT, TINY_SEGMENT // 2)
    model = load_model(tiny_model)
    save_model(tmp_path / "named", model.config | {"default_segments": 2, "default_overlap": 0.25}, model.weights)
    assert msr_jax.load(tmp_path / "named")._chunk(None) == (2 * TINY_SEGMENT, TINY_SEGMENT // 2)
    assert msr_jax.load(tmp_path / "named", segments=1, overlap=0.5)._chunk(None) == (TINY_SEGMENT, TINY_SEGMENT // 2)
    save_model(tmp_path / "odd", model.config | {"default_segments": 1.5}, model.weights)
    with pytest.raises(UserError, match=r"default_segments 1\.5"):
        msr_jax.load(tmp_path / "odd")
    with pytest.raises(UserError, match="at least 1 segment"):
        msr_jax.load(tiny_model, segments=0)


def test_a_song_too_loud_for_the_model_is_refused_and_not_separated_into_nan(tiny_model):
    noise = np.random.default_rng(0).standard_normal(3000)
    separator = msr_jax.load(tiny_model, "none")
    with pytest.raises(UserError, match="gives NaN or infinite samples"):
        separator.separate(1e25 * noise, TINY_RATE)
    with pytest.raises(UserError, match="NaN or inf"):
        separator.separate(1e300 * noise, TINY_RATE)


def test_without_overlap_joints_are_cross_faded_over_five_milliseconds(tiny_model):
    assert msr_jax.load(tiny_model, overlap=0)._chunk(None) == (TINY_SEGMENT, RATE * 5 // 1000)


def test_bfloat16_is_close_to_float32(separator, tiny_model, bfloat16_units):
    x = song(3 * TINY_SEGMENT, 2)
    exact = separator.separate(x, RATE)
    rounded = msr_jax.load(tiny_model, refine="none", dtype="bfloat16").separate(x, RATE)
    for stem in STEMS:
        difference = np.linalg.norm(rounded[stem] - exact[stem]) / np.linalg.norm(exact[stem])
        assert 0 < difference < 0.015
