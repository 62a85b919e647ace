"""`python -m data_prep.render OUT --layout slakh2100 --tracks N --seconds S --seed K`: stand-in multitrack music.

Pieces by a seeded arranger, played by a SoundFont and by our own synthesis, in the layout of Slakh2100: mono FLAC at
44.1 kHz, one file per instrument, `metadata.yaml`, and instruments outside the four groups that a preparation leaves out.
The splits share neither pieces nor instruments: programs, kits and the parameters of synthesis differ. The same seed
gives the same bytes.

The default SoundFont, TimGM6mb (carried by pretty_midi), is GPL-2; the scores are made here.
"""

import argparse
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import yaml

from data_prep.arranger import arrange
from data_prep.timbre import RATE, default_soundfont, render_part
from msr_jax.audio.io import write_audio
from msr_jax.errors import UserError

SPLITS = ("train", "validation", "test")
# General MIDI programs (and kits) for training and validation. Testing has others of the same families: the steel-string
# guitar was never trained on, the nylon-string one was.
TRAIN_PROGRAMS = {
    "drums": (0, 8, 24, 25, 40, 48),
    "bass": (32, 33, 35, 37, 38),
    "guitar": (24, 26, 28, 29, 31),
    "piano": (0, 1, 3, 4, 6, 7),
    "other": (16, 18, 48, 50, 52, 56, 61, 65, 71, 73, 80, 81, 88, 89),
}
TEST_PROGRAMS = {
    "drums": (16, 32),
    "bass": (34, 36, 39),
    "guitar": (25, 27, 30),
    "piano": (2, 5),
    "other": (19, 49, 57, 66, 68),
}
SYNTHESISED = {"train": 0.4, "validation": 0.4, "test": 0.0}
LEVEL_DB = {"drums": -20.0, "bass": -20.0, "guitar": -24.0, "piano": -23.0, "other": -26.0}
PEAK = 10 ** (-1 / 20)
NAMES = {
    "drums": "Drums",
    "bass": "Bass",
    "guitar": "Guitar",
    "piano": "Piano",
    "other": "Strings (continued)",
}


def render_track(index: int, out: Path, split: str, seconds: float, seed: int, soundfonts: list[str]) -> None:
    """Write one track folder, whole or not at all; its content depends on (seed, split, index) alone."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    parts = arrange(rng, seconds, TEST_PROGRAMS if split == "test" else TRAIN_PROGRAMS)
    audio, entries = [], {}
    for k, part in enumerate(parts):
        x = render_part(rng, part, seconds, soundfonts, SYNTHESISED[split])
        audio.append(x * 10 ** ((LEVEL_DB[part.group] + rng.normal(0, 3)) / 20))
        is_drum = part.group == "drums"
        entries[f"S{k:02d}"] = {
            "audio_rendered": True,
            "inst_class": NAMES[part.group],
            "is_drum": is_drum,
            "program_num": 128 if is_drum else part.program,
            "plugin_name": "msr_jax.render",
        }
    gain = PEAK / max(np.abs(np.sum(audio, 0)).max(), np.abs(audio).max(), 1e-9)
    # Stems are rounded to the format's steps before they are summed, so that the mix is exactly their sum.
    stems = [np.rint(x * gain * 32767) / 32768 for x in audio]
    folder = out / split / f"Track{index:05d}"
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    for name, x in [*zip((f"stems/{n}" for n in entries), stems, strict=True), ("mix", np.sum(stems, 0))]:
        write_audio(beside / f"{name}.flac", x[:, None].astype(np.float32), RATE, "PCM_16")
    described = {
        "UUID": f"{seed}-{split}-{index}",
        "audio_dir": "stems",
        "overall_gain": float(gain),
        "stems": entries,
    }
    (beside / "metadata.yaml").write_text(yaml.safe_dump(described))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.render", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--layout", choices=["slakh2100"], default="slakh2100")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--tracks", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--soundfont", action="append", metavar="FILE.sf2", help="repeatable; default: pretty_midi's")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    try:
        if args.tracks < 1 or args.seconds <= 1:
            raise UserError("--tracks must be at least 1 and --seconds more than 1")
        fonts = args.soundfont or [default_soundfont()]
        missing = [f for f in fonts if not Path(f).is_file()]
        if missing:
            raise UserError(f"the SoundFont {missing[0]} does not exist")
        work = partial(
            render_track,
            out=args.out,
            split=args.split,
            seconds=args.seconds,
            seed=args.seed,
            soundfonts=fonts,
        )
        # Spawned: a fork of a process with threads, as the libraries here start them, can hang.
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(work, range(args.tracks)))
    except OSError as error:
        print(f"data_prep.render: cannot write to {args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"data_prep.render: {error}", file=sys.stderr)
        return 2
    print(f"rendered {args.tracks} tracks of {args.seconds:g} s in {args.out / args.split} (seed {args.seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
