"""Audio files: what is read and written, and what is refused in one sentence."""

import os
import resource

import numpy as np
import pytest
import soundfile

from msr_jax.audio.io import AudioWriter, audio_info, read_audio, read_blocks, resample, writable_rate, write_audio
from msr_jax.errors import UserError

RATE = 16_000


def tone(seconds=1.0, channels=2):
    t = np.arange(int(seconds * RATE)) / RATE
    return np.stack([0.5 * np.sin(2 * np.pi * (200 + 50 * c) * t) for c in range(channels)], 1).astype(np.float32)


@pytest.mark.parametrize("name,error", [("a.wav", 0.0), ("a.flac", 2**-23)])
def test_what_is_written_is_read_back(tmp_path, name, error):
    write_audio(tmp_path / name, tone(), RATE)
    audio, rate = read_audio(tmp_path / name)
    assert rate == RATE and audio.dtype == np.float32 and audio.shape == (RATE, 2)
    assert np.abs(audio - tone()).max() <= error
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("suffix,kind,level", [(".mp3", "MP3", 0.1), (".ogg", "OGG", 0.2)])
def test_stems_are_compressed_little(tmp_path, suffix, kind, level):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * RATE, 2)).astype(np.float32)
    write_audio(tmp_path / f"a{suffix}", noise, RATE)
    sizes = []
    for at in (level - 0.1, level, level + 0.1, None):
        soundfile.write(tmp_path / f"b{suffix}", noise, RATE, format=kind, compression_level=at)
        sizes.append((tmp_path / f"b{suffix}").stat().st_size)
    size = (tmp_path / f"a{suffix}").stat().st_size
    assert abs(size - sizes[1]) < 100 and sizes[0] > 1.01 * size and size > 1.01 * max(sizes[2:]), (size, sizes)


def test_mp3_is_read(tmp_path):
    soundfile.write(tmp_path / "a.mp3", tone(2.0), RATE, format="MP3")
    audio, rate = read_audio(tmp_path / "a.mp3")
    assert rate == RATE and audio.shape == (2 * RATE, 2)
    assert np.abs(audio).max() == pytest.approx(0.5, abs=0.05)


def test_a_flac_that_does_not_tell_its_length_is_read_to_the_end(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(), RATE, subtype="PCM_24")
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= (
        0xF0  # the 36 bits of STREAMINFO with the number of samples: 0 is unknown, as streaming encoders leave it
    )
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    audio, _ = read_audio(tmp_path / "a.flac")
    np.testing.assert_allclose(audio, tone(), atol=2**-23)
    assert audio_info(tmp_path / "a.flac").frames is None


def test_blocks_are_no_longer_than_asked_and_add_up_to_the_file(tmp_path):
    write_audio(tmp_path / "a.wav", tone(), RATE)
    blocks = list(read_blocks(tmp_path / "a.wav", 3000))
    assert [len(b) for b in blocks] == [3000] * 5 + [1000]
    np.testing.assert_array_equal(np.concatenate(blocks), tone())


@pytest.mark.parametrize("lost", [2, 5000])
@pytest.mark.parametrize(
    "suffix,format,subtype",
    [
        ("wav", "WAV", "PCM_16"),
        ("wav", "WAV", "FLOAT"),
        ("wav", "RF64", "PCM_16"),
        ("flac", "FLAC", "PCM_16"),
        ("aiff", "AIFF", "PCM_24"),
        ("au", "AU", "PCM_16"),
        ("w64", "W64", "PCM_16"),
        ("ogg", "OGG", "VORBIS"),
        ("opus", "OGG", "OPUS"),
    ],
)
def test_a_file_that_lost_its_end_is_refused(tmp_path, suffix, format, subtype, lost):
    path = tmp_path / f"song.{suffix}"
    soundfile.write(
        path, np.random.default_rng(0).uniform(-0.5, 0.5, (4 * RATE, 1)), RATE, format=format, subtype=subtype
    )
    assert read_audio(path)[0].shape == (4 * RATE, 1)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(UserError, match=r"cut off|cannot be read as audio") as caught:
        read_audio(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_mp3_cut_short_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.mp3", tone(2.0), RATE, format="MP3")
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is cut off"):
        read_audio(tmp_path / "a.mp3")


def test_unreadable_files_are_named_with_a_reason(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("these are words, not samples\n" * 40)
    soundfile.write(tmp_path / "silent.wav", np.zeros((0, 1)), RATE)
    (tmp_path / "text.raw").write_text("soundfile asks for a rate where a name ends like this")
    bad = tone()
    bad[700, 1] = np.nan
    soundfile.write(tmp_path / "nan.wav", bad, RATE, subtype="FLOAT")
    for name, reason in {
        "none.wav": "does not exist",
        "empty.wav": "is an empty file",
        "text.wav": "cannot be read as audio",
        "silent.wav": "holds no audio samples",
        "text.raw": "cannot be read as audio",
        "text.wav/below": "does not exist",
        "n" * 300 + ".wav": "cannot be read",
        "nan.wav": "NaN or infinite sample at sample 700",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            read_audio(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is a folder"):
        read_audio(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")  # which nobody writes into
    for pipe in (tmp_path / "pipe.wav", "/dev/null"):
        with pytest.raises(UserError, match="is a pipe or a device"):
            read_audio(pipe)


def test_what_is_no_sound_is_not_written_and_an_mp3_is_60_db_over_full_scale_at_most(tmp_path):
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match="it would hold NaN or infinite samples"):
            with AudioWriter(tmp_path / "a.wav", RATE, 2) as writer:
                writer.write(np.full((10, 2), value, np.float32))
    assert not list(tmp_path.iterdir())
    for name, gain in (("most.mp3", 2000.0), ("more.mp3", 20_000.0)):
        with AudioWriter(tmp_path / name, RATE, 2) as writer:
            writer.write(np.sign(tone()).astype(np.float32) * gain)
    assert (tmp_path / "most.mp3").read_bytes() == (tmp_path / "more.mp3").read_bytes()


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_what_comes_out_of_an_open_pipe_is_read_as_from_a_file(tmp_path, suffix):
    soundfile.write(tmp_path / f"a.{suffix}", tone()[:4000], RATE)
    end, beginning = os.pipe()
    os.write(beginning, (tmp_path / f"a.{suffix}").read_bytes())
    os.close(beginning)
    pipe = f"/dev/fd/{end}"
    assert audio_info(pipe) == audio_info(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read_audio(pipe)[0], read_audio(tmp_path / f"a.{suffix}")[0])
    os.close(end)


def test_a_place_that_cannot_be_written_is_named_and_left_clean(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_audio(tmp_path / "file" / "a.wav", tone(), RATE)
    with pytest.raises(UserError, match=r"must end in \.wav, \.flac, "):
        write_audio(tmp_path / "a.m4a", tone(), RATE)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        write_audio(tmp_path / "folder.wav", tone(), RATE)
    with pytest.raises(UserError, match="FLAC holds 8 channels at most, not 9; write WAV"):
        write_audio(tmp_path / "a.flac", np.zeros((10, 9), np.float32), RATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.wav"]


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_full_disk_leaves_the_older_file_as_it_was(tmp_path, name):
    write_audio(tmp_path / name, tone(0.1), RATE)
    before = (tmp_path / name).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).uniform(-1, 1, (100_000, 2)).astype(np.float32)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(UserError, match="is the disk full"):
            write_audio(tmp_path / name, noise, RATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus"])
def test_a_disk_that_is_full_at_any_moment_leaves_nothing(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).uniform(-1, 1, (6000, 2)).astype(np.float32)
    write_audio(path, noise, 48_000)
    size = path.stat().st_size
    path.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (10, 100, size // 2, size - 1000, size - 10):  # encoders write their last block when all else is done
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            with pytest.raises(UserError, match="cannot write"):
                write_audio(path, noise, 48_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []


def test_integer_formats_count_what_they_clip(tmp_path):
    loud = np.array([[0.5], [1.5], [-2.0]], np.float32)
    with AudioWriter(tmp_path / "a.flac", RATE, 1) as flac, AudioWriter(tmp_path / "a.wav", RATE, 1) as wav:
        flac.write(loud)
        wav.write(loud)
    assert (flac.clipped, wav.clipped) == (2, 0)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav")[0], loud)
    np.testing.assert_allclose(read_audio(tmp_path / "a.flac")[0], np.clip(loud, -1, 1), atol=2**-22)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize(("subtype", "bits"), [("PCM_16", 16), ("PCM_24", 24)])
def test_samples_are_rounded_to_the_nearest_integer_of_a_format(tmp_path, suffix, subtype, bits):
    steps = np.random.default_rng(0).uniform(-1000, 1000, (4000, 2)).astype(np.float32)
    extremes = np.array([[-1, 1], [1 - 2.0**-15, -1]], np.float32)
    audio = np.concatenate([steps / 2 ** (bits - 1), extremes])
    write_audio(tmp_path / f"a.{suffix}", audio, RATE, subtype)
    got = read_audio(tmp_path / f"a.{suffix}")[0] * 2 ** (bits - 1)
    np.testing.assert_array_equal(got[:-2], np.rint(audio[:-2] * 2 ** (bits - 1)))
    np.testing.assert_allclose(got[-2:] / 2 ** (bits - 1), extremes, atol=2.0 ** (1 - bits))


@pytest.mark.parametrize(("suffix", "rate"), [("flac", 95_904), ("flac", 700_000), ("ogg", 384_000)])
def test_a_rate_that_a_format_has_not_is_said_before_anything_is_written(tmp_path, suffix, rate):
    with pytest.raises(UserError, match=rf"{rate} Hz; write WAV|above 192000 Hz; write WAV"):
        AudioWriter(tmp_path / f"a.{suffix}", rate, 1)
    assert list(tmp_path.iterdir()) == []
    assert writable_rate(".ogg", 384_000) == 192_000


def later(ogg, by):
    """The bytes of an Ogg file, its sound beginning so many samples later, as of a stream that was cut out of another."""
    data, at, pages = bytearray(ogg), 0, 0
    while at < len(data):
        size = 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        granule = int.from_bytes(data[at + 6 : at + 14], "little")
        if pages > 1:  # after the headers
            data[at + 6 : at + 14] = (granule + by).to_bytes(8, "little")
        data[at + 22 : at + 26] = bytes(4)
        crc = 0
        for byte in data[at : at + size]:
            crc ^= byte << 24
            for _ in range(8):
                crc = (crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)
                crc &= 0xFFFFFFFF
        data[at + 22 : at + 26] = crc.to_bytes(4, "little")
        at, pages = at + size, pages + 1
    return bytes(data)


def test_an_opus_stream_that_begins_later_is_read_from_its_first_sample(tmp_path):
    soundfile.write(tmp_path / "a.opus", tone(), RATE, format="OGG", subtype="OPUS")
    (tmp_path / "b.opus").write_bytes(later((tmp_path / "a.opus").read_bytes(), 312))
    one, two = (read_audio(tmp_path / name)[0] for name in ("a.opus", "b.opus"))
    assert len(one) == len(two) == RATE
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("frames", [None, 2**30])
def test_a_wav_file_names_its_speakers_and_not_the_time(tmp_path, frames):
    with AudioWriter(tmp_path / "a.wav", RATE, 6, frames=frames, mask=0x60F) as writer:
        writer.write(tone(channels=6))
    assert audio_info(tmp_path / "a.wav").mask == 0x60F
    assert b"PEAK" not in (tmp_path / "a.wav").read_bytes()
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav")[0], tone(channels=6))


def test_wav_files_beyond_four_gigabytes_are_rf64(tmp_path):
    with AudioWriter(tmp_path / "large.wav", RATE, 1, frames=2**30) as writer:
        writer.write(tone(channels=1))
    with AudioWriter(tmp_path / "small.wav", RATE, 1, frames=RATE) as writer:
        writer.write(tone(channels=1))
    assert soundfile.info(tmp_path / "large.wav").format == "RF64"
    assert soundfile.info(tmp_path / "small.wav").format == "WAV"
    np.testing.assert_array_equal(read_audio(tmp_path / "large.wav")[0], tone(channels=1))


def test_resampling_keeps_a_tone(tmp_path):
    slow = resample(tone(), RATE, RATE // 2)
    t = np.arange(RATE // 2) / (RATE // 2)
    assert slow.shape == (RATE // 2, 2)
    assert np.abs(slow[200:-200, 0] - 0.5 * np.sin(2 * np.pi * 200 * t)[200:-200]).max() < 1e-3
