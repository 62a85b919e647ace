"""Optimisers and learning-rate schedules of the config, by optax."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from msr_jax.errors import UserError
from msr_jax.models.lora import LORA


def scale_by_radam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Rectified Adam as PyTorch computes it, with which the published models were trained.

    `optax.scale_by_radam` differs in two ways that show. It adds eps to the second moment after the correction of its
    bias, where PyTorch adds it before: for gradients of 1e-6 that changes updates by a fifth. And it takes 1 - b2^t
    by subtraction, whose rounding error the rectification magnifies.
    """
    longest = 2 / (1 - b2) - 1

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        left1, left2 = (-jnp.expm1(count * math.log(b)) if b else jnp.ones(()) for b in (b1, b2))  # 1 - b^t
        length = longest - 2 * count * (1 - left2) / left2
        is_rectified = length > 5
        square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        rectification = jnp.sqrt(jnp.where(is_rectified, square * left2, 1.0))

        def scale(m, v):
            return m / left1 * jnp.where(is_rectified, rectification / (jnp.sqrt(v) + eps), 1.0)

        return jax.tree.map(scale, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def make_schedule(optim: Mapping[str, Any], total_steps: int) -> optax.Schedule:
    """Learning rate by optimiser step: "constant" (as released), "cosine" or "linear" to `final_lr`, after a warm-up.

    The warm-up rises from 0 over `warmup_steps`; the decay ends at `total_steps` and takes the last `decay_steps`, or with 0
    all steps after the warm-up.

    Raises:
      UserError: unknown schedule.
    """
    peak, end, warmup = optim["lr"], optim["final_lr"], optim["warmup_steps"]
    after_warmup = max(total_steps - warmup, 1)
    left = min(optim["decay_steps"], after_warmup) or after_warmup
    makers = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, left, end / peak if peak else 0.0),
        "linear": lambda: optax.linear_schedule(peak, end, left),
    }
    if optim["schedule"] not in makers:
        raise UserError(f"optim.schedule must be one of {', '.join(makers)}, not '{optim['schedule']}'")
    after = makers[optim["schedule"]]()
    parts, ends = [after], []
    if after_warmup > left:
        parts, ends = [optax.constant_schedule(peak), after], [total_steps - left]
    if warmup:
        parts, ends = [optax.linear_schedule(0.0, peak, warmup), *parts], [warmup, *ends]
    return optax.join_schedules(parts, ends) if ends else after


def trained_mask(params: Any, freeze: Sequence[str]) -> Any:
    """Which parameters are trained, as a tree of bools; None if all are.

    Not trained: those whose path ("layers/time_0/attention/to_qkv") one of the patterns `freeze` matches, `*` standing for
    anything, and the low-rank adapters of such; and, where there are adapters, all else.

    Raises:
      UserError: a pattern matches no parameter, or nothing is left to train.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = ["/".join(key.key for key in path) for path, _ in flat]
    for pattern in freeze:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise UserError(
                f"config.optim.freeze has '{pattern}', which is no parameter's path; they are such as {', '.join(paths[:3])}"
            )
    # "lora/layers/time_0/attention/to_qkv/down" adapts "layers/time_0/attention/to_qkv".
    adapted = lambda path: path.removeprefix(f"{LORA}/").rpartition("/")[0] if path.startswith(f"{LORA}/") else path
    is_frozen = lambda path: any(fnmatchcase(p, pattern) for p in (path, adapted(path)) for pattern in freeze)
    has_lora = any(path.startswith(f"{LORA}/") for path in paths)
    is_trained = [(not has_lora or path.startswith(f"{LORA}/")) and not is_frozen(path) for path in paths]
    if not any(is_trained):
        raise UserError("config.optim.freeze leaves no parameter to train; take a pattern out of it")
    return None if all(is_trained) else jax.tree.unflatten(tree, is_trained)


def hold_frozen(params: Any, mask: Any) -> Any:
    """`params`, those that are not trained as constants, so that no gradient of theirs is computed."""
    if mask is None:
        return params
    return jax.tree.map(lambda leaf, is_trained: leaf if is_trained else jax.lax.stop_gradient(leaf), params, mask)


def make_optimizer(
    optim: Mapping[str, Any], schedule: optax.Schedule, mask: Any = None
) -> optax.GradientTransformation:
    """The optimiser `name`, after clipping to the global norm `clip_norm` (0: none, as released).

    `mask` is of `trained_mask`: parameters outside of it stay as they are to the bit, and take no room in the state.

    `weight_decay` is decoupled, and applies to adamw, prodigy and muon; tables of frequencies (`freqs`) never move. Muon moves
    matrices and convolutions, AdamW the rest. Its updates are scaled to the size of AdamW's, so that both take one learning rate.

    Raises:
      UserError: unknown optimiser, or a decay that it does not have.
    """
    name, rest = optim["name"], {key: optim[key] for key in ("b1", "b2", "eps")}
    scale, decay = optax.scale_by_learning_rate(schedule), optim["weight_decay"]
    makers = {
        "adam": lambda: [optax.scale_by_adam(**rest), scale],
        "radam": lambda: [scale_by_radam(**rest), scale],
        "adamw": lambda: [optax.scale_by_adam(**rest), optax.add_decayed_weights(decay), scale],
        "prodigy": lambda: [_prodigy(schedule, decay, **rest)],
        "muon": lambda: [_muon(schedule, decay, **rest)],
    }
    if name not in makers:
        raise UserError(f"optim.name must be one of {', '.join(makers)}, not '{name}'")
    if decay and name in ("adam", "radam"):
        raise UserError(f"optim.weight_decay is {decay}, but {name} has none; set optim.name=adamw, prodigy or muon")
    clip = [optax.clip_by_global_norm(optim["clip_norm"])] if optim["clip_norm"] else []
    tx = _hold_tables(optax.chain(*clip, *makers[name]()))
    if mask is None:
        return tx
    nothing = optax.stateless(lambda updates, _: jax.tree.map(_nothing, updates))
    return optax.chain(optax.masked(tx, mask), optax.masked(nothing, jax.tree.map(lambda m: not m, mask)))


def _nothing(update: jax.Array) -> jax.Array:
    return jnp.full_like(update, -0.0)  # 0 + -0 is 0


def _hold_tables(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, of the same state, but that `freqs`, the rotary frequencies, stay: they have no gradient, and decay would shrink them."""

    def update(grads, state, params=None):
        updates, state = tx.update(grads, state, params)
        return jax.tree_util.tree_map_with_path(_unless_table, updates), state

    return optax.GradientTransformation(tx.init, update)


def _unless_table(path: Any, update: jax.Array) -> jax.Array:
    return _nothing(update) if path and getattr(path[-1], "key", None) == "freqs" else update


def _prodigy(schedule: optax.Schedule, decay: float, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Prodigy as the released training ran it: lr is a factor (1.0) on a rate that it finds itself, from the way that parameters
    have come and how the gradients point along it (Mishchenko and Defazio 2023, algorithm 4); moments as they are, no correction
    of their bias.

    The state is optax's. Its update flattens what it multiplies, for which parameters that are split over devices are gathered in
    float32 every step (findings/optax_prodigy_gathers.sh).
    """
    first, b3 = 1e-6, b2**0.5  # the rate that it begins with, and what sums remember
    total = lambda tree: sum(leaf.sum() for leaf in jax.tree.leaves(tree))

    def update(grads, state, params=None):
        found = state.estim_lr
        step = found * schedule(state.count)
        along = total(jax.tree.map(lambda g, start, p: g * (start - p), grads, state.params0, params))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * found * g, state.exp_avg, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(found * g), state.exp_avg_sq, grads)
        sums = jax.tree.map(lambda s, g: b3 * s + step * found / first * g, state.grad_sum, grads)
        weighted = b3 * state.numerator_weighted + step * found / first * along
        size = total(jax.tree.map(jnp.abs, sums))  # 0 until a step has gone anywhere, as a warm-up's first does not
        found = jnp.where(size > 0, jnp.maximum(found, weighted / jnp.where(size > 0, size, 1.0)), found)
        updates = jax.tree.map(lambda m, v, p: -step * (m / (jnp.sqrt(v) + found * eps) + decay * p), mu, nu, params)
        return updates, type(state)(mu, nu, sums, state.params0, found, weighted, optax.safe_increment(state.count))

    return optax.GradientTransformation(optax.contrib.prodigy(1.0).init, update)


def _muon(schedule: optax.Schedule, decay: float, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    return optax.contrib.muon(
        schedule, eps=eps, weight_decay=decay, adam_b1=b1, adam_b2=b2, adam_weight_decay=decay,
        consistent_rms=0.2, muon_weight_dimension_numbers=_as_matrices,
    )  # fmt: skip


def _as_matrices(params: Any) -> Any:
    """How Muon reads each parameter. None (AdamW's) are vectors, and the stacks of vectors that a scan over layers makes.

    Told by their names: a convolution ("conv…", or "weight" and "kernel" of more than two axes) is a matrix of its last
    axis against all others; biases, "norm" and "freqs" are vectors however many are stacked; other parameters are matrices of their last two axes,
    the axes before them (layers, bands, stems) stacks of matrices that are moved each on its own.
    """

    def read(path, leaf):
        name = path[-1].key
        if leaf.ndim < 2 or name.endswith("bias") or name in ("norm", "freqs"):
            return None
        is_convolution = name.startswith("conv") or (name in ("weight", "kernel") and leaf.ndim > 2)
        first = 0 if is_convolution else leaf.ndim - 2
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(read, params)
