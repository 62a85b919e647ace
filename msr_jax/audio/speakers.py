"""The order and the names of more than two channels.

A mask has a bit for each speaker, as in WAVEFORMATEXTENSIBLE: front left 1, front right 2, centre 4, low frequencies 8, back
left 16, back right 32, …; channels are in the order of the bits.
"""

from pathlib import Path
from typing import Any

from mutagen import MutagenError, flac

# What FLAC and Ogg mean by a number of channels.
MASKS = {3: 0x7, 4: 0x33, 5: 0x37, 6: 0x3F, 7: 0x70F, 8: 0x63F}
# Channels of Vorbis and Opus, as libsndfile gives them, in the order of the mask: there the centre is the second.
FROM_VORBIS = {
    3: (0, 2, 1),
    4: (0, 1, 2, 3),
    5: (0, 2, 1, 3, 4),
    6: (0, 2, 1, 5, 3, 4),
    7: (0, 2, 1, 6, 5, 3, 4),
    8: (0, 2, 1, 7, 5, 6, 3, 4),
}
FLAC_FIELD = "WAVEFORMATEXTENSIBLE_CHANNEL_MASK"  # a comment, as the program flac writes it


def flac_mask(path: Path, channels: int) -> int:
    """The mask of a FLAC file of more than two channels."""
    try:
        tags: Any = flac.FLAC(path).tags
        mask = int(tags[FLAC_FIELD][0], 0) if tags and FLAC_FIELD in tags else 0
    except (MutagenError, ValueError):
        mask = 0
    return mask if mask.bit_count() == channels else MASKS.get(channels, 0)


def write_mask(path: Path, kind: str, channels: int, mask: int) -> None:
    """Name the speakers in a FLAC file, or in a WAV file that has an extensible header."""
    if kind == "FLAC" and mask != MASKS.get(channels):
        file = flac.FLAC(path)
        file[FLAC_FIELD] = f"0x{mask:04X}"
        file.save()
    elif kind != "FLAC":
        with open(path, "r+b") as opened:
            head = opened.read(4096)
            fmt = head.find(b"fmt ")
            if head[fmt + 8 : fmt + 10] == b"\xfe\xff":
                opened.seek(fmt + 28)
                opened.write(mask.to_bytes(4, "little"))
