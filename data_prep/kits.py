"""Drum kits of a SoundFont: which it has, and which drums two of them play by the same sample.

A player asked for a kit that a SoundFont lacks plays another one without a word, and a small SoundFont gives one sample to
several kits: of the eight of TimGM6mb, Jazz is Standard to the bit, and five of the others share most drums with it.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from data_prep.arranger import Note, Part
from data_prep.timbre import presets, sample_part
from msr_jax.errors import UserError

PITCHES = range(27, 88)  # of General MIDI's drums
SECONDS = 0.2
SAME = 0.98  # correlation of two drums from which on they are one sample, played louder or softer


@lru_cache(maxsize=16)
def drum_sounds(soundfont: str, kit: int) -> np.ndarray:
    """A kit's drums one by one, (pitches, samples), each of energy 1; silent ones are zero."""
    parts = [Part("drums", kit, [Note(0.0, SECONDS, p, 100)]) for p in PITCHES]
    audio = np.stack([sample_part(part, SECONDS, soundfont, 0.0, rest=0.1) for part in parts])
    norms = np.linalg.norm(audio, axis=1, keepdims=True)
    return np.divide(audio, norms, out=np.zeros_like(audio), where=norms > 0)


def shared_drums(soundfonts: Sequence[str], kits: Mapping[str, Sequence[int]]) -> dict[str, dict[int, frozenset[int]]]:
    """What each split must leave out so that no split before it has that sample: {split: {kit: pitches}}.

    Args:
      kits: of each split, those to be trained on first.

    Raises:
      UserError: a SoundFont lacks a kit. Patch sets (.cfg) cannot be asked; what they play is not compared.
    """
    found: dict[str, dict[int, set[int]]] = {split: {kit: set() for kit in own} for split, own in kits.items()}
    for soundfont in sorted({f for f in soundfonts if not f.endswith(".cfg")}):
        has, earlier = presets(soundfont, True), list[np.ndarray]()
        for split, own in kits.items():
            if lacking := [kit for kit in own if kit not in has]:
                raise UserError(
                    f"{soundfont} has no kit {lacking[0]} for {split}, only {', '.join(map(str, has))}; name another "
                    "--soundfont, or one of its own for each split and --every-program"
                )
            sounds = {kit: drum_sounds(soundfont, kit) for kit in own}
            for kit, drums in sounds.items():
                same = [(drums @ other.T > SAME).any(1) for other in earlier]
                found[split][kit] |= {p for p, *is_shared in zip(PITCHES, *same, strict=True) if any(is_shared)}
            earlier += sounds.values()
    return {split: {kit: frozenset(pitches) for kit, pitches in own.items()} for split, own in found.items()}
