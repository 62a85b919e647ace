"""SIGKILL at random moments, the same command again and again: what it makes in the end is what nobody's kill would change."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from launch.fuzzing.cases import _command, training
from launch.fuzzing.children import Child, Work

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
            k: _timeless(v)
            for k, v in told.items()
            if k not in ("work_seconds", "first", "rtf", "stamp", "data", "workdir")
        }
    return [_timeless(v) for v in told] if isinstance(told, list) else told


def _train(base: Mapping[str, Any], out: Path, processes: int) -> list[Work]:
    argv = ["train", *training(base["records"], out / "run", STEPS)]
    if processes == 1:
        return [_command(*argv)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    return [_command(*argv, "--coordinator", place, "--processes", processes, "--process", k) for k in range(processes)]


def _separate(base: Mapping[str, Any], out: Path, _: int) -> list[Work]:
    return [_command("separate", *base["songs"], "-o", out, "--model", base["model"], "--refine", "none")]


def _evaluate(base: Mapping[str, Any], out: Path, _: int) -> list[Work]:
    options = ("--model", base["model"], "--refine", "none", "--excerpts", "1")
    return [_command("evaluate", "--data", base["corpus"] / "test", "--out", out, *options)]


def _prepare(base: Mapping[str, Any], out: Path, _: int) -> list[Work]:
    from data_prep.slakh2100 import main

    return [lambda: main([str(base["corpus"]), str(out / "records"), "--crop", "2048", "--workers", "1"])]


# Name: (work of each process, processes, how many of a hundred lives).
KILLED: dict[str, tuple[Callable[..., list[Work]], int, int]] = {
    "prepare": (_prepare, 1, 20), "separate": (_separate, 1, 24), "evaluate": (_evaluate, 1, 16),
    "train": (_train, 1, 20), "train, 2 processes": (_train, 2, 12), "train, 4 processes": (_train, 4, 8),
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
                with soundfile.SoundFile(os.fsencode(path)) as file:  # names need not be UTF-8
                    if len(file.read()) != file.frames or file.frames == 0:
                        raise ValueError("shorter than it says")
            elif path.suffix == ".json" and "checkpoints" not in path.parts:
                json.loads(path.read_text())
            elif "array_record" in path.suffix or "array_record" in path.name:
                from array_record.python.array_record_module import ArrayRecordReader

                if ArrayRecordReader(str(path)).num_records() == 0:
                    raise ValueError("no records")
            elif path.suffix == ".safetensors":
                from safetensors.numpy import load_file

                load_file(path)
        except Exception as error:
            broken.append(f"{path}: {error}")
    return broken


def _start(name: str, base: Mapping[str, Any], folder: Path) -> list[Child]:
    make, processes, _ = KILLED[name]
    flags = os.environ.get("XLA_FLAGS", "")
    env = {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=1"} if processes > 1 else {}
    works = make(base, folder / "out", processes)
    return [Child(work, folder, folder / f"told{k}.txt", env=env) for k, work in enumerate(works)]


def live(
    name: str, rng: np.random.Generator, base: Mapping[str, Any], folder: Path, usual: float, limit: float
) -> tuple[int, str | None]:
    """Kill a command, start it again and kill it, some times, and let it end: (kills, what is wrong).

    Moments are drawn from the CPU seconds that the command usually takes. Of several processes one is killed, and then the others.
    """
    out, kills = folder / "out", 0
    for _ in range(int(rng.integers(3, 9))):
        running = _start(name, base, folder)
        moment, victim = float(rng.uniform(0.02, 0.7)) * usual, running[int(rng.integers(len(running)))]
        later = float(rng.choice([0, 0.5]))
        others = [child for child in running if child is not victim]
        try:
            end = victim.kill_at(moment, limit)
            if end.killed and others:
                time.sleep(later)
                for child in others:
                    child.kill()
            ends = [end] + [child.wait(limit) for child in others]
        finally:
            for child in running:
                child.kill()
        if broken := partial_files(out):
            return kills, f"a partial file after a kill: {broken[0]}"
        # Processes whose companion was killed may say so in any way; all that end by themselves may not.
        if not end.killed:
            if fault := next((f for e in ends if (f := e.fault())), None):
                return kills, fault
            break
        kills += 1
    ends = [child.wait(limit) for child in _start(name, base, folder)]
    for end in ends:
        if fault := end.fault() or (f"exit code {end.code} after kills" if end.code else None):
            return kills, fault
    left = [p for p in folder.rglob(".*") if p.name.endswith((".tmp", ".partial"))]
    return kills, f"left behind: {left[0].name}" if left else None


def is_starved(folder: Path) -> bool:
    """Whether processes of one run lost each other for want of a core: gRPC gives up after 100 s without a heartbeat."""
    return any("stopped sending heartbeats" in path.read_text(errors="replace") for path in folder.glob("told*.txt"))


def reference(name: str, base: Mapping[str, Any], folder: Path, limit: float) -> tuple[dict[str, str], float]:
    """What a command makes that nobody kills, and its CPU seconds (of the second of two: nothing is compiled anew)."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        ends = [child.wait(limit) for child in _start(name, base, folder)]
        for end in ends:
            if end.code:
                raise RuntimeError(f"{name} ends with {end.code}: {end.text[-2000:]}")
    return result_of(name, folder / "out"), max(end.computed for end in ends)
