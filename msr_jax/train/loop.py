"""A training run, from config to model folder: the only file that knows all the others."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from msr_jax.config_fields import check_config
from msr_jax.errors import UserError
from msr_jax.messages import log as program_log
from msr_jax.messages import saying
from msr_jax.models.backbone import compute_dtype, make_backbone
from msr_jax.plan.chips import peak_flops
from msr_jax.plan.flops import count_flops
from msr_jax.train.batches import check_batch, dispatches, open_dataset
from msr_jax.train.checkpoint import Checkpoints
from msr_jax.train.distributed import agree, check_same_in_all, is_main
from msr_jax.train.log import RunLog
from msr_jax.train.same_data import changes, checksum, data_identity, networks_identity
from msr_jax.train.sharding import gather, make_mesh
from msr_jax.train.stage import (
    BEFORE,
    BUILDS_ON,
    FREE,
    OF_TRAINING,
    SHARED,
    Stage,
    as_inputs,
    load_frozen,
    load_start,
    make_stage,
    of_all_processes,
    place_frozen,
    settings,
    trained_networks,
)  # fmt: skip
from msr_jax.train.state import TrainState
from msr_jax.train.validation import make_validation, read_windows
from msr_jax.train.workdir import StopNote, Workdir
from msr_jax.weights.model_folder import save_model


def train(
    config: Mapping[str, Any],
    workdir: str | Path,
    dataset: grain.MapDataset | None = None,
    profile_steps: int = 0,
    accept_new_data: bool = False,
) -> TrainState:
    """Train one stage: from the newest checkpoint in `workdir`, else on `init_from`, else from scratch.

    The run is a pure function of the config and the data: killed at any moment and started again, on any mesh and any
    number of processes, it goes on with the examples and the noise of a run that was never interrupted; on the same
    mesh, to the same numbers. SIGTERM to any process saves after the dispatch in flight and ends it.

    Args:
      config: plain nested mappings with the fields of `msr_jax.config`.
      workdir: gets checkpoints/, model/, metrics.jsonl, tensorboard/ and config.json; written by one process, except
        checkpoints/, which all must see (`train.checkpoints` names another place, such as a bucket).
      dataset: replaces the records of `config["data"]`; element k is this process's part of micro-batch k.
      profile_steps: trace so many steps, from the second dispatch on, into workdir/profile; 0 traces none.
      accept_new_data: go on although the records are others than those that the checkpoint was made with.

    Returns:
      The state after the last step, which is below `train.steps` if SIGTERM stopped the run.

    Raises:
      UserError: a config, data or checkpoint that does not fit, a place that cannot be written or that another run
        holds, or too many steps in a row without a finite loss.
    """
    check_config(config)
    check_same_in_all({"config": checksum(of_all_processes(config))}, "the settings of the config are others")
    check_same_in_all(  # on a CPU each process measures it
        {"dtype": checksum(str(compute_dtype(config["compute_dtype"])))},
        f"the precision that config.compute_dtype={config['compute_dtype']} comes to is another",
        "set config.compute_dtype=float32",
    )
    _check_for_training(config)
    mesh = make_mesh(config["mesh"])
    check_batch(config["data"]["batch"], mesh)
    backbone = make_backbone(config["model"], config["compute_dtype"])
    backbone.check_length(config["data"]["crop"])
    backbone.check_length(config["segment"])
    frozen, begin = agree(lambda: load_frozen(config)), agree(lambda: load_start(config))
    data = dataset if dataset is not None else agree(lambda: open_dataset(config))
    sums = networks_identity({**frozen, **({"start": begin} if begin else {})})
    check_same_in_all(sums, "the networks that config.init_from names are others")
    identity = {
        "data": {} if dataset is not None else agree(lambda: data_identity(config)),
        # The deterministic stage only begins with what it is given, as a warm start does.
        "networks": {name: sums[name] for name in frozen if config["method"] in BUILDS_ON},
    }
    if identity["data"]:  # each draws over its own count of records
        check_same_in_all({"data": checksum(identity["data"])}, "the records of config.data are others")
    windows = agree(lambda: read_windows(config))
    if windows is not None and config["data"].get("validation_split") == "test" and is_main():
        program_log.info(
            "validation is on the split test, as released: scores there are no longer those of unheard songs; records made with "
            "data_prep.musdb18hq --validation have songs held out, for --config.data.validation_split=validation"
        )
    validate = None if windows is None else make_validation(config, backbone, windows, mesh)
    stage = make_stage(config, backbone, frozen, mesh, begin)
    place = agree(lambda: Workdir(Path(workdir)), main_only=True)
    try:
        return _run(
            config, Path(workdir), place, stage, frozen, mesh, data, windows, validate, profile_steps, identity, accept_new_data
        )  # fmt: skip
    finally:
        if place is not None:
            place.release()


def _check_for_training(config: Mapping[str, Any]) -> None:
    """Raises UserError for settings that contradict each other where a run begins, and do no harm elsewhere."""
    t, init_from = config["train"], config["init_from"]
    source = BUILDS_ON.get(config["method"], ("deterministic",))[0]
    other = "diffusion" if source == "deterministic" else "deterministic"
    if init_from[other]:
        raise UserError(
            f"config.init_from.{other} is not read by {config['method']}, which takes config.init_from.{source}; leave it out"
        )
    if t["keep_best"] and (not config["data"]["validation"] or t["checkpoint_every"] % t["validate_every"]):
        raise UserError(
            "config.train.keep_best goes by the scores of validation: set config.data.validation, and make "
            f"config.train.checkpoint_every ({t['checkpoint_every']}) a multiple of config.train.validate_every "
            f"({t['validate_every']})"
        )


def _run(
    config: Mapping[str, Any],
    workdir: Path,
    place: Workdir | None,
    stage: Stage,
    frozen: Mapping[str, Any],
    mesh: Mesh,
    data: grain.MapDataset,
    windows: np.ndarray | None,
    validate: Callable[[Mapping[str, Any]], Any] | None,
    profile_steps: int,
    identity: Mapping[str, Any],
    accept_new_data: bool,
) -> TrainState:
    t, method = config["train"], config["method"]
    examples = config["data"]["batch"] * config["optim"]["accumulate"]  # per optimiser step
    networks = place_frozen(config, frozen, mesh)
    inputs = as_inputs(networks)
    folder = t["checkpoints"] or workdir / "checkpoints"
    with Checkpoints(folder, t["keep"], t["keep_best"]) as checkpoints, StopNote() as stop:
        state, skips = _restore_or_start(checkpoints, stage, config, identity, accept_new_data)
        if place:
            place.write("config.json", json.dumps(config, indent=1) + "\n")
        log = agree(
            lambda: RunLog(
                workdir if is_main() else None, int(state.step), t["steps"], t["log_every"], t["wandb_project"], config
            )
        )
        profile = _Profile(workdir / "profile", profile_steps)

        def write_metrics(last_step: int, metrics: Mapping[str, Any]) -> None:
            skips.add(last_step, metrics)
            log.steps(last_step - len(metrics["loss"]) + 1, metrics, examples)
            skips.check()

        def write_model() -> None:
            weights = {**frozen, **gather(trained_networks(method, state))}
            agree(lambda: save_model(workdir / "model", _of_separation(config), weights), main_only=True)

        def save(at_end: bool, is_stopping: bool, score: float | None) -> None:
            if at_end or not is_stopping:  # who asked for a stop waits for the checkpoint only
                # The model first: a kill in between repeats some steps, and never leaves a finished run without its model.
                write_model()
            meta = {
                "seed": config["seed"], "data_position": int(state.step), "skipped": skips.counts, "config": config,
                **identity,
            }  # fmt: skip
            checkpoints.save(state, meta, score)
            if is_stopping:
                checkpoints.wait()

        if state.step >= t["steps"]:  # trained already, but a sampler's settings may be others by now
            write_model()
        programs: dict[int, Any] = {}  # by the number of steps in the dispatch
        previous = None
        try:
            with contextlib.closing(dispatches(data, int(state.step), config, mesh)) as batches_ahead:
                while True:
                    with log.timed("input"):
                        step, batches = next(batches_ahead, (None, None))
                    if step is None:
                        break
                    count = jax.tree.leaves(batches)[0].shape[0]
                    if count not in programs:
                        before_all = contextlib.nullcontext() if programs else stop.nothing_to_save()
                        with before_all:
                            programs[count] = _compile(stage, (state, inputs, batches), count, mesh, log)
                    else:
                        profile.begin()
                    state, metrics = programs[count](state, inputs, batches)
                    profile.end(count, state)
                    if previous:  # one dispatch late: the device does not wait for the log
                        write_metrics(*previous)
                    previous = (step, metrics)
                    stopped, at_end = stop.is_agreed(), step == t["steps"]
                    is_validation = validate is not None and (at_end or step % t["validate_every"] == 0)
                    is_checkpoint = at_end or stopped or step % t["checkpoint_every"] == 0
                    if is_validation or is_checkpoint:
                        write_metrics(*previous)
                        previous = None
                    score = None
                    if is_validation:
                        assert validate is not None and windows is not None
                        with log.timed("validation"):
                            found = validate({**networks, **trained_networks(method, state)})
                            log.scores(step, found.scores)
                            sounds = _sounds(config, windows[0].mean(-1), found.estimate.mean(-1))
                            log.sounds(step, sounds, config["sample_rate"])
                            score = next(iter(found.scores.values()))
                    # A state from which no step has been finite since is not worth a checkpoint's place, unless it is the last.
                    if is_checkpoint and (at_end or stopped or not skips.counts["in_a_row"]):
                        with log.timed("checkpoint"):
                            save(at_end, stopped, score)
                    if stopped and not at_end:
                        _say(f"stopped by SIGTERM after step {step}; start again to continue")
                        break
        finally:
            profile.close()
            log.close()
    return state


def _of_separation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that a model is kept with: without what its network has in training only."""
    return {**config, "model": {k: v for k, v in config["model"].items() if f"model.{k}" not in OF_TRAINING}}


def _compile(stage: Stage, arguments: tuple, steps: int, mesh: Mesh, log: RunLog) -> Any:
    """The program of a dispatch of so many steps; the log learns what a step computes."""
    with log.timed("compilation"), jax.set_mesh(mesh), _saying_compilation():
        traced = stage.steps.trace(*arguments)
        program = traced.lower().compile()
    log.per_step(count_flops(traced.jaxpr) / (steps * mesh.size), peak_flops(jax.devices()[0].device_kind))
    return program


def _saying_compilation() -> contextlib.AbstractContextManager[None]:
    text = "compiling the training step; it is kept for the next start"
    return saying(text) if is_main() else contextlib.nullcontext()


def _say(text: str) -> None:
    if is_main():
        print(text, flush=True)


def _sounds(config: Mapping[str, Any], truth: np.ndarray, estimate: np.ndarray) -> dict[str, np.ndarray]:
    """By name, the mixture of a window (stems, samples), and each stem as it is and as separated."""
    pairs = {f"{name}/{kind}": audio[k] for k, name in enumerate(config["stems"])
             for kind, audio in (("reference", truth), ("estimate", estimate))}  # fmt: skip
    return {"mixture": truth.sum(0), **pairs}


def _restore_or_start(
    checkpoints: Checkpoints,
    stage: Stage,
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    accept_new_data: bool,
) -> tuple[TrainState, "_SkipCount"]:
    limit = config["train"]["max_skipped"]
    if checkpoints.latest_step() is None:
        folder = config["init_from"][BUILDS_ON.get(config["method"], ("deterministic",))[0]]
        _say(f"starting at step 0 {f'on {folder}' if folder else 'from scratch'}")
        return stage.start(), _SkipCount(limit)
    meta = checkpoints.meta()
    changed, others = agree(lambda: _compared(checkpoints, meta, config, identity, accept_new_data))
    try:
        state = checkpoints.restore(stage.abstract)
    except UserError as error:
        of_the_state = [change for change in changed if change[0].split(".")[0] in ("optim", "model", "ema_rate")]
        if not of_the_state:
            raise
        listed = ", ".join(f"config.{name} = {old}, not {new}" for name, old, new in of_the_state)
        raise UserError(
            f"the checkpoints in {checkpoints.folder} were made with {listed}, and do not fit; use another --workdir"
        ) from error
    _say(f"resumed from step {int(state.step)} in {checkpoints.folder}")
    if changed:
        listed = ", ".join(f"{name} ({old} before, {new} now)" for name, old, new in changed)
        _say(f"settings changed since then: {listed}")
        _say_where_the_data_go_on({name: old for name, old, _ in changed}, config, int(state.step))
    if others:
        _say(f"the data changed since then: {others}")
    return state, _SkipCount(limit, **meta.get("skipped", {}))


def _say_where_the_data_go_on(before: Mapping[str, Any], config: Mapping[str, Any], step: int) -> None:
    """Examples are counted in steps of today's size: with another size before, some are left out, or come again."""
    fields = (("data", "batch"), ("optim", "accumulate"))
    size = lambda changes: math.prod(changes.get(f"{part}.{name}", config[part][name]) for part, name in fields)
    now, then = size({}), size(before)
    if now != then:
        _say(
            f"the data go on at example {step * now} of their order, not at {step * then}: as if all steps had taken {now}"
        )


def _compared(
    checkpoints: Checkpoints,
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    accept_new_data: bool,
) -> tuple[list[tuple[str, Any, Any]], str]:
    """Settings that changed since a checkpoint (name, old, new), and what changed of the data, in words.

    Raises:
      UserError: it was made with what must not change: another network, seed, separator, or other data that is not accepted.
    """
    then = {**BEFORE, **dict(settings(meta["config"]))}
    changed = [(k, then.get(k), v) for k, v in settings(config) if then.get(k) != v]
    for name, old, new in changed:
        if name.split(".")[0] in ("method", "seed", *SHARED) and name not in FREE:
            raise UserError(
                f"the checkpoints in {checkpoints.folder} were made with config.{name} = {old}, not {new}; "
                "use another --workdir"
            )
    moved = [name for name, old in meta.get("networks", {}).items() if identity["networks"].get(name) != old]
    if moved:
        source = BUILDS_ON[config["method"]][0]
        raise UserError(
            f"the checkpoints in {checkpoints.folder} were made on another {moved[0]} network than "
            f"{config['init_from'][source]} has now; give back the one that they were made on, or use another --workdir"
        )
    others = "; ".join(changes(meta.get("data", {}), identity["data"]))
    if others and not accept_new_data:
        raise UserError(
            f"the checkpoints in {checkpoints.folder} were made with other data ({others}); give back what they were made "
            "with, use another --workdir, or go on with the new data by --accept-new-data"
        )
    return changed, others


class _SkipCount:
    """Counts the steps that were skipped because their loss or gradient was not finite; the same in every process."""

    def __init__(self, limit: int, total: int = 0, in_a_row: int = 0):
        self.limit, self.counts, self.report = limit, {"total": total, "in_a_row": in_a_row}, ""

    def add(self, last_step: int, metrics: Mapping[str, Any]) -> None:
        loss, norm, skipped = (np.asarray(metrics[name]) for name in ("loss", "grad_norm", "skipped"))
        for k, is_skipped in enumerate(skipped):
            if not is_skipped:
                self.counts["in_a_row"] = 0
                continue
            self.counts["total"] += 1
            self.counts["in_a_row"] += 1
            step = last_step - len(loss) + 1 + k
            if self.counts["in_a_row"] > self.limit and not self.report:
                self.report = (
                    f"the loss of step {step} is {loss[k]}, its gradient norm {norm[k]}, and {self.counts['in_a_row']} "
                    f"steps in a row ({self.counts['total']} in all) were skipped for such values, so training stopped; "
                    "lower optim.lr or check the data, then start again from the last checkpoint"
                )

    def check(self) -> None:
        """Raises UserError once more than `limit` steps in a row were skipped."""
        if self.report:
            raise UserError(self.report)


class _Profile:
    """A trace of some steps by JAX's profiler, of the first process."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.left, self.is_running = folder, steps if is_main() else 0, False

    def begin(self) -> None:
        if self.left > 0 and not self.is_running:
            jax.profiler.start_trace(str(self.folder))
            self.is_running = True

    def end(self, steps: int, state: TrainState) -> None:
        if self.is_running:
            self.left -= steps
            if self.left <= 0:
                jax.block_until_ready(state)
                self.close()

    def close(self) -> None:
        if self.is_running:
            self.is_running = False
            jax.profiler.stop_trace()
            _say(f"profile in {self.folder}")
