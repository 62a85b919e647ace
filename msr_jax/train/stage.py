"""What a config comes to: the networks it builds on, its first state and its compiled steps, laid out on a mesh."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from msr_jax.data.augment_step import make_augment
from msr_jax.errors import UserError
from msr_jax.messages import log
from msr_jax.methods.stages import Objective, make_objective
from msr_jax.models.backbone import cast_params, compute_dtype, copy_shared, make_backbone
from msr_jax.models.interface import Backbone
from msr_jax.models.lora import LORA, init_lora, merge_lora
from msr_jax.train.optim import hold_frozen, make_optimizer, make_schedule, trained_mask
from msr_jax.train.sharding import gathered, put, replicated, tree_sharding, with_shardings
from msr_jax.train.state import TrainState, init_state, make_train_steps
from msr_jax.weights.model_folder import inputs_of, load_model

# method: (field of `init_from`, networks that its folder must hold). The deterministic stage needs none; given one, it goes on
# from its parameters.
BUILDS_ON = {
    "diffusion": ("deterministic", ("deterministic",)),
    "det_x2": ("deterministic", ("deterministic",)),
    "consistency": ("diffusion", ("deterministic", "diffusion")),
}
# Settings that a run and what it starts from must share, and those of `model` that may differ all the same:
# how a network is computed or was begun does not tie it to others.
SHARED = ("model", "stems", "sample_rate", "channels", "input_level")
FREE = ("model.remat", "model.zero_init_output", "model.pass_mixture", "model.attn_dropout", "model.ff_dropout")
OF_REFINER = ("model.mask_scale", "model.stft_adapter_hidden")  # a separator has none, and its folder may say others
# What a folder or a run has that is older than these settings.
BEFORE = {"model.mask_scale": 1.0, "model.attention_bias": False, "model.lora_rank": 0}
OF_TRAINING = ("model.lora_rank",)  # no part of a network: its adapters are merged when it is written
# What each host may have of its own: what it calls the places that all have, and how it reads the records.
PLACES = (
    *("data.train", "data.validation", "train.checkpoints"),
    *("init_from.deterministic", "init_from.diffusion", "init_from.start"),
)
OF_A_HOST = ("data.workers", "data.preload", "train.wandb_project")
# Folded into the seed's key, where a step's number is otherwise.
INIT_KEY, VALIDATION_KEY = 2**31 - 1, 2**31 - 2
AUGMENT_KEY = 2**31 - 3  # folded into a micro-batch's key
LORA_KEY = 2**31 - 4


class Stage(NamedTuple):
    """start() -> the first state, on the mesh; abstract: that state's shapes and shardings; steps: compiled on first use,
    steps(state, frozen, batches) -> (state, metrics), with the state donated. sent: the precision in which matrices cross
    devices; mask: which parameters are trained, as of `trained_mask`.
    """

    start: Callable[[], TrainState]
    abstract: TrainState
    steps: jax.stages.Wrapped
    sent: Any
    mask: Any


def make_stage(
    config: Mapping[str, Any],
    backbone: Backbone,
    frozen: Mapping[str, Any],
    mesh: Mesh,
    start: Mapping[str, Any] | None = None,
) -> Stage:
    """The training state and steps of `config["method"]` on a mesh.

    Args:
      frozen: float32 parameters of the networks that the stage builds on, as host arrays (or their shapes, if `Stage.start`
        will not be called).
      start: parameters that a warm start copies instead of the frozen separator's, see `load_start`.

    Raises:
      UserError: an unknown method, loss, optimiser or schedule.
    """
    is_student = config["method"] == "consistency"
    min_size = config["mesh"]["fsdp_min_size"]
    rank = config["model"].get("lora_rank", 0)
    # Adapters of low rank are added to a matrix before it is rounded.
    sent = jax.numpy.float32 if rank else compute_dtype(config["compute_dtype"])
    whole = lambda tree: gathered(mesh, tree, min_size, sent, backbone.exact)

    def first_params(source: Any) -> Any:
        key = jax.random.key(config["seed"])
        if is_student:  # the student and its target start as copies of the teacher
            params = jax.tree.map(jax.numpy.copy, source)
        else:
            begin = lambda net: net.init(jax.random.fold_in(key, INIT_KEY), *inputs_of(config["method"]))
            params = begin(backbone)
            if source and config["method"] == "deterministic":
                params = copy_shared(params, source)
            elif source and config["init_from"]["warm_start"]:
                is_zeroed = config["model"].get("zero_init_output", False)
                plain = begin(make_backbone({**config["model"], "zero_init_output": False})) if is_zeroed else None
                params = copy_shared(params, source, plain=plain)
        return {**params, LORA: init_lora(jax.random.fold_in(key, LORA_KEY), params, rank)} if rank else params

    source = start or frozen.get("diffusion" if is_student else "deterministic", {})
    if rank and config["method"] in ("diffusion", "det_x2"):
        raise UserError(
            f"config.model.lora_rank trains adapters on a network that is there already, and {config['method']} begins one of its "
            "own, with parts that no separator has; set it to 0"
        )
    if rank and not source:
        raise UserError(
            "config.model.lora_rank trains adapters on a network that is there already; name one by"
            " --config.init_from.deterministic=DIR, or set it to 0"
        )
    mask = trained_mask(jax.eval_shape(first_params, source), config["optim"].get("freeze", ()))
    objective = _augmented(make_objective(config, backbone), config)

    def loss_fn(params, inputs, batch, key):
        inputs = {name: merge_lora(network) for name, network in whole(inputs).items()}
        return objective(merge_lora(whole(hold_frozen(params, mask))), inputs, batch, key)

    schedule = make_schedule(config["optim"], config["train"]["steps"])
    tx = make_optimizer(config["optim"], schedule, mask)
    target_rate = config["consistency"]["target_rate"] if is_student else 0.0
    initial = lambda source: init_state(first_params(source), tx, config["ema_rate"], is_student)
    shapes = jax.eval_shape(initial, source)
    shardings = tree_sharding(mesh, shapes, min_size)
    steps = make_train_steps(loss_fn, tx, schedule, config["seed"], config["ema_rate"], target_rate)
    return Stage(
        lambda: jax.jit(initial, out_shardings=shardings)(put(source, tree_sharding(mesh, source, min_size))),
        with_shardings(shapes, shardings),
        jax.jit(steps, donate_argnums=0, out_shardings=(shardings, replicated(mesh))),
        sent,
        mask,
    )


def _augmented(objective: Objective, config: Mapping[str, Any]) -> Objective:
    augment = make_augment(config["data"]["augment"], config["stems"], config["sample_rate"])
    if augment is None:
        return objective

    def loss_fn(params, frozen, batch, key):
        stems = augment(batch["stems"], jax.random.fold_in(key, AUGMENT_KEY))
        return objective(params, frozen, {**batch, "stems": stems}, key)

    return loss_fn


def place_frozen(config: Mapping[str, Any], frozen: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Networks that the steps take in, split like parameters, their matrices in the compute precision (see `cast_params`).

    None for the deterministic stage: what it goes on from is no part of them.
    """
    cast = cast_params(frozen if config["method"] in BUILDS_ON else {}, config["compute_dtype"])
    return put(cast, tree_sharding(mesh, cast, config["mesh"]["fsdp_min_size"]))


def as_inputs(networks: Mapping[str, Any]) -> dict[str, Any]:
    """Networks by the names of the objectives, for which the diffusion model is the teacher."""
    return {"teacher" if name == "diffusion" else name: params for name, params in networks.items()}


def load_frozen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Networks that the stage builds on, by name, from `init_from`; UserError where they are missing or differ."""
    source, needed = BUILDS_ON.get(config["method"], ("deterministic", ("deterministic",)))
    folder = config["init_from"][source]
    if not folder and config["method"] not in BUILDS_ON:
        return {}
    if not folder:
        raise UserError(f"{config['method']} starts from a {source} model: set --config.init_from.{source}=DIR")
    return _load(config, folder, needed, source)


def load_start(config: Mapping[str, Any]) -> Any:
    """The separator of `init_from.start`, whose parameters a refinement's warm start takes where their names match; {} if
    none is named, and the frozen separator's are taken. UserError where it is missing or differs.

    Two separators, trained apart, err apart: a refinement that begins with another one has something to add to the estimate (not in the paper; launch/study/STUDY.md).
    """
    folder = config["init_from"].get("start", "")  # older runs have none
    if not folder:
        return {}
    if config["method"] not in ("diffusion", "det_x2") or not config["init_from"]["warm_start"]:
        raise UserError(
            "config.init_from.start is for a warm start (config.init_from.warm_start) of diffusion or det_x2"
        )
    return _load(config, folder, ("deterministic",), "deterministic")["deterministic"]


def _load(config: Mapping[str, Any], folder: str, needed: tuple[str, ...], kind: str) -> dict[str, Any]:
    model = load_model(folder)
    lacking = [name for name in needed if name not in model.weights]
    if lacking:
        raise UserError(f"{folder} holds no {lacking[0]} network; name the folder of a trained {kind} model")
    free = FREE if "diffusion" in needed else FREE + OF_REFINER
    theirs = {**BEFORE, **dict(settings({field: model.config[field] for field in SHARED}))}
    for name, value in settings({field: config[field] for field in SHARED}):
        if name not in (*free, *OF_TRAINING) and theirs.get(name) != value:
            raise UserError(f"config.{name} is {value}, but {theirs.get(name)} in {folder}; both must have the same")
    if "diffusion" in needed:  # the teacher is computed as the student is, and as it was trained
        teacher = model.config["diffusion"]
        for section in ("diffusion", "consistency"):
            if (value := config[section]["sigma_data"]) != teacher["sigma_data"]:
                told = f"config.{section}.sigma_data is {value}, but the teacher in {folder} was trained with {teacher['sigma_data']}"
                raise UserError(f"{told}; both must have the same")
        if config["diffusion"]["sampler"] != teacher["sampler"]:
            log.info(
                f"the model will refine by diffusion with this config's diffusion.sampler, which is not that of {folder}"
            )
    return {name: model.weights[name] for name in needed}


def settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) of every leaf, values as JSON has them."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.loads(json.dumps(value))


def of_all_processes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all processes of a run must have alike; of places, which hosts may have under other names, whether
    they are given.
    """
    return {name: bool(v) if name in PLACES else v for name, v in settings(config) if name not in OF_A_HOST}


def trained_networks(method: str, state: TrainState) -> dict[str, Any]:
    """What the stage adds to the model: the averaged parameters if the config keeps an average, and the target.

    Low-rank adapters are merged into them.
    """
    trained = {method: state.params if state.ema_params is None else state.ema_params}
    if state.target_params is not None:
        trained["target"] = state.target_params
    return {name: merge_lora(params) for name, params in trained.items()}
