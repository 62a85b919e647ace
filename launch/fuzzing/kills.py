"""SIGKILL at random moments, then the same command again: what it makes is that of a command which nobody killed."""

import hashlib
import json
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from launch.fuzzing import inputs
from launch.fuzzing.cases import _command, training
from launch.fuzzing.children import Child

STEPS = 12


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by name of what a command is for: files that it made, without logs and what stands beside them."""
    files = [
        f
        for f in sorted(folder.rglob("*"))
        if f.is_file() and not any(p.startswith(".") for p in f.relative_to(folder).parts)
    ]
    return {
        str(f.relative_to(folder)): hashlib.sha256(_said(f)).hexdigest() for f in files if "tensorboard" not in f.parts
    }


def _said(path: Path) -> bytes:
    """A file's bytes; of results, without what time says."""
    if (path.suffix == ".json" and path.name == "results.json") or path.parent.name == "tracks":
        told = json.loads(path.read_text())
        return json.dumps(_timeless(told), sort_keys=True).encode()
    if path.name in ("results.md", "report.html"):
        return b""
    return path.read_bytes()


def _timeless(told: Any) -> Any:
    if isinstance(told, dict):
        return {
            k: _timeless(v) for k, v in told.items() if k not in ("work_seconds", "rtf", "stamp", "data", "workdir")
        }
    return [_timeless(v) for v in told] if isinstance(told, list) else told


def _train(base: Mapping[str, Path], out: Path, processes: int) -> list[inputs.Work]:
    argv = ["train", *training(base["records"], out / "run", STEPS)]
    if processes == 1:
        return [_command(*argv)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    return [_command(*argv, "--coordinator", place, "--processes", processes, "--process", k) for k in range(processes)]


def _separate(base: Mapping[str, Path], out: Path, _: int) -> list[inputs.Work]:
    return [_command("separate", base["song"], "-o", out, "--model", base["model"], "--refine", "none")]


def _evaluate(base: Mapping[str, Path], out: Path, _: int) -> list[inputs.Work]:
    return [_command("evaluate", "--data", base["corpus"] / "test", "--out", out, "--excerpts", "0")]


def _prepare(base: Mapping[str, Path], out: Path, _: int) -> list[inputs.Work]:
    from data_prep.slakh2100 import main

    return [lambda: main([str(base["corpus"]), str(out / "records"), "--crop", "2048", "--workers", "1"])]


# Name: (work of each process, processes, how many of a hundred kills).
KILLED: dict[str, tuple[Callable[..., list[inputs.Work]], int, int]] = {
    "prepare": (_prepare, 1, 30), "separate": (_separate, 1, 30), "evaluate": (_evaluate, 1, 15),
    "train": (_train, 1, 15), "train, 2 processes": (_train, 2, 7), "train, 4 processes": (_train, 4, 3),
}  # fmt: skip


def result_of(name: str, out: Path) -> dict[str, str]:
    """What must be equal: the files made; of a run, its model and its metrics."""
    found = digests(out)
    if name.startswith("train"):
        return {k: v for k, v in found.items() if k.startswith("run/model/") or k == "run/metrics.jsonl"}
    return found


def partial_files(out: Path) -> list[str]:
    """Files under their final name that are not whole."""
    broken = []
    for path in sorted(p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if any(
            part.startswith(".") or part.endswith(".tmp") or "orbax" in part for part in path.relative_to(out).parts
        ):
            continue
        try:
            if path.suffix in (".wav", ".flac"):
                with soundfile.SoundFile(path) as file:
                    if len(file.read()) != file.frames or file.frames == 0:
                        raise ValueError("shorter than it says")
            elif path.suffix == ".json" and "checkpoints" not in path.parts:
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                from safetensors.numpy import load_file

                load_file(path)
        except Exception as error:
            broken.append(f"{path}: {error}")
    return broken


def processes_env(processes: int) -> dict[str, str]:
    return {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"} if processes > 1 else {}


def kill_once(
    name: str, rng: np.random.Generator, base: Mapping[str, Path], folder: Path, usual: float, limit: float
) -> tuple[str | None, float]:
    """Kill a command at a moment drawn from its usual length, some times, then let it end: (what is wrong, seconds of the last)."""
    make, processes, _ = KILLED[name]
    out = folder / "out"
    for _ in range(int(rng.integers(1, 4))):
        running = [
            Child(work, folder, folder / f"told{k}.txt", env=processes_env(processes))
            for k, work in enumerate(make(base, out, processes))
        ]
        victim = running[int(rng.integers(len(running)))]
        moment = float(rng.uniform(0, 1.1)) * usual
        try:
            victim.wait(moment)  # its limit is the kill
        finally:
            for child in running:
                if child is not victim:
                    child.kill()
                    child.wait(limit)
        if broken := partial_files(out):
            return f"a partial file after a kill: {broken[0]}", 0.0
    running = [
        Child(work, folder, folder / f"told{k}.txt", env=processes_env(processes))
        for k, work in enumerate(make(base, out, processes))
    ]
    ends = [child.wait(limit) for child in running]
    for end in ends:
        if fault := end.fault() or (f"exit code {end.code} after kills" if end.code else None):
            return fault, end.seconds
    if left := [p for p in folder.rglob(".*") if p.name.endswith(".tmp")]:
        return f"left behind: {left[0].name}", ends[0].seconds
    return None, max(end.seconds for end in ends)


def reference(name: str, base: Mapping[str, Path], folder: Path, limit: float) -> tuple[dict[str, str], float]:
    """What a command makes that nobody kills, and how long it takes (the second of two: nothing is compiled anew)."""
    make, processes, _ = KILLED[name]
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        children = [
            Child(work, folder, folder / f"told{k}.txt", env=processes_env(processes))
            for k, work in enumerate(make(base, folder / "out", processes))
        ]
        ends = [child.wait(limit) for child in children]
        for end in ends:
            if end.code:
                raise RuntimeError(f"{name} ends with {end.code}: {end.text[-2000:]}")
    return result_of(name, folder / "out"), max(end.seconds for end in ends)
