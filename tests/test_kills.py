"""What a batch that was killed must leave is really looked for."""

import json

import numpy as np
import pytest
import soundfile

from launch.fuzzing.batch import FIELDS, faults, kill_within, write_songs


@pytest.fixture
def done(tmp_path):
    """Two songs with a stem each, and their manifest."""
    songs = write_songs(tmp_path / "songs", 2, (0.1, 0.2), np.random.default_rng(0))
    rows = []
    for song in songs:
        audio, rate = soundfile.read(song, always_2d=True)
        stem = tmp_path / "stems" / song.stem / "bass.wav"
        stem.parent.mkdir(parents=True)
        soundfile.write(stem, audio, rate)
        told = {"source": str(song), "stems": {"bass": str(stem)}, "levels": {"bass": -20.0}, "error": None}
        rows.append({**dict.fromkeys(FIELDS, 1), **told})
    return songs, tmp_path / "stems", tmp_path / "manifest.jsonl", rows


def test_a_whole_batch_has_no_faults_and_each_kind_of_fault_is_found(done):
    songs, out, manifest, rows = done
    short = out / songs[0].stem / "bass.wav"
    stem, rate = soundfile.read(short, always_2d=True)

    def said(rows):
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "; ".join(faults(songs, out, manifest))

    assert said(rows) == ""
    assert "2 lines" in said([*rows, rows[0]])
    assert "0 lines" in said(rows[1:]) and "told of nowhere" in said(rows[1:])
    assert "incomplete line" in said([rows[0], {**rows[1], "levels": {}}])
    (out / ".song.tmp").touch()
    assert "left over" in said(rows)
    soundfile.write(short, stem[:-1], rate)
    assert "not as long" in said(rows)


def test_a_command_is_killed_after_it_has_told_of_some_songs(tmp_path):
    manifest = tmp_path / "manifest"
    command = ["bash", "-c", f"while true; do echo >> {manifest}; sleep 0.01; done"]
    told = kill_within(command, manifest, np.random.default_rng(0), 9)
    assert 0 < told == len(manifest.read_text().splitlines())
