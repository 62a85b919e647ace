"""The launchers run what they say: commands recorded by stand-ins for gcloud, srun and scontrol, files checked by schema."""

import importlib.util
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from msr_jax.config_files import read_config

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a program of a name on the PATH that notes its arguments and then runs a line of shell; `.calls()` reads them."""
    folder, record = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def add(name, then="true"):
        program = folder / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> {record}\n{then}\n')
        program.chmod(0o755)

    add.calls = lambda: record.read_text().splitlines() if record.exists() else []
    return add


def bash(script, *arguments, **env):
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_bash_without_faults(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_local_says_how_it_is_used():
    code, said = bash("local.sh", "--help")
    assert code == 0 and "bash launch/local.sh [-n PROCESSES]" in said and "set -e" not in said


def test_local_takes_the_gpus_that_are_given_to_it(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    code, said = bash("local.sh", "-n", "2", "--gpus", "--dry-run", "--", "train")
    assert code == 0 and [line.split()[0] for line in said.splitlines()] == [
        f"CUDA_VISIBLE_DEVICES={k}" for k in (4, 7)
    ]
    code, said = bash("local.sh", "-n", "3", "--gpus", "--", "train")
    assert code == 2 and "names 2 GPUs, fewer than the 3 processes" in said


def test_local_shows_one_command_per_process(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, said = bash("local.sh", "-n", "3", "--gpus", "--dry-run", "--", "train", "--config", "c.py")
    lines = said.splitlines()
    assert code == 0 and len(lines) == 3
    assert lines[2] == (
        "CUDA_VISIBLE_DEVICES=2 msr train --config c.py --coordinator 127.0.0.1:PORT --processes 3 --process 2"
    )


@pytest.mark.parametrize(
    "codes,expected,runs", [("0", 0, 1), ("2", 2, 1), ("75 0", 0, 2), ("137 75 0", 0, 3), ("1", 1, 4)]
)
def test_local_starts_again_unless_it_is_done_or_the_input_is_bad(stand_in, tmp_path, codes, expected, runs):
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    # Each start takes the next code of the list, the last one for good.
    stand_in("msr", f'c={tmp_path}/codes; n=$(head -1 $c); [ $(wc -l < $c) -gt 1 ] && sed -i 1d $c; exit "$n"')
    code, said = bash("local.sh", "-n", "1", "--", "train")
    assert code == expected and len(stand_in.calls()) == runs and said.count("starting again") == runs - 1


@pytest.mark.parametrize(("codes", "expected", "runs"), [("1 0", 1, 2), ("137 0 0 0", 0, 4), ("137 0 1 0", 1, 4)])
def test_processes_that_separate_do_not_end_each_other(stand_in, tmp_path, codes, expected, runs):
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    take = f"( flock 9; n=$(head -1 $c); sed -i 1d $c; exit $n ) 9>{tmp_path}/lock"
    stand_in("msr", f"c={tmp_path}/codes; {take}")
    code, said = bash("local.sh", "-n", "2", "--", "separate", "a.wav")
    assert code == expected and len(stand_in.calls()) == runs and said.count("starting again") == runs // 2 - 1


def test_local_passes_sigterm_on_and_does_not_start_again(stand_in, tmp_path):
    ready = tmp_path / "ready"
    stand_in("msr", f"trap 'exit 75' TERM; touch {ready}.$PPID.$$; while true; do sleep 0.05; done")
    run = subprocess.Popen(["bash", str(LAUNCH / "local.sh"), "-n", "2", "--", "train"], cwd=ROOT)
    while len(list(tmp_path.glob("ready.*"))) < 2:
        assert run.poll() is None
    run.terminate()
    assert run.wait(30) == 75 and len(stand_in.calls()) == 2


@pytest.mark.parametrize("after", [0, 0.02, 0.05, 0.1])
def test_local_passes_on_a_signal_that_comes_while_it_starts(stand_in, tmp_path, after):
    stand_in("msr", "trap 'exit 75' TERM; for k in {1..400}; do sleep 0.05; done; exit 1")
    command = ["bash", "-c", f"echo $$ > {tmp_path}/pid; exec bash {LAUNCH}/local.sh -n 2 -- train"]
    run = subprocess.Popen(command, cwd=ROOT)
    while not (tmp_path / "pid").exists():
        pass
    time.sleep(0.02 + after)
    run.terminate()
    assert run.wait(15) in (75, 143, -15)  # before the trap stands, the shell itself ends
    assert len(stand_in.calls()) <= 2


@pytest.mark.parametrize("options", [["-n", "0"], ["-n", "-1"], ["-n", "x"], ["-n", ""], ["--restarts", "no"]])
def test_local_takes_no_senseless_number(stand_in, options):
    stand_in("msr")
    code, said = bash("local.sh", *options, "--", "train")
    assert code == 2 and said.count("\n") == 1 and stand_in.calls() == []


def test_local_shows_commands_that_can_be_pasted():
    code, said = bash("local.sh", "-n", "1", "--dry-run", "--", "train", "--config.optim.freeze=('a b/*',)")
    words = subprocess.run(["bash", "-c", f"printf '%s\n' {said}"], capture_output=True, text=True).stdout.splitlines()
    assert code == 0 and words[2] == "--config.optim.freeze=('a b/*',)"


def test_local_says_what_is_missing():
    assert bash("local.sh", "-n", "2") == (
        2, "local.sh: nothing to run; write the command after --, such as: -- train --config … --workdir …\n",
    )  # fmt: skip
    code, said = bash("local.sh", "--nodes", "2")
    assert code == 2 and "unknown option '--nodes'" in said


PLACE = {"NAME": "mine", "ZONE": "us-central1-a", "TYPE": "v5litepod-64", "POLL_SECONDS": "0"}


def test_a_dry_pod_shows_its_commands_and_calls_nothing(stand_in):
    stand_in("gcloud")
    for action, words in (
        (
            ["create"],
            "queued-resources create mine --node-id mine --zone us-central1-a --accelerator-type v5litepod-64",
        ),
        (["setup"], "tpu-vm scp"),
        (["run", "--config", "c.py"], "--worker=all --command"),
        (["delete"], "queued-resources delete mine --zone us-central1-a --force --quiet"),
    ):
        code, said = bash("tpu_pod.sh", "--dry-run", *action, **PLACE)
        assert code == 0 and words in said
    assert stand_in.calls() == []


def test_a_pod_is_made_spot_and_runs_on_all_its_hosts(stand_in):
    stand_in("gcloud")
    assert bash("tpu_pod.sh", "create", **PLACE)[0] == 0
    assert bash("tpu_pod.sh", "create", **PLACE, SPOT="no", PROJECT="p")[0] == 0
    assert bash("tpu_pod.sh", "run", "--config", "c.py", "--config.optim.lr=1", **PLACE)[0] == 0
    spot, kept, run = stand_in.calls()
    assert "--spot" in spot and "--spot" not in kept and "--project p" in kept
    assert run == (
        "gcloud compute tpus tpu-vm ssh mine --zone us-central1-a --worker=all --command "
        "cd msr && .venv/bin/msr train --distributed --config c.py --config.optim.lr=1"
    )


def test_a_preempted_pod_is_made_again_and_the_run_goes_on(stand_in, tmp_path):
    lost = tmp_path / "lost"
    gcloud(
        stand_in,
        # The first run is cut off with the slice; the next finds a new one and ends well.
        train=f"[ -e {lost} ] || {{ touch {lost}; exit 255; }}",
        describe=f"[ -e {lost}.again ] && echo ACTIVE || echo SUSPENDED",
        create=f"touch {lost}.again",
    )
    code, said = bash("tpu_pod.sh", "resume", "--config", "c.py", **PLACE)
    assert code == 0 and "ended with code 255; going on (attempt 1 of 20)" in said
    assert verbs(stand_in) == [
        "train", "describe", "describe", "delete", "create", "describe", "scp", "tpu_host.sh", "train",
    ]  # fmt: skip


def gcloud(stand_in, **lines):
    """A stand-in that runs the line of shell under the first of these words among its arguments."""
    cases = "\n".join(f"  *{word}*) {line} ;;" for word, line in lines.items())
    stand_in("gcloud", f'case "$*" in\n{cases}\nesac')


def verbs(stand_in):
    return [re.search(r"(train|describe|delete|create|scp|tpu_host.sh)", call)[1] for call in stand_in.calls()]


def fails_once(name, folder):
    return f"[ -e {folder}/{name} ] || {{ touch {folder}/{name}; exit 1; }}"


@pytest.mark.parametrize("action", ["scp", "create", "describe"])
def test_a_pod_is_brought_back_though_a_command_fails_once(stand_in, tmp_path, action):
    lost = tmp_path / "lost"
    then = {"train": f"[ -e {lost} ] || {{ touch {lost}; exit 255; }}", "create": f"touch {lost}.again"}
    then |= {"describe": f"[ -e {lost}.again ] && echo ACTIVE || echo SUSPENDED", "scp": "true"}
    then[action] = f"{fails_once('failed', tmp_path)}; {then[action]}"
    gcloud(stand_in, **then)
    (tmp_path / "temporary").mkdir()
    code, said = bash("tpu_pod.sh", "resume", "--config", "c.py", **PLACE, TMPDIR=str(tmp_path / "temporary"))
    assert code == 0 and verbs(stand_in).count("train") == 2, said
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    ("state", "then"),
    [("", "false"), ("", "true"), ("WAITING_FOR_RESOURCES", "true"), ("SUSPENDING", "true"), ("ACTIVE", "true")],
)
def test_a_pod_that_may_be_well_is_not_deleted(stand_in, tmp_path, state, then):
    """gcloud does not answer, the request still waits in its queue, or the slice is there: only the run has ended."""
    tries, asked = tmp_path / "tries", tmp_path / "asked"
    gcloud(
        stand_in,
        train=f'echo >> {tries}; [ "$(wc -l < {tries})" -gt 1 ] || exit 1',
        describe=f'echo >> {asked}; [ "$(wc -l < {asked})" -gt 3 ] && echo ACTIVE || {{ echo "{state}"; {then}; }}',
    )
    code, _ = bash("tpu_pod.sh", "resume", "--config", "c.py", **PLACE)
    assert code == 0 and not {"delete", "create"} & set(verbs(stand_in))


def test_a_pod_that_was_never_made_is_made(stand_in, tmp_path):
    made = tmp_path / "made"
    gcloud(
        stand_in,
        train=f"[ -e {made} ] || exit 1",
        describe=f'[ -e {made} ] && echo ACTIVE || {{ echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }}',
        create=f"touch {made}",
    )
    code, _ = bash("tpu_pod.sh", "resume", "--config", "c.py", **PLACE)
    assert code == 0 and "create" in verbs(stand_in) and "delete" not in verbs(stand_in)


@pytest.mark.parametrize(
    ("kind", "version"),
    [("v5litepod-64", "tpuv5-lite"), ("v5p-32", "alpha-tpuv5 "), ("v6e-16", "tpuv6e"), ("v4-8", "ubuntu")],
)
def test_the_software_of_a_pod_is_that_of_its_chips(kind, version):
    assert version in bash("tpu_pod.sh", "--dry-run", "create", **PLACE | {"TYPE": kind})[1]


@pytest.mark.parametrize("has_new", [True, False])
def test_a_host_gets_a_python_that_is_new_enough(stand_in, tmp_path, has_new):
    shutil.copytree(LAUNCH, tmp_path / "msr" / "launch")
    old = 'case "$*" in *version_info*) exit 1 ;; *uv\\ venv*) mkdir -p .venv/bin; ln -s "$0" .venv/bin/python ;; esac'
    new = 'case "$*" in *-m\\ venv*) mkdir -p .venv/bin; ln -s "$0" .venv/bin/python ;; esac'
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        stand_in(name, new if has_new and name == "python3.11" else old)
    done = subprocess.run(["bash", str(tmp_path / "msr" / "launch" / "tpu_host.sh")], capture_output=True, text=True)
    calls = stand_in.calls()
    assert done.returncode == 0, done.stderr
    assert any("uv venv" in call for call in calls) != has_new
    assert calls[-1].endswith("-m pip install --quiet .[tpu,cloud]")


def test_examples_of_training_fit_the_devices_that_they_are_for():
    """The batch of every example for two hosts of eight GPUs, and of the README's slice of 64 chips, divides over them."""
    text = "\n".join(p.read_text() for p in (*LAUNCH.glob("*.*"), ROOT / "README.md") if p.suffix in (".md", ".sbatch"))
    jobset = " ".join(
        line.strip("- ") for line in (LAUNCH / "gke_jobset.yaml").read_text().splitlines() if " --config" in line
    )
    found = 0
    for line in [*text.splitlines(), jobset]:
        devices = 16 if "sbatch launch" in line or line == jobset else 64 if "TYPE=v5litepod-64" in line else None
        if devices is None or "--config" not in line or "separate" in line:
            continue
        words = re.findall(r"--config(?:\.[\w.]+)?[= ][^\s`]+", line)
        name = next(w for w in words if re.match(r"--config[= ]", w)).split("=" if "=" in words[0] else " ")[1]
        batch = int(next((w.split("=")[1] for w in words if w.startswith("--config.data.batch")), 0))
        batch = batch or read_config(name, [])["data"]["batch"]
        assert batch % devices == 0, line
        found += 1
    assert found >= 4


def test_a_pod_does_not_repeat_bad_input_and_names_what_is_missing(stand_in):
    stand_in("gcloud", "exit 2")
    assert bash("tpu_pod.sh", "resume", "--config", "c.py", **PLACE)[0] == 2 and len(stand_in.calls()) == 1
    for action, env, words in (
        (["run"], PLACE, "run needs arguments"),
        (["create"], {"NAME": "mine"}, "set ZONE"),
        (["launch"], PLACE, "unknown action 'launch'"),
    ):
        code, said = bash("tpu_pod.sh", *action, **env)
        assert code == 2 and words in said


@pytest.mark.parametrize("ended,code,requeued", [(0, 0, False), (2, 2, False), (75, 75, True), (137, 137, True)])
def test_slurm_queues_again_what_was_stopped_or_lost(stand_in, ended, code, requeued):
    stand_in("srun", f"exit {ended}")
    stand_in("scontrol")
    found, _ = bash("slurm.sbatch", "--config", "c.py", SLURM_JOB_ID="7", VENV="/env")
    calls = stand_in.calls()
    assert found == code and calls[0] == "srun --kill-on-bad-exit=1 /env/bin/msr train --config c.py"
    assert calls[1:] == (["scontrol requeue 7"] if requeued else [])


def test_slurm_gives_up_on_losses_in_the_end_but_never_on_stops(stand_in):
    stand_in("srun", "exit ${CODE}")
    stand_in("scontrol")
    often = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "20"}
    bash("slurm.sbatch", "--config", "c.py", CODE="1", **often)
    assert len(stand_in.calls()) == 1
    bash("slurm.sbatch", "--config", "c.py", CODE="75", **often)
    assert stand_in.calls()[-1] == "scontrol requeue 7"


def test_slurm_asks_for_a_signal_in_time_and_one_task_per_gpu():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (LAUNCH / "slurm.sbatch").read_text(), re.M))
    assert options["signal"] == "TERM@120" and "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    code, said = bash("slurm.sbatch", "--config", "c.py", DRY_RUN="yes")
    assert (code, said.strip()) == (0, "srun --kill-on-bad-exit=1 .venv/bin/msr train --config c.py")


def job():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = jobset["spec"]["replicatedJobs"]
    return jobset, workers, workers["template"]["spec"]


def test_the_jobset_describes_processes_that_find_each_other():
    from msr_jax.train.distributed import find_cluster

    jobset, workers, spec = job()
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {item["name"]: item["value"] for item in container["env"]}
    name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}-{workers['name']}-0-0.{name}:{port}"
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    cluster = find_cluster({**env, "JOB_COMPLETION_INDEX": "1"})
    assert (cluster.processes, cluster.process) == (spec["completions"], 1)


def test_the_jobset_restarts_all_but_bad_input_and_waits_for_the_checkpoint():
    jobset, _, spec = job()
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2] and spec["backoffLimit"] == 0
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.skipif(importlib.util.find_spec("kubernetes_validate") is None, reason="needs kubernetes-validate")
def test_the_job_inside_fits_the_schema_of_kubernetes():
    import kubernetes_validate

    _, workers, spec = job()
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": workers["name"]}, "spec": spec}
    kubernetes_validate.validate(whole, "1.33", strict=True)


def test_the_image_holds_what_the_package_is_built_from():
    copied = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.M)
    named = {word for line in copied for word in line.split()}
    assert all((ROOT / name).exists() for name in named)
    assert {"msr_jax", "data_prep", "configs", "pyproject.toml", "requirements.lock"} <= named
