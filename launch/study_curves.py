"""Training curves as a picture: `python launch/study_curves.py OUT.svg RUN…`, means of the loss over 100 steps of each run."""

import json
import sys
from pathlib import Path

import numpy as np

from msr_jax.infer.plots import scatter

MEAN_OVER = 100  # steps
STYLE = (
    "svg{background:#fff;font:13px sans-serif}.grid{stroke:#ddd}.zero{stroke:none}"
    ".series0{fill:#2563eb}.series1{fill:#ea580c}.series2{fill:#16a34a}.series3{fill:#9333ea}"
)


def curve(run: Path) -> list[tuple[float, float, str]]:
    """(step, mean loss, name) of a run's metrics.jsonl; of a step that was taken again, the last."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    loss = {line["step"]: line["loss"] for line in lines if "loss" in line}
    steps = np.array(sorted(loss))
    groups = np.split(steps, range(MEAN_OVER, len(steps), MEAN_OVER))
    means = ((float(g.mean()), float(np.mean([loss[s] for s in g]))) for g in groups)
    return [(step, mean, f"{run.name} {step:.0f}: {mean:.2f}") for step, mean in means]


def main(out: Path, runs: list[Path]) -> None:
    drawing = scatter({run.name: curve(run) for run in runs}, "step", "loss", ", ".join(run.name for run in runs))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="290" {drawing[len("<svg ") :]}'
    out.write_text(head.replace(">", f"><style>{STYLE}</style>", 1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
