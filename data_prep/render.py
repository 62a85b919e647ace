"""`python -m data_prep.render OUT --layout slakh2100|musdb18hq --tracks N --seconds S --seed K`: stand-in multitrack music.

Pieces by a seeded arranger, played by a SoundFont and by our own synthesis, as the corpora are distributed: Slakh2100's mono
FLAC at 44.1 kHz, one file per instrument, with `metadata.yaml`, MIDI, and instruments outside the four groups that a
preparation leaves out; or MUSDB18-HQ's stereo WAV, four stems and their mixture. The splits share neither pieces nor
instruments: programs differ, kits too, drums that a SoundFont plays by a sample of an earlier split's kit are left out, and
only training has synthesised parts. The same seed gives the same bytes.

N tracks are a split's with `--split`; else one in six is for the test, one in six (of Slakh2100's layout, which has that
split) for validation, and the rest for training. The default SoundFont, TimGM6mb (carried by pretty_midi), is GPL-2; the
scores are made here.
"""

import argparse
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from data_prep.arranger import WITH_VOCALS, Part, arrange
from data_prep.kits import shared_drums
from data_prep.scores import excerpt, find_scores, read_score, write_midi
from data_prep.timbre import RATE, default_soundfont, integrated_loudness, render_part, to_stereo
from data_prep.writer import in_parallel, worker_pool
from msr_jax.audio.io import write_audio
from msr_jax.config import MUSDB_STEMS
from msr_jax.errors import UserError
from msr_jax.files import clear, passing
from msr_jax.process import begin, run_as_process

SPLITS = ("train", "validation", "test")  # their order is in the seeds
LAYOUTS = {"slakh2100": SPLITS, "musdb18hq": ("train", "test")}
# General MIDI programs (and kits). The test has others of the same families: the steel-string guitar was never trained on,
# the nylon-string one was. Kits as the default SoundFont has them: by their samples they are three, the acoustic ones (0 to
# 16, 32 and 40; 32 is 0 once more, and 48 mixes the three), an electronic one (24) and a drum machine (25).
PROGRAMS = {
    "train": {
        "drums": (0, 8, 16, 40),
        "bass": (32, 33, 35, 38),
        "guitar": (24, 26, 28, 29),
        "piano": (0, 1, 3, 4, 6),
        "other": (16, 18, 48, 50, 52, 56, 61, 65, 71, 73, 80, 81, 88, 89),
    },
    "validation": {"drums": (24,), "bass": (37,), "guitar": (31,), "piano": (7,), "other": (20, 51, 58, 69, 72)},
    "test": {
        "drums": (25,),
        "bass": (34, 36, 39),
        "guitar": (25, 27, 30),
        "piano": (2, 5),
        "other": (19, 49, 57, 66, 68),
    },
}
EVERY_PROGRAM = {
    group: tuple(sorted({n for split in SPLITS for n in PROGRAMS[split].get(group, ())})) for group in PROGRAMS["train"]
} | {"drums": (0, 8, 16, 24, 25, 32, 40, 48)}
VOICE = (53,)  # in the MIDI alone: no SoundFont sings, vocals are synthesised, each track's with a voice of its own
LEVEL_DB = {"drums": -20.0, "bass": -20.0, "guitar": -24.0, "piano": -23.0, "other": -26.0, "vocals": -19.0}
PEAK_DB = -1.0
CLASSES = {"drums": "Drums", "bass": "Bass", "guitar": "Guitar", "piano": "Piano"}


class Sounds(NamedTuple):
    """What a track is made of: length in seconds, programs of each group, SoundFonts, share of parts our own models play;
    drums of a kit that are left out; pieces to take excerpts of, or none to have them arranged; shares of an excerpt's
    parts that change register, and that are doubled.
    """

    seconds: float
    programs: Mapping[str, tuple[int, ...]]
    soundfonts: list[str]
    synthesised: float
    left_out: Mapping[int, frozenset[int]]
    scores: list[Path]
    moved: float
    doubled: float | None


def own_drums(parts: Sequence[Part], sounds: Sounds) -> list[Part]:
    """The parts without the drums that another split has."""
    out = lambda part: sounds.left_out.get(part.program, frozenset()) if part.group == "drums" else frozenset()
    return [part._replace(notes=[n for n in part.notes if n.pitch not in out(part)]) for part in parts]


def compose(rng: np.random.Generator, sounds: Sounds) -> list[Part]:
    """The parts of a track: arranged, or an excerpt in which at least two groups play."""
    if not sounds.scores:
        return own_drums(arrange(rng, sounds.seconds, sounds.programs), sounds)
    for _ in range(100):
        score = read_score(sounds.scores[rng.integers(len(sounds.scores))])
        parts = excerpt(rng, score, sounds.seconds, sounds.programs, sounds.moved, sounds.doubled)
        if len({part.group for part in parts}) > 1:
            return own_drums(parts, sounds)
    raise UserError(f"no {sounds.seconds:g} s of the pieces of --scores have two instruments; give others")


def play(rng: np.random.Generator, parts: Sequence[Part], sounds: Sounds) -> list[np.ndarray]:
    """(samples,) float32 of each part, at its level in a band."""
    audio = []
    for part in parts:
        x = render_part(rng, part, sounds.seconds, sounds.soundfonts, sounds.synthesised)
        audio.append(x * 10 ** ((LEVEL_DB[part.group] + rng.normal(0, 3)) / 20))
    return audio


def to_steps(audio: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """Stems under one gain, so that neither they nor their sum pass the peak, in steps of 16 bits; and that gain.

    They are rounded before they are summed, so that the mix is exactly their sum.
    """
    gain = 10 ** (PEAK_DB / 20) / max(np.abs(np.sum(audio, 0)).max(), *(np.abs(x).max() for x in audio), 1e-9)
    return [np.rint(x * gain * 32767) / 32768 for x in audio], float(gain)


def _describe(part: Part, stem: np.ndarray) -> dict[str, Any]:
    import pretty_midi

    is_drum = part.group == "drums"
    return {
        "audio_rendered": True,
        "inst_class": CLASSES.get(part.group) or pretty_midi.program_to_instrument_class(part.program),
        "integrated_loudness": round(integrated_loudness(stem), 6),
        "is_drum": is_drum,
        "midi_program_name": "Drums" if is_drum else pretty_midi.program_to_instrument_name(part.program),
        "midi_saved": True,
        "plugin_name": "msr_jax.render",
        "program_num": 128 if is_drum else part.program,
    }


def write_slakh(folder: Path, rng: np.random.Generator, sounds: Sounds, name: str) -> None:
    """A track as Slakh2100 has it, into `folder`."""
    parts = compose(rng, sounds)
    stems, gain = to_steps(play(rng, parts, sounds))
    numbers = [f"S{k:02d}" for k in range(len(parts))]
    for number, part, x in zip(numbers, parts, stems, strict=True):
        write_audio(folder / "stems" / f"{number}.flac", x[:, None].astype(np.float32), RATE, "PCM_16")
        write_midi(folder / "MIDI" / f"{number}.mid", [part])
    write_audio(folder / "mix.flac", np.sum(stems, 0)[:, None].astype(np.float32), RATE, "PCM_16")
    write_midi(folder / "all_src.mid", parts)
    described = {
        "UUID": name,
        "audio_dir": "stems",
        "lmd_midi_dir": "",
        "midi_dir": "MIDI",
        "normalization_factor": -13.0,
        "normalized": False,
        "overall_gain": gain,
        "stems": {n: _describe(part, x) for n, part, x in zip(numbers, parts, stems, strict=True)},
        "target_peak": PEAK_DB,
    }
    (folder / "metadata.yaml").write_text(yaml.safe_dump(described))


def write_musdb(folder: Path, rng: np.random.Generator, sounds: Sounds, name: str) -> None:
    """A song as MUSDB18-HQ has it, into `folder`."""
    parts = own_drums(arrange(rng, sounds.seconds, {**sounds.programs, "vocals": VOICE}, WITH_VOCALS), sounds)
    audio = play(rng, parts, sounds)
    mixed = {stem: np.zeros((int(sounds.seconds * RATE), 2), np.float32) for stem in MUSDB_STEMS}
    for part, x in zip(parts, audio, strict=True):
        mixed[part.group if part.group in MUSDB_STEMS else "other"] += to_stereo(rng, x)
    stems, _ = to_steps([mixed[stem] for stem in MUSDB_STEMS])
    for stem, x in [*zip(MUSDB_STEMS, stems, strict=True), ("mixture", np.sum(stems, 0))]:
        write_audio(folder / f"{stem}.wav", x.astype(np.float32), RATE, "PCM_16")


def render_track(job: tuple[str, int], out: Path, layout: str, seed: int, sounds: Mapping[str, Sounds]) -> None:
    """Write track `job` = (split, index), whole or not at all; its content depends on that, the seed and the sounds alone."""
    split, index = job
    rng = np.random.default_rng([seed, SPLITS.index(split), index, *([1] if layout == "musdb18hq" else [])])
    write, pattern = {
        "slakh2100": (write_slakh, "Track{:05d}"),
        "musdb18hq": (write_musdb, "Rendered Band - Song {:04d}"),
    }[layout]
    folder = out / split / pattern.format(index)
    beside = passing(folder)
    try:
        beside.mkdir(parents=True)
        write(beside, rng, sounds[split], f"{seed}-{split}-{index}")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    finally:
        clear(beside)


def split_counts(layout: str, split: str | None, tracks: int) -> dict[str, int]:
    """How many of the tracks each split gets. UserError if there are too few for all splits."""
    if split:
        if split not in LAYOUTS[layout]:
            raise UserError(f"{layout} has no split {split}; it has {', '.join(LAYOUTS[layout])}")
        return {split: tracks}
    others = {s: max(1, tracks // 6) for s in LAYOUTS[layout][1:]}
    if tracks <= sum(others.values()):
        raise UserError(
            f"--tracks {tracks} are too few for the splits {', '.join(LAYOUTS[layout])}; or name one --split"
        )
    return {"train": tracks - sum(others.values()), **others}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.render", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="slakh2100")
    parser.add_argument("--split", choices=SPLITS, help="render this one only; default: all of the layout")
    parser.add_argument("--tracks", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--soundfont",
        action="append",
        metavar="FILE",
        help="SoundFont (.sf2), or TiMidity++'s configuration of a patch set (.cfg, such as launch/study/freepats.cfg); repeatable (one "
        "named twice is drawn twice as often); default: pretty_midi's",
    )
    parser.add_argument(
        "--synthesised", type=float, default=0.4, help="share of training's parts that are synthesised (default 0.4)"
    )
    parser.add_argument(
        "--every-program",
        action="store_true",
        help="all splits draw from all instruments; name SoundFonts of their own for those to be tested on",
    )
    parser.add_argument("--scores", type=Path, metavar="DIR", help="take excerpts of the MIDI files in DIR as pieces")
    parser.add_argument(
        "--leave-out", type=Path, metavar="DIR", help="but of none that shares a passage with a MIDI file in DIR"
    )
    parser.add_argument(
        "--moved", type=float, default=0.0, help="share of the excerpts' parts that change register (default 0)"
    )
    parser.add_argument(
        "--doubled", type=float, help="share of them that another instrument plays too (default: now and then one does)"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first track (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    try:
        begin(sys.argv[1:] if argv is None else argv)
        for name in ("synthesised", "moved", "doubled"):
            if not 0 <= (getattr(args, name) or 0) <= 1:
                raise UserError(f"--{name} must lie between 0 and 1, not {getattr(args, name):g}")
        if args.tracks < 1 or not 1 < args.seconds < math.inf or min(args.first, args.seed) < 0:
            raise UserError("--tracks must be at least 1, --seconds more than 1, --first and --seed at least 0")
        fonts = args.soundfont or [default_soundfont()]
        missing = [f for f in fonts if not Path(f).is_file()]
        if missing:
            raise UserError(f"the SoundFont {missing[0]} does not exist")
        if not args.scores and (args.leave_out or args.moved or args.doubled is not None):
            raise UserError("--leave-out, --moved and --doubled go with --scores; name a folder of MIDI files with it")
        if args.scores and args.layout != "slakh2100":
            raise UserError("--scores makes tracks in the layout slakh2100 only")
        scores = find_scores(args.scores, args.leave_out) if args.scores else []
        counts = split_counts(args.layout, args.split, args.tracks)
        jobs = [(split, args.first + index) for split, count in counts.items() for index in range(count)]
        kits = {split: PROGRAMS[split]["drums"] for split in LAYOUTS[args.layout]}
        left_out = {} if args.every_program else shared_drums(fonts, kits)
        sounds = {
            split: Sounds(
                args.seconds,
                EVERY_PROGRAM if args.every_program else PROGRAMS[split],
                fonts,
                args.synthesised if split == "train" else 0.0,
                left_out.get(split, {}),
                scores,
                args.moved,
                args.doubled,
            )
            for split in counts
        }
        work = partial(render_track, out=args.out, layout=args.layout, seed=args.seed, sounds=sounds)
        with worker_pool(args.workers) as pool:
            in_parallel(work, jobs, pool, "rendering")
    except OSError as error:
        print(f"data_prep.render: cannot write to {args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"data_prep.render: {error}", file=sys.stderr)
        return 2
    listed = ", ".join(f"{count} {split}" for split, count in counts.items())
    source = f", excerpts of {len(scores)} pieces" if scores else ""
    print(f"rendered {args.tracks} tracks of {args.seconds:g} s in {args.out} ({listed}; seed {args.seed}{source})")
    return 0


if __name__ == "__main__":
    sys.exit(run_as_process("data_prep.render", main))
