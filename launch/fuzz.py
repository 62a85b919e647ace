"""`python launch/fuzz.py OUT --minutes N [--seed S]`: a campaign against the commands, by hand.

Damaged inputs of every kind, random options, files that a full disk cuts off, two of a command in one place, and SIGKILL at
random moments; nothing of it may end in a traceback, run on for over `--limit` seconds, leave a partial file under its final
name or one outside of the output folder, and a killed command that is started again must make what one makes that was not
killed, to the bit. Case k is a function of the seed and k: `--only K` runs it again. What fails stays in OUT/failures, with
the smallest change of its file that still fails. Three of four minutes go to files, the rest to kills.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from launch.fuzzing import cases, inputs, kills
from launch.fuzzing.children import Child, Outcome, run

BATCH = 64
LIGHT = ("audio", "checkpoint", "model", "metadata", "records")  # kinds whose cases run for a moment, but for some


def import_all() -> None:
    """What the commands import on use, once for all children."""
    import importlib

    from msr_jax.cli import COMMANDS

    for name in ("separate", "train", "evaluate", "import"):
        importlib.import_module(COMMANDS[name][0])
    for name in (
        "msr_jax.train.loop",
        "msr_jax.separate.engine",
        "data_prep.slakh2100",
        "data_prep.verify",
        "tests.toy",
    ):
        importlib.import_module(name)


def make_base(folder: Path, limit: float) -> dict:
    """What cases are made from: a model, a corpus, its records, a song, the names of settings. Children make them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    base = {name: folder / name for name in ("model", "corpus", "records")} | {"song": folder / "song.wav"}
    inputs.corpus(base["corpus"], rng)
    import soundfile

    soundfile.write(base["song"], inputs.sound(rng, 4.0, 2, 11_025), 11_025)
    from data_prep.slakh2100 import main

    (folder / "run").mkdir()
    for work in (
        lambda: main([str(base["corpus"]), str(base["records"]), "--crop", "2048", "--workers", "1"]),
        lambda: inputs.tiny_model(base["model"]) and 0,
    ):
        if (end := run(work, folder / "run", 10 * limit)).code:
            raise RuntimeError(end.text)
    from ml_collections import ConfigDict

    from tests.toy import get_config

    leaves = lambda c, at="": [
        n for k, v in c.items() for n in (leaves(v, f"{at}{k}.") if isinstance(v, ConfigDict) else [at + k])
    ]
    return base | {"settings": leaves(get_config())}


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


def make(seed: int, k: int, base: dict, folder: Path) -> tuple[str, cases.Case]:
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


def together(batch: list[tuple[int, str, cases.Case, Path]], limit: float) -> bool:
    """Whether one child runs all of a batch to its end, each in its folder and without a fault: for what runs for a moment."""

    def work() -> int:
        for _, _, case, folder in batch:
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (case.largest or resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                try:
                    code = case.work()
                except SystemExit as error:
                    code = error.code
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            if Outcome(int(code or 0), told.getvalue(), 0.0, False).fault():
                return 3
        return 0

    before = [set(folder.rglob("*")) for *_, folder in batch]
    end = run(work, batch[0][3].parent, limit)
    strange = [outside(f, b) or kills.partial_files(f / "out") for (*_, f), b in zip(batch, before, strict=True)]
    return end.code == 0 and not end.hung and not any(strange)


def run_files(
    out: Path, base: dict, seed: int, until: float, limit: float, first: int, only: int | None
) -> tuple[int, Counter, int]:
    """Cases until the time is over: (how many, of which kinds, faults)."""
    counts, faults, k = Counter(), 0, first if only is None else only
    while time.monotonic() < until:
        batch = []
        for number in range(k, k + (1 if only is not None else BATCH)):
            folder = out / "cases" / str(number % BATCH)
            batch.append((number, *make(seed, number, base, folder), folder))
        light = [b for b in batch if b[1] in LIGHT and not b[2].twice]
        is_fine = only is None and together(light, limit)
        for number, kind, _, folder in batch:
            if not (is_fine and any(number == b[0] for b in light)):
                case = make(seed, number, base, folder)[1]
                fault, text = judge(case, folder, limit)
                if fault:
                    faults += 1
                    case = minimise(case, folder, fault, limit)
                    keep(out, f"{kind}-{number}", folder, fault, case.told, text, case.spoiled and case.spoiled[2])
            counts[kind] += 1
        k += len(batch)
        if only is not None:
            break
        if counts.total() % 512 == 0:
            print(f"{counts.total()} files, {faults} faults", flush=True)
    return k, counts, faults


def run_kills(out: Path, base: dict, seed: int, until: float, limit: float, first: int) -> tuple[Counter, int]:
    """Kills until the time is over: (how many of which commands, faults)."""
    counts, faults, wanted, k = Counter(), 0, {}, first
    names, shares = list(kills.KILLED), np.array([share for *_, share in kills.KILLED.values()], float)
    while time.monotonic() < until:
        rng = np.random.default_rng([seed, 1, k])
        name = names[int(rng.choice(len(names), p=shares / shares.sum()))]
        folder = out / "killed"
        if name not in wanted:
            wanted[name] = kills.reference(name, base, folder, 10 * limit)
        expected, usual = wanted[name]
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        fault, _ = kills.kill_once(name, rng, base, folder, usual, limit)
        found = kills.result_of(name, folder / "out")
        if fault is None and found != expected:
            differ = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            fault = f"not what a command makes that nobody kills: {', '.join(differ)}"
        if fault:
            faults += 1
            text = "\n".join(p.read_text(errors="replace") for p in sorted(folder.glob("told*.txt")))
            keep(out, f"kill-{k}", folder, fault, name, text, None)
        counts[name] += 1
        k += 1
        if counts.total() % 25 == 0:
            print(f"{counts.total()} kills, {faults} faults", flush=True)
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python launch/fuzz.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="K", help="begin with case K (default 0)")
    parser.add_argument("--only", type=int, metavar="K", help="case K alone, again")
    parser.add_argument(
        "--limit", type=float, default=60, metavar="SECONDS", help="a hang is what takes longer (default 60)"
    )
    parser.add_argument(
        "--kills", type=float, default=0.25, metavar="SHARE", help="of the time for kills (default 0.25)"
    )
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(out / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["MSR_HOME"] = str(out / "home")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    import_all()
    began = time.monotonic()
    base = make_base(out / "base", args.limit)
    print(f"seed {args.seed}, from case {args.first}, limit {args.limit:g} s", flush=True)
    total = 60 * args.minutes
    last, files, faults = run_files(
        out, base, args.seed, began + (1 - args.kills) * total, args.limit, args.first, args.only
    )
    killed, more = Counter(), 0
    if args.only is None and args.kills:
        killed, more = run_kills(out, base, args.seed, began + total, args.limit, args.first)
    told = {"seed": args.seed, "first": args.first, "last": last, "files": dict(files), "kills": dict(killed),
            "faults": faults + more, "minutes": (time.monotonic() - began) / 60}  # fmt: skip
    (out / f"summary-{args.seed}-{args.first}.json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{files.total()} files {dict(files)}, {killed.total()} kills {dict(killed)}: {faults + more} faults")
    return 1 if faults + more else 0


if __name__ == "__main__":
    sys.exit(main())
