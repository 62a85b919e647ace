"""Audio that libsndfile does not know, by PyAV or the program ffmpeg; and `.stem.mp4` files with any stems."""

import gc
import inspect
import json
import os
import struct
import sys
import types
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from msr_jax.audio import media
from msr_jax.audio.io import audio_info, read_audio, write_audio
from msr_jax.data.stem_mp4 import streams_of
from msr_jax.data.tracks import read_track
from msr_jax.errors import UserError

RATE = 44_100
KINDS = {
    "a.m4a": ("ipod", "aac"),
    "alac.m4a": ("ipod", "alac"),
    "a.aac": ("adts", "aac"),
    "a.webm": ("webm", "libopus"),
    "a.wma": ("asf", "wmav2"),
    "a.oga": ("ogg", "flac"),
    "a.mka": ("matroska", "flac"),
}


def tone(frequency=300.0, seconds=1.0, channels=2):
    t = np.arange(int(seconds * RATE)) / RATE
    return np.stack([0.3 * np.sin(2 * np.pi * frequency * (1 + c) * t) for c in range(channels)], 1).astype(np.float32)


def encode(path, streams, kind=None, pts=None):
    """Write streams of audio (samples, channels) at 44,100 Hz (48,000 Hz for Opus, as it wants it) into a media file.

    With `pts` of 0 mp4 gets an edit list, which leaves out the encoder's delay.
    """
    form, codec = kind or KINDS[path.name]
    if codec == "flac":
        return wrap_flac(path, streams[0], form)
    with av.open(str(path), "w", format=form) as container:
        outs = [
            container.add_stream(codec, rate=48_000 if codec == "libopus" else RATE, layout="stereo") for _ in streams
        ]
        for out in outs:
            if codec == "wmav2":
                out.bit_rate = 128_000
        container.start_encoding()
        for out, audio in zip(outs, streams, strict=True):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(audio.reshape(1, -1)), format="flt", layout="stereo"
            )
            frame.sample_rate, frame.pts = RATE, pts
            container.mux(out.encode(frame))
            container.mux(out.encode(None))
    return path


def wrap_flac(path, audio, form):
    """The packets of a FLAC file in another container."""
    plain = path.with_suffix(".flac")
    soundfile.write(plain, audio, RATE)
    if form == "flac":
        return plain
    with av.open(str(plain)) as source, av.open(str(path), "w", format=form) as container:
        out = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = out
                container.mux(packet)
    return path


@pytest.fixture(params=["PyAV", "ffmpeg"])
def decoder(request, monkeypatch, tmp_path):
    """PyAV; and a stand-in for the program ffmpeg, which answers the options that are passed to it, by PyAV too."""
    if request.param == "PyAV":
        monkeypatch.setattr(media.shutil, "which", lambda name: None)
        return request.param
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{FFMPEG}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(media, "find_spec", lambda name: None)
    return request.param


FFMPEG = """
import struct, sys
import av
told = dict(zip(sys.argv[2:-1], sys.argv[3:]))
assert told["-f"] == "wav" and told["-c:a"] == "pcm_f32le" and sys.argv[-1] == "-"
with av.open(told["-i"]) as container:
    stream = container.streams.audio[int(told["-map"].split(":")[2])]
    rate, channels = stream.rate, stream.channels
    head = struct.pack("<HHIIHH", 3, channels, rate, 4 * channels * rate, 4 * channels, 32)
    sys.stdout.buffer.write(b"RIFF\\xff\\xff\\xff\\xffWAVEfmt \\x10\\0\\0\\0" + head + b"data\\xff\\xff\\xff\\xff")
    resampler = av.AudioResampler(format="flt")
    try:
        for frame in container.decode(stream):
            for part in resampler.resample(frame):
                sys.stdout.buffer.write(part.to_ndarray().tobytes())
    except av.FFmpegError as error:
        sys.exit(str(error))
"""


@pytest.mark.parametrize("name", KINDS)
def test_media_files_are_read(tmp_path, decoder, name):
    audio, rate = read_audio(encode(tmp_path / name, [tone()]))
    assert rate == (48_000 if name == "a.webm" else RATE) and audio.shape[1] == 2
    assert len(audio) / rate == pytest.approx(1.0, abs=0.06)
    for c in range(2):
        strongest = np.abs(np.fft.rfft(audio[:rate, c])).argmax() * rate / len(audio[:rate])
        assert strongest == pytest.approx(300 * (1 + c), abs=2)


@pytest.mark.parametrize(
    "blocks,length", [((600, 424, 300), 1000), ((1000,), 1000), ((990,), 990), ((900, 6000), 6900)]
)
def test_what_an_encoder_of_mp4_fills_its_last_frames_with_is_left_out(blocks, length):
    info = media.MediaInfo(1, 1000, 0, 1.0)
    samples = np.arange(sum(blocks), dtype=np.float32)[:, None]
    parts = np.split(samples, np.cumsum(blocks)[:-1])
    read = np.concatenate(list(media._measured(Path("a.m4a"), "mov", info, iter(parts), {})))
    np.testing.assert_array_equal(read, samples[:length])
    other = np.concatenate(list(media._measured(Path("a.mka"), "matroska", info, iter(parts), {})))
    np.testing.assert_array_equal(other, samples)


def test_lossless_files_keep_their_length(tmp_path):
    for name in ("alac.m4a", "a.oga"):
        assert len(read_audio(encode(tmp_path / name, [tone()]))[0]) == RATE


@pytest.mark.parametrize("samples", [44_100, 44_117, 44_130, 77_000, 77_777, 100_003])
def test_a_song_in_mp4_keeps_its_length(tmp_path, samples):
    """The header counts in thousandths of a second, rounded to either side; the last packet knows to some samples."""
    path = encode(tmp_path / "a.m4a", [tone(seconds=3.0)[:samples]], pts=0)
    assert abs(len(read_audio(path)[0]) - samples) < 10


@pytest.mark.parametrize("name", ["a.m4a", "a.webm", "a.mka"])
def test_a_media_file_is_missed_wherever_it_is_cut(tmp_path, name):
    whole = encode(tmp_path / name, [tone(seconds=3.0)], pts=0).read_bytes()
    for share in np.linspace(0.3, 0.9, 13):
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError):
            read_audio(tmp_path / name)


def test_a_header_of_mp4_that_is_exact_is_believed():
    info = media.MediaInfo(1, RATE, 0, 44_120 / RATE)  # no whole number of thousandths
    blocks = iter([np.ones((44_032, 1), np.float32), np.ones((128, 1), np.float32)])
    assert sum(map(len, media._measured(Path("a.m4a"), "mov", info, blocks, {"end": 44_160 / RATE}))) == 44_120


@pytest.mark.parametrize("name", ["a.m4a", "a.webm", "a.oga", "a.mka"])
def test_a_media_file_that_was_cut_short_is_refused(tmp_path, name):
    data = encode(tmp_path / name, [tone(seconds=3)]).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut off") as caught:
        read_audio(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_caf_whose_chunks_point_behind_any_end_is_a_sentence(tmp_path):
    chunk = b"desc\x7f" + bytes.fromhex("ffffffffffffff") + b"free\x7f" + bytes.fromhex("fffffffffffff0")
    (tmp_path / "a.caf").write_bytes(b"caff\0\1\0\0" + chunk + bytes(100))
    with pytest.raises(UserError, match=r"damaged or cut off|cannot be read"):
        audio_info(tmp_path / "a.caf")


def test_without_a_decoder_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "find_spec", lambda name: None)
    monkeypatch.setattr(media.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"a\.m4a needs PyAV or ffmpeg .*pip install 'msr_jax\[media\]'"):
        audio_info(encode(tmp_path / "a.m4a", [tone()]))


def test_lists_that_name_other_files_are_not_opened(tmp_path):
    (tmp_path / "a.m4a").write_text("#EXTM3U\n#EXTINF:1,\nother.ts\n")
    (tmp_path / "a.webm").write_text("ffconcat version 1.0\nfile other.wav\n")
    for name in ("a.m4a", "a.webm"):
        with pytest.raises(UserError, match="cannot be read as audio"):
            audio_info(tmp_path / name)


def test_speakers_come_in_the_order_of_wav_from_every_format(tmp_path):
    six = tone(200.0, 1.0, 6)
    soundfile.write(tmp_path / "a.ogg", six[:, [0, 2, 1, 4, 5, 3]], RATE)  # as Vorbis has them: the centre second
    write_audio(tmp_path / "b.ogg", six, RATE)
    for path in (
        tmp_path / "a.ogg",
        tmp_path / "b.ogg",
        encode(tmp_path / "a.oga", [six]),
        encode(tmp_path / "a.flac", [six], ("flac", "flac")),
    ):
        audio, _ = read_audio(path)
        heard = [np.abs(np.fft.rfft(x)).argmax() for x in audio.T]
        heard.pop(3)  # Vorbis leaves little of the low frequencies' channel above 120 Hz
        assert heard == [200, 400, 600, 1000, 1200]
        assert audio_info(path).mask in (0x3F, 0x60F)  # the back or the sides


def with_names(path, names):
    """Add the atom in which stem files name their stems, at the end."""
    body = json.dumps({"stems": [{"name": name, "color": "#000000"} for name in names]}).encode()
    atom = lambda name, body: struct.pack(">I4s", 8 + len(body), name) + body
    data = path.read_bytes()
    at = data.index(b"moov") - 4
    size = struct.unpack(">I", data[at : at + 4])[0]
    assert at + size == len(data)  # nothing that an offset points to moves
    udta = atom(b"udta", atom(b"stem", body))
    path.write_bytes(data[:at] + struct.pack(">I", size + len(udta)) + data[at + 4 :] + udta)
    return path


def stem_mp4(path, count=5):
    return encode(path, [tone(200.0 + 100 * k) for k in range(count)], ("mp4", "aac"))


def strongest(audio):
    return np.abs(np.fft.rfft(audio[:RATE, 0])).argmax()


def test_stems_of_an_mp4_are_those_of_musdb18_unless_it_names_others(tmp_path):
    plain = stem_mp4(tmp_path / "a.stem.mp4")
    assert streams_of(plain) == ["mixture", "drums", "bass", "other", "vocals"]
    read = read_track(plain, ("drums", "vocals"), RATE, 2)
    assert [strongest(x) for x in read.audio] == pytest.approx([300, 600], abs=2) and read.files == [plain]
    with pytest.raises(UserError, match=r"a\.stem\.mp4 holds no guitar; its stems are drums, bass, other, vocals"):
        read_track(plain, ("bass", "guitar"), RATE)
    named = with_names(stem_mp4(tmp_path / "b.stem.mp4", 3), ["Guitar", "Piano"])
    read = read_track(named, ("piano", "guitar"), RATE, 2)
    assert [strongest(x) for x in read.audio] == pytest.approx([400, 300], abs=2)
    with pytest.raises(UserError, match="holds no drums; its stems are guitar, piano"):
        read_track(named, ("drums",), RATE)


def test_stems_of_one_name_are_numbered_and_those_without_take_their_place_as_name(tmp_path):
    path = stem_mp4(tmp_path / "a.stem.mp4")
    original = path.read_bytes()
    for names, streams in (
        (["Drums", "Bass", "Synth", "Synth"], ["drums", "bass", "synth", "synth 2"]),
        (["Synth", "Synth", "Synth 2", "Mixture"], ["synth", "synth 3", "synth 2", "mixture 2"]),
        (["Drums", "", None, "Vox"], ["drums", "stem 2", "stem 3", "vox"]),
        (["Stem"] * 4, ["drums", "bass", "other", "vocals"]),
        ([""] * 4, ["drums", "bass", "other", "vocals"]),
    ):
        path.write_bytes(original)
        assert streams_of(with_names(path, names)) == ["mixture", *streams]


def test_a_decoder_ends_with_its_file(tmp_path):
    with media.open_media(encode(tmp_path / "a.oga", [tone()]), "ogg") as (_, blocks):
        next(blocks)
    # By the type itself: asked what it is, a weak proxy of something that is gone raises an error.
    decoding = [g for g in gc.get_objects() if type(g) is types.GeneratorType and g.__name__ == "decode"]
    assert not any(inspect.getgeneratorstate(g) == inspect.GEN_SUSPENDED for g in decoding)
    del blocks  # which has held them


@pytest.mark.parametrize("name", KINDS)
def test_about_how_long_a_media_file_is_is_known_before_it_is_read(tmp_path, name):
    info = audio_info(encode(tmp_path / name, [tone(seconds=2)]))
    assert info.frames is None and info.about == pytest.approx(2 * info.sample_rate, rel=0.1)


def test_a_damaged_stem_mp4_is_a_sentence(tmp_path):
    (tmp_path / "a.stem.mp4").write_bytes(b"no mp4")
    with pytest.raises(UserError, match="is no mp4 file"):
        read_track(tmp_path / "a.stem.mp4", ("drums",), RATE)
    few = stem_mp4(tmp_path / "b.stem.mp4", 2)
    with pytest.raises(UserError, match="has 2 streams of audio, not 5"):
        read_track(few, ("vocals",), RATE)


def test_a_damaged_file_is_a_sentence_and_nothing_else_is_printed(tmp_path, capfd):
    path = encode(tmp_path / "a.wma", [tone(seconds=0.2)])
    data = path.read_bytes()
    path.write_bytes(data[:40] + data[104:])
    with pytest.raises(UserError, match=r"a\.wma is damaged or cut off"):
        read_audio(path)
    assert capfd.readouterr().err == ""
