"""Fixtures of the U-Net track: networks, and single blocks."""

import re
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from math import gcd
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from msr_jax.config_fields import check_field
from msr_jax.errors import UserError
from msr_jax.methods.denoiser import consistency_scalings, edm_scalings, edm_weight, precondition
from msr_jax.models import layers, unet1d
from msr_jax.models.backbone import make_backbone
from msr_jax.parity.checks import TOLERANCE, Arrays, Check, relative_error
from msr_jax.weights.lightning import read_checkpoint
from msr_jax.weights.model_folder import parameter_shapes, unflatten
from msr_jax.weights.torch_names import PREFIXES, from_torch, to_torch
from msr_jax.weights.unet_weights import published_sizes

ARCHS = {"unet_det": "unet_det", "unet_diff": "unet_diffusion", "unet_cd": "unet_consistency"}
# What each output of a refining network is: (network, scalings, clamp).
ROLES = {
    "denoised": ("diffusion", "edm", True),
    "teacher_edm": ("diffusion", "edm", False),
    "consistency": ("consistency", "consistency", False),
    "student_edm": ("consistency", "edm", False),
    "target_consistency": ("target", "consistency", False),
}


def _swap(x: Any) -> Any:
    """(batch, channels, time) <-> (batch, time, channels)."""
    return jnp.asarray(x).swapaxes(1, 2) if np.ndim(x) == 3 else x


class _Fixture:
    """Arrays and description of one fixture, and its networks."""

    def __init__(self, path: Path, arrays: Arrays, meta: Mapping[str, Any]):
        self.path, self.stem, self.arrays, self.meta = path, path.stem, arrays, meta
        self.sizes = published_sizes(meta.get("config", {}).get("unet", {}), str(path))
        tolerance = meta.get("tolerance", TOLERANCE)
        self.tolerance = tolerance if isinstance(tolerance, int | float) else tolerance.get("max_relative", TOLERANCE)

    def compare(self, name: str, actual: Any) -> Iterator[Check]:
        """A check, if the fixture has a tensor of that name."""
        if name in self.arrays:
            yield Check(name, relative_error(_swap(actual), self.arrays[name]), self.tolerance)

    def networks(self) -> dict[str, Any]:
        """Parameters by network name, from the fixture's own tensors, the checkpoint beside it, or the seeded rule."""
        if "weight_rule" in self.meta:
            return {"deterministic": self._seeded("det"), "diffusion": self._seeded("diff")}
        arch = next((a for prefix, a in ARCHS.items() if self.stem.startswith(prefix)), None)
        if arch is None:
            raise UserError(f"{self.path.name} is a fixture of no U-Net; known are {', '.join(ARCHS)} and unet_blocks")
        state = {k.removeprefix("state_dict/"): v for k, v in self.arrays.items() if k.startswith("state_dict/")}
        if not state:
            tensors = read_checkpoint(self.path.with_suffix(".ckpt")).state_dict
            state = {k: t.read() for k, t in tensors.items()}
        by_network = {}
        for network, prefix in PREFIXES[arch].items():
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            by_network[network] = unflatten(from_torch(own))
        return by_network

    def _seeded(self, role: str) -> Any:
        """The weights that the fixture's rule describes: every tensor from a generator seeded by its name."""
        backbone = make_backbone({"name": "unet1d", **self.sizes})
        network = {"det": "deterministic", "diff": "diffusion"}[role]
        empty = {k: np.empty(s, np.int8) for k, s in parameter_shapes(backbone, network).items()}
        state = {}
        for key, tensor in to_torch(empty).items():
            seed = zlib.crc32(f"{self.meta['salt']}/{role}/{key}".encode())
            w = np.random.Generator(np.random.PCG64(seed)).standard_normal(tensor.shape, np.float32)
            if key.endswith((".g", "groupnorm.weight")):
                w = 1 + np.float32(0.1) * w
            elif key.endswith(".bias"):
                w = np.float32(0.1) * w
            elif key != "to_time.0.0.weights":
                fan = 2 * w.shape[0] if re.search(r"upsamples\.\d+\.upsample\.weight", key) else np.prod(w.shape[1:])
                w = w / np.sqrt(fan).astype(np.float32)
            state[key] = w
        return unflatten(from_torch(state))


def _stages(features: list, sown: Mapping[str, Any]) -> dict[str, Any]:
    """Activations of one run under the fixtures' names."""
    levels = (len(features) - 3) // 2
    named = {"to_in": features[1], "bottleneck": features[levels + 2], "features_final": features[-1]}
    named |= {f"down{i}": features[2 + i] for i in range(levels)}
    named |= {f"up{j}": features[levels + 3 + j] for j in range(levels - 1)}
    named |= {f"up{levels - 1}": sown["last_level"][0]}
    return named | {k: sown[k][0] for k in ("to_mapping", "to_features", "to_time") if k in sown}


def _check_network(fixture: _Fixture) -> Iterator[Check]:
    arrays = fixture.arrays
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fixture.sizes.items()}
    net = unet1d.UNet1d(**fields)
    run = jax.jit(partial(net.apply, mutable=["intermediates"]))
    weights, label = fixture.networks(), arrays["in/features"]
    mixture = _swap(arrays["in/mixture"])

    (estimate, features), sown = run({"params": weights["deterministic"]}, mixture, label)
    yield from fixture.compare("out/estimate", estimate)
    yield from fixture.compare("out/det_estimate", estimate)
    for name, activation in _stages(features, sown["intermediates"]).items():
        yield from fixture.compare(f"mid/{name}", activation)
        yield from fixture.compare(f"mid/det/{name}", activation)
    for k, activation in enumerate(features):
        yield from fixture.compare(f"mid/inject{k:02d}", activation)
    moments = np.array(
        [[np.mean(f, dtype=np.float64), np.std(f, dtype=np.float64)] for f in map(np.asarray, features)],
        np.float32,
    )
    yield from fixture.compare("mid/inject_mean_std", moments)
    for variant, x in (
        ("quiet", arrays.get("in/mixture_quiet")),
        ("silence", np.zeros_like(arrays["in/mixture"])),
    ):
        if f"out/estimate_{variant}" in arrays:
            (y, _), _ = run({"params": weights["deterministic"]}, _swap(x), label)
            yield from fixture.compare(f"out/estimate_{variant}", y)

    for name in [k for k in arrays if k.startswith("out/raw/")]:
        injected = features if name.endswith("/inject") else None
        (y, _), _ = run(
            {"params": weights["diffusion"]},
            _swap(arrays["in/raw/x"]),
            label,
            arrays["in/raw/time"],
            injected,
        )
        yield from fixture.compare(name, y)

    told = fixture.meta["config"]
    sigma_data, sigma_min = told.get("sigma_data", 0.2), told.get("sigma_min", 1e-4)
    for name in [k for k in arrays if k.split("/")[1] in ROLES and k.startswith("out/")]:
        role, tag = name.split("/")[1:]
        network, kind, clamp = ROLES[role]
        batch = arrays["in/mixture"].shape[0]
        levels = (
            arrays["in/mixed_sigmas"] if tag == "mixed_sigmas" else np.full(batch, float(tag.split("_")[1]), np.float32)
        )
        sigma = jnp.asarray(levels)
        x = _swap(next(arrays[k] for k in (f"in/x_noisy/{tag}", f"in/x/{tag}", "in/x") if k in arrays))
        edm = kind == "edm"
        scalings = edm_scalings(sigma, sigma_data) if edm else consistency_scalings(sigma, sigma_data, sigma_min)
        seen: dict[str, Any] = {}

        def raw(scaled, tau, network=network, seen=seen):
            (y, activations), sown = run({"params": weights[network]}, scaled, label, tau, features)
            seen |= _stages(activations, sown["intermediates"]) | {"to_out": y, "c_noise": tau}
            return y

        y = precondition(raw, scalings, x)
        yield from fixture.compare(name, jnp.clip(y, -1, 1) if clamp else y)
        if role in ("denoised", "consistency"):
            for stage, activation in seen.items():
                yield from fixture.compare(f"mid/{tag}/{stage}", activation)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _sizes_to_try(kind: str, told: Any, state: Arrays, x: np.ndarray, out: np.ndarray) -> Iterator[tuple[int, int]]:
    """(groups, heads) of a block: as its description's fields say; else all that its tensors allow, which do not tell them.

    The recorded output does: of no two of these is it the same.
    """
    fields = told if isinstance(told, Mapping) else {}
    width = next((v.shape[0] for k, v in state.items() if k.endswith("to_q.weight")), 1)
    channels = gcd(x.shape[1], out.shape[1]) if kind in ("resnet", "bottleneck") else 1
    ways = (("groups", "resnet_groups", channels), ("heads", "attention_heads", width))
    wanted = []
    for name, field, whole in ways:
        if name in fields:
            check_field(f"model.{field}", fields[name], "the fixture's block: ", name, model="unet1d")
        wanted.append([fields[name]] if name in fields else _divisors(whole))
    return product(*wanted)


def _block(kind: str, state: Arrays, x: np.ndarray, out: np.ndarray, groups: int, heads: int) -> Any:
    """The module of a single-block fixture; what its tensors tell of its sizes is read from their shapes."""
    width = next((v.shape[0] for k, v in state.items() if k.endswith("to_q.weight")), heads)
    if kind == "resnet":
        return layers.ResidualBlock(out.shape[1], groups)
    if kind in ("patch", "unpatch"):
        size = max(out.shape[2], x.shape[2]) // min(out.shape[2], x.shape[2])
        channels = out.shape[1] if kind == "unpatch" else out.shape[1] // size
        edge = x.shape[1] if kind == "patch" else out.shape[1]
        block: Any = layers.Under(partial(layers.ResidualBlock, channels, min(size, edge), name="block"))
        if kind == "unpatch":
            return lambda variables, x, z: block.apply(variables, unet1d.unpatch(x, size), z)
        return lambda variables, x, z: unet1d.patch(block.apply(variables, x, z), size)
    if kind == "down":
        taps = state["weight"].shape[2]
        return layers.Conv(out.shape[1], taps, (taps - 1) // 2, (taps - 1) // 2)
    if kind == "up":
        return layers.Upsample(out.shape[1], state["weight"].shape[2] // 2)
    if kind == "transformer":
        return layers.Transformer(heads, width // heads, state["feed_forward.1.weight"].shape[0] // out.shape[1])
    if kind == "attention":
        return layers.AttentionInner(heads, width // heads)
    if kind == "bottleneck":
        return unet1d.Bottleneck(out.shape[1], groups, heads, width // heads, jnp.float32)
    if kind == "ffn":
        return layers.FeedForward(state["1.weight"].shape[0] // out.shape[1])
    raise UserError(f"a block of the kind '{kind}' is not known")


def _run_block(kind: str, module: Any, state: Arrays, inputs: list[np.ndarray]) -> Any:
    """The block's output under the fixture's order of axes."""
    under = {"ffn": "feed_forward.", "up": "upsample."}.get(kind, "")
    params = unflatten(from_torch({f"{under}{k}": v for k, v in state.items()}))
    params = params.get("upsample", params) if kind == "up" else params
    apply = getattr(module, "apply", module)
    if kind == "attention":  # its tokens come as (batch, length, channels) already
        return apply({"params": params}, *(jnp.asarray(x) for x in inputs))
    return _swap(apply({"params": params}, *(_swap(x) for x in inputs)))


def _time_embedding(state: Arrays, tau: np.ndarray, features: int) -> Any:
    params = unflatten(from_torch(state))
    embed = unet1d.TimeEmbedding(len(state["to_time.0.0.weights"]))
    dense: Any = layers.Linear(features).apply(
        {"params": params["to_time_0_1"]}, embed.apply({"params": params["to_time_0_0"]}, tau)
    )
    return jax.nn.gelu(dense, approximate=False)


def _check_block(fixture: _Fixture, name: str) -> Check:
    arrays, told = fixture.arrays, fixture.meta.get("blocks", {}).get(name)
    kind = name.split("_")[0].rstrip("0123456789")
    kind = told.get("kind", kind) if isinstance(told, Mapping) else kind
    prefix = f"{name}/state_dict/"
    state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    inputs, out = [arrays[k] for k in sorted(arrays) if k.startswith(f"{name}/in/")], arrays[f"{name}/out"]
    if not inputs:
        raise UserError(f"{fixture.path.name}: the block '{name}' has no input {name}/in/0")
    if kind == "time":
        return Check(
            f"{name}/out", relative_error(_time_embedding(state, inputs[0], out.shape[1]), out), fixture.tolerance
        )
    errors = [float("inf")]
    try:
        for groups, heads in _sizes_to_try(kind, told, state, inputs[0], out):
            module = _block(kind, state, inputs[0], out, groups, heads)
            errors.append(relative_error(_run_block(kind, module, state, inputs), out))
            if errors[-1] <= fixture.tolerance:
                break
    except (FlaxError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{fixture.path.name}: the block '{name}' does not fit its tensors ({reason})") from error
    return Check(f"{name}/out", min(errors), fixture.tolerance)


def _check_blocks(fixture: _Fixture) -> Iterator[Check]:
    arrays = fixture.arrays
    for name in dict.fromkeys(k.split("/")[0] for k in arrays if k.endswith("/out")):
        yield _check_block(fixture, name)
    if "precond/sigma" in arrays:
        sigma = jnp.asarray(arrays["precond/sigma"])
        tables = {"edm": edm_scalings(sigma, 0.2), "cd": consistency_scalings(sigma, 0.2, 1e-4)}
        for kind, values in tables.items():
            for column, value in zip(("c_skip", "c_out", "c_in", "c_noise"), values, strict=True):
                yield from fixture.compare(f"precond/{kind}/{column}", value)
        yield from fixture.compare("precond/loss_weight", edm_weight(sigma, 0.2))


def check_unet(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    """Checks of one fixture of this track."""
    fixture = _Fixture(path, arrays, meta)
    return _check_blocks(fixture) if path.stem.startswith("unet_blocks") else _check_network(fixture)
