"""Headers of files with plain samples (WAV, RF64, W64, AIFF, CAF, AU): what they promise, beside what the file holds.

A program that writes into a pipe cannot go back to its header and leaves some number there that no file so short can have,
or 0. Such a file is whole, and ends where it ends; one that promises a little more than it holds has been cut off.
"""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from msr_jax.errors import UserError

# What counts as audio in a folder; a file that is named is read whatever it is called.
AUDIO_SUFFIXES = frozenset(
    ".wav .wave .flac .ogg .oga .opus .mp3 .mp2 .aif .aiff .aifc .au .caf .w64 .rf64 .m4a .aac .wma .webm .mka".split()
)

GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # how the names of W64's chunks go on
# Bytes, an hour and a half of a CD: a header that promises so much, and a sixteenth of it there, is no cut file.
MANY = 2**30


class _Form(NamedTuple):
    """How a container writes its chunks."""

    size: str  # of a chunk, for `struct`
    name_bytes: int
    counts_head: bool  # whether a size counts the name and itself
    align: int
    first: int  # where the first chunk begins
    data: bytes  # the chunk with the samples
    before: int  # bytes in that chunk before the samples


_WAV = _Form("<I", 4, False, 2, 12, b"data", 0)
_AIFF = _Form(">I", 4, False, 2, 12, b"SSND", 8)
FORMS = {
    b"RIFF": _WAV,
    b"RF64": _WAV,
    b"BW64": _WAV,
    b"RIFX": _WAV._replace(size=">I"),
    b"FORM": _AIFF,
    b"riff": _Form("<q", 16, True, 8, 40, b"data" + GUID, 0),
    b"caff": _Form(">q", 4, False, 1, 8, b"data", 4),
}
AU = {b".snd": ">I", b"dns.": "<I"}


class Samples(NamedTuple):
    """Where the samples of a file lie: from byte `start` to `stop`.

    `promised` is bytes by the header; `head` what stands before the samples as it should read, where that is otherwise than
    in the file. `mask` has a bit for each speaker (WAVEFORMATEXTENSIBLE); 0 where the header names none.
    """

    promised: int
    is_open: bool
    head: bytes | None
    start: int
    stop: int
    mask: int = 0

    @property
    def is_cut(self) -> bool:
        return not self.is_open and self.promised > self.stop - self.start


class Spliced(io.RawIOBase):
    """Reads `head`, then a file's bytes from `start` to `stop`, then `zeros` zeros."""

    def __init__(self, file: BinaryIO, head: bytes, start: int, stop: int, zeros: int = 0):
        self.file, self.head, self.start, self.stop = file, head, start, stop
        self.length, self.at = len(head) + stop - start + zeros, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), max(0, self.length - self.at))
        part = self.head[self.at : self.at + wanted]
        place = self.start + self.at + len(part) - len(self.head)
        if len(part) < wanted and place < self.stop:
            self.file.seek(place)
            part += self.file.read(min(wanted - len(part), self.stop - place))
        buffer[:wanted] = part.ljust(wanted, b"\0")
        self.at += wanted
        return wanted


def id3_end(file: BinaryIO, at: int = 0) -> int:
    """Where ID3v2 tags that begin at byte `at` end; `at` itself where there are none."""
    while True:
        file.seek(at)
        tag = file.read(10)
        if len(tag) < 10 or tag[:3] != b"ID3" or max(tag[6:]) > 127:
            return at
        footer = 10 if tag[5] & 16 else 0
        at += 10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True)) + footer


def _chunks(file: BinaryIO, form: _Form, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, bytes of its body, where the body begins) of each chunk from byte `at` on."""
    head = form.name_bytes + struct.calcsize(form.size)
    while at + head <= end:
        file.seek(at)
        name, size = file.read(form.name_bytes), struct.unpack(form.size, file.read(head - form.name_bytes))[0]
        size -= head if form.counts_head else 0
        yield name, size, at + head
        at += head + size + -size % form.align
        if size < 0:
            return


def _is_followed_by_chunks(file: BinaryIO, form: _Form, at: int, end: int) -> bool:
    """Whether what lies behind an empty data chunk is further chunks, to the end of the file."""
    found = list(_chunks(file, form, at, end))
    return bool(found) and all(name[:4].isascii() and name[:4].decode().isprintable() for name, _, _ in found) and (
        end - 1 <= found[-1][2] + max(0, found[-1][1]) <= end
    )  # fmt: skip


def _is_open_length(promised: int, held: int, is_wide: bool) -> bool:
    """Whether a length of more than what is held was never meant as one."""
    if is_wide and promised >= 2**48:
        return True
    near_limit = 0x7E000000 <= promised <= 0x80010000 or 0xFE000000 <= promised <= 0xFFFFFFFF
    return near_limit or (promised >= MANY and promised > 16 * held)


def find_samples(file: BinaryIO) -> Samples | None:
    """Where the samples of a file lie; None where it is of another format, or so damaged that there is no place for them.

    Raises:
      UserError: an open length, and more behind it than the format can count.
    """
    end, base = file.seek(0, io.SEEK_END), id3_end(file)
    file.seek(base)
    kind = file.read(4)
    if kind in AU:
        return _find_au(file, AU[kind], base, end)
    if kind not in FORMS:
        return None
    form, mask, wide = FORMS[kind], 0, None
    file.seek(base + 8)
    if kind == b"FORM" and file.read(4) not in (b"AIFF", b"AIFC"):
        return None
    for name, size, at in _chunks(file, form, base + form.first, end):
        if name == b"ds64":
            wide = at
        elif name[:4] == b"fmt " and size >= 40:
            file.seek(at)
            fmt = file.read(40)
            order = form.size[0]
            if len(fmt) == 40 and struct.unpack(f"{order}H", fmt[:2])[0] == 0xFFFE:
                mask = struct.unpack(f"{order}I", fmt[20:24])[0]
        elif name == form.data:
            break
        if at - base > 2**28:
            return None  # samples do not begin so late
    else:
        return None
    size_field, start = at - struct.calcsize(form.size), at + form.before
    if wide is not None and size == 0xFFFFFFFF:
        file.seek(wide + 8)
        size, size_field = struct.unpack("<Q", file.read(8))[0], wide + 8
    else:
        wide = None
    is_wide = wide is not None or form.size[1] == "q"
    promised, held = max(0, size - form.before), max(0, end - start)
    if size < 0 or (is_wide and size >= 2**63):
        promised = 2**63
    fits = promised <= held and (is_wide or held < 2**32)  # a length of 32 bits cannot be that of a larger file
    is_open = promised > held and _is_open_length(promised, held, is_wide)
    is_open |= not fits and promised <= held
    is_open |= promised == 0 and held > 0 and not _is_followed_by_chunks(file, form, start, end)
    file.seek(base)
    head = file.read(start - base)
    if is_open:
        start, stop = _without_copies(file, head, start, end)
        held = stop - start
        head = _completed(head, held, form, size_field - base, None if wide is None else wide - base)
        return Samples(promised, True, head, start, stop, mask)
    # BW64 is RF64 with further chunks, under a name that libsndfile does not know.
    return Samples(promised, False, b"RF64" + head[4:] if kind == b"BW64" else None, start, end, mask)


def _without_copies(file: BinaryIO, head: bytes, start: int, stop: int) -> tuple[int, int]:
    """The span of samples without the copies of the header that some programs leave around them in a pipe."""

    def is_copy(at: int) -> bool:
        file.seek(at)
        return file.read(len(head))[:4] == head[:4] and stop - start >= len(head)

    while is_copy(start):
        start += len(head)
    while is_copy(stop - len(head)):
        stop -= len(head)
    return start, stop


def _completed(head: bytes, held: int, form: _Form, size_field: int, wide: int | None) -> bytes:
    """A header with the lengths that a file of `held` bytes of samples should have."""
    counted = held + form.before + (24 if form.counts_head else 0)
    total = len(head) + held
    if wide is not None:
        fields = {size_field: struct.pack("<Q", held), wide: struct.pack("<Q", total - 8)}
    elif form.size == "<q":
        fields = {size_field: struct.pack("<q", counted), 16: struct.pack("<q", total)}
    elif form.size == ">q":
        fields = {size_field: struct.pack(">q", counted)}
    elif total - 8 < 2**32:
        fields = {size_field: struct.pack(form.size, counted), 4: struct.pack(form.size, total - 8)}
    elif head[:4] == b"RIFF":  # its form for large files
        large = struct.pack("<I", 0xFFFFFFFF)
        sizes = struct.pack("<4sIQQQI", b"ds64", 28, total + 28, held, 0, 0)
        return b"RF64" + large + b"WAVE" + sizes + head[12:-4] + large
    else:
        raise UserError("it holds more bytes than its format can count; convert it to FLAC")
    mended = bytearray(head.replace(b"BW64", b"RF64", 1))
    for place, value in fields.items():
        mended[place : place + len(value)] = value
    return bytes(mended)


def _find_au(file: BinaryIO, size: str, base: int, end: int) -> Samples | None:
    file.seek(base + 4)
    told = file.read(8)
    if len(told) < 8:
        return None
    offset, promised = struct.unpack(size[0] + "II", told)
    start = base + offset
    held = max(0, end - start)
    is_open = promised == 0xFFFFFFFF or (promised == 0 and held > 0)
    is_open |= promised > held and _is_open_length(promised, held, False)
    file.seek(base)
    head = file.read(offset)
    # libsndfile takes a length from 2 GB on for a negative one, and an open one up to the end of what it is given.
    is_long = not is_open and 2**31 <= promised <= held
    told_length = held if is_open and held < 2**31 else 0xFFFFFFFF
    mended = head[:8] + struct.pack(size, told_length) + head[12:] if is_open or is_long else None
    return Samples(promised, is_open, mended, start, start + promised if is_long else end)
