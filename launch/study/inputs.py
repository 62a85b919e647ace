"""What a diffusion refinement makes of its input: `python launch/study/inputs.py MODEL CORPUS --sigma 1`.

The denoiser at one noise level, given the noised estimate as in use, and in its place the estimate without noise, noise alone
or the noised true stem: SI-SDR over the estimate's where a stem sounds, in segments of the validation tracks.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from msr_jax.data.tracks import find_tracks, load_track, split_of
from msr_jax.methods.denoiser import make_denoiser
from msr_jax.methods.losses import SILENT
from msr_jax.methods.stages import level_gain
from msr_jax.metrics.si_sdr import si_sdr
from msr_jax.models.backbone import make_backbone
from msr_jax.weights.model_folder import load_model

Array = jax.Array


def segments(corpus: str, config: dict, count: int) -> np.ndarray:
    """(count, stems, time, 1): as many from each validation track (but of the last), evenly spaced."""
    tracks = find_tracks(split_of(corpus, "validation"), config["stems"])
    each, length = -(-count // len(tracks)), config["segment"]
    found = []
    for track in tracks:
        audio = load_track(track, config["stems"], config["sample_rate"])
        found += [audio[:, s : s + length] for s in np.linspace(0, audio.shape[1] - length, each, dtype=int)]
    return np.stack(found)[:count, ..., None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="working directory of a diffusion stage")
    parser.add_argument("corpus")
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--segments", type=int, default=64)
    args = parser.parse_args()
    model = load_model(args.model)
    config, weights = model.config, model.weights
    backbone, label = make_backbone(config["model"]), jnp.eye(len(config["stems"]))

    @jax.jit
    def refined(stems: Array, key: Array) -> tuple[Array, dict[str, Array]]:
        """One example (stems, time, 1): the stems at the level of training, and estimates of them by input."""
        stems = stems * level_gain(stems.sum(0)[None], config["input_level"])[0]
        (estimate,), features = backbone.separate(weights["deterministic"], stems.sum(0)[None], None)
        conditioning = backbone.condition(weights["diffusion"], features)
        network = lambda x, tau: backbone.refine(weights["diffusion"], x, label, tau, conditioning)
        denoise = make_denoiser(network, config["diffusion"]["sigma_data"], config["diffusion"]["clip"])
        noise = args.sigma * jax.random.normal(key, estimate.shape)
        inputs = {
            "noised estimate": estimate + noise,
            "estimate without noise": estimate,
            "noise alone": noise,
            "noised true stem": stems + noise,
        }
        sigma = jnp.full(len(stems), args.sigma)
        return stems, {"estimate": estimate} | {name: denoise(x, sigma) for name, x in inputs.items()}

    data = segments(args.corpus, config, args.segments)
    gains: dict[str, list[float]] = {}
    for i, stems in enumerate(data):
        targets, estimates = refined(stems, jax.random.fold_in(jax.random.key(0), i))
        at_level = np.asarray(targets)
        power = np.square(at_level).mean((1, 2))
        heard = power > SILENT * np.square(at_level.sum(0)).mean()
        scores = {name: si_sdr(np.asarray(e[..., 0]), at_level[..., 0])[heard] for name, e in estimates.items()}
        for name, score in scores.items():
            gains.setdefault(name, []).extend(score - scores["estimate"])
    print(f"σ {args.sigma:g}, {len(data)} segments, {len(gains['estimate'])} sounding stems: dB over the estimate\n")
    for name, values in gains.items():
        print(f"| {name} | {np.mean(values):+.2f} |")


if __name__ == "__main__":
    main()
