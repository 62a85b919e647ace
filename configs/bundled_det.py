"""Deterministic stage of the bundled model; `launch/study/study.sh` trains it three times, each from the run before.

The refinement begins with the second run, and refines what the third estimates, which heard more sounds (WIDER_RECORDS):
msr train --config configs/bundled_det.py --workdir runs/bundled_first --config.data.train=RECORDS
msr train --config configs/bundled_det.py --workdir runs/bundled_start --config.data.train=RECORDS --config.init_from.deterministic=runs/bundled_first --config.train.steps=5000 --config.optim.decay_steps=0 --config.seed=4
msr train --config configs/bundled_det.py --workdir runs/bundled_det --config.data.train=WIDER_RECORDS --config.init_from.deterministic=runs/bundled_start --config.train.steps=4000 --config.optim.decay_steps=0 --config.seed=6
"""

from ml_collections import ConfigDict

from msr_jax.config import SLAKH_STEMS
from msr_jax.configs import bsrf_det_small


def get_config() -> ConfigDict:
    c = bsrf_det_small.get_config()
    c.stems = SLAKH_STEMS
    c.sample_rate = 22_050  # Hz
    c.channels = 1
    c.segment = c.data.crop = 64_512  # samples, 3 s: 64 frames
    # Few and wide tokens: a CPU does more with the same number of operations.
    c.model.update(
        {
            "dim": 96,
            "depth": 4,
            "dim_head": 32,
            "heads": 3,
            "stereo": False,
            "freqs_per_bands": (4,) * 6 + (8,) * 7 + (24,) * 4 + (64,) * 3 + (219,) * 3,
            "stft_hop_length": 1024,
        }
    )
    # The mixture's RMS, so that noise of σ 1 lies 40 dB below it.
    c.input_level = 100.0
    # At σ_data a denoiser keeps half of its input. It begins with another separator (`init_from.start`), whose masks give
    # the other half: the mean of two estimates that err apart, from the first step on. They meet ten times as much of the
    # mixture as of the noised estimate. With an error in dB every noise level counts the same, without a weight.
    c.model.update({"pass_mixture": 14.14, "mask_scale": 0.1})
    c.diffusion.update({"sigma_data": 0.5, "p_mean": -0.69, "p_std": 0.4, "loss_weight": "none"})
    c.diffusion.sampler.update({"num_steps": 1, "sigma_min": 0.25, "sigma_max": 0.5})
    # Few levels, and so few evaluations of the teacher, evenly spaced, for its path is nearly straight. A small σ_min keeps
    # half of the input at σ_data here too.
    c.consistency.update({"sigma_data": 0.5, "num_levels": 4, "sigma_min": 0.02, "sigma_max": 0.5, "rho": 1.0})
    c.consistency.sampler.sigma_max = 0.5
    augment = {"reversal": 0.0, "distortion": 0.0, "noise": 0.0, "mixup": (0.0, 0.0), "mixup_gain": (1.0, 1.0)}
    c.data.augment.update({**augment, "polarity": 0.5, "loudness": (1.0, 1.0)})
    c.data.update({"mix_across_songs": 0.4, "equal_songs": False, "gain_db": (-6.0, 6.0), "preload": False})
    c.optim.update({"schedule": "linear", "decay_steps": 5400})
    c.train.update({"steps_per_dispatch": 1, "steps": 16_400, "checkpoint_every": 200})
    c.ema_rate = 0.999
    return c
