"""What a song says of itself goes into its stems, from every format into every format."""

import base64
import resource

import mutagen
import numpy as np
import pytest
import soundfile
from mutagen import asf, flac, id3, mp4
from mutagen.wave import WAVE

from msr_jax.audio.io import AudioWriter, read_audio
from msr_jax.audio.tags import read_tags, stem_tags
from msr_jax.errors import UserError
from tests.test_media import encode, tone

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(200))
RATE = 44_100


def cover():
    picture = flac.Picture()
    picture.type, picture.mime, picture.data, picture.desc = 3, "image/png", PNG, "front"
    return picture


def as_vorbis(file):
    file["title"], file["artist"], file["album"] = "Sång", ["One", "Two"], "Ålbum"
    file["tracknumber"], file["tracktotal"], file["date"], file["mood_of_mine"] = "3", "12", "1999-05", "blue"
    file["replaygain_track_gain"], file["encoder"] = "-3 dB", "someone"


def tag_flac(path):
    file = flac.FLAC(path)
    as_vorbis(file)
    file.add_picture(cover())
    file.save()


def tag_ogg(path):
    file = mutagen.File(path)
    as_vorbis(file)
    file["metadata_block_picture"] = [base64.b64encode(cover().write()).decode()]
    file.save()


def tag_id3(path):
    file = mutagen.File(path)
    if file.tags is None:
        file.add_tags()
    frames = {
        "TIT2": "Sång",
        "TPE1": ["One", "Two"],
        "TALB": "Ålbum",
        "TRCK": "3/12",
        "TDRC": "1999-05",
        "TLEN": "1000",
    }
    for name, text in frames.items():
        file.tags.add(getattr(id3, name)(encoding=3, text=text))
    file.tags.add(id3.TXXX(encoding=3, desc="mood_of_mine", text="blue"))
    file.tags.add(id3.TXXX(encoding=3, desc="replaygain_track_gain", text="-3 dB"))
    file.tags.add(id3.APIC(encoding=3, mime="image/png", type=3, desc="front", data=PNG))
    file.save()


def tag_mp4(path):
    file = mp4.MP4(path)
    file["\xa9nam"], file["\xa9ART"], file["\xa9alb"], file["trkn"] = "Sång", ["One", "Two"], "Ålbum", [(3, 12)]
    file["\xa9day"], file["----:com.apple.iTunes:mood_of_mine"] = "1999-05", b"blue"
    file["----:com.apple.iTunes:iTunSMPB"] = b" 00000000 00000840"
    file["covr"] = [mp4.MP4Cover(PNG, mp4.MP4Cover.FORMAT_PNG)]
    file.save()


def tag_asf(path):
    file = asf.ASF(path)
    file["Title"], file["Author"], file["WM/AlbumTitle"] = "Sång", ["One", "Two"], "Ålbum"
    file["WM/TrackNumber"], file["WM/Year"], file["mood_of_mine"] = "3/12", "1999-05", "blue"
    text = "image/png\0front\0".encode("utf-16-le")
    file["WM/Picture"] = asf.ASFByteArrayAttribute(b"\3" + len(PNG).to_bytes(4, "little") + text + PNG)
    file.save()


SONGS = {"a.flac": tag_flac, "a.ogg": tag_ogg, "a.mp3": tag_id3, "a.wav": tag_id3, "a.aiff": tag_id3, "a.m4a": tag_mp4}
SONGS["a.wma"] = tag_asf


@pytest.fixture
def song(tmp_path, request):
    path = tmp_path / request.param
    if path.suffix in (".m4a", ".wma"):
        encode(path, [tone(seconds=0.2)])
    else:
        soundfile.write(path, tone(seconds=0.2), RATE)
    SONGS[path.name](path)
    return path


@pytest.mark.parametrize("song", SONGS, indirect=True)
@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus"])
def test_tags_and_cover_go_from_every_format_into_every_format(song, tmp_path, suffix):
    told = stem_tags(read_tags(song), "drums", "a")
    for name in ("one", "two"):
        with AudioWriter(tmp_path / f"{name}.{suffix}", 48_000, 2, tags=told) as writer:
            writer.write(tone(seconds=0.2))
    same = (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()
    assert same or suffix in ("ogg", "opus")  # a stream's number in an Ogg file is drawn at random
    stem = read_tags(tmp_path / f"one.{suffix}")
    assert stem.text == {
        "TITLE": ["Sång (drums)"], "ARTIST": ["One", "Two"], "ALBUM": ["Ålbum"], "TRACKNUMBER": ["3/12"],
        "DATE": ["1999-05"], "MOOD_OF_MINE": ["blue"],
    }  # fmt: skip
    assert [(p.type, p.mime, p.data) for p in stem.pictures] == [(3, "image/png", PNG)]
    audio = read_audio(tmp_path / f"one.{suffix}")[0]
    np.testing.assert_allclose(audio, tone(seconds=0.2), atol=2**-23 if suffix in ("wav", "flac") else 0.3)


def test_fields_have_the_names_that_players_know(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(), RATE)
    tag_flac(tmp_path / "a.flac")
    for name in ("b.flac", "b.wav"):
        with AudioWriter(
            tmp_path / name, RATE, 1, tags=stem_tags(read_tags(tmp_path / "a.flac"), "bass", "a")
        ) as writer:
            writer.write(tone()[:, :1])
    written = flac.FLAC(tmp_path / "b.flac")
    assert written["tracknumber"] == ["3"] and written["tracktotal"] == ["12"] and written["title"] == ["Sång (bass)"]
    frames = WAVE(tmp_path / "b.wav").tags
    assert (
        str(frames["TRCK"]) == "3/12" and frames["TPE1"].text == ["One", "Two"] and str(frames["TIT2"]) == "Sång (bass)"
    )


def test_the_info_chunk_of_a_wav_is_read(tmp_path):
    with soundfile.SoundFile(tmp_path / "a.wav", "w", RATE, 1) as file:
        file.title, file.artist, file.software = "Song", "One", "a program"
        file.write(tone()[:, 0])
    assert read_tags(tmp_path / "a.wav").text == {"TITLE": ["Song"], "ARTIST": ["One"]}


def test_a_song_without_a_title_is_called_by_its_name_and_one_without_tags_stays_so(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(), RATE)
    bare = read_tags(tmp_path / "a.flac")
    assert not bare.text and stem_tags(bare, "bass", "a") == bare
    file = flac.FLAC(tmp_path / "a.flac")
    file["artist"] = "One"
    file.save()
    assert stem_tags(read_tags(tmp_path / "a.flac"), "bass", "a").text["TITLE"] == ["a (bass)"]


@pytest.mark.parametrize("name", ["", "~", "a=b", "ä", "a\tb"])
@pytest.mark.parametrize("suffix", ["flac", "opus", "wav"])
def test_fields_with_names_that_vorbis_comments_do_not_allow_are_left_out(tmp_path, name, suffix):
    soundfile.write(tmp_path / "a.mp3", tone(seconds=0.1), RATE)
    tags = id3.ID3()
    tags.add(id3.TIT2(encoding=3, text="Song"))
    tags.add(id3.TXXX(encoding=3, desc=name, text="value"))
    tags.save(tmp_path / "a.mp3")
    with AudioWriter(tmp_path / f"b.{suffix}", 48_000, 2, tags=read_tags(tmp_path / "a.mp3")) as writer:
        writer.write(tone(seconds=0.1))
    assert read_tags(tmp_path / f"b.{suffix}").text == {"TITLE": ["Song"]}


def test_tags_that_cannot_be_read_are_none(tmp_path):
    for name, data in {
        "a.mp3": b"ID3\x04\0\0\x7f\x7f\x7f\x7f",
        "a.flac": b"fLaC\xff\xff\xff\xff",
        "a.m4a": b"\0\0\0\x08ftyp",
    }.items():
        (tmp_path / name).write_bytes(data)
        assert read_tags(tmp_path / name) == ({}, [])
    assert read_tags(tmp_path / "none.mp3") == ({}, [])


def test_covers_too_large_for_the_format_are_left_out(tmp_path):
    soundfile.write(tmp_path / "a.mp3", tone(), RATE, format="MP3")
    tags = id3.ID3()
    tags.add(id3.TIT2(encoding=3, text="Song"))
    for k, size in enumerate((1000, 2**24)):
        tags.add(id3.APIC(encoding=3, mime="image/jpeg", type=3, desc=str(k), data=bytes(size)))
    tags.save(tmp_path / "a.mp3")
    assert [len(p.data) for p in read_tags(tmp_path / "a.mp3").pictures] == [1000]


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_disk_that_fills_up_with_the_tags_leaves_nothing(tmp_path, name):
    soundfile.write(tmp_path / "song.flac", tone(seconds=0.1), RATE)
    file = flac.FLAC(tmp_path / "song.flac")
    picture = cover()
    picture.data = bytes(300_000)
    file.add_picture(picture)
    file.save()
    told = stem_tags(read_tags(tmp_path / "song.flac"), "bass", "song")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(UserError, match="is the disk full"):
            with AudioWriter(tmp_path / name, RATE, 2, tags=told) as writer:
                writer.write(tone(seconds=0.1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["song.flac"]
