"""`msr sweep`: σ_max, S_churn, T, R and seeds of a sampler, all over one cached set of deterministic features.

The deterministic network runs once per segment; its estimate and features stay on the device while every setting
refines them. Settings are tuned like this on a validation split, never on the tracks that are reported.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track as progress_over

from msr_jax.data.tracks import find_tracks, split_of, track_name
from msr_jax.errors import UserError
from msr_jax.evaluate.protocols import cut
from msr_jax.evaluate.report import number
from msr_jax.evaluate.songs import check_all_stems, load_references
from msr_jax.files import check_place, write_whole
from msr_jax.methods.denoiser import make_consistency, make_denoiser
from msr_jax.methods.samplers import noise_from_keys, refine_by_consistency, refine_by_diffusion
from msr_jax.methods.schedules import consistency_sigmas, sampler_sigmas
from msr_jax.methods.stages import SAMPLED, level_gain, network_of
from msr_jax.metrics.si_sdr import WindowScores, score_windows
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.model_folder import load_model

Array = jax.Array
# No protocol of `msr evaluate`: "msdm" cuts 11.9 s, whatever the model's own segment is.
CUT = "the model's own segments, each separated by itself, laid end to end"


class Setting(NamedTuple):
    """One point of the sweep; None where the refinement has no such setting."""

    steps: int
    sigma_max: float
    resamples: int | None
    s_churn: float | None
    seed: int


def make_cached(config: Mapping[str, Any], refine: str) -> tuple[Callable[..., Any], Callable[..., Array]]:
    """The refiner of `methods.stages` in two parts, so that the first is shared by all settings.

    Returns:
      prepare(weights, mixture (time, channels)) -> cache, and
      sample(weights, cache, sigmas, seed, num_resamples, s_churn) -> estimates (stems, time, channels). Both are jitted;
      the last two arguments are compiled in, σ values and seed are not.
    """
    backbone, name = make_backbone(config["model"]), network_of(config, refine)
    label = jnp.eye(len(config["stems"]))
    c, d = config["consistency"], config["diffusion"]

    @jax.jit
    def prepare(weights, mixture):
        gain = level_gain(mixture[None], config["input_level"])[0]
        mixture = mixture[None] * gain
        if backbone.stems_together:
            estimate, features = backbone.separate(weights["deterministic"], mixture, None)
            estimate = estimate[0]
        else:
            estimate, features = backbone.separate(weights["deterministic"], mixture.repeat(len(label), 0), label)
        return gain, estimate, backbone.condition(weights[name], features)

    @partial(jax.jit, static_argnums=(4, 5))
    def sample(weights, cache, sigmas, seed, num_resamples, s_churn):
        gain, estimate, conditioning = cache
        noise = noise_from_keys(jax.random.split(jax.random.key(seed), len(label)), estimate.shape)
        network = lambda x, tau: backbone.refine(weights[name], x, label, tau, conditioning)
        if refine == "diffusion":
            options = {"num_resamples": num_resamples, "s_churn": s_churn, "solver": d["sampler"]["solver"]}
            denoise = make_denoiser(network, d["sigma_data"], d["clip"])
            refined = refine_by_diffusion(denoise, estimate, sigmas, noise, clip=d["clip"], **options)
        else:
            consistency = make_consistency(network, c["sigma_data"], c["sigma_min"])
            options = {"renoise": c["sampler"]["renoise"], "clip": c["sampler"]["clip"]}
            refined = refine_by_consistency(consistency, estimate, sigmas, noise, sigma_min=c["sigma_min"], **options)
        return refined / gain

    return prepare, sample


def sigmas_of(config: Mapping[str, Any], refine: str, setting: Setting) -> np.ndarray:
    """Noise levels of the sampler for a setting."""
    if refine == "diffusion":
        s = config["diffusion"]["sampler"]
        return sampler_sigmas(setting.steps, s["sigma_min"], setting.sigma_max, s["rho"])
    c = config["consistency"]
    return consistency_sigmas(setting.steps, c["sigma_min"], setting.sigma_max, c["rho"])


def averages(scores: Sequence[WindowScores]) -> dict[str, float | None]:
    """Averages over stems of the means over windows: SI-SDRi in both conventions."""
    values, silent = (np.concatenate([getattr(s, k) for s in scores]) for k in ("si_sdri", "silent"))
    active = [values[~silent[:, j], j].mean() for j in range(values.shape[1]) if (~silent[:, j]).any()]
    found = {"si_sdri_active": active, "si_sdri_msdm": values.mean(0) if len(values) else []}
    means = {name: float(np.mean(v)) if len(v) else math.nan for name, v in found.items()}
    return {name: value if math.isfinite(value) else None for name, value in means.items()}


def sweep(
    model: Any, refine: str, settings: Sequence[Setting], tracks: Sequence[Path], progress: Callable = lambda x: x
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score every setting on the same tracks: the model's own segments, each separated by itself, laid end to end.

    Returns:
      (one dict per setting, after one for the deterministic estimate; names of the tracks that were left out, being shorter
      than a segment).

    Raises:
      UserError: a track cannot be read, or none is as long as a segment.
    """
    config, weights, segment = model.config, jax.device_put(dict(model.weights)), model.config["segment"]
    prepare, sample = make_cached(config, refine)
    found: list[list[WindowScores]] = [[] for _ in range(len(settings) + 1)]
    skipped = []
    for number_of_track, folder in enumerate(progress(tracks)):
        references = load_references(folder, config["stems"], config["sample_rate"], config["channels"])
        references = cut(references, "msdm", segment)
        if not references.shape[-1]:
            skipped.append(track_name(folder))
            continue
        estimates: list[list[np.ndarray]] = [[] for _ in found]
        for start in range(0, references.shape[-1], segment):
            mixture = references[..., start : start + segment].sum(0).T
            cache = prepare(weights, np.ascontiguousarray(mixture))
            estimates[0].append(np.asarray(cache[1] / cache[0]))
            for setting, refined in zip(settings, estimates[1:], strict=True):
                place = np.random.SeedSequence([setting.seed, number_of_track, start]).generate_state(1)[0]
                sigmas = sigmas_of(config, refine, setting)
                refined.append(np.asarray(sample(weights, cache, sigmas, place, setting.resamples, setting.s_churn)))
        for scores, parts in zip(found, estimates, strict=True):
            joined = np.concatenate(parts, 1).swapaxes(1, 2)
            scores.append(score_windows(joined, references, config["sample_rate"]))
    if not found[0]:
        raise UserError(f"no track is as long as a segment of {segment} samples")
    rows: list[dict[str, Any]] = [{"setting": None}, *({"setting": s._asdict()} for s in settings)]
    return [row | averages(scores) for row, scores in zip(rows, found, strict=True)], skipped


def markdown(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    best = max(rows, key=lambda r: -np.inf if r[metric] is None else r[metric])
    names = list(Setting._fields)
    lines = [f"| {' | '.join(names)} | SI-SDRi, active (dB) | SI-SDRi, MSDM (dB) |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        told = [row["setting"][n] for n in names] if row["setting"] else ["deterministic", *[""] * (len(names) - 1)]
        cells = ["" if v is None else str(v) for v in told]
        mark = " **best**" if row is best else ""
        lines.append(f"| {' | '.join(cells)} | {number(row['si_sdri_active'])} | {number(row['si_sdri_msdm'])}{mark} |")
    return "\n".join(lines) + "\n"


def _numbers(text: str | None, kind: Callable, default: Any, name: str) -> list:
    try:
        values = [kind(t) for t in text.split(",")] if text else [default]
    except ValueError as error:
        raise UserError(f"--{name} must be numbers with commas between them, not '{text}'") from error
    if any(v is not None and not math.isfinite(v) for v in values):
        raise UserError(f"--{name} must be finite, not '{text}'")
    may_be_zero = name in ("s-churn", "seeds")
    if any(v is not None and (v < 0 or (v == 0 and not may_be_zero)) for v in values):
        raise UserError(f"--{name} must be {'0 or more' if may_be_zero else 'positive'}, not '{text}'")
    return values


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="msr sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", required=True, metavar="DIR", type=Path, help="folder of tracks, or a corpus with splits"
    )
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--refine", choices=SAMPLED, required=True)
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="sweep.json and sweep.md")
    parser.add_argument("--split", default="validation", help="(default: validation, so that test stays untouched)")
    parser.add_argument("--steps", metavar="T,T", help="each of these is a list; all combinations are run")
    parser.add_argument("--sigma-max", metavar="σ,σ")
    parser.add_argument("--resamples", metavar="R,R", help="diffusion only")
    parser.add_argument("--s-churn", metavar="S,S", help="diffusion only")
    parser.add_argument("--seeds", metavar="K,K")
    parser.add_argument("--tracks", type=int, metavar="N", help="the first N tracks only")
    args = parser.parse_args(argv)
    model = load_model(args.model)
    if network_of(model.config, args.refine) not in model.weights:
        raise UserError(f"the model cannot refine by {args.refine}: it holds the networks {', '.join(model.weights)}")
    default = model.config[args.refine]["sampler"]
    is_diffusion = args.refine == "diffusion"
    if not is_diffusion and (args.resamples or args.s_churn):
        raise UserError("--resamples and --s-churn are settings of --refine diffusion")
    points = itertools.product(
        _numbers(args.steps, int, default["num_steps"], "steps"),
        _numbers(args.sigma_max, float, default["sigma_max"], "sigma-max"),
        _numbers(args.resamples, int, default["num_resamples"] if is_diffusion else None, "resamples"),
        _numbers(args.s_churn, float, default["s_churn"] if is_diffusion else None, "s-churn"),
        _numbers(args.seeds, int, 0, "seeds"),
    )
    settings = [Setting(*point) for point in points]
    lowest = default["sigma_min"] if is_diffusion else model.config["consistency"]["sigma_min"]
    for s in settings:
        if s.sigma_max < lowest and (s.steps > 1 or not is_diffusion):
            raise UserError(
                f"levels fall from --sigma-max to {lowest:g} here, so {s.sigma_max:g} is too low for T = {s.steps}"
            )
    folder = split_of(args.data, args.split)
    if args.tracks is not None and args.tracks < 1:
        raise UserError("--tracks must be at least 1")
    tracks = find_tracks(folder, model.config["stems"])[: args.tracks]
    check_all_stems(folder, model.config["stems"])
    check_place(args.out / "sweep.json")
    console = Console()
    progress = partial(progress_over, description="sweeping", console=console, disable=not console.is_terminal)
    rows, skipped = sweep(model, args.refine, settings, tracks, progress)
    text = markdown(rows, "si_sdri_msdm" if model.config["channels"] == 1 else "si_sdri_active")
    segment, count = model.config["segment"], len(tracks) - len(skipped)
    by = f"{CUT} ({segment} samples, {segment / model.config['sample_rate']:.2f} s)"
    head = f"{args.refine} on {count} tracks of {folder}; {by}"
    if skipped:
        head += f"\n\nNOT scored, shorter than a segment: {', '.join(skipped)}"
    told = {
        "model": args.model,
        "data": str(folder),
        "refine": args.refine,
        "tracks": count,
        "skipped": skipped,
        "protocol": CUT,
        "segment": segment,
        "rows": rows,
    }
    write_whole(args.out / "sweep.json", json.dumps(told, indent=1, allow_nan=False) + "\n")
    write_whole(args.out / "sweep.md", f"{head}\n\n{text}")
    print(f"{head}\n\n{text}")
    return 0
