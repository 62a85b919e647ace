"""A conversion that was killed, or ran out of disk, goes on where it was; nothing half-written is taken for whole."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

import data_prep.prepare
from data_prep.slakh2100 import main
from data_prep.writer import make_manifest, write_records
from msr_jax.data.records import read_manifest
from msr_jax.errors import UserError

CROP, TRACKS, RATE = 4096, 6, 22_050


@pytest.fixture
def src(tmp_path):
    """Six tracks in the converted form, noise of half a second."""
    for k in range(TRACKS):
        for j, stem in enumerate(("bass", "drums", "guitar", "piano")):
            path = tmp_path / "src" / "train" / f"Track{k:05d}" / f"{stem}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            audio = np.random.default_rng([k, j]).integers(-9999, 9999, 3 * CROP, np.int16)
            soundfile.write(path, audio, RATE, subtype="PCM_16")
    return tmp_path / "src"


@pytest.fixture
def decoded(monkeypatch):
    """Names of tracks that are decoded in this process, as they are."""
    names, plain = [], data_prep.prepare.read_track
    monkeypatch.setattr(
        data_prep.prepare, "read_track", lambda track, *more: (names.append(track.name), plain(track, *more))[1]
    )
    return names


def arguments(src, out, *more):
    return [str(src), str(out), "--crop", str(CROP), "--workers", "1", "--shard-bytes", "150000", *more]


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_after_a_kill_only_what_was_in_hand_is_done_again(src, tmp_path, decoded):
    assert main(arguments(src, tmp_path / "whole")) == 0
    decoded.clear()
    code = (
        "import sys, time, data_prep.prepare as p; plain = p.read_track\n"
        "p.read_track = lambda *a: (time.sleep(0.5), plain(*a))[1]\n"
        "from data_prep.slakh2100 import main; main(sys.argv[1:])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *arguments(src, tmp_path / "out")])
    notes = tmp_path / ".out.partial" / "tracks"
    while len(list(notes.glob("*.json"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {f.stem.split("-")[1] for f in notes.glob("*.json")}
    assert 2 <= len(done) < TRACKS and not (tmp_path / "out").exists()
    assert main(arguments(src, tmp_path / "out")) == 0
    assert sorted(decoded) == [f"Track{k:05d}" for k in range(TRACKS) if f"{k:05d}" not in done]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {f.name for f in tmp_path.iterdir()} == {"src", "out", "whole"}


def test_a_shard_that_was_not_finished_is_written_again(src, tmp_path, monkeypatch, decoded):
    assert main(arguments(src, tmp_path / "whole")) == 0
    plain, written = data_prep.writer._write_shard, []

    def killed_in_the_third(work, manifest, job):
        if len(written) == 2:
            (work / "records" / job[0]).write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(job[0])
        plain(work, manifest, job)

    monkeypatch.setattr(data_prep.writer, "_write_shard", killed_in_the_third)
    assert main(arguments(src, tmp_path / "out")) == 130
    monkeypatch.setattr(
        data_prep.writer,
        "_write_shard",
        lambda work, manifest, job: (written.append(job[0]), plain(work, manifest, job)),
    )
    decoded.clear()
    assert main(arguments(src, tmp_path / "out")) == 0
    assert not decoded and len(written) == len(set(written)) == len(read_manifest(tmp_path / "out")["shards"]) > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_finished_is_not_done_again_unless_the_source_or_the_settings_change(src, tmp_path, decoded, capsys):
    for change, expected in (
        (lambda: None, TRACKS),
        (lambda: None, 0),
        (lambda: os.utime(src / "train" / "Track00000" / "bass.wav", (1, 1)), TRACKS),
    ):
        change()
        decoded.clear()
        assert main(arguments(src, tmp_path / "out")) == 0
        assert len(decoded) == expected and "train: 6 of 6 tracks" in capsys.readouterr().out
    assert main(arguments(src, tmp_path / "out", "--seed", "1")) == 0
    assert len(decoded) == 2 * TRACKS


def test_a_linked_folder_that_changes_is_a_change_of_the_source_also_in_a_circle(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "S00.flac").write_bytes(b"one")
    (tmp_path / "track").mkdir()
    (tmp_path / "track" / "stems").symlink_to(tmp_path / "real")
    for name in ("round", "about"):
        (tmp_path / "real" / name).symlink_to(tmp_path / "track")
    before = data_prep.prepare.signature(tmp_path / "track")
    assert [name for name, _, _ in before] == ["track/stems/S00.flac"]
    (tmp_path / "real" / "S00.flac").write_bytes(b"other")
    assert data_prep.prepare.signature(tmp_path / "track") != before


@pytest.fixture
def unreadable(monkeypatch):
    """Names of tracks that cannot be read for the moment, as of a disk that is away; their files do not change."""
    names, plain = {"Track00002"}, data_prep.prepare.read_track

    def read(track, *more):
        if track.name in names:
            raise UserError(f"{track} cannot be read (Input/output error)")
        return plain(track, *more)

    monkeypatch.setattr(data_prep.prepare, "read_track", read)
    return names


def test_a_track_that_could_not_be_read_is_tried_anew_at_the_next_start(src, tmp_path, unreadable, decoded, capsys):
    out = tmp_path / "out"
    assert main(arguments(src, out)) == 0
    assert "5 of 6 tracks" in (said := capsys.readouterr().out) and f"wrote {out}" in said
    before = contents(out)
    decoded.clear()
    assert main(arguments(src, out)) == 0 and decoded == ["Track00002"] and contents(out) == before
    assert "5 of 6 tracks" in (said := capsys.readouterr().out) and f"{out} is there already, made of the same" in said
    unreadable.clear()
    assert main(arguments(src, out)) == 0
    assert "6 of 6 tracks" in (said := capsys.readouterr().out) and f"wrote {out}" in said
    assert main(arguments(src, tmp_path / "whole")) == 0 and contents(out) == contents(tmp_path / "whole")
    assert {f.name for f in tmp_path.iterdir()} == {"src", "out", "whole"}


def test_shards_of_a_start_that_lacked_a_track_are_not_taken_for_those_that_have_it(
    src, tmp_path, unreadable, monkeypatch
):
    def killed(folder, manifest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data_prep.writer, "write_info", killed)  # all shards are finished
        assert main(arguments(src, tmp_path / "out")) == 130
    unreadable.clear()
    assert main(arguments(src, tmp_path / "out")) == 0
    assert main(arguments(src, tmp_path / "whole")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("is_there", [True, False])
def test_records_are_written_to_where_a_link_leads(src, tmp_path, is_there):
    place = tmp_path / "disk" / "records"
    place.mkdir(parents=True) if is_there else place.parent.mkdir()
    (tmp_path / "out").symlink_to(place)
    assert main(arguments(src, tmp_path / "out")) == 0
    assert (tmp_path / "out").is_symlink() and read_manifest(place)["tracks"]["train"]
    assert [f.name for f in (tmp_path / "disk").iterdir()] == ["records"]


def test_the_folder_one_is_in_is_refused_as_a_place(src, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(arguments(src, ".")) == 2
    assert "is the folder that this runs in" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize("room", [60_000, 120_000])
def test_a_full_disk_ends_in_one_sentence_and_can_be_gone_on_from(src, tmp_path, room, decoded):
    """A track takes 98,000 bytes and a shard 150,000: the first room is too small for either, the second for a shard."""
    command = [sys.executable, "-m", "data_prep.slakh2100", *arguments(src, tmp_path / "out")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    ended = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert ended.returncode == 2 and not (tmp_path / "out").exists()
    last = ended.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("data_prep.slakh2100: cannot write records")
        and "is the disk full?" in last
        and "goes on" in last
    )
    assert "Traceback" not in ended.stderr
    assert main(arguments(src, tmp_path / "out")) == 0
    assert len(decoded) == (TRACKS if room == 60_000 else 0)


def test_two_preparations_of_one_folder_do_not_meet(src, tmp_path, capsys):
    with open(tmp_path / ".out.partial.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(arguments(src, tmp_path / "out")) == 2
    assert "another process is preparing out" in capsys.readouterr().err
    assert main(arguments(src, tmp_path / "out")) == 0


def test_who_is_refused_leaves_the_work_of_the_other_alone(src, tmp_path):
    work = tmp_path / ".out.partial"
    work.mkdir()
    (work / "precious").touch()
    manifest = make_manifest(["a", "b"], 8000, 1, 1000)
    with data_prep.writer._alone(work):
        with pytest.raises(UserError, match="another process is preparing out"):
            write_records(tmp_path / "out", {"train": [("t", np.zeros((2, 3000, 1), np.int16))]}, manifest)
        assert (work / "precious").exists()
    assert not work.with_name(".out.partial.lock").exists()


def test_a_lock_that_was_removed_between_opening_and_locking_is_none(tmp_path, monkeypatch):
    work, lock = tmp_path / ".out.partial", tmp_path / ".out.partial.lock"
    first, plain = data_prep.writer._alone(work), fcntl.flock
    first.__enter__()

    def flock(file, how):
        monkeypatch.setattr(data_prep.writer.fcntl, "flock", plain)
        first.__exit__(None, None, None)  # whoever held it ends just now
        plain(file, how)

    monkeypatch.setattr(data_prep.writer.fcntl, "flock", flock)
    with data_prep.writer._alone(work):
        assert lock.exists()
        with pytest.raises(UserError, match="another process"), data_prep.writer._alone(work):
            pass
    assert not lock.exists()


def test_coding_by_zstd_reads_back_the_same(src, tmp_path):
    from msr_jax.data.records import RecordSource

    for coding in ("none", "zstd"):
        assert main(arguments(src, tmp_path / coding, "--coding", coding)) == 0
    one, two = (RecordSource(tmp_path / coding, "train") for coding in ("none", "zstd"))
    assert all((one[k]["stems"] == two[k]["stems"]).all() for k in range(len(one)))
