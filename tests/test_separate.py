"""Separation: chunks and overlap-add lose nothing, whatever the length, rate, channels or batch."""

import json
import shutil

import numpy as np
import pytest
import soundfile

import msr_jax
from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.infer.separate import cut_chunks, overlap_add
from tests.conftest import TINY_SEGMENT

RATE = 22_050


def song(samples, channels=1, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal((samples, channels)).astype(np.float32)


@pytest.mark.parametrize("overlap", [0, 10, 25, 50])
@pytest.mark.parametrize("group", [1, 3])
def test_overlap_add_of_the_identity_is_the_identity(overlap, group):
    for samples in (1, 5, 99, 100, 101, 175, 176, 250, 1000):
        x = song(samples, 2)
        blocks = (x[i : i + 37] for i in range(0, samples, 37))
        chunks = cut_chunks(blocks, 100, 100 - overlap)
        twice = lambda c, first: np.stack([c, 2 * c], 1)
        out = np.concatenate(list(overlap_add(chunks, twice, 2, 100, overlap, group)), 1)
        np.testing.assert_allclose(out, np.stack([x, 2 * x]), atol=1e-6)


def test_the_last_chunk_is_full_and_memory_stays_within_a_few_segments():
    held, total = [], 200_000

    def blocks():
        for start in range(0, total, 370):
            yield np.zeros((min(370, total - start), 1), np.float32)

    def run(chunks, first):
        held.append(chunks.size)
        return chunks[:, None]

    starts = [(start, length) for start, length, _ in cut_chunks(blocks(), 1000, 750)]
    assert starts[-1] == (total - 1000, 1000)
    pieces = [b.shape[1] for b in overlap_add(cut_chunks(blocks(), 1000, 750), run, 1, 1000, 250, 1)]
    assert sum(pieces) == total and max(pieces) <= 2000 and max(held) == 1000


@pytest.mark.parametrize("samples", [1, 700, TINY_SEGMENT, 3 * TINY_SEGMENT + 17])
def test_stems_have_the_song_s_shape(tiny_model, samples):
    separator = msr_jax.load(tiny_model, refine="none")
    for shape in ((samples,), (samples, 2)):
        stems = separator.separate(song(samples, 2)[:, 0] if len(shape) == 1 else song(samples, 2), RATE)
        assert list(stems) == ["bass", "drums", "guitar", "piano"]
        assert all(s.shape == shape and s.dtype == np.float32 and np.isfinite(s).all() for s in stems.values())


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
def test_other_rates_come_back_at_their_own_rate_and_length(tiny_model, rate):
    stems = msr_jax.load(tiny_model, refine="none").separate(song(10_001), rate)
    assert all(s.shape == (10_001, 1) for s in stems.values())


def test_the_result_does_not_depend_on_the_batch_and_the_seed_decides_the_noise(tiny_model):
    mixture = song(3 * TINY_SEGMENT, 2)
    one, many, other = (
        msr_jax.load(tiny_model, refine="diffusion", num_steps=2, seed=seed, batch_size=size).separate(mixture, RATE)
        for size, seed in ((1, 0), (16, 0), (4, 1))
    )
    for stem in one:
        np.testing.assert_allclose(one[stem], many[stem], atol=1e-5)
    assert np.abs(one["bass"] - other["bass"]).max() > 1e-4


def test_channels_are_separated_each_on_its_own(tiny_model):
    separator = msr_jax.load(tiny_model, refine="none")
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


def test_bad_arrays_are_refused(tiny_model):
    separator = msr_jax.load(tiny_model, refine="none")
    for bad in (np.zeros(0), np.zeros((4, 2, 2)), np.array([0.0, np.nan])):
        with pytest.raises(UserError):
            separator.separate(bad, RATE)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_the_command_writes_every_stem_at_the_song_s_rate_and_length(tiny_model, tmp_path, suffix, capsys):
    soundfile.write(tmp_path / "söng one.flac", song(30_000, 2), 44_100)
    argv = [
        "separate",
        str(tmp_path / "söng one.flac"),
        "-o",
        str(tmp_path / "out"),
        "--model",
        str(tiny_model),
    ]
    assert main([*argv, "--format", suffix, "--refine", "consistency", "--steps", "2"]) == 0
    assert "4 stems" in capsys.readouterr().out
    for stem in ("bass", "drums", "guitar", "piano"):
        info = soundfile.info(tmp_path / "out" / "söng one" / f"{stem}.{suffix}")
        assert (info.frames, info.channels, info.samplerate) == (30_000, 2, 44_100)


def test_bad_input_gets_one_sentence_and_leaves_nothing(tiny_model, tmp_path, capsys):
    good, text, bad = tmp_path / "good.wav", tmp_path / "text.wav", tmp_path / "nan.wav"
    soundfile.write(good, song(30_000), RATE)
    text.write_text("no audio here")
    samples = song(30_000)
    samples[29_000] = np.nan
    soundfile.write(bad, samples, RATE, subtype="FLOAT")
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "deterministic.safetensors").write_bytes(b"nonsense")
    out = tmp_path / "out"
    (tmp_path / "again").mkdir()
    shutil.copy(good, tmp_path / "again" / "good.wav")
    for songs, folder, model, words in (
        ([tmp_path / "none.wav"], out, tiny_model, "does not exist"),
        ([good, text], out, tiny_model, "cannot be read as audio"),
        ([bad], out, tiny_model, "NaN"),
        ([good], good / "below", tiny_model, "cannot write"),
        ([good], good, tiny_model, "is a file"),
        ([good], out, tmp_path, "holds no config.json"),
        ([good], out, broken, "cannot be read"),
        ([good, tmp_path / "again" / "good.wav"], out, tiny_model, "two songs are named good"),
    ):
        code = main(["separate", *map(str, songs), "-o", str(folder), "--model", str(model)])
        message = capsys.readouterr().err
        assert code == 2 and words in message and message.count("\n") == 1
        assert not out.exists() or not [p for p in out.rglob("*") if p.is_file()]
