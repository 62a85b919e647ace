"""`python launch/fuzz.py OUT --minutes N [--seed S]`: a campaign against the commands, by hand.

Damaged inputs of every kind, random options, files that a full disk cuts off, two of a command in one place, and SIGKILL at
random moments; nothing of it may end in a traceback, hang (compute, or wait without computing, for over `--limit` seconds),
leave a partial file under its final name or one outside of the output folder, and a killed command that is started again must
make what one makes that was not killed, to the bit. Case k is a function of the seed and k: `--only K` runs it again. Started
again with the same OUT and seed, it goes on with the next case, and its counts add up. What fails stays in OUT/failures, with
the smallest change of its file that still fails.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from launch.fuzzing import cases, inputs, kills
from launch.fuzzing.children import Child, run, run_each
from launch.fuzzing.tally import Tally

BATCH = 128


def import_all() -> None:
    """What the commands import on use, once for all children; XLA compiles for programs that run for a moment, as in tests."""
    import importlib

    from msr_jax.cli import COMMANDS

    importlib.import_module("tests.conftest")
    for name in ("separate", "train", "evaluate", "import", "export", "compare"):
        importlib.import_module(COMMANDS[name][0])
    for name in (
        "msr_jax.train.loop", "msr_jax.separate.engine", "data_prep.slakh2100", "data_prep.verify", "tests.toy",
        "av", "msr_jax.evaluate.plots",
    ):  # fmt: skip
        importlib.import_module(name)


def make_base(folder: Path, limit: float) -> dict[str, Any]:
    """What cases are made from: a model, a corpus, its records, songs, checkpoints, names of settings. Children make them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    base: dict[str, Any] = {name: folder / name for name in ("model", "corpus", "records")}
    inputs.corpus(base["corpus"], rng)
    import soundfile

    base["songs"] = [folder / f"song{k}.wav" for k in range(3)]
    for path in base["songs"]:
        soundfile.write(path, inputs.sound(rng, 1.5, 2, 11_025), 11_025)
    from data_prep.slakh2100 import main
    from msr_jax.cli import main as msr

    (folder / "run").mkdir()
    score = ["evaluate", "--data", str(base["corpus"] / "test"), "--out", str(folder / "scored"), "--excerpts", "0"]
    for work in (
        lambda: main([str(base["corpus"]), str(base["records"]), "--crop", "2048", "--workers", "1"]),
        lambda: inputs.tiny_model(base["model"]) and 0,
        lambda: inputs.media(folder / "media") and 0,
        lambda: inputs.checkpoints(folder / "checkpoints") and 0,
        lambda: msr(score),
    ):
        if (end := run(work, folder / "run", 10 * limit)).code:
            raise RuntimeError(end.text)
    from ml_collections import ConfigDict

    from tests.test_tags import SONGS
    from tests.toy import get_config

    leaves = lambda c, at="": [
        n for k, v in c.items() for n in (leaves(v, f"{at}{k}.") if isinstance(v, ConfigDict) else [at + k])
    ]
    base |= {name: sorted((folder / name).iterdir()) for name in ("media", "checkpoints")}
    base |= {"stem_file": folder / "media" / "a.stem.mp4", "results": folder / "scored" / "results.json"}
    base |= {"tagged": [folder / "media" / name for name in SONGS], "settings": leaves(get_config())}
    return base


def hashed(folder: Path) -> str:
    """A digest of all files in a folder, and of their names."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(os.fsencode(path.relative_to(folder)) + b"\0" + path.read_bytes())
    return found.hexdigest()


def outside(folder: Path, before: set[Path]) -> list[str]:
    """Files that a command left where it may not: beside what was there and `out/`, or hidden in that."""
    found = [p for p in folder.rglob("*") if p not in before]
    strange = [p for p in found if (folder / "out") not in (p, *p.parents)]
    return [str(p.relative_to(folder)) for p in [*strange, *(p for p in found if p.name.endswith(".tmp"))]]


def judge(case: cases.Case, folder: Path, limit: float) -> tuple[str | None, str]:
    """Run a case: (what is wrong with it, what it printed)."""
    before = set(folder.rglob("*"))
    if case.twice:
        pair = [Child(case.work, folder, folder.parent / f"{folder.name}.{k}.txt", case.largest) for k in range(2)]
        ends = [child.wait(limit) for child in pair]
    else:
        ends = [run(case.work, folder, limit, case.largest)]
    fault = next((f for end in ends if (f := end.fault())), None)
    if fault is None and (strange := outside(folder, before)):
        fault = f"a file where none may be: {strange[0]}"
    if fault is None and (broken := kills.partial_files(folder / "out")):
        fault = f"a partial file: {broken[0]}"
    return fault, "\n".join(end.text for end in ends)


def make(seed: int, k: int, base: dict[str, Any], folder: Path) -> tuple[str, cases.Case]:
    rng = np.random.default_rng([seed, k])
    shares = np.array(list(cases.KINDS.values()), float)
    kind = list(cases.KINDS)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("in", "out"):
        (folder / name).mkdir(parents=True)
    return kind.__name__, kind(rng, folder, base)


def minimise(case: cases.Case, folder: Path, fault: str, limit: float) -> cases.Case:
    """Take back what was done to the file, one thing after the other, as long as it fails in the same way."""
    if case.spoiled is None:
        return case
    path, data, done = case.spoiled
    for step in list(done):
        fewer = [other for other in done if other is not step]
        shutil.rmtree(folder / "out")
        (folder / "out").mkdir()
        path.write_bytes(inputs.changed(data, fewer))
        again = judge(case, folder, limit)[0]
        if again and again.split(":")[0] == fault.split(":")[0]:
            done = fewer
    path.write_bytes(inputs.changed(data, done))
    return case._replace(spoiled=(path, data, done))


def keep(out: Path, name: str, folder: Path, fault: str, told: str, text: str, done: object) -> None:
    place = out / "failures" / name
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place, symlinks=True)
    (place / "fault.txt").write_text(f"{fault}\n{told}\n{done}\n\n{text}", errors="surrogateescape")
    print(f"FAULT {name}: {fault}", flush=True)


def run_files(out: Path, base: dict[str, Any], seed: int, k: int, count: int, limit: float, tally: Tally) -> None:
    """Cases k to k + count - 1: one child runs those that go alone, and what seems at fault there runs again by itself."""
    batch = []
    for number in range(k, k + count):
        folder = out / "cases" / str(number - k)
        batch.append((number, *make(seed, number, base, folder), folder))
    alone = [b for b in batch if not b[2].twice]
    before = {number: set(folder.rglob("*")) for number, *_, folder in batch}
    ends = run_each([(case.work, folder, case.largest) for _, _, case, folder in alone], out / "cases", limit)
    suspects = {b[0]: "two at a time" for b in batch if b[2].twice}
    for (number, _, _, folder), end in zip(alone, ends, strict=True):
        fault = "it ended all" if end is None else end.fault()
        if fault or (fault := ", ".join([*outside(folder, before[number]), *kills.partial_files(folder / "out")])):
            suspects[number] = fault
    for number, kind, case, folder in batch:
        if number in suspects:
            again = make(seed, number, base, folder)[1]
            fault, text = judge(again, folder, limit)
            if fault:
                again = minimise(again, folder, fault, limit)
                keep(out, f"{kind}-{number}", folder, fault, again.told, text, again.spoiled and again.spoiled[2])
                tally.faults.append(f"{kind}-{number}: {fault}")
            elif not case.twice:
                print(
                    f"case {number} ({kind}, {case.told}) failed among others, not alone: {suspects[number]}",
                    flush=True,
                )
                tally.counts["among others alone"] += 1
        tally.counts[f"files, {kind}"] += 1
        if case.twice:
            tally.counts["two in one place"] += 1
        if case.largest:
            tally.counts["full disks"] += 1


def run_life(
    out: Path, base: dict[str, Any], seed: int, k: int, limit: float, wanted: dict[str, Any], tally: Tally
) -> None:
    """Life k: a command that is killed some times and then ends."""
    rng = np.random.default_rng([seed, 1, k])
    names, shares = list(kills.KILLED), np.array([share for *_, share in kills.KILLED.values()], float)
    name = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    folder = out / "killed"
    if name not in wanted:
        try:
            wanted[name] = kills.reference(name, base, folder, 10 * limit)
        except RuntimeError:
            if not kills.is_starved(folder):
                raise
            tally.counts[f"starved, {name}"] += 1
            return
    expected, usual = wanted[name]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    count, fault = kills.live(name, rng, base, folder, usual, limit)
    if fault and not fault.startswith("a partial file") and kills.is_starved(folder):
        tally.counts[f"starved, {name}"] += 1
        return
    found = kills.result_of(name, folder / "out")
    if fault is None and found != expected:
        differ = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        fault = f"not what a command makes that nobody kills: {', '.join(differ)}"
    if fault:
        text = "\n".join(p.read_text(errors="replace") for p in sorted(folder.glob("told*.txt")))
        keep(out, f"life-{k}", folder, fault, name, text, None)
        tally.faults.append(f"life-{k}, {name}: {fault}")
    tally.counts[f"kills, {name}"] += count
    tally.counts[f"lives, {name}"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python launch/fuzz.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="K", help="case K alone, again")
    parser.add_argument("--only-life", type=int, metavar="K", help="life K of a killed command alone, again")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="a hang is longer (default 60)")
    parser.add_argument("--kills", type=float, default=0.5, metavar="SHARE", help="of the time (default 0.5)")
    args = parser.parse_args()
    out = args.out.absolute()
    for name in ("", "tmp", "home"):
        (out / name).mkdir(parents=True, exist_ok=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "MSR_HOME": str(out / "home")}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TMPDIR": str(out / "tmp")}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    import_all()
    began = time.monotonic()
    base = make_base(out / "base", args.limit)
    digest = hashed(out / "base")
    tally, wanted = Tally(out / f"tally-{args.seed}.json"), {}
    print(
        f"seed {args.seed}, from case {tally.next_case} and life {tally.next_life}, limit {args.limit:g} s", flush=True
    )
    if args.only is not None or args.only_life is not None:
        tally = Tally(out / "none.json")
        if args.only is not None:
            run_files(out, base, args.seed, args.only, 1, args.limit, tally)
        else:
            run_life(out, base, args.seed, args.only_life, args.limit, wanted, tally)
        print("\n".join(tally.faults) or "no fault")
        return 1 if tally.faults else 0
    while time.monotonic() < began + 60 * args.minutes:
        before, faults = time.monotonic(), len(tally.faults)
        if tally.minutes["kills"] < args.kills * sum(tally.minutes.values()) or args.kills == 1:
            run_life(out, base, args.seed, tally.next_life, args.limit, wanted, tally)
            tally.next_life += 1
            what = "kills"
        else:
            run_files(out, base, args.seed, tally.next_case, BATCH, args.limit, tally)
            tally.next_case += BATCH
            what = "files"
        tally.minutes[what] += (time.monotonic() - before) / 60
        if strange := [p.name for p in (out / "tmp").iterdir()]:
            tally.counts["left in the folder for temporary files"] += len(strange)
            shutil.rmtree(out / "tmp")
            (out / "tmp").mkdir()
        tally.save()
        if what == "files" or tally.next_life % 5 == 0 or len(tally.faults) > faults:
            print(tally, flush=True)
    if hashed(out / "base") != digest:
        tally.faults.append("what the cases are made from was changed: a file outside of the output folder")
        tally.save()
    print(json.dumps({"counts": dict(sorted(tally.counts.items())), "faults": tally.faults}, indent=1))
    print(tally)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
