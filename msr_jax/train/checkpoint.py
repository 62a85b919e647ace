"""Checkpoints by Orbax: parameters, averages, optimiser and a JSON of the rest as separate items of one atomic step."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from msr_jax.errors import UserError
from msr_jax.train.state import TrainState

FORMAT = 1
ITEMS = ("params", "opt_state", "ema_params", "target_params")


class Checkpoints:
    """The checkpoints of one run, in `folder`/<step>/; the newest `keep` are kept. Use in `with`: leaving waits for writes."""

    def __init__(self, folder: str | Path, keep: int):
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error.strerror}") from error
        options = ocp.CheckpointManagerOptions(preservation_policy=policies.LatestN(keep))
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.manager.close()

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self.manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Save at `state.step`; returns before the files are written. `meta` must be JSON."""
        step = int(state.step)
        if step == self.latest_step():
            return
        arrays = {name: getattr(state, name) for name in ITEMS if getattr(state, name) is not None}
        items = {name: ocp.args.StandardSave(value) for name, value in arrays.items()}
        meta = {"format": FORMAT, "step": step, **meta}
        self.manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))

    def meta(self) -> dict[str, Any]:
        """The JSON of the newest checkpoint."""
        restored = self.manager.restore(self.latest_step(), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return restored.meta

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, laid out as `abstract` (shapes, dtypes and shardings).

        Raises:
          UserError: the checkpoint holds another model or optimiser.
        """
        step = self.latest_step()
        items = {name: getattr(abstract, name) for name in ITEMS if getattr(abstract, name) is not None}
        args = {name: ocp.args.StandardRestore(value) for name, value in items.items()}
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(**args))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            first = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"the checkpoint of step {step} in {self.folder} holds another model or optimiser than the config ({first}); "
                "use another --workdir"
            ) from error
        counter = jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), abstract.step.sharding)
        return abstract.replace(step=counter, **{name: restored[name] for name in items})
