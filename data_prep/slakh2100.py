"""`python -m data_prep.slakh2100 SRC OUT`: a Slakh2100-layout folder into pre-shuffled training records.

SRC holds `train`, `validation` and `test` (those that exist are taken), each with track folders as Slakh2100 is
distributed, or already converted to one file per stem. Tracks that cannot be used are left out, named and counted.
"""

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from msr_jax.config import SLAKH_STEMS
from msr_jax.data.records import to_pcm, track_records, write_records
from msr_jax.data.tracks import find_tracks, load_track
from msr_jax.errors import UserError

SPLITS = ("train", "validation", "test")
SAMPLE_RATE = 22_050
CROP = 262_144


def _load(track: Path, stems: tuple[str, ...]) -> tuple[np.ndarray | None, int, str]:
    """(int16 stems, clipped samples, "") of a track, or (None, 0, why not)."""
    try:
        return *to_pcm(load_track(track, stems, SAMPLE_RATE)), ""
    except UserError as error:
        return None, 0, str(error)


def _in_order(pool: Executor, tracks: list[Path], ahead: int) -> Iterator:
    """Yield (track, what `_load` gives), in order, never more than `ahead` tracks before they are asked for."""
    waiting: deque = deque()
    for track in tracks:
        waiting.append((track, pool.submit(_load, track, SLAKH_STEMS)))
        if len(waiting) > ahead:
            track, loaded = waiting.popleft()
            yield track, loaded.result()
    for track, loaded in waiting:
        yield track, loaded.result()


class Report:
    """Counts what went in; filled while records are written."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.skipped: list[str] = []

    def records(self, split: str, tracks: list[Path], crop: int, workers: int) -> Iterator:
        seconds, clipped, used, active = 0.0, 0, 0, np.zeros(len(SLAKH_STEMS))
        # Results come in order, so the records do not depend on the number of workers.
        # Spawned: a fork of a process with threads, as the libraries here start them, can hang.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for track, (stems, over, why) in _in_order(pool, tracks, 2 * workers):
                if stems is None:
                    self.skipped.append(why)
                    continue
                used, clipped, length = used + 1, clipped + over, stems.shape[1] / SAMPLE_RATE
                seconds += length
                active += length * (np.abs(stems).max(1) > 0)
                yield from track_records(track.name, stems, crop)
        if not used:
            raise UserError(f"none of the {len(tracks)} tracks of {split} can be used; the first: {self.skipped[-1]}")
        rates = ", ".join(f"{s} {100 * a / seconds:.0f} %" for s, a in zip(SLAKH_STEMS, active, strict=True))
        self.lines.append(
            f"{split}: {used} of {len(tracks)} tracks, {seconds / 3600:.2f} h, {clipped} clipped samples; "
            f"time of tracks that have the stem: {rates}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.slakh2100", description=__doc__)
    parser.add_argument("src", type=Path, metavar="SRC")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of records to write")
    parser.add_argument("--crop", type=int, default=CROP, help="longest crop that training will take, samples")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    args = parser.parse_args(argv)
    try:
        if not args.src.is_dir():
            raise UserError(f"{args.src} is no folder")
        if args.crop < 1:
            raise UserError(f"--crop must be at least one sample, not {args.crop}")
        splits = {s: find_tracks(args.src / s, SLAKH_STEMS) for s in SPLITS if (args.src / s).is_dir()}
        if not splits:
            raise UserError(f"{args.src} has none of the folders {', '.join(SPLITS)}; name the root of the corpus")
        report = Report()
        sources = {s: report.records(s, tracks, args.crop, args.workers) for s, tracks in splits.items()}
        manifest = {
            "stems": list(SLAKH_STEMS),
            "sample_rate": SAMPLE_RATE,
            "crop": args.crop,
            "layout": "slakh2100",
        }
        write_records(args.out, sources, manifest)
    except UserError as error:
        print(f"data_prep.slakh2100: {error}", file=sys.stderr)
        return 2
    print("\n".join(report.lines))
    for why in report.skipped:
        print(f"skipped: {why}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
