"""Training curves as a picture: `python launch/study/curves.py OUT.svg RUN…`.

Means over 100 steps, of a short run over a fifth of it: of the gain over the estimate where every run logs it (refinements),
else of the loss.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from msr_jax.evaluate.plots import scatter

MEAN_OVER = 100  # steps
STYLE = (
    "svg{background:#fff;font:13px sans-serif}.grid{stroke:#ddd}.zero{stroke:none}"
    ".series0{fill:#2563eb}.series1{fill:#ea580c}.series2{fill:#16a34a}.series3{fill:#9333ea}"
)


def metrics(run: Path) -> list[dict[str, float]]:
    """Lines of a run's metrics.jsonl that have a loss, one for a step: of one that was taken again, the last."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return list({line["step"]: line for line in lines if "loss" in line}.values())


def curve(name: str, lines: list[dict[str, float]], field: str) -> list[tuple[float, float, str]]:
    """(step, mean, label) over steps, but those that were skipped: what is not finite is null, in older files NaN."""
    values = {line["step"]: line[field] for line in lines if line[field] is not None and np.isfinite(line[field])}
    if not values:
        return []
    steps = np.array(sorted(values))
    count = min(MEAN_OVER, max(1, len(steps) // 5))
    groups = np.split(steps, range(count, len(steps), count))
    means = ((float(g.mean()), float(np.mean([values[s] for s in g]))) for g in groups)
    return [(step, mean, f"{name} {step:.0f}: {mean:.2f}") for step, mean in means]


def main(out: Path, runs: list[Path]) -> None:
    read = {run.name: metrics(run) for run in runs}
    field = "gain_db" if all("gain_db" in lines[0] for lines in read.values()) else "loss"
    named = {"gain_db": "gain over the estimate (dB)", "loss": "loss"}[field]
    drawing = scatter({name: curve(name, lines, field) for name, lines in read.items()}, "step", named, ", ".join(read))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="290" {drawing[len("<svg ") :]}'
    out.write_text(head.replace(">", f"><style>{STYLE}</style>", 1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    args = parser.parse_args()
    if lacking := [run for run in args.runs if not (run / "metrics.jsonl").is_file()]:
        parser.error(f"{lacking[0]} holds no metrics.jsonl; name the --workdir of a run")
    main(args.out, args.runs)
