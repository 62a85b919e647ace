"""A seeded arranger: band music for bass, drums, guitar, piano and others, as notes in seconds.

It does not aim at beauty but at variety: keys, tempi, metres, feels, progressions, styles of playing, sections in which
instruments rest. What a separator must not learn is which notes go together; what it must learn is how sources sound.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
# How often a part plays in a section; together with resting parts this comes near the activity of Slakh2100.
ACTIVITY = {"drums": 0.98, "bass": 0.92, "guitar": 0.68, "piano": 0.8, "other": 0.5, "vocals": 0.75}
PRESENCE = {"drums": 1.0, "bass": 1.0, "guitar": 0.85, "piano": 0.95}
WITH_VOCALS = {**PRESENCE, "vocals": 1.0}
KICK, SNARE, SIDE, HAT, PEDAL, OPEN, RIDE, CRASH = 36, 38, 37, 42, 44, 46, 51, 49
TOMS = (50, 48, 45, 43, 41)


class Note(NamedTuple):
    """Start and duration in seconds, MIDI pitch, velocity 1 to 127."""

    start: float
    duration: float
    pitch: int
    velocity: int


class Part(NamedTuple):
    """One instrument's notes; `group` is bass, drums, guitar, piano, vocals or other, `program` General MIDI (a kit for drums)."""

    group: str
    program: int
    notes: list[Note]


class Bar(NamedTuple):
    """A bar: start in sixteenths, its number of sixteenths, its chord's root and tones (pitch classes), its section's index."""

    start: int
    length: int
    root: int
    chord: tuple[int, ...]
    section: int
    is_last: bool


class Song:
    """The frame that all parts share: metre, tempo, swing, sections and chords."""

    def __init__(self, rng: np.random.Generator, seconds: float):
        self.seconds = seconds
        self.sixteenth = 15.0 / np.exp(rng.uniform(np.log(68), np.log(185)))
        self.beats = int(rng.choice([4, 4, 4, 4, 4, 3, 3, 5, 6]))
        self.swing = rng.uniform(0.1, 0.34) if rng.random() < 0.3 else 0.0
        self.key, self.scale = int(rng.integers(12)), SCALES[str(rng.choice(list(SCALES)))]
        per_bar = 4 * self.beats
        count = int(seconds / (per_bar * self.sixteenth)) + 1
        patterns = [self._progression(rng) for _ in range(int(rng.integers(2, 4)))]
        self.bars: list[Bar] = []
        section = 0
        while len(self.bars) < count:
            progression, length = patterns[rng.integers(len(patterns))], int(rng.choice([2, 4, 4, 4, 8]))
            for k in range(length):
                root, chord = progression[k % len(progression)]
                self.bars.append(Bar(len(self.bars) * per_bar, per_bar, root, chord, section, k == length - 1))
            section += 1
        self.sections = section

    def _progression(self, rng: np.random.Generator) -> list[tuple[int, tuple[int, ...]]]:
        degrees = [0, *rng.choice(7, 7, p=[0.22, 0.1, 0.1, 0.2, 0.2, 0.14, 0.04])][: int(rng.choice([2, 4, 4, 8]))]
        size = 4 if rng.random() < 0.35 else 3
        tones = lambda d: tuple((self.key + self.scale[(d + 2 * k) % 7]) % 12 for k in range(size))
        return [(tones(int(d))[0], tones(int(d))) for d in degrees]

    def when(self, step: float) -> float:
        """Seconds of a place in sixteenths; off-beat eighths are late in a swung song."""
        late = self.swing * 2 if int(step) % 4 == 2 else self.swing if int(step) % 4 in (1, 3) else 0.0
        return (step + late) * self.sixteenth


def _nearest(pitch_class: int, around: float) -> int:
    return int(around + ((pitch_class - around + 6) % 12) - 6)


def _voicing(chord: tuple[int, ...], around: float) -> list[int]:
    return sorted(_nearest(p, around) for p in chord)


class Player:
    """Collects the notes of one part, with the looseness of one musician."""

    def __init__(self, rng: np.random.Generator, song: Song):
        self.rng, self.song, self.notes = rng, song, list[Note]()
        self.loose, self.drag = rng.uniform(0.001, 0.013), rng.normal(0, 0.006)
        self.level, self.dynamics = rng.uniform(66, 105), rng.uniform(3, 14)

    def play(self, step: float, length: float, pitch: int, accent: float = 0.0) -> None:
        """Add a note; step and length in sixteenths. What lies outside the song is left out."""
        start = max(0.0, self.song.when(step) + self.drag + self.rng.normal(0, self.loose))
        if start < self.song.seconds - 0.05 and 0 <= pitch < 128:
            velocity = int(np.clip(self.level + accent + self.rng.normal(0, self.dynamics), 20, 127))
            self.notes.append(Note(start, max(0.03, length * self.song.sixteenth), pitch, velocity))


def _drums(p: Player, song: Song, plays: np.ndarray) -> None:
    rng, cymbal_style = p.rng, 0
    for bar in song.bars:
        if bar.start == 0 or song.bars[bar.start // bar.length - 1].section != bar.section:
            steps = bar.length
            kick = rng.random(steps) < np.where(
                np.arange(steps) % 4 == 0, 0.35, np.where(np.arange(steps) % 2, 0.07, 0.2)
            )
            kick[0] = True
            if rng.random() < 0.2:
                kick = np.arange(steps) % 4 == 0
            back = np.zeros(steps, bool)
            back[4 * (song.beats // 2) if rng.random() < 0.2 else slice(4, None, 8)] = True
            ghosts = (rng.random(steps) < rng.choice([0.0, 0.03, 0.12])) & ~back
            every = int(rng.choice([1, 2, 2, 2, 4]))
            cymbal_style = int(rng.choice([HAT, HAT, HAT, RIDE, OPEN, PEDAL]))
            opens = rng.random(steps) < rng.choice([0.0, 0.06])
            snare = int(rng.choice([SNARE, SNARE, SNARE, 40, SIDE, 39]))
            if plays[bar.section] and rng.random() < 0.7:
                p.play(bar.start, 4, CRASH if rng.random() < 0.8 else 57, 10)
        if not plays[bar.section]:
            continue
        fill = bar.length - int(rng.choice([4, 8])) if bar.is_last and rng.random() < 0.75 else bar.length
        for k in range(bar.length):
            if k >= fill:
                if rng.random() < 0.75:
                    tom = TOMS[min(4, int(5 * (k - fill) / (bar.length - fill)))]
                    p.play(bar.start + k, 1, tom if rng.random() < 0.6 else SNARE, 5)
                continue
            if kick[k]:
                p.play(bar.start + k, 1, KICK, 8)
            if back[k]:
                p.play(bar.start + k, 1, snare, 10)
            if ghosts[k]:
                p.play(bar.start + k, 1, snare, -40)
            if k % every == 0:
                p.play(bar.start + k, 1, OPEN if opens[k] else cymbal_style, 0 if k % 4 == 0 else -14)


def _rhythm(rng: np.random.Generator, steps: int, density: float) -> list[int]:
    weight = np.where(np.arange(steps) % 4 == 0, 1.4, np.where(np.arange(steps) % 2 == 0, 1.0, 0.45))
    hits = [int(k) for k in np.flatnonzero(rng.random(steps) < density * weight)]
    return hits or [0]


def _spans(hits: list[int], steps: int) -> list[tuple[int, int]]:
    return [(a, b - a) for a, b in zip(hits, [*hits[1:], steps], strict=True)]


def _bass(p: Player, song: Song, plays: np.ndarray) -> None:
    rng, around = p.rng, p.rng.uniform(30, 42)
    style = str(rng.choice(["eighths", "riff", "riff", "walking", "long", "octaves", "fifths"]))
    hits, tones, short = (
        _rhythm(rng, song.bars[0].length, rng.uniform(0.25, 0.6)),
        rng.integers(0, 3, 64),
        rng.uniform(0.4, 1.0),
    )
    for bar in song.bars:
        if not plays[bar.section]:
            continue
        root = _nearest(bar.root, around)
        fifth = root + 7 if rng.random() < 0.5 else root - 5
        if style == "walking":
            line = [
                (4 * b, 4, root if b == 0 else _nearest(int(rng.choice(bar.chord)), root + rng.normal(0, 4)))
                for b in range(song.beats)
            ]
        elif style == "eighths":
            line = [(k, 2, root) for k in range(0, bar.length, 2)]
        elif style == "long":
            line = [(0, bar.length, root)]
        elif style == "octaves":
            line = [(k, 2, root + 12 * (k // 2 % 2)) for k in range(0, bar.length, 2)]
        elif style == "fifths":
            line = [(4 * b, 4, root if b % 2 == 0 else fifth) for b in range(song.beats)]
        else:
            line = [
                (k, n, (root, fifth, root + 12)[tones[i % 64]] if i else root)
                for i, (k, n) in enumerate(_spans(hits, bar.length))
            ]
        for step, length, pitch in line:
            p.play(bar.start + step, length * short, pitch)


def _melody(p: Player, song: Song, plays: np.ndarray, around: float) -> None:
    rng, pitch = p.rng, around
    pool = [song.key + s for s in song.scale]
    for bar in song.bars:
        if not plays[bar.section] or rng.random() < 0.15:
            continue
        for step, length in _spans(_rhythm(rng, bar.length, rng.uniform(0.2, 0.55)), bar.length):
            pitch = float(np.clip(pitch + rng.normal(0, 4), around - 10, around + 12))
            choice = int(rng.choice(bar.chord if step % 4 == 0 else pool))
            p.play(bar.start + step, length * rng.uniform(0.6, 1.0), _nearest(choice % 12, pitch))


def _chords(p: Player, song: Song, plays: np.ndarray, group: str) -> None:
    """Chordal playing of guitar, piano and others, in a style drawn once per part."""
    rng = p.rng
    around = rng.uniform(48, 60) if group == "guitar" else rng.uniform(52, 68)
    style = str(
        rng.choice(
            [
                "strum",
                "strum",
                "arpeggio",
                "arpeggio",
                "block",
                "block",
                "comp",
                "comp",
                "chug",
                "stride",
                "pad",
            ]
        )
    )
    if style == "stride" and group != "piano":
        style = "arpeggio"
    if style == "chug" and group != "guitar":
        style = "comp"
    hits = _rhythm(rng, song.bars[0].length, rng.uniform(0.2, 0.6))
    order, rate, short = rng.permutation(8), int(rng.choice([1, 2, 2, 4])), rng.uniform(0.3, 1.0)
    left_hand = group == "piano" and rng.random() < 0.5
    for bar in song.bars:
        if not plays[bar.section]:
            continue
        voices = _voicing(bar.chord, around)
        if group == "guitar" and style in ("strum", "arpeggio"):
            voices = sorted({*voices, voices[0] + 12, _nearest(bar.root, 45)})
        if left_hand:
            for step, length in _spans([0, bar.length // 2], bar.length):
                p.play(bar.start + step, length, _nearest(bar.root, 40), -6)
        if style == "chug":
            root = _nearest(bar.root, 43)
            for k in range(0, bar.length, 2):
                for pitch in (root, root + 7, root + 12):
                    p.play(bar.start + k, 2 * short, pitch, 10 if k % 8 == 0 else -8)
        elif style == "arpeggio":
            for i, k in enumerate(range(0, bar.length, rate)):
                p.play(bar.start + k, rate * rng.uniform(0.8, 2.5), voices[order[i % 8] % len(voices)])
        elif style == "stride":
            for b in range(song.beats):
                pitches = [_nearest(bar.root, 38)] if b % 2 == 0 else voices
                for pitch in pitches:
                    p.play(bar.start + 4 * b, 3, pitch)
        else:
            spans = {"pad": [(0, bar.length)], "block": [(4 * b, 4) for b in range(song.beats)]}.get(
                style, _spans(hits, bar.length)
            )
            for step, length in spans:
                up = style == "strum" and step % 4 != 0
                for i, pitch in enumerate(reversed(voices) if up else voices):
                    spread = 0.12 * i if style == "strum" else 0.0
                    p.play(bar.start + step + spread, length * short, pitch, -8 if up else 0)


def arrange(
    rng: np.random.Generator,
    seconds: float,
    programs: Mapping[str, tuple[int, ...]],
    presence: Mapping[str, float] = PRESENCE,
) -> list[Part]:
    """Compose a piece.

    Args:
      seconds: length of the piece.
      programs: for each group, the programs (kits for drums) to choose from.
      presence: how likely each group is in it.

    Returns:
      Its parts; as a rule bass and drums always, guitar and piano mostly (guitar sometimes twice), up to two others.
    """
    song = Song(rng, seconds)
    groups = [g for g in presence if rng.random() < presence[g]]
    groups += ["guitar"] * (("guitar" in groups) and rng.random() < 0.3) + ["other"] * int(rng.integers(0, 3))
    parts = []
    for group in groups:
        player = Player(rng, song)
        plays = rng.random(song.sections) < ACTIVITY[group]
        if not plays.any():
            plays[rng.integers(song.sections)] = True
        if group == "drums":
            _drums(player, song, plays)
        elif group == "bass":
            _bass(player, song, plays)
        elif group == "vocals" or rng.random() < {"guitar": 0.3, "piano": 0.2, "other": 0.45}[group]:
            _melody(player, song, plays, rng.uniform(58, 76))
        else:
            _chords(player, song, plays, group)
        parts.append(Part(group, int(rng.choice(programs[group])), player.notes))
    return parts
