"""How the stems of a song are written, by a separator without a network: formats, bits, peaks."""

import numpy as np
import pytest
import soundfile
import soxr

from msr_jax.audio import io
from msr_jax.cli import main
from msr_jax.errors import UserError
from msr_jax.separate.chunks import resampled_stems
from msr_jax.separate.songs import Output, Task, about_song, levels_of, stems_of, write_stems

RATE = 44_100


class Halves:
    """Two stems that are the song times 0.75 and 0.25."""

    stems = ("loud", "soft")

    def stream(self, blocks, sample_rate, channels, frames=None, progress=None):
        for block in blocks:
            yield {"loud": 0.75 * block, "soft": 0.25 * block}


def song(path, level=0.1, samples=12_000):
    audio = np.random.default_rng(0).standard_normal((samples, 2))
    soundfile.write(path, level * np.clip(audio, -3, 3), RATE, subtype="FLOAT")
    return path


def written(path, folder, *output):
    about = about_song(path, Output(*output))
    parts = stems_of(Halves(), path, about.info)
    done = write_stems(parts, Task(path, folder), about, Output(*output), Halves.stems)
    assert not list(folder.parent.rglob(".*"))
    return done, {stem: soundfile.read(place)[0] for stem, place in done.paths.items()}


@pytest.mark.parametrize(
    "suffix, bits, subtype, rate, error_db",
    [
        ("wav", None, "FLOAT", RATE, -140),
        ("wav", "24", "PCM_24", RATE, -115),
        ("wav", "16", "PCM_16", RATE, -65),
        ("flac", None, "PCM_24", RATE, -115),
        ("flac", "16", "PCM_16", RATE, -65),
        ("mp3", None, "MPEG_LAYER_III", RATE, None),
        ("ogg", None, "VORBIS", RATE, None),
        ("opus", None, "OPUS", 48_000, None),
    ],
)
def test_every_format_holds_the_stems(tmp_path, suffix, bits, subtype, rate, error_db):
    path = song(tmp_path / "song.wav")
    done, stems = written(path, tmp_path / "out", suffix, bits)
    info = soundfile.info(done.paths["loud"])
    assert (info.subtype, info.samplerate, info.channels) == (subtype, rate, 2)
    assert abs(info.duration - 12_000 / RATE) < 0.06 and abs(done.seconds - 12_000 / RATE) < 1e-3
    truth = 0.75 * soundfile.read(path)[0]
    if error_db:
        assert 10 * np.log10(np.square(stems["loud"] - truth).mean() / np.square(truth).mean()) < error_db
    assert done.levels["loud"] == pytest.approx(10 * np.log10(np.square(truth).mean()), abs=0.5)
    if suffix not in ("ogg", "opus"):  # whose streams have a random number
        again, _ = written(path, tmp_path / "again", suffix, bits)
        assert again.paths["loud"].read_bytes() == done.paths["loud"].read_bytes()


def test_peaks_are_kept_clipped_or_scaled_all_stems_alike(tmp_path):
    path = song(tmp_path / "song.wav", level=1)
    (kept, whole), (_, clipped), (scaled, small) = (
        written(path, tmp_path / str(peak), "wav", None, peak) for peak in (None, "clip", "scale")
    )
    assert kept.peak == pytest.approx(2.25) and kept.gain == 1 and not any(kept.clipped.values())
    assert scaled.gain == pytest.approx(1 / 2.25) and not any(scaled.clipped.values())
    for stem in Halves.stems:
        np.testing.assert_allclose(clipped[stem], np.clip(whole[stem], -1, 1))
        np.testing.assert_allclose(small[stem], whole[stem] / 2.25, atol=1e-6)
    usual, stems = written(path, tmp_path / "usual", "flac")
    assert usual.clipped == {"loud": np.count_nonzero(np.abs(whole["loud"]) > 1), "soft": 0}
    np.testing.assert_allclose(stems["loud"], clipped["loud"], atol=2**-22)


def test_a_stem_that_is_made_again_has_the_gain_of_all_stems(tmp_path):
    path = song(tmp_path / "song.wav", level=1)
    output = Output("wav", None, "scale")
    about = about_song(path, output)
    first, stems = written(path, tmp_path / "out", "wav", None, "scale")
    first.paths["soft"].unlink()
    again = write_stems(stems_of(Halves(), path, about.info), Task(path, tmp_path / "out"), about, output, ["soft"])
    assert again.gain == first.gain < 1
    np.testing.assert_array_equal(soundfile.read(again.paths["soft"])[0], stems["soft"])


def test_stems_of_a_song_that_tells_its_length_only_roughly_may_pass_4_gb(tmp_path, monkeypatch):
    path = song(tmp_path / "song.wav", level=1)
    monkeypatch.setattr(io, "WAV_BYTES", 50_000)  # stands for 4 GB; a stem has 96,000
    about = about_song(path, Output())
    rough, unknown = (about._replace(info=about.info._replace(frames=None, about=n)) for n in (12_000, None))
    write = lambda about, *output: write_stems(
        stems_of(Halves(), path, about.info), Task(path, tmp_path / "out"), about, Output(*output), ["loud"]
    )
    assert soundfile.info(write(rough).paths["loud"]).format == "RF64"
    # What is there for a moment is a WAV file too.
    assert soundfile.info(write(unknown, "flac", None, "scale").paths["loud"]).frames == 12_000


def test_stems_join_a_folder_that_another_song_has_made_meanwhile(tmp_path):
    path, folder = song(tmp_path / "x.wav"), tmp_path / "out" / "x"
    about = about_song(path, Output())

    def parts():
        (folder / "y").mkdir(parents=True)
        (folder / "y" / "loud.wav").touch()
        yield from stems_of(Halves(), path, about.info)

    done = write_stems(parts(), Task(path, folder), about, Output(), Halves.stems)
    assert sorted(folder.rglob("*.wav")) == sorted([*done.paths.values(), folder / "y" / "loud.wav"])
    assert not list(tmp_path.rglob(".*"))


def test_16_bits_are_dithered_and_silence_is_not(tmp_path):
    path = tmp_path / "song.wav"
    audio = np.zeros((RATE, 1))
    audio[RATE // 2 :, 0] = 1e-5 * np.sin(np.arange(RATE // 2) / 20)  # below the last bit
    soundfile.write(path, audio, RATE, subtype="FLOAT")
    _, stems = written(path, tmp_path / "out", "wav", "16")
    assert not stems["loud"][: RATE // 2].any()
    tone = np.sin(np.arange(RATE // 2) / 20)
    assert stems["loud"][RATE // 2 :] @ tone / (tone @ tone) == pytest.approx(0.75e-5, rel=0.2)


def test_the_noise_of_one_stem_is_not_that_of_another_wherever_they_lie(tmp_path):
    path = song(tmp_path / "song.wav")
    about, output = about_song(path, Output("wav", "16")), Output("wav", "16")
    task = Task(path, tmp_path / "out", "{stem}/song.{ext}")
    done = write_stems(stems_of(Halves(), path, about.info), task, about, output, Halves.stems)
    truth = soundfile.read(path)[0]
    error = {s: soundfile.read(done.paths[s])[0] - share * truth for s, share in (("loud", 0.75), ("soft", 0.25))}
    assert abs(np.corrcoef(*(e.reshape(-1) for e in error.values()))[0, 1]) < 0.05
    assert all(abs(e.mean()) < 0.02 / 2**15 for e in error.values())


def test_scaled_stems_pass_no_peak_at_a_rate_that_the_format_wants_either(tmp_path):
    path = tmp_path / "song.wav"
    square = np.sign(np.sin(np.arange(30_000) / 40))[:, None] * [1.3, 1.3]
    soundfile.write(path, square, RATE, subtype="FLOAT")
    done, _ = written(path, tmp_path / "out", "opus", None, "scale")
    assert not any(done.clipped.values()) and done.gain < 1 and done.peak * done.gain == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("suffix", ["mp3", "opus"])
def test_a_song_of_a_sample_at_a_rate_that_the_format_has_not_becomes_files_that_can_be_read(tmp_path, suffix):
    soundfile.write(tmp_path / "a.wav", np.full((1, 2), 0.1), 192_000, subtype="FLOAT")
    assert all(len(audio) for audio in written(tmp_path / "a.wav", tmp_path / "o", suffix)[1].values())


def test_every_channel_is_resampled_as_if_alone():
    x = np.random.default_rng(0).standard_normal((2, 3000, 5)).astype(np.float32)
    blocks = np.split(x, [1, 1000, 2990], 1)  # of some nothing comes back at first
    together = np.concatenate(list(resampled_stems(blocks, 44_100, 32_000, 2, 5)), 1)
    for stem, channel in np.ndindex(2, 5):
        alone = soxr.resample(x[stem, :, channel], 44_100, 32_000, quality="HQ")
        np.testing.assert_array_equal(together[stem, :, channel], alone)


def test_levels_are_of_what_was_written(tmp_path):
    path = song(tmp_path / "song.wav", level=1.5)
    done = written(path, tmp_path / "out", "flac", None, "clip")[0]
    assert done.clipped["loud"]
    assert done.levels == levels_of(done.paths)[0]


def test_what_a_format_cannot_do_is_refused(tmp_path, capsys):
    for output, words in (
        (("flac", "32f"), "can have --bits 16 or 24"),
        (("mp3", "16"), "has no bits per sample"),
        (("flac", None, "keep"), "--peak keep goes with"),
    ):
        with pytest.raises(UserError, match=words):
            Output(*output).check()
    path = song(tmp_path / "song.wav")
    assert main(["separate", str(path), "-o", str(tmp_path / "out"), "--format", "opus", "--bits", "24"]) == 2
    assert "--format opus has no bits" in capsys.readouterr().err
