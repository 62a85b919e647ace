"""Pieces from MIDI files, for `data_prep.render --scores`: excerpts of real arrangements, played by other instruments.

An arranger's parts go their own ways; in written music instruments double each other, cross registers and stop together.
A separator that never heard two instruments in unison takes them for one.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_prep.arranger import Note, Part
from msr_jax.data.tracks import group_of
from msr_jax.errors import UserError

SAME = 12  # intervals in a row that make two pieces the same
MIN_NOTES = 8  # of a part in an excerpt
MAX_PARTS = 7
# Octaves that a part may be moved by, and between what median pitches it may then lie.
REGISTERS = {"bass": ((12, 12, 24), 24, 66), "guitar": ((-12,), 38, 90), "piano": ((-12, -12, -24), 30, 100)}


def read_score(path: Path) -> list[Part]:
    """The parts of a MIDI file, notes in seconds; programs outside the four groups are "other". UserError if it is none."""
    import pretty_midi

    try:
        with warnings.catch_warnings():  # of tempo changes where they should not be; they count all the same
            warnings.simplefilter("ignore")
            score = pretty_midi.PrettyMIDI(str(path))
    except Exception as error:  # mido raises what it happens to meet
        raise UserError(f"{path} cannot be read as MIDI ({error or type(error).__name__}); remove it") from error
    parts = []
    for instrument in score.instruments:
        notes = [Note(n.start, n.end - n.start, n.pitch, n.velocity) for n in instrument.notes]
        group = group_of(instrument.program, instrument.is_drum) or "other"
        if notes:
            parts.append(Part(group, instrument.program, sorted(notes)))
    return parts


def write_midi(path: Path, parts: Sequence[Part]) -> None:
    """Parts as a MIDI file, one track each."""
    import pretty_midi

    score = pretty_midi.PrettyMIDI()
    for part in parts:
        instrument = pretty_midi.Instrument(part.program, part.group == "drums")
        instrument.notes = [pretty_midi.Note(n.velocity, n.pitch, n.start, n.start + n.duration) for n in part.notes]
        score.instruments.append(instrument)
    path.parent.mkdir(parents=True, exist_ok=True)
    score.write(str(path))


def _runs(parts: list[Part]) -> set[tuple[int, ...]]:
    """Every `SAME` intervals in a row of each part but drums: the same in any key and at any tempo."""
    found: set[tuple[int, ...]] = set()
    for part in parts:
        if part.group != "drums":
            steps = np.diff([n.pitch for n in part.notes]).tolist()
            runs = (tuple(steps[k : k + SAME]) for k in range(len(steps) - SAME + 1))
            found.update(run for run in runs if len(set(run)) > 3)  # not a repeated note or a trill
    return found


def _midi_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".mid", ".midi") and p.name[0] != ".")


def find_scores(folder: Path, leave_out: Path | None = None) -> list[Path]:
    """MIDI files below `folder` with at least two of the four groups, in the order of their names.

    Args:
      leave_out: pieces that have `SAME` intervals in a row in common with a MIDI file below this folder are left out, so
        that what is to be tested on is not trained on.

    Raises:
      UserError: nothing is left, there is nothing to leave out, or a file cannot be read.
    """
    test_pieces = _midi_files(leave_out) if leave_out else []
    if leave_out and not test_pieces:  # a wrong path would let the test's pieces in unnoticed
        raise UserError(f"--leave-out {leave_out} has no MIDI file; name the folder of the corpus to be tested on")
    held_back = {run for path in test_pieces for run in _runs(read_score(path))}
    found = []
    for path in _midi_files(folder):
        parts = read_score(path)
        if len({part.group for part in parts} - {"other"}) > 1 and not _runs(parts) & held_back:
            found.append(path)
    if not found:
        raise UserError(f"--scores {folder} has no MIDI file left with two of drums, bass, guitar and piano")
    return found


def excerpt(
    rng: np.random.Generator,
    score: list[Part],
    seconds: float,
    programs: Mapping[str, tuple[int, ...]],
    moved: float = 0.0,
    doubled: float | None = None,
) -> list[Part]:
    """A stretch of a piece in another key, tempo and instrumentation.

    Every part gets a program drawn from its group's. Tempo is scaled by 0.85 to 1.2, pitch by up to 4 semitones. Parts of
    other instruments go to guitar or piano, or are left out.

    Args:
      score: the piece's parts, as `read_score` gives them.
      seconds: length of the excerpt, in which starts and durations lie.
      programs: for each group, the programs (kits for drums) to choose from.
      moved: share of parts that change their register (see `REGISTERS`): where all that is low is a bass, a separator
        takes all that is low for one.
      doubled: share of parts that an instrument of another group plays too, mostly in unison. None: in three excerpts of
        ten, guitar or piano double one part, in unison or an octave above.
    """
    tempo, key = rng.uniform(0.85, 1.2), int(rng.integers(-4, 5))
    end = max(n.start for part in score for n in part.notes) / tempo
    start = rng.uniform(0, max(0.0, end - seconds))
    choose = lambda group: int(rng.choice(programs[group]))
    parts = []
    for part in score:
        group = str(rng.choice(["guitar", "piano", "other"])) if part.group == "other" else part.group
        if group == "other":
            continue
        shift = 0 if group == "drums" else key
        if moved and group in REGISTERS and rng.random() < moved:
            octaves, low, high = REGISTERS[group]
            octave = int(rng.choice(octaves))
            shift += octave if low <= np.median([n.pitch for n in part.notes]) + octave <= high else 0
        at = [(n.start / tempo - start, n) for n in part.notes]
        notes = [
            Note(t, min(n.duration / tempo, seconds - t), n.pitch + shift, n.velocity)
            for t, n in at
            if 0 <= t < seconds - 0.05 and 0 <= n.pitch + shift < 128
        ]
        if len(notes) >= MIN_NOTES:
            parts.append(Part(group, choose(group), notes))
    tuned = [part for part in parts if part.group != "drums"]
    if doubled is None:
        lines = [tuned[rng.integers(len(tuned))]] if tuned and rng.random() < 0.3 else []
        doublers, octaves = ["guitar", "piano"], (0, 0, 12)
    else:
        lines = [part for part in tuned if rng.random() < doubled]
        doublers, octaves = ["bass", "guitar", "piano"], (0, 0, 0, -12, 12)
    for part in lines:
        group = str(rng.choice([g for g in doublers if g != part.group]))
        octave = int(rng.choice(octaves))
        notes = [n._replace(pitch=n.pitch + octave) for n in part.notes if 0 <= n.pitch + octave < 128]
        parts.append(Part(group, choose(group), notes))
    kept = sorted(rng.permutation(len(parts))[:MAX_PARTS])
    return [parts[k] for k in kept]
