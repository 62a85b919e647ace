"""Ctrl-C and SIGTERM end a command within two seconds, whatever it is doing, and leave nothing half-written."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from msr_jax.audio.io import write_audio
from msr_jax.errors import UserError
from msr_jax.files import HOST, PASSING, clear_left_over, passing, write_whole
from msr_jax.machine import keep_compiled_programs
from msr_jax.messages import saying
from msr_jax.process import Ended, handling_sigterm

# A command in C code that neither returns nor looks for signals, as a compiled call or the compiler.
DEAF = """
import hashlib, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run by nohup
from contextlib import nullcontext
from pathlib import Path
from msr_jax import cli, files

def main(argv):
    passing = files.passing(Path(argv[0]))
    passing.write_text("half")
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

sys.modules["deaf"] = sys.modules[__name__]
cli.COMMANDS["deaf"] = ("deaf", "")
sys.argv = ["msr", "deaf", sys.argv[1]]
sys.exit(cli.main())
"""


def test_a_command_in_compiled_code_ends_within_two_seconds(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    runs = [
        subprocess.Popen([sys.executable, "-c", DEAF, tmp_path / f"{n}.wav"], stdout=-1, stderr=-1, text=True)
        for n in numbers
    ]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    assert len(list(tmp_path.glob(".*.tmp"))) == 3
    started = time.monotonic()
    for run, number in zip(runs, numbers, strict=True):
        run.send_signal(number)
    said = [run.communicate(timeout=10)[1] for run in runs]
    assert time.monotonic() - started < 2
    assert [run.returncode for run in runs] == [130, 143, 129]
    assert said == [f"msr deaf: {how}\n" for how in ("interrupted", "ended by SIGTERM", "ended by SIGHUP")]
    assert not list(tmp_path.iterdir())


WORKING = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from msr_jax.process import end_with_parent, run_as_process

def main():
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 60).result()

run_as_process("script", main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(number):
    run = subprocess.Popen([sys.executable, "-c", WORKING], stdout=-1, stderr=-1, text=True)
    worker = Path(f"/proc/{int(run.stdout.readline())}/cmdline")
    run.send_signal(number)
    started = time.monotonic()
    run.wait()
    while worker.exists() and worker.read_bytes() and time.monotonic() - started < 10:
        time.sleep(0.01)
    assert time.monotonic() - started < 2 and run.returncode in (130, 143, -signal.SIGKILL)


SWALLOWING = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from msr_jax.process import run_as_process

def main():
    print("ready", flush=True)
    try:
        time.sleep(60)
    except BaseException:  # as a callback from C does
        pass
    assert False, "what the callback was to do"

run_as_process("script", main)
"""


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
    ],
)
def test_a_signal_whose_exception_a_library_swallows_ends_the_process_all_the_same(number, code, told):
    run = subprocess.Popen([sys.executable, "-c", SWALLOWING], stdout=-1, stderr=-1, text=True)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(number)
    said = run.communicate(timeout=10)[1]
    assert run.returncode == code and said == f"script: {told}\n"


def test_what_a_killed_process_left_is_cleared_and_what_others_write_is_not(tmp_path):
    own = passing(tmp_path / "bass.wav")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f".bass.wav.{HOST}.{gone.pid}.tmp", f".drums.wav.{HOST}.99999999999999999999.tmp"]
    names += [own.name, f".bass.wav.elsewhere.{gone.pid}.tmp", ".notes.tmp", "1.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
    clear_left_over(tmp_path, ["song", "wav"])  # another song's, which a machine beside may be writing
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    clear_left_over(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[2:])


def test_whoever_writes_a_file_clears_what_a_killed_process_left_of_it(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    excerpts, report = tmp_path / "excerpts", tmp_path / "results.json"
    excerpts.mkdir()
    half = [excerpts / f".mixture.flac.{HOST}.{gone.pid}.tmp", tmp_path / f".results.json.{HOST}.{gone.pid}.tmp"]
    for path in half:
        path.write_text("half")
    write_audio(excerpts / "mixture.flac", np.zeros((100, 1), np.float32), 8000)
    write_whole(report, "{}")
    assert not any(path.exists() for path in half) and report.read_text() == "{}"


def test_a_place_that_cannot_be_written_is_a_sentence_and_an_earlier_process_of_this_number_no_hindrance(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        write_whole(tmp_path / ("n" * 300) / "results.json", "{}")
    beside = passing(tmp_path / "model")
    beside.mkdir()
    PASSING.discard(beside)  # as in a container that was started again
    assert passing(tmp_path / "model") == beside and not beside.exists()


def test_a_second_sigterm_does_not_end_the_clearing_that_the_first_began():
    done = []
    with pytest.raises(Ended), handling_sigterm():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            done.append("cleared")
    assert done == ["cleared"]


def test_programs_that_a_killed_process_left_half_kept_are_removed_unless_another_is_writing(tmp_path, monkeypatch):
    monkeypatch.setenv("MSR_HOME", str(tmp_path))
    for name in ("MAX_SIZE", "DIR"):  # set below, given back after the test
        monkeypatch.setenv(f"JAX_COMPILATION_CACHE_{name}", "")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

    def kept():
        del os.environ["JAX_COMPILATION_CACHE_DIR"]
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "jax")  # whose settings would be this process's own
            keep_compiled_programs()
        return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])

    folder = kept()
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).write_bytes(b"12345678")
    with open(folder / ".lockfile", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept()
        assert (folder / "half-cache").exists()
    kept()
    assert {p.name for p in folder.glob("[a-z]*")} == {"whole-cache", "whole-atime"}


@pytest.mark.parametrize("seconds, is_said", [(0.0, False), (0.2, True)])
def test_what_takes_long_is_said_and_what_does_not_is_not(caplog, monkeypatch, seconds, is_said):
    monkeypatch.setattr("msr_jax.messages.log.propagate", True)
    with caplog.at_level("INFO", "msr_jax"), saying("compiling", after=0.05):
        time.sleep(seconds)
    assert ("compiling" in caplog.text) == is_said


@pytest.mark.parametrize("ending", ["return 0", "sys.exit(0)"])
def test_a_command_that_ends_by_itself_leaves_no_socket_open_and_says_nothing(ending):
    program = f"import sys\nfrom msr_jax.process import run_as_process\ndef main():\n    {ending}\n"
    program += "sys.exit(run_as_process('script', main))\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
