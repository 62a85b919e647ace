"""What a song says of itself (title, artist, cover, …), read from any format and written into its stems, by mutagen."""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import mutagen
import soundfile
from mutagen import asf, flac, id3, mp4
from mutagen.apev2 import APEv2, APEv2File
from mutagen.mp3 import MP3
from mutagen.wave import WAVE

from msr_jax.files import native

# Fields under their names in Vorbis comments, and those of ID3 frames, MP4 atoms and ASF attributes.
FIELDS = (
    ("TITLE", "TIT2", "\xa9nam", "Title"),
    ("ARTIST", "TPE1", "\xa9ART", "Author"),
    ("ALBUM", "TALB", "\xa9alb", "WM/AlbumTitle"),
    ("ALBUMARTIST", "TPE2", "aART", "WM/AlbumArtist"),
    ("TRACKNUMBER", "TRCK", "trkn", "WM/TrackNumber"),
    ("DISCNUMBER", "TPOS", "disk", "WM/PartOfSet"),
    ("DATE", "TDRC", "\xa9day", "WM/Year"),
    ("ORIGINALDATE", "TDOR", "", "WM/OriginalReleaseYear"),
    ("GENRE", "TCON", "\xa9gen", "WM/Genre"),
    ("COMPOSER", "TCOM", "\xa9wrt", "WM/Composer"),
    ("LYRICIST", "TEXT", "", "WM/Writer"),
    ("CONDUCTOR", "TPE3", "", "WM/Conductor"),
    ("REMIXER", "TPE4", "", "WM/ModifiedBy"),
    ("LABEL", "TPUB", "", "WM/Publisher"),
    ("COPYRIGHT", "TCOP", "cprt", "Copyright"),
    ("ISRC", "TSRC", "", "WM/ISRC"),
    ("BPM", "TBPM", "tmpo", "WM/BeatsPerMinute"),
    ("INITIALKEY", "TKEY", "", "WM/InitialKey"),
    ("MOOD", "TMOO", "", "WM/Mood"),
    ("LANGUAGE", "TLAN", "", "WM/Language"),
    ("MEDIA", "TMED", "", "WM/Media"),
    ("GROUPING", "TIT1", "\xa9grp", "WM/ContentGroupDescription"),
    ("SUBTITLE", "TIT3", "", "WM/SubTitle"),
    ("COMPILATION", "TCMP", "cpil", "WM/IsCompilation"),
    ("TITLESORT", "TSOT", "sonm", "WM/TitleSortOrder"),
    ("ARTISTSORT", "TSOP", "soar", "WM/ArtistSortOrder"),
    ("ALBUMSORT", "TSOA", "soal", "WM/AlbumSortOrder"),
    ("ALBUMARTISTSORT", "TSO2", "soaa", "WM/AlbumArtistSortOrder"),
    ("COMPOSERSORT", "TSOC", "soco", "WM/ComposerSortOrder"),
    ("COMMENT", "COMM", "\xa9cmt", "Description"),
    ("LYRICS", "USLT", "\xa9lyr", "WM/Lyrics"),
)
FRAMES = {frame: name for name, frame, _, _ in FIELDS}
ATOMS = {atom: name for name, _, atom, _ in FIELDS if atom}
ATTRIBUTES = {attribute: name for name, _, _, attribute in FIELDS}
TOTALS = {"TRACKNUMBER": ("TRACKTOTAL", "TOTALTRACKS"), "DISCNUMBER": ("DISCTOTAL", "TOTALDISCS")}
SYNONYMS = {
    "YEAR": "DATE", "TRACK": "TRACKNUMBER", "DISC": "DISCNUMBER", "ALBUM ARTIST": "ALBUMARTIST", "ORGANIZATION": "LABEL",
    "PUBLISHER": "LABEL", "DESCRIPTION": "COMMENT", "UNSYNCEDLYRICS": "LYRICS",
}  # fmt: skip
# What is true of the song's own samples or file, and not of a stem's.
LEFT_OUT = (
    "REPLAYGAIN_", "R128_", "MP3GAIN_", "ITUN", "ACOUSTID_", "ENCODER", "ENCODED", "ENCODING", "TOOL", "LENGTH", "CUESHEET",
    "METADATA_BLOCK_PICTURE", "COVERART", "COVER ART", "WAVEFORMATEXTENSIBLE_", "MD5", "ACCURATERIP", "SOFTWARE",
)  # fmt: skip
NAME = re.compile("[ -<>-}]+")  # of a field, as Vorbis comments allow it
PICTURE_BYTES = 2**24 - 2**16  # of all together: what FLAC's metadata blocks hold


class Tags(NamedTuple):
    """Values by their names in Vorbis comments, in capitals, and pictures."""

    text: dict[str, list[str]]
    pictures: list[flac.Picture]


def read_tags(path: Path) -> Tags:
    """The tags of an audio file; none where it has none, or none that can be read."""
    try:
        file = mutagen.File(path)
    except Exception:  # whatever is in a file's tags, the file is separated
        file = None
    tags = getattr(file, "tags", None)
    pairs: Iterable[tuple[str, Any]] = ()
    pictures: list[flac.Picture] = []
    with suppress(Exception):  # as above; what was read before stays
        if isinstance(tags, id3.ID3):
            pairs, pictures = (
                list(_of_id3(tags)),
                [_picture(f.type, f.mime, f.desc, f.data) for f in tags.getall("APIC")],
            )
        elif isinstance(tags, mp4.MP4Tags):
            pairs, pictures = list(_of_mp4(tags)), [_cover(data) for data in tags.get("covr", [])]
        elif isinstance(tags, asf.ASFTags):
            pairs = [
                (ATTRIBUTES.get(name, name.removeprefix("WM/")), str(value))
                for name, value in tags
                if name != "WM/Picture"
            ]
            pictures = [_asf_picture(value.value) for value in tags.get("WM/Picture", [])]
        elif isinstance(tags, APEv2):
            pairs, pictures = _of_ape(tags)
        elif tags is not None:  # Vorbis comments
            pairs, pictures = list(tags), list(getattr(file, "pictures", []) or _ogg_pictures(tags))
        elif isinstance(file, APEv2File) or path.suffix.lower() == ".mp3":
            pairs, pictures = _of_ape(APEv2(path))
        else:
            with soundfile.SoundFile(native(path)) as opened:
                pairs = list(opened.copy_metadata().items())
    text: dict[str, list[str]] = {}
    for name, value in pairs:
        name, value = name.upper(), value.strip("\0 \n")
        name = SYNONYMS.get(name, name)
        if value and NAME.fullmatch(name) and not name.startswith(LEFT_OUT):
            text.setdefault(name, []).append(value)
    kept, room = [], PICTURE_BYTES
    for picture in pictures:
        room -= len(picture.data)
        if room < 0:
            break
        kept.append(picture)
    return Tags(_with_totals(text), kept)


def stem_tags(tags: Tags, stem: str, song: str) -> Tags:
    """A stem's tags: the song's, and `TITLE (stem)`; `song` is the title of one that has other tags and no title."""
    if not tags.text and not tags.pictures:
        return tags
    title = tags.text.get("TITLE", [song])[0]
    return tags._replace(text={**tags.text, "TITLE": [f"{title} ({stem})"]})


def write_tags(path: Path, kind: str, tags: Tags) -> None:
    """Write tags into a file that has none yet; libsndfile's name for its format is `kind`. RF64 has no place for them.

    Raises:
      OSError: the file cannot be written.
    """
    if kind == "RF64" or not (tags.text or tags.pictures):
        return
    try:
        if kind in ("WAV", "WAVEX", "MP3"):
            file: Any = MP3(path) if kind == "MP3" else WAVE(path)
            file.add_tags()
            for frame in _to_id3(tags):
                file.tags.add(frame)
        else:
            file = mutagen.File(path)  # FLAC, Ogg Vorbis, Ogg Opus
            for name, values in sorted(_split_totals(tags.text).items()):
                file[name] = values
            if kind == "FLAC":
                for picture in tags.pictures:
                    file.add_picture(picture)
            elif tags.pictures:
                file["METADATA_BLOCK_PICTURE"] = [base64.b64encode(p.write()).decode() for p in tags.pictures]
        file.save()
    except mutagen.MutagenError as error:
        cause = error.args[0] if error.args and isinstance(error.args[0], OSError) else error
        raise OSError(getattr(cause, "errno", None), getattr(cause, "strerror", None) or str(cause)) from error


def _picture(kind: int, mime: str, description: str, data: bytes) -> flac.Picture:
    picture = flac.Picture()
    picture.type, picture.mime, picture.desc, picture.data = kind, mime, description, data
    return picture


def _cover(data: bytes) -> flac.Picture:
    return _picture(3, "image/png" if data[:4] == b"\x89PNG" else "image/jpeg", "", bytes(data))


def _asf_picture(value: bytes) -> flac.Picture:
    """A picture of ASF: kind, bytes of the data, type and description as UTF-16 that ends in 0, data."""
    size = int.from_bytes(value[1:5], "little")
    mime, _, rest = value[5:].decode("utf-16-le", errors="replace").partition("\0")
    return _picture(value[0], mime, rest.partition("\0")[0], value[len(value) - size :])


def _ogg_pictures(tags: Any) -> Iterator[flac.Picture]:
    for coded in tags.get("metadata_block_picture", []):
        yield flac.Picture(base64.b64decode(coded))


def _of_id3(tags: id3.ID3) -> Iterator[tuple[str, str]]:
    for frame in tags.values():
        if frame.FrameID == "TXXX":
            yield from ((frame.desc, value) for value in frame.text)
        elif frame.FrameID == "COMM":
            if not frame.desc:  # players keep settings of theirs under others
                yield from (("COMMENT", value) for value in frame.text)
        elif frame.FrameID == "USLT":
            yield "LYRICS", frame.text
        elif frame.FrameID == "TCON":
            yield from (("GENRE", value) for value in frame.genres)
        elif frame.FrameID in FRAMES:
            yield from ((FRAMES[frame.FrameID], str(value)) for value in frame.text)


def _of_mp4(tags: mp4.MP4Tags) -> Iterator[tuple[str, str]]:
    for name, values in tags.items():
        if name.startswith("----"):
            yield from ((name.split(":")[-1], bytes(value).decode(errors="replace")) for value in values)
        elif name in ("trkn", "disk"):
            yield from (
                (ATOMS[name], f"{number}/{total}" if total else str(number)) for number, total in values if number
            )
        elif name == "cpil":
            yield ATOMS[name], "1" if values else ""
        elif name in ATOMS:
            yield from ((ATOMS[name], str(value)) for value in values)


def _of_ape(tags: APEv2) -> tuple[list[tuple[str, str]], list[flac.Picture]]:
    pairs = [(name, part) for name, value in tags.items() if value.kind == 0 for part in value]
    covers = [value.value for name, value in tags.items() if name.lower() == "cover art (front)"]
    return pairs, [_cover(cover.partition(b"\0")[2]) for cover in covers]


def _with_totals(text: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """`TRACKNUMBER` 3 and `TRACKTOTAL` 12 as the one 3/12; as in ID3."""
    told = dict(text)
    for name, totals in TOTALS.items():
        counts = [told.pop(total)[0] for total in totals if total in told]
        if name in told and counts and "/" not in told[name][0]:
            told[name] = [f"{told[name][0]}/{counts[0]}"]
    return told


def _split_totals(text: Mapping[str, list[str]]) -> dict[str, list[str]]:
    told = dict(text)
    for name, (total, _) in TOTALS.items():
        number, _, count = told.get(name, [""])[0].partition("/")
        if count:
            told |= {name: [number], total: [count]}
    return told


def _to_id3(tags: Tags) -> Iterator[id3.Frame]:
    names = {name: frame for frame, name in FRAMES.items()}
    for name, values in sorted(tags.text.items()):
        if name == "COMMENT":
            yield id3.COMM(encoding=3, lang="XXX", desc="", text=values)
        elif name == "LYRICS":
            yield id3.USLT(encoding=3, lang="XXX", desc="", text="\n".join(values))
        elif name in names:
            yield getattr(id3, names[name])(encoding=3, text=values)
        else:
            yield id3.TXXX(encoding=3, desc=name, text=values)
    for k, picture in enumerate(tags.pictures):
        # Frames of one description replace each other.
        yield id3.APIC(
            encoding=3, mime=picture.mime, type=picture.type, desc=picture.desc or " " * k, data=picture.data
        )
