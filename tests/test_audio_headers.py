"""Files whose headers do not tell their length, or tell a wrong one: written into pipes, cut off, or with chunks around."""

import struct

import numpy as np
import pytest

from msr_jax.audio.headers import find_samples
from msr_jax.audio.io import audio_info, read_audio
from msr_jax.audio.speakers import FROM_VORBIS, MASKS
from msr_jax.errors import UserError

RATE = 8000
SOUND = (np.random.default_rng(0).uniform(-0.5, 0.5, (4000, 2)) * 32768).astype("<i2")
W64 = {n: n.encode() + bytes.fromhex("f3acd3118cd100c04f8edb8a") for n in ("wave", "fmt ", "data", "junk")}
RIFF64 = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")


def chunk(name, body, size=None, order="<", pad=True):
    size = len(body) if size is None else size
    return name + struct.pack(order + "I", size) + body + (b"\0" if pad and len(body) % 2 else b"")


def fmt(tag=1, bits=16, channels=2, order="<", extra=b""):
    width = channels * bits // 8
    return struct.pack(order + "HHIIHH", tag, channels, RATE, RATE * width, width, bits) + extra


def extensible(bits=16, channels=2, tag=1, mask=3):
    guid = struct.pack("<H", tag) + bytes.fromhex("000000001000800000aa00389b71")
    return fmt(0xFFFE, bits, channels, extra=struct.pack("<HHI", 22, bits, mask) + guid)


def wav(data, size=None, total=None, before=b"", after=b"", form=None, kind=b"RIFF"):
    body = b"WAVE" + chunk(b"fmt ", fmt() if form is None else form) + before + chunk(b"data", data, size) + after
    return kind + struct.pack("<I", len(body) if total is None else total) + body


def aiff(data, size=None, total=None, frames=None, kind=b"AIFF"):
    rate = struct.pack(">HQ", 16383 + 12, RATE << (63 - 12))  # 80-bit float of 2^12 ≤ RATE < 2^13
    described = struct.pack(">hIh", 2, len(data) // 4 if frames is None else frames, 16) + rate
    described += b"NONE\0\0" if kind == b"AIFC" else b""
    body = kind + chunk(b"COMM", described, order=">")
    body += chunk(b"SSND", bytes(8) + data, len(data) + 8 if size is None else size, ">")
    return b"FORM" + struct.pack(">I", len(body) if total is None else total) + body


def rf64(data, size, total=0, form=None, kind=b"RF64"):
    body = b"WAVE" + chunk(b"ds64", struct.pack("<QQQI", total, size, 0, 0))
    return kind + b"\xff" * 4 + body + chunk(b"fmt ", form or fmt()) + b"data" + b"\xff" * 4 + data


def w64(data, size, total):
    described = W64["fmt "] + struct.pack("<q", 24 + 16) + fmt()
    return RIFF64 + struct.pack("<q", total) + W64["wave"] + described + W64["data"] + struct.pack("<q", size) + data


def caf(data, size):
    described = struct.pack(">d4sIIIII", RATE, b"lpcm", 0, 4, 1, 2, 16)
    head = b"caff" + struct.pack(">HH", 1, 0) + b"desc" + struct.pack(">q", 32) + described
    return head + b"data" + struct.pack(">q", size) + bytes(4) + data


def au(data, size, offset=28):
    return struct.pack(">4sIIIII", b".snd", offset, size, 3, RATE, 2).ljust(offset, b"\0") + data


LITTLE, BIG = SOUND.tobytes(), SOUND.byteswap().tobytes()
# What SoX, arecord, oggdec, LAME, ffmpeg, pacat, mpg123 and flac leave as the length, and what nobody does yet.
LENGTHS = [
    0x7FFFF000,
    0x7FFFFFD3,
    0x80000000,
    0x7FFFFFFF,
    0xFFFFFFFF,
    0xFFFFFFDB,
    0x7FFFFFDB,
    0,
    0x40000001,
    0xF0000000,
]
OPEN = {
    **{f"WAV {n:#x}": wav(LITTLE, n, (n + 36) % 2**32) for n in LENGTHS},
    "WAV 0 and 0": wav(LITTLE, 0, 0),
    "WAV with tags before": wav(LITTLE, 0xFFFFFFFF, 0xFFFFFFFF, chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0\0")),
    "WAV extensible": wav(LITTLE, 0x7FFFEFFC, 0x7FFFF044, chunk(b"fact", b"\0\0\0\0"), form=extensible()),
    "WAV of a whole RIFF": wav(LITTLE, 0x50000000),
    **{
        f"AIFF {n}": aiff(BIG, n, (n + 46) % 2**32, 0x1FC00000)
        for n in (2130706440, 2130706436, 0x80000000, 0xFFFFFFFF)
    },
    "AIFF 0": aiff(BIG, 0, 0, 0),
    "AIFC": aiff(BIG, 2130706440, 2130706510, 0x1FC00000, b"AIFC"),
    "RF64 0": rf64(LITTLE, 0),
    "RF64 -1": rf64(LITTLE, 2**64 - 1, 2**64 - 1),
    "BW64": rf64(LITTLE, 0, kind=b"BW64"),
    "W64 -1": w64(LITTLE, -1, -1),
    "W64 2^63 - 1": w64(LITTLE, 2**63 - 1, -1),
    "W64 0": w64(LITTLE, 24, 0),
    "CAF -1": caf(BIG, -1),
    "CAF 0": caf(BIG, 4),
    "AU -1": au(BIG, 0xFFFFFFFF),
    "AU 0": au(BIG, 0, 44),
    "behind ID3": b"ID3\x04\0\0\0\0\x02\0" + bytes(256) + wav(LITTLE, 0, 0),
}


def written(tmp_path, data):
    path = tmp_path / "song.audio"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", OPEN)
def test_a_file_whose_length_was_left_open_is_read_to_its_end(tmp_path, case):
    path = written(tmp_path, OPEN[case])
    audio, rate = read_audio(path)
    np.testing.assert_array_equal(audio, SOUND / np.float32(32768))
    assert rate == RATE and audio_info(path).frames == len(SOUND)


@pytest.mark.parametrize("bits,tag", [(24, 1), (32, 1), (32, 3), (64, 3)])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_other_sample_formats_of_open_length_are_read_too(tmp_path, bits, tag, channels):
    values = np.random.default_rng(0).uniform(-0.5, 0.5, (1000, channels))
    if tag == 3:
        data = values.astype(f"<f{bits // 8}").tobytes()
    else:
        data = (
            (values * 2.0**31)
            .astype("<i4")[..., None]
            .view(np.uint8)
            .reshape(1000, channels, 4)[..., 4 - bits // 8 :]
            .tobytes()
        )
    audio, _ = read_audio(
        written(tmp_path, wav(data, 0x7FFFF000 // 6 * 6, 0x7FFFF048, form=extensible(bits, channels, tag)))
    )
    np.testing.assert_allclose(audio, values, atol=2**-22)


@pytest.mark.parametrize("lost", [1, 2, 1000, 15_990])
@pytest.mark.parametrize(
    "data",
    [
        wav(LITTLE),
        wav(LITTLE, before=chunk(b"LIST", b"INFO" + bytes(999))),
        aiff(BIG),
        rf64(LITTLE, len(LITTLE), len(LITTLE) + 72),
        w64(LITTLE, len(LITTLE) + 24, len(LITTLE) + 104),
        caf(BIG, len(BIG) + 4),
        au(BIG, len(BIG)),
        b"ID3\x04\0\0\0\0\x02\0" + bytes(256) + wav(LITTLE),
    ],
)
def test_a_file_that_lost_its_end_is_no_file_of_open_length(tmp_path, data, lost):
    read_audio(written(tmp_path, data))
    with pytest.raises(UserError, match="cut off: its header promises"):
        read_audio(written(tmp_path, data[:-lost]))


def test_a_whole_bw64_is_read_as_the_rf64_that_it_is(tmp_path):
    data = rf64(LITTLE, len(LITTLE), len(LITTLE) + 72, kind=b"BW64")
    np.testing.assert_array_equal(read_audio(written(tmp_path, data))[0], SOUND / np.float32(32768))
    with pytest.raises(UserError, match="cut off"):
        read_audio(written(tmp_path, data[:-1]))


def test_a_header_without_a_sample_behind_it_is_said_to_hold_none(tmp_path):
    tags = chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0\0")
    for data in (
        wav(b""),
        wav(b"", after=tags),
        wav(b"", after=tags + chunk(b"id3 ", b"ID3\x03\0\0\0\0\0\0")),
        aiff(b""),
    ):
        with pytest.raises(UserError, match="holds no audio samples"):
            read_audio(written(tmp_path, data))


@pytest.mark.parametrize(
    "data",
    [
        wav(
            LITTLE,
            after=chunk(b"LIST", b"INFOIART\x03\0\0\0Me\0\0") + chunk(b"id3 ", b"ID3\x03\0\0\0\0\0\x05" + bytes(5)),
        ),
        wav(LITTLE, before=chunk(b"junk", bytes(4097)) + chunk(b"bext", bytes(603))),
        wav(LITTLE, after=b"ID3 without a chunk of its own"),
        wav(LITTLE, after=chunk(b"LIST", b"INFO" + bytes(40))[:-20]),  # what was lost is no sound
        wav(LITTLE, total=36),
    ],
)
def test_other_chunks_around_the_samples_are_passed_over(tmp_path, data):
    np.testing.assert_array_equal(read_audio(written(tmp_path, data))[0], SOUND / np.float32(32768))


def test_copies_of_the_header_that_sox_leaves_in_a_pipe_are_no_sound(tmp_path):
    whole = caf(BIG, 4)
    head = whole[: -len(BIG)]
    audio, _ = read_audio(written(tmp_path, head * 2 + BIG + head))
    np.testing.assert_array_equal(audio, SOUND / np.float32(32768))


@pytest.mark.parametrize("size", [0xFFFFFFFF, 5_000_000_000 % 2**32])
def test_a_wav_beyond_four_gigabytes_is_read_whole(tmp_path, size):
    path = written(tmp_path, wav(b"", size, 0xFFFFFFFF))
    with open(path, "r+b") as file:
        file.truncate(44 + 5_000_000_000)  # takes no room on the disk
    assert audio_info(path).frames == 1_250_000_000


@pytest.mark.parametrize("size", [0xFFFFFFFF, 3_000_000_000])
def test_an_au_beyond_two_gigabytes_is_read_whole(tmp_path, size):
    path = written(tmp_path, au(b"", size))
    with open(path, "r+b") as file:
        file.truncate(28 + 3_000_000_000)
    assert audio_info(path).frames == 750_000_000


def test_an_aiff_beyond_four_gigabytes_is_refused(tmp_path):
    path = written(tmp_path, aiff(b"", 0x7F000008))
    with open(path, "r+b") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(UserError, match="more bytes than its format can count"):
        audio_info(path)


def test_speakers_are_read_from_an_extensible_header(tmp_path):
    data = wav(bytes(12 * 100), form=extensible(channels=6, mask=0x60F))
    assert audio_info(written(tmp_path, data)).mask == 0x60F
    assert audio_info(written(tmp_path, wav(LITTLE))).mask == 0


def test_speakers_are_in_the_order_of_the_vorbis_specification_there_and_of_their_bits_elsewhere():
    bits = {"FL": 1, "FR": 2, "FC": 4, "LFE": 8, "BL": 16, "BR": 32, "BC": 0x100, "SL": 0x200, "SR": 0x400}
    vorbis = [
        "FL FC FR",
        "FL FR BL BR",
        "FL FC FR BL BR",
        "FL FC FR BL BR LFE",
        "FL FC FR SL SR BC LFE",
        "FL FC FR SL SR BL BR LFE",
    ]
    for order in map(str.split, vorbis):
        assert FROM_VORBIS[len(order)] == tuple(order.index(name) for name in sorted(order, key=bits.get))
        assert MASKS[len(order)] == sum(bits[name] for name in order)


@pytest.mark.parametrize(
    "data",
    [
        b"RIFF",
        b"RIFF\0\0\0\0WAVE",
        b"FORM\0\0\0\0ILBM",
        b"caff",
        b".snd\0\0\0",
        b"",
        b"ID3",
        RIFF64,
        wav(b"", form=extensible())[:40],
    ],
)
def test_a_header_that_ends_early_has_no_place_for_samples(tmp_path, data):
    with open(written(tmp_path, data), "rb") as file:
        assert find_samples(file) is None
