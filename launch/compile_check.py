"""The table of `compile_check.sh`: official programs × chips, each row a `msr plan` in a process of its own.

A row is kept while the sources that make the program are the same, and where only they have changed, while the program is.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from msr_jax.config_files import read_config
from msr_jax.errors import UserError
from msr_jax.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "launch" / "compile_table.json"
TARGETS = ("h200:1", "v5e:1x1", "h100:1", "a100:1", "v5p:1x1x1", "v6e:1x1")
FIRST = TARGETS[:2]  # those that most people rent
STAGES = ("det", "diffusion", "consistency")
# What every row has, also of a program that was refused.
KEPT = {"program", "target", "seconds", "fits", "refused", "compiler", "key", "sources", "commit"}
MORE_WORK_SPACE = 1.05  # than the committed table's is too much
# What of the repository a program is made of; the rest of it does not make a row old.
SOURCES = (
    "configs/unet_*.py", "configs/bsrf_*.py", "msr_jax/config.py", "msr_jax/models/*.py", "msr_jax/methods/*.py",
    "msr_jax/audio/*.py", "msr_jax/devices.py", "msr_jax/data/augment*.py", "msr_jax/train/optim.py", "msr_jax/train/sharding.py",
    "msr_jax/train/stage.py", "msr_jax/train/state.py", "msr_jax/separate/engine.py", "msr_jax/plan/program.py",
    "msr_jax/plan/target.py", "msr_jax/plan/chips.py",
)  # fmt: skip


class Row(NamedTuple):
    """One program on one target: its name, and what `msr plan` is called with."""

    program: str
    target: str
    options: tuple[str, ...]


def rows() -> Iterator[Row]:
    """All rows, those that tell most first: training and separation on the first chips, then on the others, then the controls."""
    for targets in (FIRST, TARGETS[len(FIRST) :]):
        yield from (_training(track, stage, t) for t in targets for track in ("unet", "bsrf") for stage in STAGES)
        for target in targets:
            for dtype in ("bfloat16", "float32"):
                for track in ("unet", "bsrf"):
                    yield from (_separation(track, refine, dtype, target) for refine in ("none", *STAGES[1:]))
    yield from (_training(track, "det_x2", target) for target in TARGETS for track in ("unet", "bsrf"))


def _training(track: str, stage: str, target: str) -> Row:
    each = 1 if (track, target) == ("bsrf", "v5e:1x1") else 2
    return Row(f"{track}_{stage}", target, (f"configs/{track}_{stage}.py", f"--config.data.batch={each}"))


def _separation(track: str, refine: str, dtype: str, target: str) -> Row:
    config = f"configs/{track}_{'det' if refine == 'none' else refine}.py"
    options = (config, f"--config.compute_dtype={dtype}", "--separate", refine)
    return Row(f"{track} separate {refine} {dtype}", target, options)


def sources() -> str:
    """A hash of all that programs are made of."""
    files = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def commit_of() -> str:
    """The commit of this tree, with "-dirty" where it has been changed since."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "no commit"


def run(row: Row, minutes: float) -> dict[str, Any]:
    """The plan of a row; what went wrong, if no plan came within so many minutes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "plan.json"
        config, *options = row.options
        command = [sys.executable, "-m", "msr_jax.cli", "plan", "--config", config, "--target", row.target, *options]
        start = time.perf_counter()
        found: dict[str, Any] = {"program": row.program, "target": row.target}
        try:
            done = subprocess.run(
                [*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes
            )
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        except subprocess.TimeoutExpired:
            said = f"not compiled in {minutes:g} minutes"
            found["minutes"] = minutes
        found["seconds"] = time.perf_counter() - start
        if not path.exists():
            return found | {"fits": False, "refused": said[:300], "compiler": "", "key": ""}
        plan = json.loads(path.read_text())
    memory = plan["bytes_per_device"]
    return found | {
        "examples": plan["examples_per_device"],
        "fits": plan["fits"],
        "refused": plan["refused"],
        "needs": plan["needs"],
        "has": plan["has"],
        "work_space": memory.get("work_space"),
        "state": memory["parameters"] + memory["optimiser"] + memory["averages"] + memory["frozen"],
        "flops": plan["flops_per_device"],
        "forms": plan.get("forms", {}),
        "seconds_to_compile": plan["seconds_to_compile"],
        "compiler": plan["compiler"],
        "key": plan["key"],
    }


def markdown(found: list[dict[str, Any]], wanted: list[Row]) -> str:
    """The table: a line per program, a column per target, of those that have been compiled; the others by name."""
    cells = {(row["program"], row["target"]): row for row in found}
    programs, targets = _shown(found, wanted, "program"), _shown(found, wanted, "target")
    lines = _head(["program"], targets)
    for program in programs:
        lines.append(f"| {program} | " + " | ".join(_cell(cells.get((program, t))) for t in targets) + " |")
    compilers = sorted({row["compiler"] for row in found if row["compiler"]})
    commits = sorted({row["commit"] for row in found})
    by = f"Compiled by {'; '.join(compilers)}; programs of {', '.join(commits)}." if found else "Nothing compiled."
    count = (
        f"{len(cells)} of {len(wanted)} compiled. Cells: work space in GB, for so many examples (segments) on a device."
    )
    lines += ["", f"{by} {count}"]
    missing = [row.program for row in wanted if row.program not in programs]
    unseen = [row.target for row in wanted if row.target not in targets]
    for what, names in (("on any chip", missing), ("for any program", unseen)):
        if names:
            lines += ["", f"Not compiled yet {what}: {', '.join(dict.fromkeys(names))}."]
    return "\n".join(lines) + "\n"


def _shown(found: list[dict[str, Any]], wanted: list[Row], field: str) -> list[str]:
    """The programs or targets of the wanted rows that have been compiled, in their order."""
    seen = {row[field] for row in found}
    return [name for name in dict.fromkeys(getattr(row, field) for row in wanted) if name in seen]


def _head(first: list[str], targets: list[str]) -> list[str]:
    names = [*first, *(target.split(":")[0] for target in targets)]
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def tables(found: list[dict[str, Any]], wanted: list[Row]) -> str:
    """Both tables, as launch/README.md has them."""
    return markdown(found, wanted) + "\n" + which_chip(found, wanted)


def which_chip(found: list[dict[str, Any]], wanted: list[Row]) -> str:
    """By training stage and chip: examples that fit a device, and devices that share the released batch of a step.

    From one compilation: what a step takes beside its work space, and the work space of an example. Larger batches take less
    for an example, so that more may fit (`msr plan --fit` compiles until it knows).
    """
    cells = {(row["program"], row["target"]): row for row in found}
    stages = [row for row in wanted if "--separate" not in row.options]
    programs, targets = _shown(found, stages, "program"), _shown(found, wanted, "target")
    lines = _head(["stage", "batch"], targets)
    for program in programs:
        batch, times = released_batch(program)
        shown = " | ".join(_share(cells.get((program, target)), batch) for target in targets)
        lines.append(f"| {program} | {batch}{f' × {times}' if times > 1 else ''} | {shown} |")
    lines += [
        "",
        "Cells: at least so many examples fit one device (part of the work space does not grow with them), GB of work space for"
        " each; devices for the batch, at that.",
    ]
    return "\n".join(lines) + "\n"


@cache
def released_batch(program: str) -> tuple[int, int]:
    """As released: examples that go at once, and how often they do in a step."""
    config = read_config(str(ROOT / "configs" / f"{program}.py"), [])
    return int(config["data"]["batch"]), int(config["optim"]["accumulate"])


def _share(row: dict[str, Any] | None, batch: int) -> str:
    if row is None or not row["fits"]:
        return _cell(row)
    each = row["work_space"] / row["examples"]
    most = max(row["examples"], int((row["has"] - (row["needs"] - row["work_space"])) / each))
    devices = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most)
    return f"{most}, {each / 1e9:.2f}; {devices}"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not compiled yet"
    if row["fits"]:
        return f"{row['work_space'] / 1e9:.2f} ({row['examples']})"
    if row.get("needs"):
        return f"**does not fit**: {row['needs'] / 1e9:.1f} of {row['has'] / 1e9:.1f} ({row['examples']})"
    return f"**refused**: {row['refused'][:60]}"


def worse(found: list[dict[str, Any]], committed: list[dict[str, Any]]) -> list[str]:
    """What the committed table has as fitting, and no longer does, or not in 1.05 times the work space."""
    before = {(row["program"], row["target"]): row for row in committed if row["fits"]}
    said = []
    for row in found:
        was = before.get((row["program"], row["target"]))
        if was and not row["fits"]:
            said.append(
                f"{row['program']} on {row['target']} no longer compiles and fits: {row['refused'] or 'memory'}"
            )
        elif was and row["work_space"] > MORE_WORK_SPACE * was["work_space"]:
            grown = f"{was['work_space'] / 1e9:.2f} to {row['work_space'] / 1e9:.2f} GB"
            said.append(f"{row['program']} on {row['target']}: work space from {grown}")
    return said


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; none where there is no file.

    Raises:
      UserError: the file is no table of this script's.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        if all(row.keys() >= KEPT for row in found):
            return list(found)
    except (ValueError, LookupError, TypeError, AttributeError):  # no JSON, or another
        pass
    raise UserError(f"{path} is damaged, or no table of this script's; remove it, or name another folder")


def main(argv: list[str] | None = None) -> int:
    wanted = list(rows())
    names = sorted({row.program for row in wanted})
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--programs", nargs="+", choices=names, metavar="NAME", help="these alone, such as unet_det")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, metavar="TARGET", help="these alone, such as h200:1")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), metavar="MINUTES", help="start no row after so long"
    )
    parser.add_argument("--each", type=float, default=60, metavar="MINUTES", help="give a row up after so long")
    args = parser.parse_args(argv)
    chosen = [
        row
        for row in wanted
        if row.program in (args.programs or [row.program]) and row.target in (args.targets or [row.target])
    ]
    made_of, begun = sources(), time.monotonic()
    commit = commit_of()
    kept = {(row["program"], row["target"]): row for row in _rows_of(args.out / "table.json")}
    for row in chosen:
        before = kept.get((row.program, row.target))
        # One that was given up is tried again by who gives it more.
        if before and before["sources"] == made_of and before.get("minutes", args.each) >= args.each:
            continue
        if time.monotonic() - begun > 60 * args.limit:
            break
        found = run(row, args.each) | {"sources": made_of, "commit": commit}
        if before and found["key"] and before["key"] == found["key"]:
            found["commit"] = before["commit"]  # the same program still
        kept[row.program, row.target] = found
        print(f"{row.program} on {row.target}: {_cell(found)}, {found['seconds']:.0f} s", flush=True)
        current = [kept[r.program, r.target] for r in wanted if (r.program, r.target) in kept]
        write_whole(args.out / "table.json", json.dumps({"rows": current}, indent=1) + "\n")
        # A row of an older program is no row of this one's table.
        fresh = [row for row in current if row["sources"] == made_of]
        write_whole(args.out / "table.md", tables(fresh, wanted))
    fresh = [row for row in kept.values() if row["sources"] == made_of]
    failures = worse(fresh, _rows_of(COMMITTED))
    print(
        "\n".join(failures)
        or f"nothing worse than {COMMITTED.name}; {len(fresh)} rows of {len(wanted)} are of these sources"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
