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


def unet_small() -> ConfigDict:
    """A U-Net of a few million parameters that learns something in minutes on a CPU; released recipe but where noted."""
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


def bsrf_small() -> ConfigDict:
    """A BS-RoFormer of a million parameters that learns something in minutes on a CPU; released recipe but where noted."""
    c = bsrf_base()
    c.segment = c.data.crop = 44_100  # samples, 1 s
    c.compute_dtype = "float32"
    c.model.update(
        {
            "dim": 48,
            "depth": 2,
            "freqs_per_bands": (4,) * 8 + (8,) * 8 + (32,) * 4 + (64,) * 4 + (128,) * 3 + (161,),
            "dim_head": 16,
            "heads": 4,
            "stft_hop_length": 1024,
            "mlp_expansion_factor": 1,
            "attn_dropout": 0.0,
            "ff_dropout": 0.0,
            "stft_adapter_hidden": 8,  # remat stays: a third faster on a CPU, there is less to store and to read again
        }
    )
    # Effects that a CPU computes for longer than it trains are left out.
    c.data.augment.update({"pitch_shift": 0.0, "time_stretch": 0.0, "equaliser": 0.0})
    # In dB: with L1, as released, a model this small answers with silence for a stem that it is unsure of.
    c.input_level, c.loss = 1.0, "log_mse"
    # σ_data as large as the noise: half of what comes out is then the network's. Trained on noise about as large as the error of
    # the estimate; sampled from less, which costs a model this small least (`msr sweep` on tracks that are not the test's).
    c.diffusion.update({"sigma_data": 0.1, "p_mean": -2.3, "p_std": 0.7, "estimate_probability": 1.0, "clip": 0.0})
    c.diffusion.sampler.update({"num_steps": 2, "s_churn": 0.0, "sigma_min": 0.01, "sigma_max": 0.03})
    c.consistency.update({"sigma_data": 0.1, "num_levels": 6, "sigma_min": 0.01, "sigma_max": 0.5})
    c.consistency.sampler.update({"sigma_max": 0.03, "clip": 0.0})
    c.data.update({"batch": 4, "preload": True, "workers": 0})
    c.data.update({"validation_split": "validation", "tail": "drop", "min_active": 2})
    c.optim.update({"name": "muon", "lr": 2e-3, "schedule": "cosine", "warmup_steps": 50, "clip_norm": 1.0})
    c.train.update(
        {
            "steps": 1500,
            "steps_per_dispatch": 10,
            "log_every": 50,
            "validate_every": 500,
            "checkpoint_every": 500,
            "validation_windows": 16,
        }
    )
    return c


def bundled() -> ConfigDict:
    """The model that ships: a mono BS-RoFormer for Slakh's stems, small enough to train and to run on a CPU."""
    c = bsrf_small()
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
    c.optim.schedule = "constant"
    c.train.update({"steps_per_dispatch": 1, "checkpoint_every": 200})
    c.ema_rate = 0.999
    return c


def short() -> ConfigDict:
    """The bundled model's sizes for the short study: one set of tracks for every stage, a separator of a quarter of an hour."""
    c = bundled()
    # A refinement begins with the frozen separator's own parameters. σ_data far below every σ: next to nothing of the input is
    # kept, and the separator's masks, on the mixture that is passed to them, give the estimate from the first step on.
    c.model.mask_scale = 1.0
    c.diffusion.update({"sigma_data": 0.02, "p_mean": -0.25, "p_std": 0.8})
    c.diffusion.sampler.update({"sigma_min": 0.5, "sigma_max": 1.0})
    c.consistency.update({"sigma_data": 0.02, "sigma_min": 0.15, "sigma_max": 4.0})
    c.consistency.sampler.sigma_max = 4.0
    c.optim.schedule = "linear"
    return c


def short_refined() -> ConfigDict:
    """What the refinements of the short study share."""
    c = short()
    # And the noised estimate once: the denoiser scales what its network gives by σ_data, a fiftieth.
    c.model.pass_mixture = 49.0
    c.loss_floor = 1e-3
    c.stem_choice = "all"
    c.optim.lr = 1e-3
    c.train.steps = 380
    return c
