"""A training run, from config to model folder: the only file that knows all the others."""

import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from msr_jax.data.pipeline import make_train_dataset, validation_windows
from msr_jax.errors import UserError
from msr_jax.methods.stages import make_objective, make_refiner
from msr_jax.metrics.si_sdr import is_silent, si_sdr
from msr_jax.models.backbone import Backbone, make_backbone
from msr_jax.train.checkpoint import Checkpoints
from msr_jax.train.log import RunLog
from msr_jax.train.optim import make_optimizer, make_schedule
from msr_jax.train.sharding import make_mesh, stacked_batch_sharding, tree_sharding
from msr_jax.train.state import TrainState, init_state, make_train_steps
from msr_jax.weights.model_folder import Model, load_model, save_model

REFINEMENT = {"deterministic": "none", "diffusion": "diffusion", "consistency": "consistency"}
SAME_FIELDS = ("model", "stems", "sample_rate", "channels", "input_level")  # between a run and what it starts from


def _load_frozen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Networks that this stage builds on, by name, from `init_from`. Raises UserError where they are missing or differ."""
    if config["method"] == "deterministic":
        return {}
    source, needed = {
        "diffusion": ("deterministic", ["deterministic"]),
        "consistency": ("diffusion", ["deterministic", "diffusion"]),
    }[config["method"]]
    folder = config["init_from"][source]
    if not folder:
        raise UserError(f"{config['method']} starts from a {source} model: set --config.init_from.{source}=DIR")
    model = load_model(folder)
    lacking = [name for name in needed if name not in model.weights]
    if lacking:
        raise UserError(f"{folder} holds no {lacking[0]} network; name the folder of a trained {source} model")
    for field in SAME_FIELDS:
        ours = json.loads(json.dumps(config[field]))
        if field == "model":  # how a network is computed or began does not tie it to others
            theirs = {k: v for k, v in model.config[field].items() if k not in ("remat", "zero_init_output")}
            ours = {k: v for k, v in ours.items() if k not in ("remat", "zero_init_output")}
        else:
            theirs = model.config[field]
        if ours != theirs:
            raise UserError(f"config.{field} differs from that of {folder}; both stages must have the same")
    return {name: model.weights[name] for name in needed}


def _check_intervals(train: Mapping[str, Any]) -> None:
    per = train["steps_per_dispatch"]
    for name in ("steps", "log_every", "validate_every", "checkpoint_every"):
        if train[name] < 1 or per < 1 or train[name] % per:
            raise UserError(
                f"train.{name} ({train[name]}) must be a positive multiple of train.steps_per_dispatch ({per})"
            )


class _Validator:
    """SI-SDR (dB) of fixed windows, averaged over the active stems."""

    def __init__(self, config: Mapping[str, Any], backbone: Backbone):
        self.windows = None
        if config["data"]["validation"]:
            limit = config["train"]["validation_windows"]
            self.windows = validation_windows(config["data"], config["stems"], config["sample_rate"], limit)
        self.refine = jax.jit(make_refiner(config, backbone, REFINEMENT[config["method"]]))
        self.key = jax.random.fold_in(jax.random.key(config["seed"]), 2**31 - 2)

    def __call__(self, weights: Mapping[str, Any]) -> dict[str, float]:
        labels = np.eye(self.windows.shape[1], dtype=np.float32)
        scores = []
        for k, stems in enumerate(self.windows):  # all stems of a window are one batch
            mixture = np.repeat(stems.sum(0)[None, :, None], len(stems), 0)
            estimate = np.asarray(self.refine(weights, mixture, labels, jax.random.fold_in(self.key, k)))[..., 0]
            active = ~is_silent(stems[:, None])
            scores += list(si_sdr(estimate, stems)[active])
        return {"validation_si_sdr": float(np.mean(scores))}


def train(config: Mapping[str, Any], workdir: str | Path, dataset: grain.MapDataset | None = None) -> TrainState:
    """Train one stage; starts from the newest checkpoint in `workdir`, else from `init_from`, else from scratch.

    The run is a pure function of the config and the data: killed at any moment and started again, it gives the numbers
    of a run that was never interrupted. SIGTERM saves after the dispatch in flight and ends the run.

    Args:
      config: plain nested mappings with the fields of `msr_jax.config`.
      workdir: gets checkpoints/, model/, metrics.jsonl, tensorboard/ and config.json.
      dataset: replaces the records of `config["data"]`; element k is the global batch of step k.

    Returns:
      The state after the last step.

    Raises:
      UserError: a config, data or checkpoint that does not fit, or a loss that is no longer finite.
    """
    workdir, t = Path(workdir), config["train"]
    _check_intervals(t)
    mesh = make_mesh(config["mesh"])
    accumulate = config["optim"]["accumulate"]
    if config["data"]["batch"] % mesh.size:
        raise UserError(f"data.batch ({config['data']['batch']}) must be a multiple of the {mesh.size} devices of the mesh")
    backbone = make_backbone(config["model"], config["compute_dtype"])
    backbone.check_length(config["data"]["crop"])
    backbone.check_length(config["segment"])
    frozen = _load_frozen(config)
    if dataset is None:
        per_step = {**config["data"], "batch": config["data"]["batch"] * accumulate}
        dataset = make_train_dataset(
            per_step, config["stems"], config["sample_rate"], config["seed"], jax.process_index(), jax.process_count()
        )
    validate = _Validator(config, backbone)
    schedule = make_schedule(config["optim"], t["steps"])
    tx = make_optimizer(config["optim"], schedule)
    target_rate = config["consistency"]["target_rate"]
    is_student = config["method"] == "consistency"
    timed = config["method"] != "deterministic"

    def initial(student: Any) -> TrainState:
        if is_student:
            return init_state(student, tx, config["ema_rate"], True)
        params = backbone.init(jax.random.fold_in(jax.random.key(config["seed"]), 2**31 - 1), timed)
        if timed and config["init_from"]["warm_start"]:
            params = {k: student[k] if k in student else v for k, v in params.items()}
        return init_state(params, tx, config["ema_rate"], False)

    # Distillation starts the student, its target and the teacher alike; diffusion can start from the deterministic network.
    student = frozen.get("diffusion" if is_student else "deterministic")
    abstract = jax.eval_shape(initial, student)
    shardings = tree_sharding(mesh, abstract)
    steps = jax.jit(
        make_train_steps(make_objective(config, backbone), tx, schedule, config["seed"], config["ema_rate"], target_rate),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    weights = dict(frozen)
    inputs = {"teacher" if k == "diffusion" else k: v for k, v in frozen.items()}
    inputs = jax.device_put(inputs, tree_sharding(mesh, inputs))

    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error
    with Checkpoints(workdir / "checkpoints", t["keep"]) as checkpoints:
        if checkpoints.latest_step() is None:
            state = jax.jit(initial, out_shardings=shardings)(student)
            print(f"starting from {'init_from' if frozen else 'scratch'}", flush=True)
        else:
            _check_resumable(checkpoints.meta(), config)
            wanted = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
            state = checkpoints.restore(wanted)
            print(f"resumed from step {int(state.step)} in {checkpoints.folder}", flush=True)
        start = int(state.step)
        log = RunLog(workdir, start, t["steps"], t["log_every"])
        stop = _on_sigterm()

        def save() -> None:
            meta = {"seed": config["seed"], "data_position": int(state.step), "config": config}
            checkpoints.save(state, meta)
            save_model(workdir / "model", config, jax.device_get(_with_trained(weights, config["method"], state)))

        try:
            previous = None
            for step, batches in _dispatches(dataset, start, t["steps"], t["steps_per_dispatch"], accumulate, mesh, config):
                state, metrics = steps(state, inputs, batches)
                if previous:  # one dispatch late: the device does not wait for the log
                    _log(log, *previous)
                previous = (step - t["steps_per_dispatch"] + 1, metrics, config["data"]["batch"] * accumulate)
                at_end = step == t["steps"] or stop.is_set
                if at_end or step % t["validate_every"] == 0 or step % t["checkpoint_every"] == 0:
                    _log(log, *previous)
                    previous = None
                if validate.windows is not None and (step % t["validate_every"] == 0 or step == t["steps"]):
                    log.scores(step, validate(_with_trained(weights, config["method"], state)))
                if at_end or step % t["checkpoint_every"] == 0:
                    save()
                if stop.is_set and step != t["steps"]:
                    print(f"stopped by SIGTERM after step {step}; start again to continue", flush=True)
                    break
        finally:
            stop.restore()
            log.close()
    return state


def _with_trained(weights: Mapping[str, Any], method: str, state: TrainState) -> dict[str, Any]:
    trained = {method: state.params}
    if state.target_params is not None:
        trained["target"] = state.target_params
    return {**weights, **trained}


def _log(log: RunLog, first_step: int, metrics: Mapping[str, Any], examples: int) -> None:
    loss = np.asarray(metrics["loss"])
    if not np.isfinite(loss).all():
        bad = first_step + int(np.argmin(np.isfinite(loss)))
        raise UserError(f"the loss of step {bad} is {loss[bad - first_step]}; lower optim.lr or check the data, then resume")
    log.steps(first_step, metrics, examples)


def _dispatches(dataset, start, steps, per_dispatch, accumulate, mesh, config) -> Iterator[tuple[int, Any]]:
    """(last step, batches on the devices with leaves (steps, accumulate, batch, …)) from element `start` on."""
    sharding = stacked_batch_sharding(mesh)
    iterator = dataset[start:].to_iter_dataset()
    if config["data"]["workers"]:
        iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=config["data"]["workers"]))
    iterator = iter(iterator)
    for step in range(start + per_dispatch, steps + 1, per_dispatch):
        chosen = [next(iterator) for _ in range(per_dispatch)]
        stacked = {k: np.stack([c[k] for c in chosen]) for k in chosen[0]}
        stacked = {k: v.reshape(per_dispatch, accumulate, -1, *v.shape[2:]) for k, v in stacked.items()}
        yield step, {k: jax.make_array_from_process_local_data(sharding, v) for k, v in stacked.items()}


def _check_resumable(meta: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    then, now = meta["config"], json.loads(json.dumps(config))
    for field in ("method", "seed", "model"):
        if then[field] != now[field]:
            raise UserError(
                f"the checkpoints in --workdir were made with another config.{field} ({then[field]}); use another --workdir"
            )


class _on_sigterm:
    """Notes SIGTERM instead of dying of it, until `restore`."""

    def __init__(self) -> None:
        self.is_set = False
        try:
            self.before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not in the main thread: leave signals alone
            self.before = None

    def _note(self, *_: Any) -> None:
        self.is_set = True

    def restore(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


def enable_compilation_cache() -> None:
    """Keep compiled programs across runs, in JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "msr_jax" / "compiled"))
