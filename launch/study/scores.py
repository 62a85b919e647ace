"""Pieces for the study: `python launch/study/scores.py PACKAGES OUT`, PACKAGES with these Debian packages unpacked.

- openttd-openmsx: 31 pieces of game music, band arrangements (GPL-2), in `written/bands`;
- simutrans-data (Artistic), planetblupi-music-midi (GPL-3), liquidwar-data and kobodeluxe-data (GPL-2): the same kind by
  other hands, in `games`, a sixth of them in `games_validation`;
- freedoom: the MIDI files inside its game data, rock (BSD), in `written` as the next;
- mma: accompaniments by Musical MIDI Accompaniment (GPL-2) to progressions drawn here, one per file of its grooves.

Only what a model learns from them is shipped, no note of theirs.
"""

import os
import re
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_prep.scores import read_score
from msr_jax.errors import UserError

SEED, BARS = 11, 40
# Pieces of the sample corpora's tests and validation, and two that share a passage with them. `data_prep.render --leave-out`
# on those finds all but the first, whose score is not there.
HELD_BACK = (
    "ultimate_run", "5432gone_redfarn", "no_work_song_redfarn", "run_for_your_life", "say_what_redfarn",
    "slow_neasy_redfarn", "the_hobo_redfarn", "stdlib_trance",
)  # fmt: skip
GAMES = ("simutrans", "planetblupi", "liquidwar", "kobo-deluxe")  # folders of their packages
GAMES_VALIDATION = (
    "04-Simutrans-B-Theme", "13-Stephenson-blues", "18-Ride-that-train", "22-Variable-Journeys", "28-Road-to-Warm-Places",
    "35-deep-ride", "41-Libertador", "47-Salty-Breeze", "53-Where-Thomassons-Lie", "music005", "trance1",
)  # fmt: skip
SCALES = (
    ((0, ""), (2, "m"), (4, "m"), (5, ""), (7, "7"), (9, "m7"), (5, "M7")),
    ((0, "m"), (3, ""), (5, "m"), (7, "m7"), (8, ""), (10, "7"), (8, "M7")),
)
NOTES = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")


def unpack_wad(path: Path, out: Path) -> None:
    """Every MIDI lump of a game archive, as a file."""
    data = path.read_bytes()
    count, directory = struct.unpack("<ii", data[4:12])
    for k in range(count):
        start, size, name = struct.unpack("<ii8s", data[directory + 16 * k : directory + 16 * (k + 1)])
        if data[start : start + 4] == b"MThd":
            (out / f"{path.stem}_{name.rstrip(bytes(1)).decode()}.mid").write_bytes(data[start : start + size])


def accompany(root: Path, library: Path, rng: np.random.Generator, out: Path) -> None:
    """One piece in two grooves of a file; none where MMA cannot make it."""
    text = library.read_text(errors="replace")
    grooves = [g for g in re.findall(r"(?mi)^\s*DefGroove\s+(\S+)", text) if not re.search("(?i)intro|end|fill", g)]
    if not grooves:
        return
    key, degrees = rng.integers(12), SCALES[rng.integers(len(SCALES))]
    patterns = [rng.integers(len(degrees), size=rng.choice([2, 4, 8])) for _ in range(2)]
    lines = [f"Use {library.relative_to(root / 'lib').with_suffix('')}", f"Tempo {rng.integers(80, 170)}"]
    lines.append(f"RndSeed {SEED}")  # it plays loosely
    for bar in range(BARS):
        section = bar // 8 % 2
        if bar % 8 == 0:
            lines.append(f"Groove {grooves[rng.integers(len(grooves))]}")
        step, kind = degrees[patterns[section][bar % len(patterns[section])]]
        lines.append(f"{bar + 1} {NOTES[(key + step) % 12]}{kind}")
    source = out / f"{library.parent.name}_{library.stem}.mma"
    source.write_text("\n".join(lines) + "\n")
    command = [sys.executable, root.parents[1] / "bin" / "mma", source, "-f", source.with_suffix(".mid")]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env={**os.environ, "MMA_HOME": str(root)}, capture_output=True, timeout=60, check=False)
    source.unlink()


def main(packages: Path, out: Path) -> None:
    written = out / "written"
    for name in ("written/bands", "games", "games_validation"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for path in packages.rglob("*.mid"):
        games = "games_validation" if path.stem in GAMES_VALIDATION else "games"
        name = "written/bands" if path.parent.name == "openmsx" else games if {*GAMES} & {*path.parts} else "written"
        (out / name / path.name).write_bytes(path.read_bytes())
    for path in packages.rglob("*.wad"):
        unpack_wad(path, written)
    (root,) = packages.rglob("share/mma")
    (root / "plugins").mkdir(exist_ok=True)  # it warns without
    for k, library in enumerate(sorted((root / "lib").rglob("*.mma"))):
        accompany(root, library, np.random.default_rng([SEED, k]), written)
    for path in [path for path in out.rglob("*.mid") if path.stem in HELD_BACK]:
        path.unlink()
    for path in out.rglob("*.mid"):
        try:
            read_score(path)
        except UserError as error:
            print(error)
            path.unlink()
    print(f"{len(list(out.rglob('*.mid')))} pieces in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
