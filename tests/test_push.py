"""Blocks that are pushed come back as stems: all of them, in time, and the same as of the whole song."""

import threading

import jax
import numpy as np
import pytest

import msr_jax
from msr_jax.errors import UserError
from msr_jax.separate.ensemble import Ensemble
from tests.conftest import TINY_RATE


def song(samples, channels=1, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal((samples, channels)).astype(np.float32)


@pytest.mark.parametrize("rate", [TINY_RATE, 11_025, 44_100])
@pytest.mark.parametrize(
    "options", [{}, {"overlap": 0.25, "shifts": 2}, {"mixture_consistent": True}, "ensemble"], ids=str
)
def test_no_stem_is_behind_by_more_than_the_latency(make_copier, rate, options):
    if options == "ensemble":
        separator = Ensemble([make_copier(overlap=0.1), make_copier(segments=2)], by="median-spectra")
    else:
        separator = make_copier(**options)
    x, rng = song(4 * rate, 2), np.random.default_rng(1)
    pusher, parts, pushed, done = separator.pusher(rate, 2), [], 0, 0
    worst = 0
    while pushed < len(x):
        block = x[pushed : pushed + int(rng.choice([1, 50, 700, rate // 2]))]
        pushed += len(block)
        parts.append(pusher.push(block))
        done += len(parts[-1]["bass"])
        worst = max(worst, pushed - done)
    assert worst <= pusher.latency < 1.6 * worst
    parts.append(pusher.close())
    whole = list(separator.stream([x], rate))
    for stem in separator.stems:
        found, expected = (np.concatenate([part[stem] for part in some]) for some in (parts, whole))
        assert len(found) == len(x)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rate", [2.0 * TINY_RATE, np.float64(11_025), 11_025.5])
@pytest.mark.parametrize("is_ensemble", [False, True])
def test_a_rate_may_be_a_fraction_wherever_one_is_taken(make_copier, rate, is_ensemble):
    separator = Ensemble([make_copier(), make_copier()]) if is_ensemble else make_copier()
    x = song(int(rate), 2)
    pusher = separator.pusher(rate, 2)
    assert pusher.latency == pytest.approx(separator.pusher(round(rate), 2).latency, abs=2)
    pushed = np.concatenate([pusher.push(x)["bass"], pusher.close()["bass"]])
    for found in (pushed, np.concatenate([part["bass"] for part in separator.stream([x], rate)])):
        np.testing.assert_allclose(found, separator.separate(x, rate)["bass"], atol=1e-5)


@pytest.mark.parametrize("seconds", [0.05, 0.5, 1.5, 4])
def test_a_stream_of_unknown_length_gives_what_the_whole_song_gives(make_copier, seconds):
    separator = make_copier(segments=4)
    x = song(int(seconds * TINY_RATE), 2)
    expected = separator.separate(x, TINY_RATE)
    pusher = separator.pusher(TINY_RATE, 2)
    parts = [pusher.push(block) for block in np.split(x, range(50, len(x), 50))] + [pusher.close()]
    for found in (parts, list(separator.stream(np.split(x, [33]), TINY_RATE))):
        for stem in separator.stems:
            np.testing.assert_array_equal(np.concatenate([part[stem] for part in found]), expected[stem])


def test_a_mono_stream_is_flat_where_its_blocks_are(make_copier):
    with make_copier().pusher(TINY_RATE) as pusher:
        assert pusher.push(song(5000)[:, 0])["bass"].ndim == 1
        assert pusher.push(np.zeros(0, np.float32))["bass"].shape == (0,)
        assert pusher.push(song(5000))["bass"].shape[1] == 1


def test_a_caller_may_fill_one_buffer_again_and_again(make_copier):
    x, pusher, buffer = song(6000), make_copier().pusher(TINY_RATE), np.zeros((500, 1), np.float32)
    parts = []
    for at in range(0, len(x), 500):
        buffer[:] = x[at : at + 500]
        parts.append(pusher.push(buffer)["bass"])
    parts.append(pusher.close()["bass"])
    np.testing.assert_allclose(np.concatenate(parts), make_copier().separate(x, TINY_RATE)["bass"], atol=1e-6)


def test_the_blocks_of_a_stream_may_be_one_array_filled_anew(make_copier):
    """As `soundfile.blocks(path, out=buffer)` gives them."""
    x, buffer = song(6000), np.zeros((500, 1), np.float32)

    def blocks():
        for at in range(0, len(x), 500):
            buffer[:] = x[at : at + 500]
            yield buffer

    separator = make_copier()
    parts = list(separator.stream(blocks(), TINY_RATE))
    whole = separator.separate(x, TINY_RATE)
    for stem in separator.stems:
        np.testing.assert_allclose(np.concatenate([part[stem] for part in parts]), whole[stem], atol=1e-6)


def test_rates_and_samples_come_as_array_packages_have_them(make_copier):
    x, separator = song(3000), make_copier()
    expected = separator.separate(x, TINY_RATE)["bass"]
    np.testing.assert_array_equal(separator.separate(x, np.array(TINY_RATE))["bass"], expected)
    narrow = separator.separate(jax.numpy.asarray(x, jax.numpy.bfloat16), jax.numpy.array(TINY_RATE))["bass"]
    np.testing.assert_allclose(narrow, expected, atol=1e-2)

    class Tensor:
        def __array__(self, *_, **__):
            raise RuntimeError("it requires grad\nand more")

    with pytest.raises(UserError, match=r"^audio cannot be read as an array \(it requires grad\)$"):
        separator.separate(Tensor(), TINY_RATE)


def test_what_is_wrong_is_said_and_nothing_waits_for_ever(make_copier):
    separator = make_copier()
    pusher = separator.pusher(TINY_RATE, 2)
    with pytest.raises(UserError, match="1 channels, but the stream has 2"):
        pusher.push(song(10))
    pusher.push(song(10, 2))
    assert len(pusher.close()["bass"]) == 10
    with pytest.raises(UserError, match="closed"):
        pusher.push(song(10, 2))
    assert len(separator.pusher(TINY_RATE).close()["bass"]) == 0

    def fails(chunks, first):
        raise RuntimeError("out of memory")

    separator._run_chunks = fails
    pusher = separator.pusher(TINY_RATE)
    with pytest.raises(RuntimeError, match="out of memory"):
        pusher.push(song(20_000))
    with pytest.raises(UserError, match="closed"):
        pusher.push(song(10))


def test_a_pusher_that_is_dropped_leaves_no_thread(make_copier):
    before = threading.active_count()
    pusher = make_copier().pusher(TINY_RATE)
    pusher.push(song(100))
    thread = next(t for t in threading.enumerate() if t.name.endswith("(_work)"))
    del pusher
    thread.join(10)
    assert threading.active_count() == before


def test_blocks_of_a_stream_tell_their_channels(make_copier):
    separator, x = make_copier(), song(5000, 2)
    found = np.concatenate([part["bass"] for part in separator.stream([x[:10], x[10:]], TINY_RATE)])
    np.testing.assert_allclose(found, separator.separate(x, TINY_RATE)["bass"], atol=1e-6)
    assert list(separator.stream([], TINY_RATE)) == []
    flat = np.concatenate([part["bass"] for part in separator.stream([x[:, 0]], TINY_RATE)])
    assert flat.shape == (5000, 1)
    odd = (([x, x[:, :1]], "a block has 1 channels"), ([x.astype(int)], "floating-point"), (x, "several arrays"))
    for blocks, words in odd:
        with pytest.raises(UserError, match=words):
            list(separator.stream(blocks, TINY_RATE))


def test_two_threads_share_a_separator(tiny_model):
    separator = msr_jax.load(tiny_model, "consistency", num_steps=1)
    songs = [song(7000, 2, seed=k) for k in range(2)]
    alone = [separator.separate(x, TINY_RATE) for x in songs]
    shared = msr_jax.load(tiny_model, "consistency", num_steps=1)  # compiles with both waiting for it
    found = [[], []]

    def work(k):
        for _ in range(2):
            found[k].append(shared.separate(songs[k], TINY_RATE))
        pusher = shared.pusher(TINY_RATE, 2)
        found[k].append(pusher.push(songs[k]))
        pusher.close()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        for stem, audio in alone[k].items():
            assert all(np.array_equal(stems[stem], audio) for stems in found[k][:2])
            live = found[k][2][stem]
            np.testing.assert_allclose(live, audio[: len(live)], atol=1e-5)
