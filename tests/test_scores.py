"""Excerpts of written pieces: whole arrangements in another key and tempo, and none of a piece that is held back."""

import numpy as np
import pytest

pytest.importorskip("pretty_midi")

from data_prep.arranger import Note, Part
from data_prep.render import EVERY_PROGRAM, main
from data_prep.scores import excerpt, find_scores, read_score, write_midi
from msr_jax.errors import UserError

KINDS = (("drums", 0), ("bass", 33), ("guitar", 27), ("piano", 0), ("other", 48))


def piece(seed, seconds=20.0, key=0, tempo=1.0):
    rng = np.random.default_rng(seed)
    starts = np.arange(0, seconds, 0.25) / tempo
    line = lambda: [Note(t, 0.2 / tempo, int(rng.integers(40, 60)) + key, 90) for t in starts]
    return [Part(group, program, line()) for group, program in KINDS]


@pytest.fixture
def folder(tmp_path):
    for seed in range(2):
        write_midi(tmp_path / "scores" / f"{seed}.mid", piece(seed))
    return tmp_path / "scores"


def test_parts_are_read_by_the_families_of_slakh(folder):
    assert [part.group for part in read_score(folder / "0.mid")] == [group for group, _ in KINDS]


def test_an_excerpt_has_the_length_asked_for_and_instruments_of_the_right_family():
    for seed in range(20):
        parts = excerpt(np.random.default_rng(seed), piece(0), 5.0, EVERY_PROGRAM)
        assert {"drums", "bass", "guitar", "piano"} <= {part.group for part in parts}
        for part in parts:
            assert part.program in EVERY_PROGRAM[part.group]
            assert all(0 <= n.start and n.start + n.duration <= 5.0 for n in part.notes)


def test_all_parts_but_drums_are_moved_to_the_same_key():
    score = piece(0)
    written = {part.group: {n.pitch for n in part.notes} for part in score}
    whole = excerpt(np.random.default_rng(3), score, 60.0, EVERY_PROGRAM)
    first = {part.group: part for part in reversed(whole)}
    (key,) = {first[g].notes[0].pitch - score[k].notes[0].pitch for k, g in ((1, "bass"), (2, "guitar"), (3, "piano"))}
    assert {n.pitch - key for n in first["bass"].notes} == written["bass"] and key != 0
    assert {n.pitch for n in first["drums"].notes} == written["drums"]


def test_parts_change_their_register_when_asked_to():
    def middle(moved, seed):
        parts = excerpt(np.random.default_rng(seed), piece(0), 60.0, EVERY_PROGRAM, moved)
        return {part.group: np.median([n.pitch for n in part.notes]) for part in reversed(parts)}

    apart = lambda moved: [m["bass"] - m["piano"] for m in (middle(moved, seed) for seed in range(20))]
    assert max(map(abs, apart(0.0))) < 6 and max(apart(0.5)) > 10


def test_instruments_sometimes_play_in_unison():
    def doubled(seed):
        parts = excerpt(np.random.default_rng(seed), piece(0), 5.0, EVERY_PROGRAM)
        lines = [tuple(n.start for n in part.notes) + tuple(n.pitch % 12 for n in part.notes) for part in parts]
        return len(set(lines)) < len(lines)

    assert 0 < sum(doubled(seed) for seed in range(30)) < 30


def test_every_part_is_doubled_by_another_family_when_asked_to():
    for seed in range(10):
        parts = excerpt(np.random.default_rng(seed), piece(0)[:4], 5.0, EVERY_PROGRAM, doubled=1.0)
        lines = lambda parts: {tuple(n.pitch % 12 for n in part.notes) for part in parts}
        tuned = [part for part in parts if part.group != "drums"]
        assert len(lines(tuned)) == 3 and len(parts) == 7
        for line in lines(tuned):
            players = {part.group for part in tuned if tuple(n.pitch % 12 for n in part.notes) == line}
            assert len(players) == 2
    assert len(excerpt(np.random.default_rng(0), piece(0)[:4], 5.0, EVERY_PROGRAM, doubled=0.0)) == 4


def test_a_piece_that_is_held_back_is_left_out_in_any_key_and_tempo(folder, tmp_path):
    assert len(find_scores(folder)) == 2
    write_midi(tmp_path / "held" / "all_src.mid", piece(1, key=3, tempo=1.3))
    assert [p.name for p in find_scores(folder, tmp_path / "held")] == ["0.mid"]
    write_midi(tmp_path / "held" / "other.mid", piece(0))
    with pytest.raises(UserError, match="no MIDI file left"):
        find_scores(folder, tmp_path / "held")
    with pytest.raises(UserError, match="missing has no MIDI file"):
        find_scores(folder, tmp_path / "missing")


def test_tracks_are_rendered_from_scores(folder, tmp_path, capsys):
    pytest.importorskip("tinysoundfont", reason="pip install --no-deps tinysoundfont")
    arguments = ["--split", "train", "--tracks", "1", "--seconds", "4", "--workers", "1", "--first", "7"]
    assert main([str(tmp_path / "out"), *arguments, "--scores", str(folder)]) == 0
    track = tmp_path / "out" / "train" / "Track00007"
    assert len(list((track / "stems").iterdir())) >= 2 and "2 pieces" in capsys.readouterr().out
    assert main([str(tmp_path / "more"), *arguments, "--moved", "0.5"]) == 2
    assert "name a folder of MIDI files" in capsys.readouterr().err
    (folder / "broken.mid").write_bytes(b"no music")
    assert main([str(tmp_path / "more"), *arguments, "--scores", str(folder)]) == 2
    assert "broken.mid cannot be read as MIDI" in capsys.readouterr().err and not (tmp_path / "more").exists()
