"""`python -m data_prep.slakh2100 SRC OUT`: a Slakh2100-layout folder into pre-shuffled training records.

SRC holds `train`, `validation` and `test` (those that exist are taken; redux's `omitted` is not), each with track folders
as Slakh2100 is distributed, or already converted to one file per stem. Tracks that cannot be used are left out, named and
counted. Killed and started again, it goes on where it was.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from data_prep.prepare import Corpus, run
from msr_jax.config import SLAKH_STEMS
from msr_jax.data.tracks import SPLITS, child, find_tracks
from msr_jax.process import run_as_process

SAMPLE_RATE = 22_050
CROP = 262_144
# Numbers of tracks by which an edition is known; split2 moves tracks between the splits of the original.
EDITIONS: dict[tuple[int, ...], str] = {(1500, 375, 225): "original or split2", (1289, 270, 151): "redux"}


def find(src: Path, args: argparse.Namespace) -> dict[str, list[Path]]:
    """Folders of the splits that SRC has: each is a track, or is reported as what it is."""
    return {s: find_tracks(p, SLAKH_STEMS, every_folder=True) for s in SPLITS if (p := child(src, s)).is_dir()}


def edition(counts: Mapping[str, int]) -> str:
    """Which edition of the splits a corpus is, as far as the numbers of tracks tell."""
    return "Slakh2100, " + EDITIONS.get(tuple(counts.get(s, 0) for s in SPLITS), "none of the published splits")


CORPUS = Corpus("slakh2100", SLAKH_STEMS, SAMPLE_RATE, 1, CROP, 4, find, edition)


def main(argv: list[str] | None = None) -> int:
    return run("data_prep.slakh2100", __doc__, CORPUS, argv)


if __name__ == "__main__":
    sys.exit(run_as_process("data_prep.slakh2100", main))
