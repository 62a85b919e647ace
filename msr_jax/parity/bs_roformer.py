"""Fixtures of the BS-RoFormer track: networks, losses, chunked inference and whole checkpoints."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from msr_jax.errors import UserError
from msr_jax.methods.denoiser import (
    Denoiser,
    clip_waveform,
    edm_scalings,
    edm_weight,
    make_consistency,
    make_denoiser,
)
from msr_jax.methods.losses import STFT_HOP, STFT_MIN_FFT, STFT_WINDOWS, mse, multires_stft
from msr_jax.methods.samplers import noise_from_sequence, refine_by_consistency, refine_by_diffusion
from msr_jax.methods.schedules import consistency_sigmas, sampler_sigmas
from msr_jax.models.bs_roformer import BSRoformer
from msr_jax.models.products import product
from msr_jax.models.roformer import gelu
from msr_jax.parity.checks import GRADIENT_TOLERANCE, TOLERANCE, Arrays, Check, relative_error, relative_norm
from msr_jax.parity.separators import (
    activations,
    check_gradients,
    compare_mid,
    last,
    params_of,
    separate,
    state_of,
)
from msr_jax.separate.demix import Demix, demix
from msr_jax.weights.detect import prefixes_of
from msr_jax.weights.lightning import read_checkpoint
from msr_jax.weights.yaml_config import told_sizes

DEMIX_TOLERANCE = 1e-6


def _flat(x: np.ndarray | jax.Array) -> jax.Array:
    """(batch, stems, channels, time) -> (batch·stems, time, channels)."""
    return last(x).reshape(-1, x.shape[-1], x.shape[-2])


def _network(meta: Mapping[str, Any], refining: bool) -> BSRoformer:
    return BSRoformer(**told_sizes(meta, "bs_roformer", "the fixture"), timed=refining, conditioned=refining)


def _beside(path: Path, name: str) -> tuple[Arrays, dict]:
    other = path.with_name(name)
    try:
        return load_file(other.with_suffix(".safetensors")), json.loads(other.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} needs the fixture {name} beside it ({error})") from error


def _check_separator(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    net = _network(meta["config"], False)
    params = params_of(net, state_of(arrays), path.name)
    if "in/target" in arrays:
        yield from check_gradients(net, params, arrays, meta["config"], arrays["in/mixture"].shape[-1])
        return
    stems, features, sown = separate(net, params, arrays["in/mixture"])
    expected = arrays["out/sources"]
    found = np.asarray(last(stems)).reshape(expected.shape)
    scale = 1e6 if np.abs(expected).max() < 1e-3 else 1.0  # a fixture about quiet input, to be compared at full level
    yield Check("out/sources", relative_error(scale * found, scale * expected), TOLERANCE)
    frames = meta.get("frames_stored_in_mid", "all")
    if scale == 1:
        yield from compare_mid(arrays, activations(features, sown), frames)


class _Refiner:
    """A refining network with its conditioning, ready to be called on noisy stems (batch, stems, channels, time)."""

    def __init__(self, net: BSRoformer, params: Any, features: Any):
        self.net, self.params, self.features = net, params, features
        condition = jax.jit(lambda p, f: net.apply({"params": p}, f, method="condition"))
        self.conditioning = condition(params, features)
        self._run = jax.jit(
            lambda p, x, label, tau, c: net.apply(
                {"params": p}, x, label, tau, c, method="refine", mutable=["intermediates"]
            )
        )

    def run(self, x: jax.Array, tau: jax.Array, stems: Any) -> tuple[jax.Array, dict]:
        label = jnp.eye(self.net.num_stems)[np.asarray(stems)]
        y, sown = self._run(self.params, x, label, tau, self.conditioning)
        return y, sown["intermediates"]

    def network(self, stems: Any = None):
        stems = np.arange(self.net.num_stems) if stems is None else stems
        return lambda x, tau: self.run(x, tau, stems)[0]


def _call(denoise: Denoiser, x: np.ndarray, sigma: Any) -> np.ndarray:
    """Outputs (batch, stems, channels, time) for x of that shape; sigma is one number, or one per batch item."""
    wide = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32).reshape(-1, 1), x.shape[:2]).reshape(-1)
    return np.asarray(last(denoise(_flat(x), wide))).reshape(x.shape)


def _check_refiner(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    det_arrays, det_meta = _beside(path, meta["det_fixture"])
    det = _network(det_meta["config"], False)
    estimate, features, _ = separate(
        det, params_of(det, state_of(det_arrays), meta["det_fixture"]), arrays["in/mixture"]
    )
    yield Check("in/det_tracks", relative_error(last(estimate), arrays["in/det_tracks"]), TOLERANCE)
    net = _network(meta["config"], True)
    refiner = _Refiner(net, params_of(net, state_of(arrays), path.name), features)
    data, low = meta["sigma_data"], meta.get("sigma_min", 1e-4)
    raw = refiner.network()
    roles = {
        "net_raw": lambda x, sigma: raw(x / jnp.sqrt(sigma**2 + data**2)[:, None, None], jnp.log(sigma) / 4),
        "denoised": make_denoiser(raw, data, 1.0),
        "edm_param": make_denoiser(raw, data),
        "consistency": make_consistency(raw, data, low),
    }
    for name, expected in arrays.items():
        kind, _, index = name.removeprefix("out/").partition("/")
        if name.startswith("out/") and kind in roles:
            actual = _call(roles[kind], arrays[f"in/x_noisy/{index}"], arrays["in/sigmas"][int(index)])
            yield Check(name, relative_error(actual, expected), TOLERANCE)
        if kind == "denoised_single":
            one = make_denoiser(refiner.network([int(index)]), data, 1.0)
            actual = _call(one, arrays[f"in/x_single/{index}"], arrays["in/sigma_per_example"])
            yield Check(name, relative_error(actual, expected), TOLERANCE)
        if kind.startswith("e2e_"):
            steps = int(kind.removeprefix("e2e_").removesuffix("step"))
            start = 0.003934 if steps == 1 else 0.004391  # the published levels
            actual = _sample_consistency(roles["consistency"], arrays, "in/det_tracks", "in/e2e_noise", steps, start)
            yield Check(name, relative_error(actual, expected), TOLERANCE)
    yield from _check_refiner_mid(refiner, arrays, meta)


def _sample_consistency(
    consistency: Denoiser, arrays: Arrays, estimate: str, noise: str, steps: int, start: float
) -> np.ndarray:
    x = arrays[estimate]
    sequence = noise_from_sequence(jnp.stack([_flat(arrays[noise])] * (steps + 1)))  # more than one is never asked for
    sigmas = consistency_sigmas(steps, 1e-4, start, 9)
    y = refine_by_consistency(consistency, _flat(x), sigmas, sequence, sigma_min=1e-4)
    return np.asarray(last(y)).reshape(x.shape)


def _check_refiner_mid(refiner: _Refiner, arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    if "mid/stem_emb" not in arrays or "mid/time_emb" not in arrays:
        return
    # One call on one stem at one level; the embeddings of both tell which.
    nearest = lambda values, name: min(range(len(values)), key=lambda i: relative_error(values[i], arrays[name]))
    batch, levels = len(arrays["in/mixture"]), arrays["in/sigmas"]
    stem = nearest(np.asarray(refiner.params["conditioning"]["stem_embedding"]), "mid/stem_emb")
    sigma_of = lambda k: jnp.full(batch, levels[k])
    clean = last(arrays["in/x_noisy/0"][:, stem])
    tau = lambda k: edm_scalings(sigma_of(k), meta["sigma_data"]).tau
    k = nearest([refiner.run(clean, tau(i), [stem])[1]["time_emb"][0] for i in range(len(levels))], "mid/time_emb")
    scalings = edm_scalings(sigma_of(k), meta["sigma_data"])
    x = last(arrays[f"in/x_noisy/{k}"][:, stem]) * scalings.into[:, None, None]
    _, sown = refiner.run(x, scalings.tau, [stem])
    p, c = refiner.params, refiner.conditioning
    condition = gelu(sown["mapping"][0])
    named = activations({axis: sown[axis][0] for axis in ("time", "freq")}, sown)
    named |= {"mapping": sown["mapping"][0], "time_emb": sown["time_emb"][0]}
    named["stem_emb"] = p["conditioning"]["stem_embedding"][stem]
    named["stft_adapter"] = c["stft"].transpose(0, 3, 2, 1, 4)
    named["band_split_adapter"] = c["band_split"]
    for i in range(refiner.net.depth):
        for a, axis in enumerate(("time", "freq")):
            named[f"transformer_adapter{2 * i + a}"] = c[axis][i] if axis == "freq" else c[axis][i].swapaxes(1, 2)
            for block, short in (("attention", "attn"), ("feed_forward", "ff")):
                film = p["layers"][f"{axis}_0"][block]
                wide = product(condition, film["to_scale_shift"][i], jnp.float32) + film["to_scale_shift_bias"][i]
                named[f"film_{short}_layer{i}_{axis}"] = wide
    yield from compare_mid(arrays, named, meta.get("frames_stored_in_mid", "all"))


def _check_loss(arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    windows, hop = meta.get("window_sizes", STFT_WINDOWS), meta.get("hop", STFT_HOP)
    min_fft, weight = meta.get("n_fft_floor", STFT_MIN_FFT), meta.get("weight", 1.0)
    target = jnp.asarray(arrays["in/target"])
    fold = lambda x: x.reshape(len(x), -1, x.shape[-1]).swapaxes(1, 2)

    def terms(recon: jax.Array) -> tuple[jax.Array, jax.Array]:
        difference = fold(recon - target)
        return jnp.abs(difference).mean((1, 2)), multires_stft(difference, windows, hop, min_fft)

    recon = jnp.asarray(arrays["in/recon"])
    l1, spectral = terms(recon)
    values = {"l1": l1.mean(), "mrstft": spectral.mean(), "total": (l1 + weight * spectral).mean()}
    factor: Any = 1.0
    if "in/sigmas" in arrays:
        factor = edm_weight(jnp.asarray(arrays["in/sigmas"]), meta["sigma_data"])
        square = lambda x: mse(fold(x), fold(target))
        values |= {"per_example": l1 + weight * spectral, "weights": factor, "mse_per_example": square(recon)}
        values["loss"] = (factor * (l1 + weight * spectral)).mean()
        values["mse_loss"] = (factor * square(recon)).mean()
        gradient = jax.grad(lambda x: (factor * square(x)).mean())(recon)
        yield Check("out/mse_grad_recon", relative_norm(gradient, arrays["out/mse_grad_recon"]), TOLERANCE)
    for name, value in values.items():
        if f"out/{name}" in arrays:
            expected = arrays[f"out/{name}"]
            yield Check(f"out/{name}", relative_error(np.reshape(value, expected.shape), expected), TOLERANCE)

    def total(x: jax.Array) -> jax.Array:
        l1, spectral = terms(x)
        return (factor * (l1 + weight * spectral)).mean()

    gradient = jax.jit(jax.grad(total))(recon)
    for name in ("out/grad_recon", "out/grad_recon_f64"):
        yield Check(name, relative_norm(gradient, arrays[name]), GRADIENT_TOLERANCE)


def _check_demix(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    chunk = meta["chunk_size"]
    ramp = (1 + 0.5 * np.arange(chunk) / (chunk - 1)).astype(np.float32)[:, None]
    gains = np.array(meta.get("gains", []), np.float32)[:, None, None]
    by_gain = lambda chunks, _: gains * (chunks * ramp)[:, None]

    def nonlinear(chunks: np.ndarray, _: int) -> np.ndarray:
        y = np.tanh(chunks * ramp) * np.array([1.5, 1.0], np.float32)
        return np.stack([y, chunks - y], axis=1)

    def compare(name: str, run: Any, mix: str, settings: Demix, stems: Any = slice(None)) -> Check:
        y = demix(run, arrays[mix].T, chunk, settings)[stems].swapaxes(1, 2)
        return Check(name, relative_error(y, arrays[name]), TOLERANCE if run is None else DEMIX_TOLERANCE)

    overlaps = {case["case"]: case["num_overlap"] for case in meta.get("cases", [])}
    basic = Demix(meta.get("num_overlap", 2), meta.get("batch_size", 2))
    if "config_from" in meta:
        det_arrays, det_meta = _beside(path, meta["config_from"])
        net = _network(det_meta["config"], False)
        params = params_of(net, state_of(det_arrays), meta["config_from"])
        run = jax.jit(lambda x: net.apply({"params": params}, x, method="separate")[0])
        model = lambda chunks, _: np.asarray(run(chunks))
    for name in [k for k in arrays if k.startswith("out/")]:
        kind, *rest = name.removeprefix("out/").split("/")
        if kind == "ramp":
            settings = Demix(overlaps[int(rest[0])], int(rest[1].removeprefix("bs")))
            ends = [0, len(gains) - 1] if len(arrays[name]) < len(gains) else slice(None)
            yield compare(name, by_gain, f"in/mix/{rest[0]}", settings, ends)
        elif kind.startswith("bigshifts"):
            yield compare(name, by_gain, "in/mix", basic._replace(bigshifts=int(kind.removeprefix("bigshifts"))))
        elif kind.startswith("nonlin"):
            yield compare(name, nonlinear, "in/mix", basic._replace(tta=kind.endswith("_tta")))
        elif "config_from" in meta:
            yield compare(name, model, f"in/mix_{kind}", basic)


def _check_checkpoints(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    data, low = meta["sigma_data"], meta["sigma_min"]
    det = _network(meta["config_det"], False)
    net = _network({**meta["config_det"], **meta["config_refiner_extra"]}, True)
    mixture, estimate = arrays["in/mixture"], arrays["out/det_tracks"]
    files = {name.removesuffix(".ckpt").rsplit("_", 1)[-1]: name for name in meta["files"]}

    def weights(file: str, arch: str, network: str, kind: BSRoformer) -> Any:
        state = read_checkpoint(path.with_name(files[file])).state_dict
        prefix = prefixes_of(state, arch)[network]
        own = {k.removeprefix(prefix): t.read() for k, t in state.items() if k.startswith(prefix)}
        return params_of(kind, own, files[file])

    features = None
    for file in [name for name in files if name in ("det", "raw", "full")]:
        stems, features, _ = separate(det, weights(file, "bsrf_det", "deterministic", det), mixture)
        yield Check(f"{files[file]}: out/det_tracks", relative_error(last(stems), estimate), TOLERANCE)
    refiner = lambda file, arch, network: _Refiner(net, weights(file, arch, network, net), features).network()
    diffusion = make_denoiser(refiner("diff", "bsrf_diffusion", "diffusion"), data, 1.0)
    student, averaged = (
        make_consistency(refiner("cd", "bsrf_consistency", name), data, low) for name in ("consistency", "target")
    )
    teacher = make_denoiser(refiner("cd", "bsrf_consistency", "diffusion"), data)
    roles = {"diff_denoised": diffusion, "cd_net": student, "cd_target": averaged, "cd_teacher": teacher}
    for name in [k for k in arrays if "_sigma" in k]:
        role, sigma = name.removeprefix("out/").split("_sigma")
        actual = _call(roles[role], estimate + np.float32(sigma) * arrays["in/noise"], float(sigma))
        yield Check(name, relative_error(actual, arrays[name]), TOLERANCE)
    if "out/diff_sample_3steps" in arrays:
        churn = [_flat(arrays[f"in/churn_noise/{i}"]) for i in range(3)]
        sequence = [_flat(arrays["in/noise"])] + [a for c in churn for a in (c, jnp.zeros_like(c))]
        sigmas = sampler_sigmas(3, 1e-4, 0.002, 9)
        y = refine_by_diffusion(
            diffusion, _flat(estimate), sigmas, noise_from_sequence(jnp.stack(sequence)), s_churn=1.0
        )
        clipped = np.asarray(last(clip_waveform(y, 1.0))).reshape(estimate.shape)
        yield Check("out/diff_sample_3steps", relative_error(clipped, arrays["out/diff_sample_3steps"]), TOLERANCE)
    if "out/cd_1step" in arrays:
        once = _sample_consistency(student, arrays, "out/det_tracks", "in/noise", 1, 0.003934)
        yield Check("out/cd_1step", relative_error(once, arrays["out/cd_1step"]), TOLERANCE)


def check_bs_roformer(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> Iterator[Check]:
    """Checks of one fixture of this track."""
    kind = path.stem.split("_")[0]
    if kind == "bsrf":
        is_refiner = "det_fixture" in meta
        yield from (_check_refiner if is_refiner else _check_separator)(path, arrays, meta)
    elif kind == "loss":
        yield from _check_loss(arrays, meta)
    elif kind == "demix":
        yield from _check_demix(path, arrays, meta)
    else:
        yield from _check_checkpoints(path, arrays, meta)
