"""Fields that all configs share, at their released values; `configs/README.md` has a line for each choice.

A config file is `get_config()` returning an `ml_collections.ConfigDict`; any leaf is overridden on the command line
with `--config.a.b=value`.
"""

from ml_collections import ConfigDict

# Bins of each band of the public BS-RoFormers, low to high.
BANDS = (2,) * 24 + (4,) * 12 + (12,) * 8 + (24,) * 8 + (48,) * 8 + (128, 129)
SLAKH_STEMS = ("bass", "drums", "guitar", "piano")
MUSDB_STEMS = ("drums", "bass", "other", "vocals")


def unet_base() -> ConfigDict:
    """The U-Net track on Slakh2100 at official sizes; method, optimiser and lengths of training are the stage's."""
    c = ConfigDict()
    c.seed = 0
    c.method = "deterministic"
    c.stems = SLAKH_STEMS
    c.sample_rate = 22_050  # Hz
    c.channels = 1
    c.segment = 262_144  # samples, 11.9 s
    c.compute_dtype = "bfloat16"
    c.input_level = 0.0
    c.loss = "mse"
    c.loss_hop = 147  # samples
    c.loss_floor = c.loss_floor_silent = 0.1  # of log_mse: power, in that of the mixture
    c.stem_choice = "example"
    c.model = ConfigDict(
        {
            "name": "unet1d",
            "in_channels": 1,
            "channels": 256,
            "patch_factor": 16,
            "multipliers": (1, 2, 4, 4, 4, 4, 4),
            "factors": (4, 4, 4, 2, 2, 2),
            "num_blocks": (2, 2, 2, 2, 2, 2),
            "attentions": (False, False, False, True, True, True),
            "attention_heads": 8,
            "attention_features": 128,
            "attention_multiplier": 2,
            "resnet_groups": 8,
            "kernel_multiplier_downsample": 2,
            "context_features": 4,
            "zero_init_output": False,
            "remat": (),
            "lora_rank": 0,
        }
    )
    c.diffusion = ConfigDict(
        {
            "sigma_data": 0.2,
            "p_mean": -3.0,
            "p_std": 1.0,
            "estimate_probability": 0.0,
            "loss_weight": "edm",
            "clip": 1.0,
            "control_sigma": 0.0,  # of det_x2: 0 is the network itself; else a denoiser's scalings at that level, without noise
            "sampler": {
                "num_steps": 2,
                "num_resamples": 2,
                "s_churn": 20.0,
                "sigma_min": 1e-4,
                "sigma_max": 0.01,
                "rho": 9.0,
                "solver": "euler",
            },
        }
    )
    c.consistency = ConfigDict(
        {
            "sigma_data": 0.2,
            "num_levels": 18,
            "sigma_min": 1e-4,
            "sigma_max": 10.0,
            "rho": 9.0,
            "draw": "released",
            "consistency_weight": 1.0,
            "dsm_weight": 1.0,
            "dsm_uniform_limit": 0.7,
            "target_rate": 0.999,
            "evaluate": "online",
            "sampler": {"num_steps": 1, "sigma_max": 0.01244, "renoise": "released", "clip": 1.0},
        }
    )
    c.optim = ConfigDict(
        {
            "name": "adam",
            "lr": 1e-4,
            "b1": 0.9,
            "b2": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "accumulate": 1,
            "clip_norm": 0.0,
            "schedule": "constant",
            "warmup_steps": 0,
            "decay_steps": 0,
            "final_lr": 0.0,
            "freeze": (),
        }
    )
    c.ema_rate = 0.0
    c.init_from = ConfigDict({"deterministic": "", "diffusion": "", "start": "", "warm_start": False})
    c.data = ConfigDict(
        {
            "train": "",
            "validation": "",
            "batch": 50,
            "crop": 262_144,
            "mix_across_songs": 0.0,
            "equal_songs": False,
            "gain_db": (0.0, 0.0),
            "validation_split": "validation",
            "tail": "drop",
            "min_active": 2,
            "workers": 0,
            "preload": False,
            "augment": {
                "channel_swap": 0.0,
                "reversal": 0.0,
                "polarity": 0.0,
                "pitch_shift": 0.0,
                "time_stretch": 0.0,
                "equaliser": 0.0,
                "distortion": 0.0,
                "noise": 0.0,
                "option_leak": True,
                "mixup": (0.0, 0.0),
                "mixup_gain": (1.0, 1.0),
                "loudness": (1.0, 1.0),
            },
        }
    )
    c.train = ConfigDict(
        {
            "steps": 100_000,
            "steps_per_dispatch": 1,
            "log_every": 50,
            "validate_every": 1000,
            "checkpoint_every": 1000,
            "keep": 2,
            "keep_best": 0,
            "checkpoints": "",
            "max_skipped": 10,
            "validation_windows": 64,
            "wandb_project": "",
        }
    )
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "fsdp_min_size": 65_536})
    return c


def musdb_data() -> ConfigDict:
    """The `data` section of the BS-RoFormer track: MUSDB18-HQ with the released mixing, augmentations and validation."""
    data = unet_base().data
    data.update(
        {
            "batch": 24,  # 8 on each of 3 devices
            "crop": 485_100,  # samples, 11 s
            "mix_across_songs": 1.0,
            "equal_songs": True,
            # As released: all of the test split, in windows that follow each other, the last one padded.
            "validation_split": "test",
            "tail": "pad",
            "min_active": 0,
            "workers": 4,
        }
    )
    data.augment.update({"channel_swap": 0.5, "reversal": 0.1, "polarity": 0.5})
    data.augment.update({effect: 0.1 for effect in ("pitch_shift", "time_stretch", "equaliser", "distortion", "noise")})
    # One further chunk, and independently another; then the gain of each chunk, and that of the stem.
    data.augment.update({"mixup": (0.2, 0.02), "mixup_gain": (0.5, 1.5), "loudness": (0.5, 1.5)})
    return data


def bsrf_base() -> ConfigDict:
    """The BS-RoFormer track on MUSDB18-HQ at official sizes; method, optimiser and lengths of training are the stage's."""
    c = unet_base()
    c.stems = MUSDB_STEMS
    c.sample_rate = 44_100  # Hz
    c.channels = 2
    c.segment = 485_100  # samples, 11 s
    c.data = musdb_data()
    c.loss = "l1_multires_stft"
    c.stem_choice = "batch"
    c.model = ConfigDict(
        {
            "name": "bs_roformer",
            "dim": 384,
            "depth": 8,
            "stereo": True,
            "num_stems": 4,
            "time_transformer_depth": 1,
            "freq_transformer_depth": 1,
            "linear_transformer_depth": 0,
            "freqs_per_bands": BANDS,
            "dim_head": 64,
            "heads": 8,
            "stft_n_fft": 2048,
            "stft_hop_length": 441,
            "stft_win_length": 2048,
            "stft_normalized": False,
            "zero_dc": True,
            "mask_estimator_depth": 2,
            "mlp_expansion_factor": 2,
            "skip_connection": False,
            "attention_bias": False,
            "attn_dropout": 0.1,
            "ff_dropout": 0.1,
            "stft_adapter_hidden": 128,
            "zero_init_output": False,
            "pass_mixture": 0.0,
            "mask_scale": 1.0,
            "remat": True,
            "lora_rank": 0,
        }
    )
    c.diffusion.update({"sigma_data": 0.06, "estimate_probability": 0.5})
    c.diffusion.sampler.update({"num_steps": 3, "num_resamples": 1, "s_churn": 1.0, "sigma_max": 0.002})
    c.consistency.update({"sigma_data": 0.06, "num_levels": 10, "sigma_max": 0.5})
    c.consistency.sampler.sigma_max = 0.003934  # of T = 1; the published value of T = 2 is 0.004391
    c.init_from.warm_start = True
    return c


def melrf_base() -> ConfigDict:
    """The BS-RoFormer track's recipe on a Mel-Band RoFormer of the shape that most public checkpoints have, with four stems."""
    c = bsrf_base()
    model = c.model.to_dict()
    del model["freqs_per_bands"]
    model |= {"name": "mel_band_roformer", "depth": 6, "mlp_expansion_factor": 4}
    # Bands follow from these and `stft_n_fft`.
    model |= {"num_bands": 60, "sample_rate": 44_100, "match_input_audio_length": False}
    c.model = ConfigDict(model)
    return c
