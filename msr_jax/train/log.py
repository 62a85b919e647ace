"""What a run writes about itself: `metrics.jsonl` (every step), TensorBoard scalars and a progress line."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class RunLog:
    """Log of a run in `workdir`.

    `metrics.jsonl` holds no times: on resume the lines after the restored step are dropped, and the file then becomes
    that of a run that was never interrupted. TensorBoard and the progress line have means over `log_every` steps.
    """

    def __init__(self, workdir: Path, start_step: int, total_steps: int, log_every: int):
        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
            beside = path.with_suffix(".tmp")
            beside.write_text("".join(line + "\n" for line in kept))
            os.replace(beside, path)
        self.file = open(path, "a")
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self.log_every, self.total = log_every, total_steps
        self.pending: list[dict[str, float]] = []
        self.validation = ""
        self.clock, self.clock_step = time.monotonic(), start_step
        self.console = Console()
        self.bar = Progress(
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total_steps, completed=start_step)
        self.bar.start()

    def steps(self, first_step: int, metrics: Mapping[str, Any], examples_per_step: int) -> None:
        """Log the metrics (steps,) of consecutive steps; `first_step` counts the first of them as done."""
        metrics = {k: np.asarray(v) for k, v in metrics.items()}
        for k in range(len(metrics["loss"])):
            step, values = first_step + k, {name: float(v[k]) for name, v in metrics.items()}
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.pending.append(values)
            if step % self.log_every == 0 or step == self.total:
                self._interval(step, examples_per_step)
        self.file.flush()

    def _interval(self, step: int, examples_per_step: int) -> None:
        means = {name: float(np.mean([v[name] for v in self.pending])) for name in self.pending[0]}
        now = time.monotonic()
        examples = (step - self.clock_step) * examples_per_step
        means["examples_per_second"] = examples / max(now - self.clock, 1e-9)
        self.clock, self.clock_step, self.pending = now, step, []
        for name, value in means.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()  # a killed run must not lack what came before its checkpoint
        text = (
            f"loss {means['loss']:.4g}  grad {means['grad_norm']:.3g}  lr {means['lr']:.2g}  "
            f"{means['examples_per_second']:.1f} examples/s"
        )
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, description=text + self.validation)
        else:
            print(f"step {step}/{self.total}  {text}", flush=True)

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Log validation figures (dB) of a step."""
        self.file.write(json.dumps({"step": step, **scores}) + "\n")
        self.file.flush()
        for name, value in scores.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        text = "".join(f"  {name.replace('_', ' ')} {value:.2f} dB" for name, value in scores.items())
        if not self.console.is_terminal:
            print(f"step {step}/{self.total}{text}", flush=True)
        self.validation = text

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """What runs inside does not count in examples per second."""
        began = time.monotonic()
        yield
        self.clock += time.monotonic() - began

    def close(self) -> None:
        self.bar.stop()
        self.file.close()
        self.board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a kill cut off
        return float("inf")
