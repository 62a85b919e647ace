"""Several processes are one run: on any mesh, killed or stopped, with the numbers of one that nothing happened to."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import make_corpus
from tests.toy import SEGMENT

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "launch" / "local.sh"
TRAIN = ["train", "--config", str(ROOT / "tests" / "toy.py")]
pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Overrides that name records for the toy."""
    from data_prep.slakh2100 import main

    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), splits=("train", "validation"))
    records = tmp_path_factory.mktemp("prepared") / "records"
    assert main([str(corpus), str(records), "--crop", str(4 * SEGMENT)]) == 0
    return [f"--config.data.{name}={records}" for name in ("train", "validation")]


def environment(devices):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "MSR": "python -m tests.toy",
    }


def start(workdir, settings, processes=1, devices=1, program=("-m", "tests.toy"), own=((), ()), **changes):
    """The processes of a run, each with so many devices; `own` are the settings of each alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, *program, *TRAIN, "--workdir", str(workdir), *settings]
    argv += [f"--config.{name.replace('__', '.')}={value}" for name, value in changes.items()]
    several = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process"]
    return [
        subprocess.Popen(
            argv + ([*own[k % 2], *several, str(k)] if processes > 1 else []),
            env=environment(devices),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(processes)
    ]


def finish(processes):
    """Exit codes and what was printed."""
    said = [process.communicate(timeout=500)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(said)


def curve(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def losses(workdir):
    return [row["loss"] for row in map(json.loads, curve(workdir)) if "loss" in row]


def wait_for_lines(workdir, count, processes):
    deadline = time.monotonic() + 400
    while len(curve(workdir)) < count:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), finish(processes)
        time.sleep(0.005)


def wait_for_a_checkpoint(workdir, processes):
    """Until one is whole: what is being written has another name."""
    deadline = time.monotonic() + 400
    while not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), finish(processes)
        time.sleep(0.005)


def same_model(a, b):
    files = sorted(p.name for p in (a / "model").iterdir())
    return files and all((a / "model" / f).read_bytes() == (b / "model" / f).read_bytes() for f in files)


def test_processes_that_do_not_see_the_same_checkpoints_say_so_before_the_first_step(tmp_path, settings):
    """As hosts without a shared disk do, where `train.checkpoints` names none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = []
    for k in range(2):
        (tmp_path / f"host{k}").mkdir()
        argv = [sys.executable, "-m", "tests.toy", *TRAIN, "--workdir", "run", *settings, "--process", str(k)]
        argv += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        hosts.append(subprocess.Popen(argv, env=environment(1), cwd=tmp_path / f"host{k}", **streams))
    codes, said = finish(hosts)
    assert codes == [2, 2]
    assert said.count("process 1 does not see what process 0 writes to") == 2 and "set config.train.checkpoints" in said


def test_hosts_with_another_separator_each_do_not_begin(tmp_path, settings):
    """`init_from` is a folder that every host has, and nothing else makes them the same."""
    for k in range(2):
        (tmp_path / f"host{k}").mkdir()
        codes, said = finish(start(tmp_path / f"host{k}" / "det", settings, train__steps=2, seed=k))
        assert codes == [0], said
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [
        sys.executable,
        "-m",
        "tests.toy",
        *TRAIN,
        *settings,
        "--workdir",
        str(tmp_path / "run"),
        "--config.method=diffusion",
    ]
    argv += [
        "--config.init_from.deterministic=det",
        "--coordinator",
        f"127.0.0.1:{port}",
        "--processes",
        "2",
        "--process",
    ]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    hosts = [
        subprocess.Popen([*argv, str(k)], env=environment(1), cwd=tmp_path / f"host{k}", **streams) for k in range(2)
    ]
    codes, said = finish(hosts)
    assert codes == [2, 2], said
    assert said.count("are others in process 1 than in process 0; give all hosts the same") == 2


MESHES = {  # processes, devices of each, fsdp
    "one device": (1, 1, 1),
    "4 × 2": (1, 8, 2),
    "1 × 8": (1, 8, 8),
    "2 processes × 4": (2, 4, 4),
}


def test_every_mesh_goes_on_from_any_other_s_checkpoint_with_the_losses_of_one_device(settings, tmp_path):
    common = {"optim__accumulate": 2, "optim__name": "adamw", "ema_rate": 0.9, "train__checkpoint_every": 3}
    straight = start(tmp_path / "straight", settings, train__steps=3 * (len(MESHES) + 1), **common)
    order = [*MESHES, "one device"]
    for k, name in enumerate(order, 1):
        processes, devices, fsdp = MESHES[name]
        run = start(tmp_path / "chain", settings, processes, devices, train__steps=3 * k, mesh__fsdp=fsdp, **common)
        codes, said = finish(run)
        assert codes == [0] * processes, said
        assert ("resumed from step" in said) == (k > 1)
    codes, said = finish(straight)
    assert codes == [0], said
    np.testing.assert_allclose(losses(tmp_path / "chain"), losses(tmp_path / "straight"), rtol=1e-5)
    assert len(losses(tmp_path / "chain")) == 3 * len(order)
    rows = [json.loads(line) for line in curve(tmp_path / "chain")]
    scores = [row["validation_si_sdr"] for row in rows if "validation_si_sdr" in row]
    assert len(scores) == len(order) and np.isfinite(scores).all()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_that_lost_a_process_to_a_kill_goes_on_bit_for_bit(settings, tmp_path, count):
    options = {"processes": count, "devices": 2, "mesh__fsdp": 2, "train__steps": 60, "train__checkpoint_every": 10}
    codes, said = finish(start(tmp_path / "straight", settings, **options))
    assert codes == [0] * count, said
    killed = start(tmp_path / "killed", settings, **options)
    wait_for_a_checkpoint(tmp_path / "killed", killed)
    wait_for_lines(tmp_path / "killed", 13, killed)
    killed[-1].send_signal(signal.SIGKILL)
    time.sleep(0.3)
    for process in killed[:-1]:  # as a launcher does with those that are left
        process.kill()
    finish(killed)
    assert 13 <= len(curve(tmp_path / "killed")) < 60
    codes, said = finish(start(tmp_path / "killed", settings, **options))
    assert codes == [0] * count and "resumed from step" in said, said
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")
    assert same_model(tmp_path / "killed", tmp_path / "straight")


def test_sigterm_to_one_process_stops_all_at_the_same_step_and_nothing_is_lost(settings, tmp_path):
    options = {"processes": 2, "devices": 1, "mesh__fsdp": 2, "train__steps": 3000, "train__checkpoint_every": 3000}
    run = start(tmp_path / "run", settings, **options)
    wait_for_lines(tmp_path / "run", 20, run)
    run[1].send_signal(signal.SIGTERM)
    codes, said = finish(run)
    assert codes == [75, 75], said
    stopped = int(said.split("stopped by SIGTERM after step ")[1].split(";")[0])
    # Every step that was taken is in the checkpoint and in the log.
    assert (tmp_path / "run" / "checkpoints" / str(stopped)).is_dir() and len(curve(tmp_path / "run")) == stopped < 3000
    options["train__steps"] = stopped + 5
    codes, said = finish(start(tmp_path / "run", settings, **options, train__log_every=1))
    assert codes == [0, 0] and f"resumed from step {stopped} in" in said, said
    assert len(losses(tmp_path / "run")) == stopped + 5


def test_a_stopped_process_that_ends_later_than_the_first_is_not_aborted(settings, tmp_path):
    """A process that stops, and may have threads of its data left, ends without the interpreter's own exit and its barrier."""
    apart = (
        "import sys, threading, time, tests.toy; from msr_jax.cli import main; from msr_jax.train import loop\n"
        "if sys.argv[-1] == '0': threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "else: train = loop.train; loop.train = lambda *given: (train(*given), time.sleep(3))[0]\n"
        "sys.exit(main())"
    )
    run = start(tmp_path / "run", settings, 2, program=("-c", apart), train__steps=3000, train__checkpoint_every=3000)
    wait_for_lines(tmp_path / "run", 4, run)
    run[1].send_signal(signal.SIGTERM)
    codes, said = finish(run)
    assert codes == [75, 75], said


@pytest.fixture(scope="module")
def other_records(settings, tmp_path_factory):
    from data_prep.slakh2100 import main

    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), splits=("train",), tracks=3)
    records = tmp_path_factory.mktemp("prepared") / "records"
    assert main([str(corpus), str(records), "--crop", str(4 * SEGMENT)]) == 0
    return records


OTHERS = {
    "data.train=OTHER": "the records of config.data are others in process 1 than in process 0; give all hosts the same",
    "seed=1": "the settings of the config are others in process 1 than in process 0; give all hosts the same",
    "data.workers=0": "the precision that config.compute_dtype=bfloat16 comes to is another in process 1 than in process 0; "
    "set config.compute_dtype=float32",
}


@pytest.mark.parametrize("setting", OTHERS)
def test_processes_with_other_records_settings_or_precision_each_do_not_begin(
    settings, other_records, tmp_path, setting
):
    """The last of these: on CPUs each measures whether bfloat16 is faster. (How many workers load is its own affair.)"""
    own = f"--config.{setting.replace('OTHER', str(other_records))}"
    precision = "bfloat16" if "workers" in setting else "float32"
    measured = (
        "import sys, tests.toy; from msr_jax.cli import main; from msr_jax.models import backbone\n"
        "backbone.has_bfloat16_units = lambda: sys.argv[-1] == '0'\n"
        "sys.exit(main())"
    )
    run = start(tmp_path / "run", settings, 2, 1, ("-c", measured), ((), (own,)), compute_dtype=precision)
    codes, said = finish(run)
    assert codes == [2, 2] and said.count(OTHERS[setting]) == 2, said
    assert not (tmp_path / "run" / "model").exists()


def test_an_error_in_one_process_ends_all_with_its_sentence(settings, tmp_path):
    (tmp_path / "file").write_text("")
    codes, said = finish(start(tmp_path / "file" / "run", settings, processes=2))
    assert codes == [2, 2], said
    assert said.count("cannot write to --workdir") == 2 and "Traceback" not in said


def test_the_local_launcher_starts_all_again_when_one_dies(settings, tmp_path):
    options = ["--config.train.steps=100", "--config.train.checkpoint_every=10", *settings]
    command = [
        "bash",
        str(LOCAL),
        "-n",
        "2",
        "--restarts",
        "2",
        "--",
        *TRAIN,
        "--workdir",
        str(tmp_path / "run"),
        *options,
    ]
    launcher = subprocess.Popen(
        command, env=environment(1), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_a_checkpoint(tmp_path / "run", [launcher])
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    codes, said = finish([launcher])
    assert codes == [0], said
    assert "resumed from step" in said and "starting again (1 of 2)" in said
    assert len(losses(tmp_path / "run")) == 100


def test_the_local_launcher_does_not_repeat_bad_input(settings, tmp_path):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    command = [
        "bash",
        str(LOCAL),
        "-n",
        "2",
        "--",
        *TRAIN,
        "--workdir",
        str(tmp_path / "run"),
        "--config.data.batch=3",
        *settings,
    ]
    done = subprocess.run(command, env=environment(1), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "starting again" not in done.stdout + done.stderr
    assert "data.batch (3) must be a multiple of the 2 devices" in done.stderr
