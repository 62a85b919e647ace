"""`python -m data_prep.musdb18hq SRC OUT`: MUSDB18-HQ, or MUSDB18's `.stem.mp4` files, into pre-shuffled training records.

SRC holds `train` and `test`. As released, all songs of `train` are trained on and validation is on `test`; with
`--validation` the usual 14 songs of `train` become a split of their own. Songs that cannot be used are left out, named and
counted. Killed and started again, it goes on where it was.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from data_prep.prepare import Corpus, run
from msr_jax.config import MUSDB_STEMS
from msr_jax.data.tracks import child, find_tracks, plain, track_name
from msr_jax.process import run_as_process

SAMPLE_RATE = 44_100
CROP = 485_100
# The validation songs of the field, as the package `musdb` lists them.
VALIDATION = (
    "ANiMAL - Rockshow",
    "Actions - One Minute Smile",
    "Alexander Ross - Goodbye Bolero",
    "Clara Berry And Wooldog - Waltz For My Victims",
    "Fergessen - Nos Palpitants",
    "James May - On The Line",
    "Johnny Lokke - Promises & Lies",
    "Leaf - Summerghost",
    "Meaxic - Take A Step",
    "Patrick Talbot - A Reason To Leave",
    "Skelpolu - Human Mistakes",
    "Traffic Experiment - Sirens",
    "Triviul - Angelsaint",
    "Young Griffo - Pennies",
)


HINT = "to validate on the songs held out, train with --config.data.validation_split=validation; released is the split test"


def find(src: Path, args: argparse.Namespace) -> dict[str, list[Path]]:
    """Songs of `train` and `test`, those of `--validation` apart."""
    splits = {
        s: find_tracks(p, MUSDB_STEMS, every_folder=True) for s in ("train", "test") if (p := child(src, s)).is_dir()
    }
    if args.validation and "train" in splits:
        held_out = [song for song in splits["train"] if plain(track_name(song)) in map(plain, VALIDATION)]
        splits["train"] = [song for song in splits["train"] if song not in held_out]
        splits |= {"validation": held_out} if held_out else {}
    return splits


def edition(counts: Mapping[str, int]) -> str:
    """Whether all songs are there."""
    whole = counts.get("train", 0) + counts.get("validation", 0) == 100 and counts.get("test", 0) == 50
    return "MUSDB18, complete" if whole else "MUSDB18, not all 150 songs"


CORPUS = Corpus("musdb18hq", MUSDB_STEMS, SAMPLE_RATE, 2, CROP, 8, find, edition)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this corpus alone."""
    parser.add_argument("--validation", action="store_true", help="hold out the field's 14 validation songs")


def main(argv: list[str] | None = None) -> int:
    return run(
        "data_prep.musdb18hq", __doc__, CORPUS, argv, add_arguments,
        lambda splits: HINT if "validation" in splits else "",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_as_process("data_prep.musdb18hq", main))
