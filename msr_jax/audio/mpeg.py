"""Where the sound of an mp3 (or mp2, mp1) begins and ends among its tags, and whether it tells its length."""

import io
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

from msr_jax.audio.headers import id3_end

SEARCH = 2**18  # bytes after the tags in which the first frame must begin
# kbit/s by index, of MPEG-1 layers 1, 2, 3, and of MPEG-2 and 2.5 layers 1, 2 and 3
RATES = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SUFFIXES = (".mp3", ".mp2", ".mp1", ".mpa", ".mpga")
OTHERS = (b"fLaC", b"OggS")  # formats that are found behind ID3 tags too
HERTZ = (44_100, 48_000, 32_000)
SAME = bytes((0xFF, 0xFE, 0x0C, 0x00))  # bits of a header that all frames of a file share: sync, version, layer, rate


class Mpeg(NamedTuple):
    """The bytes of the frames of an MPEG audio file, and their samples per channel; None where the first frame tells."""

    start: int
    stop: int
    frames: int | None


class _Frame(NamedTuple):
    """What a frame's header of 4 bytes says; `length` is its bytes, 0 where it is free."""

    length: int
    samples: int


def _frame(header: bytes) -> _Frame | None:
    """None where it is no header."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    code, layer, rate, hertz = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3), header[2] >> 4, header[2] >> 2 & 3
    if code == 1 or layer == 4 or rate == 15 or hertz == 3 or header[3] & 3 == 2:
        return None
    version = 1 if code == 3 else 2
    samples = 384 if layer == 1 else 1152 if layer == 2 or version == 1 else 576
    slots = samples // 8 * 1000 * RATES[version, layer][rate] // (HERTZ[hertz] // {3: 1, 2: 2, 0: 4}[code])
    padding = header[2] >> 1 & 1
    length = (slots // 4 + padding) * 4 if layer == 1 else slots + padding
    return _Frame(length if rate else 0, samples)


def _same(a: bytes, b: bytes) -> bool:
    return len(b) == 4 and all(x & m == y & m for x, y, m in zip(a, b, SAME, strict=True))


def _free_length(data: bytes, at: int) -> int:
    """Bytes of the free frame at `at`, without padding: to the next header of its kind, and again as far; 0 if there is none."""
    header = data[at : at + 4]
    padding = header[2] >> 1 & 1
    for step in range(24, 5762):
        following = data[at + step : at + step + 4]
        if _same(header, following) and following[2] < 16:
            length = step - padding
            after = at + step + length + (following[2] >> 1 & 1)
            if _same(header, data[after : after + 4]):
                return length
    return 0


def _walk(data: bytes, at: int) -> Iterator[tuple[int, _Frame]]:
    """(where it ends, the frame) of each frame from `at` on, as long as they follow each other."""
    first = data[at : at + 4]
    free = _free_length(data, at) if (frame := _frame(first)) and not frame.length else 0
    while (frame := _frame(header := data[at : at + 4])) and _same(first, header):
        length = frame.length or (free and free + (header[2] >> 1 & 1))
        if not length:
            return
        at += length
        yield at, frame


def _next_chain(data: bytes, at: int, only: int = -1) -> int:
    """Where from `at` on three frames follow each other, or at `only` fewer to the end; free ones if no others; -1: nowhere."""
    for is_free in (False, True):
        place = data.find(b"\xff", at)
        while place >= 0:
            if (frame := _frame(data[place : place + 4])) and (not frame.length) == is_free:
                ends = [end for end, _ in islice(_walk(data, place), 3)]
                if len(ends) == 3 or (ends and place == only and ends[-1] + 4 > len(data)):
                    return place
            place = data.find(b"\xff", place + 1)
    return -1


def _tags_at_end(file: BinaryIO, start: int, stop: int) -> int:
    """Where ID3v1, APE and ID3v2 tags at the end begin."""
    while True:
        file.seek(max(start, stop - 128))
        tail = file.read(stop - file.tell())
        if len(tail) == 128 and tail[:3] == b"TAG":
            stop -= 128
        elif tail[-32:-24] == b"APETAGEX":
            flags = int.from_bytes(tail[-12:-8], "little")
            stop -= int.from_bytes(tail[-20:-16], "little") + (32 if flags >> 31 else 0)
        elif tail[-10:-7] == b"3DI":
            stop -= 20 + sum(byte << shift for byte, shift in zip(tail[-4:], (21, 14, 7, 0), strict=True))
        else:
            return stop
        if stop <= start:
            return start


def find_frames(file: BinaryIO, suffix: str) -> Mpeg | None:
    """The frames of an MPEG audio file; None for one that neither its name nor its start makes such a file."""
    end, start = file.seek(0, io.SEEK_END), id3_end(file)
    file.seek(start)
    data = file.read(SEARCH)
    if data[:4] in OTHERS or not (start or data[:1] == b"\xff" or suffix.lower() in SUFFIXES):
        return None
    after_zeros = len(data) - len(data.lstrip(b"\0"))
    at = _next_chain(data, 0, after_zeros if start + len(data) >= end else -1)
    if at < 0:
        return None
    first = data[at : at + 192]
    mark = max(first.find(b"Xing"), first.find(b"Info"))
    start, stop = start + at, _tags_at_end(file, start + at, end)
    if mark >= 0 and first[mark + 7] & 1:
        return Mpeg(start, stop, None)
    file.seek(start)
    data, samples, at, whole = file.read(stop - start), 0, 0, 0
    while at >= 0:
        for after, frame in _walk(data, at):
            if after <= len(data):
                samples, whole = samples + frame.samples, after
        # What follows is damage, behind which a decoder goes on, or no sound any more.
        at = _next_chain(data, whole + 1)
    return Mpeg(start, start + whole, samples)
