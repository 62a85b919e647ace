"""Checkpoints by Orbax: parameters, averages, optimiser and a JSON of the rest, separate items of one step."""

import dataclasses
import logging
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from msr_jax.errors import UserError, first_line
from msr_jax.train.distributed import agree, check_is_shared
from msr_jax.train.state import TrainState

FORMAT = 1
ITEMS = ("params", "opt_state", "ema_params", "target_params")
READ_ERRORS = (ValueError, KeyError, TypeError, OSError)
BEST = "validation_si_sdr"


class Checkpoints:
    """The checkpoints of one run, `folder`/STEP/ each, on a disk or in a bucket (gs://…) that all processes see.

    The newest `keep` are kept, and the `keep_best` with the highest validation score. A step is there whole or not at
    all: older ones go only when a newer one is complete. All processes must call each method.

    For use in `with`: leaving it waits until everything is written.
    """

    def __init__(self, folder: str | Path, keep: int, keep_best: int = 0):
        """Raises UserError if the folder cannot be written, is not the same one for all processes, or `keep` is below 1."""
        try:
            self.folder = epath.Path(folder)
        except (ImportError, KeyError, ValueError) as error:
            raise UserError(
                f"train.checkpoints: {folder} names no store that can be written ({first_line(error)})"
            ) from error
        if keep < 1:
            raise UserError(f"train.keep must be at least 1, not {keep}")
        kept, score = [policies.LatestN(keep)], None
        if keep_best:
            score = lambda metrics: metrics[BEST]
            kept.append(policies.BestN(get_metric_fn=score, n=keep_best, keep_checkpoints_without_metrics=False))
        # Orbax logs what it raises as well, with tracebacks of its threads; `_writing` says it in a sentence.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_worth_telling)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _print_unraisable
        # What a killed run left half-written goes. Scores are written, for the next start to read, only with `best_fn`
        # (findings/orbax_best_forgotten.sh).
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), best_fn=score, cleanup_tmp_directories=True
        )
        if "://" not in str(folder):
            self.folder = epath.Path(Path(folder).absolute())
        agree(self._make)
        check_is_shared(self.folder)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error.strerror or error}") from error
        except ImportError as error:
            raise UserError(
                f"train.checkpoints: {self.folder} needs what opens such places: pip install 'msr_jax[cloud]'"
            ) from error
        except Exception as error:  # each store has its own: no such bucket, no permission
            if "://" not in str(self.folder):
                raise
            raise UserError(f"cannot write checkpoints to {self.folder} ({first_line(error)})") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._writing(self.manager.close)  # waits first
        except UserError:
            if kind is None:
                raise

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self.manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any], score: float | None = None) -> None:
        """Save at `state.step`; returns before the files are written. `meta` must be JSON.

        Args:
          score: validation SI-SDR of this state in dB, by which the best are kept; None if it was not measured.

        Raises:
          UserError: this or the save before could not be written; the older checkpoints are whole.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        arrays = {name: getattr(state, name) for name in ITEMS if getattr(state, name) is not None}
        items = {name: ocp.args.StandardSave(value) for name, value in arrays.items()}
        meta = {"format": FORMAT, "step": step, **meta}
        metrics = {BEST: score} if score is not None and math.isfinite(score) else None
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
        self._writing(lambda: self.manager.save(step, args=args, metrics=metrics))

    def wait(self) -> None:
        """Until everything is written. Raises UserError if something could not be."""
        self._writing(self.manager.wait_until_finished)

    def _writing(self, action: Any) -> None:
        try:
            action()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot write a checkpoint to {self.folder} ({first_line(error)}); those before it are whole: "
                "make room, then start again"
            ) from error

    def meta(self) -> dict[str, Any]:
        """The JSON of the newest checkpoint: format, step and what `save` was given.

        Raises:
          UserError: it cannot be read, or another version of the program wrote it.
        """
        step = self.latest_step()
        try:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = self.manager.restore(step, args=args).meta
            if meta["format"] == FORMAT:
                return meta
        except READ_ERRORS as error:
            raise UserError(
                f"{self.folder / str(step)} is not a checkpoint of msr train ({first_line(error)}); "
                "remove it or use another --workdir"
            ) from error
        raise UserError(
            f"the checkpoint {self.folder / str(step)} has format {meta['format']}, this version reads format {FORMAT}; "
            "use the version that wrote it, or another --workdir"
        )

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, laid out as `abstract` (shapes, dtypes and shardings), whatever mesh wrote it.

        Raises:
          UserError: the checkpoint holds another model or optimiser, or is damaged.
        """
        step = self.latest_step()
        items = {name: getattr(abstract, name) for name in ITEMS if getattr(abstract, name) is not None}
        args = {name: ocp.args.StandardRestore(value) for name, value in items.items()}
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(**args))
        except READ_ERRORS as error:
            raise UserError(
                f"the checkpoint {self.folder / str(step)} is damaged or holds another model or optimiser than the config "
                f"({first_line(error)}); remove it or use another --workdir"
            ) from error
        counter = jax.jit(lambda: jnp.asarray(step, jnp.int32), out_shardings=abstract.step.sharding)()
        return dataclasses.replace(abstract, step=counter, **{name: restored[name] for name in items})


def _print_unraisable(told: Any) -> None:
    """Python's own, but for what TensorStore's threads print when the write that they are part of has failed already."""
    if str(told.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(told)


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Not a traceback, nor that a checkpoint has no score: not each step is validated."""
    return not record.exc_info and "did not provide metrics" not in record.getMessage()
