"""The launchers run what they say: commands recorded by stand-ins for gcloud, srun and scontrol, files checked by schema."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

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


def test_local_shows_one_command_per_process():
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
    stand_in(
        "gcloud",
        # The first run is cut off with the slice; the next finds a new one and ends well.
        f"""case "$*" in
  *train*) [ -e {lost} ] || {{ touch {lost}; exit 255; }} ;;
  *describe*) [ -e {lost}.again ] && echo ACTIVE || echo SUSPENDED ;;
  *create*) touch {lost}.again ;;
esac""",
    )
    code, said = bash("tpu_pod.sh", "resume", "--config", "c.py", **PLACE)
    assert code == 0 and "ended with code 255; going on (attempt 1 of 20)" in said
    verbs = [re.search(r"(train|describe|delete|create|scp|pip install)", call)[1] for call in stand_in.calls()]
    assert verbs == ["train", "describe", "delete", "create", "describe", "scp", "pip install", "train"]


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
