"""Deterministic stage of a small U-Net that trains in minutes on a CPU; the demo's.

msr train --config configs/unet_det_small.py --workdir runs/det --config.data.train=RECORDS
"""

from ml_collections import ConfigDict

from msr_jax.config import unet_base


def get_config() -> ConfigDict:
    # The released recipe but where noted.
    c = unet_base()
    c.segment = c.data.crop = 32_768  # samples, 1.5 s; more steps teach such a model more than more audio a step does
    # From scratch at raw level, such a model spends a third of its time getting down to the level of silence.
    c.input_level = 1.0
    c.model.update(
        {
            "channels": 128,
            "patch_factor": 32,
            "multipliers": (1, 2, 2, 2),
            "factors": (4, 2, 2),
            "num_blocks": (1, 1, 1),
            "attentions": (False, False, False),
            "attention_heads": 4,
            "attention_features": 64,
            "zero_init_output": True,
        }
    )
    # As published, the noise is far below the error of the estimate; a model this small never learns to remove much more.
    c.diffusion.update({"sigma_data": 0.5, "p_mean": -3.9, "p_std": 0.5, "estimate_probability": 1.0, "clip": 0.0})
    c.diffusion.sampler.update(
        {"num_steps": 2, "num_resamples": 1, "s_churn": 0.0, "sigma_min": 0.01, "sigma_max": 0.02}
    )
    c.consistency.update({"sigma_data": 0.5, "num_levels": 6, "sigma_min": 0.002, "sigma_max": 0.1})
    c.consistency.sampler.update({"sigma_max": 0.02, "clip": 0.0})
    c.data.update({"batch": 4, "mix_across_songs": 0.5, "gain_db": (-6.0, 6.0), "preload": True})
    c.optim.update({"lr": 1e-3, "schedule": "cosine", "warmup_steps": 50, "clip_norm": 1.0})
    c.train.update(
        {
            "steps": 2500,
            "steps_per_dispatch": 10,
            "log_every": 100,
            "validate_every": 500,
            "checkpoint_every": 500,
            "validation_windows": 16,
        }
    )
    return c
