"""Audio files: what is read and written, and what is refused in one sentence."""

import numpy as np
import pytest
import soundfile

from msr_jax.audio.io import read_audio, resample, write_audio
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


def test_mp3_is_read(tmp_path):
    soundfile.write(tmp_path / "a.mp3", tone(2.0), RATE, format="MP3")
    audio, rate = read_audio(tmp_path / "a.mp3")
    assert rate == RATE and abs(len(audio) - 2 * RATE) < 0.2 * RATE
    assert np.abs(audio).max() == pytest.approx(0.5, abs=0.05)


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_unreadable_files_are_named_with_a_reason(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("these are words, not samples\n" * 40)
    soundfile.write(tmp_path / "silent.wav", np.zeros((0, 1)), RATE)
    for name in ("cut.wav", "cut.flac"):
        soundfile.write(tmp_path / name, tone(3.0), RATE)
        cut(tmp_path / name)
    bad = tone()
    bad[700, 1] = np.nan
    soundfile.write(tmp_path / "nan.wav", bad, RATE, subtype="FLOAT")
    for name, reason in {
        "none.wav": "does not exist",
        "empty.wav": "is an empty file",
        "text.wav": "cannot be read as audio",
        "silent.wav": "holds no audio samples",
        "cut.wav": "is cut off",
        "cut.flac": "cut off",
        "nan.wav": "NaN or infinite sample at sample 700",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            read_audio(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is a folder"):
        read_audio(tmp_path)


def test_a_place_that_cannot_be_written_is_named_and_left_clean(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_audio(tmp_path / "file" / "a.wav", tone(), RATE)
    with pytest.raises(UserError, match=r"must end in \.wav or \.flac"):
        write_audio(tmp_path / "a.ogg", tone(), RATE)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_resampling_keeps_a_tone(tmp_path):
    slow = resample(tone(), RATE, RATE // 2)
    t = np.arange(RATE // 2) / (RATE // 2)
    assert slow.shape == (RATE // 2, 2)
    assert np.abs(slow[200:-200, 0] - 0.5 * np.sin(2 * np.pi * 200 * t)[200:-200]).max() < 1e-3
