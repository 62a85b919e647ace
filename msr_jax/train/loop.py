"""A training run, from config to model folder: the only file that knows all the others."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from msr_jax.data.augment_step import make_augment
from msr_jax.data.pipeline import make_train_dataset, validation_windows
from msr_jax.errors import UserError
from msr_jax.methods.stages import Objective, make_objective, make_refiner
from msr_jax.metrics.si_sdr import is_silent, si_sdr
from msr_jax.models.backbone import Backbone, make_backbone
from msr_jax.train.checkpoint import Checkpoints
from msr_jax.train.log import RunLog
from msr_jax.train.optim import make_optimizer, make_schedule
from msr_jax.train.sharding import make_mesh, stacked_batch_sharding, tree_sharding
from msr_jax.train.state import TrainState, init_state, make_train_steps
from msr_jax.weights.model_folder import load_model, save_model

REFINEMENT = {"deterministic": "none", "diffusion": "diffusion", "consistency": "consistency"}
# method: (field of `init_from`, networks that its folder must hold)
BUILDS_ON = {
    "diffusion": ("deterministic", ("deterministic",)),
    "consistency": ("diffusion", ("deterministic", "diffusion")),
}
# Settings that a run and what it starts from must share, and those of `model` that may differ all the same:
# how a network is computed or was begun does not tie it to others.
SHARED = ("model", "stems", "sample_rate", "channels", "input_level")
FREE = ("model.remat", "model.zero_init_output")
# Folded into the seed's key, where a step's number is otherwise.
INIT_KEY, VALIDATION_KEY = 2**31 - 1, 2**31 - 2
AUGMENT_KEY = 2**31 - 3  # folded into a micro-batch's key


def train(config: Mapping[str, Any], workdir: str | Path, dataset: grain.MapDataset | None = None) -> TrainState:
    """Train one stage: from the newest checkpoint in `workdir`, else on `init_from`, else from scratch.

    The run is a pure function of the config and the data: killed at any moment and started again, it gives
    the numbers of a run that was never interrupted. SIGTERM saves after the dispatch in flight and ends it.

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
    if config["data"]["batch"] % mesh.size:
        raise UserError(
            f"data.batch ({config['data']['batch']}) must be a multiple of the {mesh.size} devices of the mesh"
        )
    backbone = make_backbone(config["model"], config["compute_dtype"])
    backbone.check_length(config["data"]["crop"])
    backbone.check_length(config["segment"])
    frozen = _load_frozen(config)
    examples = config["data"]["batch"] * config["optim"]["accumulate"]  # per optimiser step
    if dataset is None:
        dataset = make_train_dataset(
            {**config["data"], "batch": examples},
            config["stems"], config["sample_rate"], config["seed"], jax.process_index(), jax.process_count(),
            config["channels"],
        )  # fmt: skip
    validate = _make_validation(config, backbone)
    stage = _make_stage(config, backbone, frozen, mesh)
    networks = jax.device_put(frozen, tree_sharding(mesh, frozen))
    inputs = {"teacher" if name == "diffusion" else name: params for name, params in networks.items()}

    _make_workdir(workdir)
    with Checkpoints(workdir / "checkpoints", t["keep"]) as checkpoints:
        state = _restore_or_start(checkpoints, stage, config)
        _write_text(workdir / "config.json", json.dumps(config, indent=1) + "\n")
        log = RunLog(workdir, int(state.step), t["steps"], t["log_every"])
        stop = _SigtermNote()

        def save() -> None:
            # The model first: a kill in between repeats some steps, and never leaves a finished run without its model.
            save_model(workdir / "model", config, {**frozen, **jax.device_get(_trained(config["method"], state))})
            meta = {"seed": config["seed"], "data_position": int(state.step), "config": config}
            checkpoints.save(state, meta)

        try:
            previous = None
            for step, batches in _dispatches(dataset, int(state.step), config, mesh):
                state, metrics = stage.steps(state, inputs, batches)
                if previous:  # one dispatch late: the device does not wait for the log
                    _log(log, *previous, examples)
                previous = (step, metrics)
                stopped, at_end = stop.is_set, step == t["steps"]
                is_validation = validate is not None and (at_end or step % t["validate_every"] == 0)
                is_checkpoint = at_end or stopped or step % t["checkpoint_every"] == 0
                if is_validation or is_checkpoint:
                    _log(log, *previous, examples)
                    previous = None
                with log.untimed():
                    if is_validation:
                        log.scores(step, validate({**networks, **_trained(config["method"], state)}))
                    if is_checkpoint:
                        save()
                if stopped and not at_end:
                    print(f"stopped by SIGTERM after step {step}; start again to continue", flush=True)
                    break
        finally:
            stop.restore()
            log.close()
    return state


class _Stage(NamedTuple):
    """What a config comes to: its first state, that state's shapes on the mesh, and the compiled steps."""

    start: Callable[[], TrainState]
    abstract: TrainState
    steps: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def _make_stage(config: Mapping[str, Any], backbone: Backbone, frozen: Mapping[str, Any], mesh: Mesh) -> _Stage:
    is_student, timed = config["method"] == "consistency", config["method"] != "deterministic"
    objective = _augmented(make_objective(config, backbone), config)
    schedule = make_schedule(config["optim"], config["train"]["steps"])
    tx = make_optimizer(config["optim"], schedule)
    target_rate = config["consistency"]["target_rate"] if is_student else 0.0

    def initial(source: Any) -> TrainState:
        if is_student:  # the student and its target start as copies of the teacher
            return init_state(source, tx, config["ema_rate"], True)
        params = backbone.init(jax.random.fold_in(jax.random.key(config["seed"]), INIT_KEY), timed)
        if timed and config["init_from"]["warm_start"]:
            params = {name: source.get(name, module) for name, module in params.items()}
        return init_state(params, tx, config["ema_rate"], False)

    source = frozen.get("diffusion" if is_student else "deterministic")
    shapes = jax.eval_shape(initial, source)
    shardings = tree_sharding(mesh, shapes)
    steps = make_train_steps(objective, tx, schedule, config["seed"], config["ema_rate"], target_rate)
    return _Stage(
        lambda: jax.jit(initial, out_shardings=shardings)(source),
        jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings),
        jax.jit(steps, donate_argnums=0, out_shardings=(shardings, None)),
    )


def _augmented(objective: Objective, config: Mapping[str, Any]) -> Objective:
    augment = make_augment(config["data"]["augment"], config["stems"], config["sample_rate"])
    if augment is None:
        return objective

    def loss_fn(params, frozen, batch, key):
        stems = augment(batch["stems"], jax.random.fold_in(key, AUGMENT_KEY))
        return objective(params, frozen, {**batch, "stems": stems}, key)

    return loss_fn


def _load_frozen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Networks that the stage builds on, by name, from `init_from`; UserError where they are missing or differ."""
    if config["method"] not in BUILDS_ON:
        return {}
    source, needed = BUILDS_ON[config["method"]]
    folder = config["init_from"][source]
    if not folder:
        raise UserError(f"{config['method']} starts from a {source} model: set --config.init_from.{source}=DIR")
    model = load_model(folder)
    lacking = [name for name in needed if name not in model.weights]
    if lacking:
        raise UserError(f"{folder} holds no {lacking[0]} network; name the folder of a trained {source} model")
    theirs = dict(_settings({field: model.config[field] for field in SHARED}))
    for name, value in _settings({field: config[field] for field in SHARED}):
        if name not in FREE and theirs.get(name) != value:
            raise UserError(f"config.{name} is {value}, but {theirs.get(name)} in {folder}; both must have the same")
    return {name: model.weights[name] for name in needed}


def _restore_or_start(checkpoints: Checkpoints, stage: _Stage, config: Mapping[str, Any]) -> TrainState:
    if checkpoints.latest_step() is None:
        folder = config["init_from"][BUILDS_ON[config["method"]][0]] if config["method"] in BUILDS_ON else ""
        print(f"starting at step 0 {f'on {folder}' if folder else 'from scratch'}", flush=True)
        return stage.start()
    then = dict(_settings(checkpoints.meta()["config"]))
    changed = [(k, then.get(k), v) for k, v in _settings(config) if then.get(k) != v]
    for name, old, new in changed:
        if name.split(".")[0] in ("method", "seed", *SHARED) and name not in FREE:
            raise UserError(
                f"the checkpoints in {checkpoints.folder} were made with config.{name} = {old}, not {new}; "
                "use another --workdir"
            )
    state = checkpoints.restore(stage.abstract)
    print(f"resumed from step {int(state.step)} in {checkpoints.folder}", flush=True)
    if changed:
        listed = ", ".join(f"{name} ({old} before, {new} now)" for name, old, new in changed)
        print(f"settings changed since then: {listed}", flush=True)
    return state


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) of every leaf, values as JSON has them."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.loads(json.dumps(value))


def _check_intervals(t: Mapping[str, Any]) -> None:
    per = t["steps_per_dispatch"]
    for name in ("steps", "log_every", "validate_every", "checkpoint_every"):
        if t[name] < 1 or per < 1 or t[name] % per:
            raise UserError(f"train.{name} ({t[name]}) must be a positive multiple of train.steps_per_dispatch ({per})")


def _make_workdir(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for left in workdir.glob(".model.*"):  # of a run that was killed while it wrote
            shutil.rmtree(left)
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}") from error
    if not os.access(workdir, os.W_OK):
        raise UserError(f"cannot write to --workdir {workdir}: permission denied")


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


def _trained(method: str, state: TrainState) -> dict[str, Any]:
    """What the stage adds to the model: the averaged parameters if the config keeps an average, and the target."""
    trained = {method: state.params if state.ema_params is None else state.ema_params}
    return trained if state.target_params is None else {**trained, "target": state.target_params}


def _make_validation(
    config: Mapping[str, Any], backbone: Backbone
) -> Callable[[Mapping[str, Any]], dict[str, float]] | None:
    """weights -> SI-SDR in dB over fixed windows, mean of the active stems; None without validation data."""
    if not config["data"]["validation"]:
        return None
    limit = config["train"]["validation_windows"]
    windows = validation_windows(config["data"], config["stems"], config["sample_rate"], limit, config["channels"])
    refine = jax.jit(make_refiner(config, backbone, REFINEMENT[config["method"]]))
    key = jax.random.fold_in(jax.random.key(config["seed"]), VALIDATION_KEY)

    def validate(weights: Mapping[str, Any]) -> dict[str, float]:
        labels = np.eye(windows.shape[1], dtype=np.float32)
        scores = []
        for k, stems in enumerate(windows):  # all stems of a window are one batch
            mixture = np.repeat(stems.sum(0)[None], len(stems), 0)
            estimate = np.asarray(refine(weights, mixture, labels, jax.random.fold_in(key, k))).swapaxes(1, 2)
            stems = stems.swapaxes(1, 2)  # (stems, channels, samples)
            scores += list(si_sdr(estimate, stems).mean(1)[~is_silent(stems)])
        return {"validation_si_sdr": float(np.mean(scores))}

    return validate


def _log(log: RunLog, last_step: int, metrics: Mapping[str, Any], examples: int) -> None:
    """Write the metrics of a dispatch; UserError if the loss or the gradient of a step is not finite.

    The gradient too: it spoils the parameters a step before the loss shows it, and they might be saved in between.
    """
    loss, grad_norm = np.asarray(metrics["loss"]), np.asarray(metrics["grad_norm"])
    first_step = last_step - len(loss) + 1
    log.steps(first_step, metrics, examples)
    finite = np.isfinite(loss) & np.isfinite(grad_norm)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise UserError(
            f"the loss of step {first_step + bad} is {loss[bad]}, its gradient norm {grad_norm[bad]}, and training "
            "stopped; lower optim.lr or check the data, then start again from the last checkpoint"
        )


def _dispatches(
    dataset: grain.MapDataset, start: int, config: Mapping[str, Any], mesh: Mesh
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """(last step, batches on the devices with leaves (steps, accumulate, batch, …)) from element `start` on."""
    per, total, workers = (
        config["train"]["steps_per_dispatch"],
        config["train"]["steps"],
        config["data"]["workers"],
    )
    # An element is a whole batch: Grain's own default would hold 500 of them.
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(2, per))
    data = dataset[start:].to_iter_dataset(read)
    if workers:
        flags.FLAGS.mark_as_parsed()  # the worker processes read absl flags
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1))
    iterator = iter(data)
    try:
        step = start
        while step < total:
            count = min(per - step % per, total - step)
            chosen = [next(iterator) for _ in range(count)]
            step += count
            stacked = {name: np.stack([batch[name] for batch in chosen]) for name in chosen[0]}
            shape = (count, config["optim"]["accumulate"], -1)
            stacked = {name: array.reshape(*shape, *array.shape[2:]) for name, array in stacked.items()}
            sharding = stacked_batch_sharding(mesh)
            yield step, {k: jax.make_array_from_process_local_data(sharding, v) for k, v in stacked.items()}
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


class _SigtermNote:
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
