"""Where an mp3's sound begins and ends: tags and padding in front, tags and garbage behind, and no word on its length."""

import numpy as np
import pytest
import soundfile

from msr_jax.audio.io import audio_info, read_audio
from msr_jax.audio.mpeg import _frame

RATE = 16_000
FOOTER = b"3DI\x04\0\x10\0\0\x02\0"
ID3V1 = b"TAG" + b"Title".ljust(125, b"\0")
ITEM = (8).to_bytes(4, "little") + bytes(4) + b"Title\0abcdefgh"


def id3(body, version=3, flags=0):
    return b"ID3" + bytes([version, 0, flags, *(len(body) >> shift & 127 for shift in (21, 14, 7, 0))]) + body


def ape(has_header):
    part = lambda flags: (
        b"APETAGEX" + b"".join(n.to_bytes(4, "little") for n in (2000, 32 + len(ITEM), 1, flags)) + bytes(8)
    )
    return (part(0xA0000000) if has_header else b"") + ITEM + part(0x80000000 if has_header else 0)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """An mp3 of varying bit rate with a Xing header."""
    audio = np.random.default_rng(0).standard_normal((2 * RATE, 2)) * 0.2
    audio[RATE // 2 :] *= 1e-3  # from the bit rate of the first frames alone it seems half as long as it is
    path = tmp_path_factory.mktemp("mp3") / "a.mp3"
    soundfile.write(path, audio, RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.2)
    return path.read_bytes()


@pytest.fixture(scope="module")
def untold(told):
    """The same without the frame that tells its length."""
    return told[told.index(told[:2], 4) :]


AROUND = {
    "ID3v2": (id3(bytes(300)), b""),
    "zero padding after ID3v2": (id3(b"TIT2\0\0\0\x02\0\0\0a" + bytes(88)) + bytes(4321), b""),
    "a v2.4 footer": (id3(bytes(256), 4, 16) + FOOTER, b""),
    "two tags": (id3(bytes(300)) + id3(bytes(3000), 4), b""),
    "a large cover": (id3(bytes(2_000_000)) + bytes(100), b""),
    "zeros": (bytes(5000), b""),
    "an APE tag in front": (ape(True), b""),
    "rubbish in front": (b"\0\1rubbish\xff\xfb" * 50, b""),
    "ID3v1": (b"", ID3V1),
    "APE": (b"", ape(True)),
    "APE without header, ID3v1": (b"", ape(False) + ID3V1),
    "ID3v2 at the end": (b"", id3(bytes(256), 4, 16) + FOOTER),
    "zeros at the end": (b"", bytes(5000)),
    "lyrics": (b"", b"LYRICSBEGININFO00003110000023LYRICS200" + ID3V1),
}


@pytest.mark.parametrize("case", AROUND)
def test_what_stands_around_the_frames_changes_nothing(tmp_path, told, untold, case):
    before, after = AROUND[case]
    for name, data in (("told", told), ("untold", untold)):
        (tmp_path / f"{name}.mp3").write_bytes(data)
        (tmp_path / "around.mp3").write_bytes(before + data + after)
        expected, _ = read_audio(tmp_path / f"{name}.mp3")
        np.testing.assert_array_equal(read_audio(tmp_path / "around.mp3")[0], expected)


def test_the_length_that_an_mp3_does_not_tell_is_counted(tmp_path, untold):
    (tmp_path / "a.mp3").write_bytes(untold)
    audio, _ = read_audio(tmp_path / "a.mp3")
    assert 2 * RATE <= len(audio) < 2.2 * RATE and len(audio) % 576 == 0
    assert audio_info(tmp_path / "a.mp3").frames == len(audio)


def test_damage_within_is_passed_over_as_decoders_do(tmp_path, untold):
    middle = len(untold) // 2
    (tmp_path / "a.mp3").write_bytes(untold[:middle] + bytes(300) + untold[middle + 300 :])
    assert len(read_audio(tmp_path / "a.mp3")[0]) >= 1.8 * RATE


@pytest.mark.parametrize("rate", [8000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_all_rates_are_counted(tmp_path, rate):
    soundfile.write(tmp_path / "a.mp3", np.random.default_rng(0).uniform(-0.1, 0.1, (rate, 1)), rate, format="MP3")
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "b.mp3").write_bytes(data[data.index(data[:2], 4) :])
    assert rate <= len(read_audio(tmp_path / "b.mp3")[0]) < rate + 3000


def test_a_frame_of_mpeg_2_layer_1_is_as_long_as_the_standard_s_bit_rates_make_it():
    """ISO/IEC 13818-3; no encoder at hand writes such files. At 24 kHz a frame is 16 ms, two bytes for each kbit/s."""
    rates = [_frame(bytes([0xFF, 0xF7, index << 4 | 1 << 2, 0])).length / 2 for index in range(1, 15)]
    assert rates == [32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256]
