"""What a run writes about itself: `metrics.jsonl` (every step), TensorBoard, a progress line, and W&B if wanted."""

import contextlib
import importlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from msr_jax.errors import UserError
from msr_jax.train.board import Board
from msr_jax.train.pictures import png, spectrogram

# What a step's time goes to besides computing; see `RunLog.timed`.
STEP_PARTS = ("input", "checkpoint")


class RunLog:
    """Log of a run in `workdir`, kept by one process; the others make one without `workdir`, which writes nothing.

    `metrics.jsonl` has null for what is not finite, as of a skipped step. It holds no times: on resume the lines after the restored step are dropped, and the file then becomes
    that of a run that was never interrupted. TensorBoard and the progress line have means over `log_every` steps, the first
    after a resume over those since.
    """

    def __init__(
        self,
        workdir: Path | None,
        start_step: int,
        total_steps: int,
        log_every: int,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """Raises UserError if the log cannot be written, or W&B is wanted and not installed."""
        self.is_kept = workdir is not None
        self.log_every, self.total = log_every, total_steps
        self.pending: list[dict[str, float]] = []
        self.validation = ""
        self.wandb = None
        self.clock, self.clock_step = time.monotonic(), start_step
        self.spent: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        if workdir is None:
            return
        if wandb_project:
            self.wandb = _start_wandb(wandb_project, workdir, config)
        try:
            self.file = _open_metrics(workdir / "metrics.jsonl", start_step)
            self.board = Board(workdir / "tensorboard", start_step)
        except OSError as error:
            raise UserError(f"cannot write the log in {workdir}: {error.strerror}") from error
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

    def per_step(self, flops: float, peak_flops: float | None) -> None:
        """From now on log the rate of a step of `flops` per device, as a share too if the device's peak is known (FLOP/s)."""
        self.rates = {"flops": flops, **({"peak": peak_flops} if peak_flops else {})}

    def steps(self, first_step: int, metrics: Mapping[str, Any], examples_per_step: int) -> None:
        """Log the metrics (steps,) of consecutive steps; `first_step` counts the first of them as done."""
        if not self.is_kept:
            return
        metrics = {k: np.asarray(v) for k, v in metrics.items()}
        for k in range(len(metrics["loss"])):
            step, values = first_step + k, {name: float(v[k]) for name, v in metrics.items()}
            self._line({"step": step, **values})
            self.pending.append(values)
            if step % self.log_every == 0 or step == self.total:
                self._interval(step, examples_per_step)
        self._flush()

    def _interval(self, step: int, examples_per_step: int) -> None:
        skipped = sum(v.get("skipped", 0) for v in self.pending)
        means = {name: _mean([v[name] for v in self.pending]) for name in self.pending[0]}
        now, count = time.monotonic(), max(step - self.clock_step, 1)
        seconds = max(now - self.clock, 1e-9)
        means["examples_per_second"] = count * examples_per_step / seconds
        self.clock, self.clock_step, self.pending, spent, self.spent = now, step, [], self.spent, {}
        times = {f"seconds_per_step/{name}": spent.get(name, 0.0) / count for name in STEP_PARTS}
        # What a step takes beside waiting for input; checkpoints come on top and are not in `seconds`.
        times["seconds_per_step/compute"] = max(seconds - spent.get("input", 0.0), 0.0) / count
        if self.rates:
            times["tflops_per_device"] = self.rates["flops"] * count / seconds / 1e12
            if "peak" in self.rates:
                times["mfu"] = self.rates["flops"] * count / seconds / self.rates["peak"]
        memory = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
        if "peak_bytes_in_use" in memory:
            times["device_memory_bytes"] = memory["peak_bytes_in_use"]
        self._scalars(step, {**means, **times})
        text = (
            f"loss {means['loss']:.4g}  grad {means['grad_norm']:.3g}  lr {means['lr']:.2g}  "
            f"{means['examples_per_second']:.1f} examples/s"
            + (f"  MFU {times['mfu']:.0%}" if "mfu" in times else "")
            + (f"  skipped {skipped:.0f}" if skipped else "")
        )
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, description=text + self.validation)
        else:
            print(f"step {step}/{self.total}  {text}", flush=True)

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Log validation figures (dB) of a step."""
        if not self.is_kept:
            return
        self._line({"step": step, **scores})
        self._scalars(step, scores)
        self._flush()
        text = "".join(f"  {name.replace('_', ' ')} {value:.2f} dB" for name, value in scores.items())
        if not self.console.is_terminal:
            print(f"step {step}/{self.total}{text}", flush=True)
        self.validation = text

    def sounds(self, step: int, sounds: Mapping[str, np.ndarray], sample_rate: int) -> None:
        """Audio (samples,) by name, to TensorBoard as sound and as spectrogram."""
        if not self.is_kept:
            return
        with self._writing():
            for name, audio in sounds.items():
                audio = np.clip(audio, -1.0, 1.0)
                self.board.audio(f"audio/{name}", audio, step, sample_rate)
                pixels = spectrogram(audio)
                self.board.image(f"spectrogram/{name}", png(pixels), pixels.shape, step)
        self._flush()

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time of what runs inside as that part's. But for "input", it does not count in examples per second."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self.spent[part] = self.spent.get(part, 0.0) + took
        if part != "input":
            self.clock += took

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk as a sentence; what is written inside may reach the disk at any time."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write the log beside {self.file.name}: {error.strerror}") from error

    def _line(self, row: Mapping[str, Any]) -> None:
        written = {name: value if np.isfinite(value) else None for name, value in row.items()}  # JSON knows no NaN
        with self._writing():
            self.file.write(json.dumps(written) + "\n")

    def _flush(self) -> None:
        with self._writing():
            self.file.flush()
            self.board.flush()  # a killed run must not lack what came before its checkpoint

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._writing():
            for name, value in values.items():
                self.board.scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(dict(values), step=step)

    def close(self) -> None:
        if not self.is_kept:
            return
        self.bar.stop()
        with contextlib.suppress(OSError):  # a full disk was reported when it was first met
            self.file.close()
        with contextlib.suppress(OSError):
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _open_metrics(path: Path, start_step: int):
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(line + "\n" for line in kept))
        os.replace(beside, path)
    return open(path, "a")


def _start_wandb(project: str, workdir: Path, config: Mapping[str, Any] | None):
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError("train.wandb_project is set, but wandb is not installed: pip install wandb") from error
    # The same run goes on when the training does.
    return wandb.init(project=project, name=workdir.name, id=workdir.name, resume="allow", config=dict(config or {}))


def _mean(values: list[float]) -> float:
    """Mean of the finite values: a skipped step must not hide the others."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a kill cut off
        return float("inf")
