"""The campaign's parts: what it makes is a function of a seed, and it sees the faults that it looks for."""

import os
import subprocess
import sys

import numpy as np
import soundfile

from launch.fuzzing import inputs, kills
from launch.fuzzing.cases import KINDS, audio
from launch.fuzzing.children import Outcome
from launch.fuzzing.tally import Tally


def test_a_case_is_a_function_of_its_seed(tmp_path):
    made = []
    for k in range(2):
        (tmp_path / str(k) / "in").mkdir(parents=True)
        case = audio(np.random.default_rng([0, 7]), tmp_path / str(k), {"media": []})
        made.append((case.told, case.spoiled[0].read_bytes(), case.spoiled[2]))
        assert inputs.changed(case.spoiled[1], case.spoiled[2]) == made[-1][1]
        assert case.work() in (0, 2)  # read, or refused in a sentence
    assert made[0] == made[1] and sum(KINDS.values()) == 1000


def test_changes_of_a_file_are_done_one_after_the_other():
    done = [("set", 1, b"xy"), ("insert", 0, b"__"), ("delete", 3, b"1"), ("cut", 5, b"")]
    assert inputs.changed(b"abcdef", done) == b"__ay" + b"d"


def test_values_are_changed_left_out_or_doubled_and_what_was_given_stays():
    told = {"a": {"b": [1, 2]}, "c": "d"}
    changed = [inputs.odd_values(np.random.default_rng(k), told, 2) for k in range(20)]
    assert told == {"a": {"b": [1, 2]}, "c": "d"} and all(c != told for c in changed)


def test_tracebacks_signals_and_hangs_are_faults_and_sentences_are_none():
    for code in (0, 1, 2, 75, 130):
        assert Outcome(code, "msr train: it does not fit", 1.0, False).fault() is None
    assert (
        "ValueError: no" in Outcome(1, "Traceback (most recent call last)\n  File\nValueError: no", 1.0, False).fault()
    )
    assert Outcome(-11, "", 1.0, False).fault() == "exit code -11"
    assert "no end within 61 s" in Outcome(-9, "", 61.0, True).fault()


def test_a_kill_comes_at_its_cpu_second_and_is_no_hang(tmp_path):
    # In a process of its own: one that has started JAX does not fork.
    code = """
import time
from pathlib import Path
from launch.fuzzing.children import Child

def compute():
    while True:
        pass

here = Path()
end = Child(compute, here, here / "told.txt").kill_at(0.3, 60)
assert end.killed and not end.hung and 0.3 <= end.computed < 1, end
end = Child(lambda: 0, here, here / "told.txt").kill_at(5, 60)
assert end.code == 0 and not end.killed and end.fault() is None, end
end = Child(lambda: time.sleep(60), here, here / "told.txt").kill_at(5, 1)
assert end.hung and not end.killed and "no end" in end.fault(), end
"""
    env = {**os.environ, "PYTHONPATH": str(inputs.ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_partial_files_under_their_final_name_are_seen(tmp_path):
    soundfile.write(tmp_path / "whole.wav", np.zeros(800), 8000)
    (tmp_path / "caf\udce9.wav").write_bytes((tmp_path / "whole.wav").read_bytes())
    (tmp_path / ".bass.wav.1.tmp").write_bytes(b"RIFF")
    assert kills.partial_files(tmp_path) == []
    (tmp_path / "cut.wav").write_bytes(b"RIFF")
    (tmp_path / "results.json").write_text('{"a": ')
    assert len(kills.partial_files(tmp_path)) == 2


def test_counts_of_several_starts_add_up(tmp_path):
    for start in (1, 2):
        tally = Tally(tmp_path / "tally.json")
        tally.counts["files, audio"] += 100
        tally.counts["kills, train"] += 3
        tally.next_case += 100
        tally.save()
        assert (tally.total("files"), tally.total("kills"), tally.next_case) == (100 * start, 3 * start, 100 * start)
