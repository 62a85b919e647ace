"""Every field of a config: its kind, its range and what it means; and the check of values against them.

The one table behind the list in `configs/README.md`, `msr train --help-config`, and the check of config files, overrides,
model folders and the YAML that comes with public weights.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msr_jax.errors import UserError


class Field(NamedTuple):
    """One row.

    kind: a key of `KINDS`.
    range: of numbers, conditions that all hold ("≥ 0, < 1") or one of several ("-1 or ≥ 1"), for each number of a list; of
      text, the choices ("mse | log_mse"); "" is anything.
    """

    name: str
    kind: str
    range: str
    meaning: str


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _all(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(test(v) for v in value)


def is_plain_name(value: Any) -> bool:
    """Whether a file can be called so in any folder, and is then in it."""
    return (
        isinstance(value, str)
        and value.strip(" .") == value != ""
        and value.isprintable()
        and not set(value) & set('/\\:*?"<>|')
    )


def _are_names(value: Any) -> bool:
    return _all(is_plain_name)(value) and len({v.casefold() for v in value}) == len(value) > 0


# What each kind is called in words, and how it is told.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", _is_whole),
    "float": ("a number", _is_real),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "text": ("text", lambda value: isinstance(value, str)),
    "names": ("a list of names that files can have, each once", _are_names),
    "texts": ("a list of texts", _all(lambda value: isinstance(value, str))),
    "ints": ("a list of whole numbers", _all(_is_whole)),
    "bools": ("a list of true or false", _all(lambda value: isinstance(value, bool))),
    "floats": ("a list of numbers", _all(_is_real)),
    "low, high": ("two numbers, the lower one first", lambda v: _all(_is_real)(v) and len(v) == 2 and v[0] <= v[1]),
}  # fmt: skip

FIELDS = (
    Field("seed", "int", "≥ 0, < 4294967296", "of initialisation, noise and data order; the same seed on the same devices gives the same run to the bit"),
    Field("method", "text", "deterministic | diffusion | consistency | det_x2", "the stage; `det_x2` is the paper's control, a second deterministic network on the first"),
    Field("stems", "names", "", "what the model separates"),
    Field("sample_rate", "int", "≥ 1, < 2147483648", "Hz"),
    Field("channels", "int", "≥ 1, < 2147483648", "of mixture and stems"),
    Field("segment", "int", "≥ 1, < 2147483648", "samples per network call in separation"),
    Field("compute_dtype", "text", "bfloat16 | float32", "of matrix products and activations; parameters, norms, losses and samplers are float32. A CPU on which products in bfloat16 are no faster computes in float32 either way"),
    Field("input_level", "float", "≥ 0", "0: waveforms go in as they are (released); else each mixture is scaled to this RMS and results are scaled back"),
    Field("loss", "text", "", "`mse`, `l1_multires_stft` (the BS-RoFormer track's), `log_mse` (level of the error in dB: quiet stems count more nearly as much as loud ones; use with `input_level`), or one of your own"),
    Field("loss_hop", "int", "≥ 1, < 2147483648", "samples between the spectra of `l1_multires_stft`"),
    Field("loss_floor", "float", "> 0", "of `log_mse`: power added for stems that sound, in that of the mixture"),
    Field("loss_floor_silent", "float", "> 0", "of `log_mse`: the same for silent stems"),
    Field("stem_choice", "text", "example | batch | all", "a mixture's target: the stem of its label (U-Net track), one stem for the whole batch (BS-RoFormer track), or every stem in turn, for which the deterministic network and the adapters run once"),
    Field("diffusion.sigma_data", "float", "> 0", "σ_data of the denoiser"),
    Field("diffusion.p_mean", "float", "", "mean of ln σ in training"),
    Field("diffusion.p_std", "float", "≥ 0", "standard deviation of ln σ in training"),
    Field("diffusion.estimate_probability", "float", "≥ 0, ≤ 1", "how often training starts from the estimate instead of the clean stem"),
    Field("diffusion.loss_weight", "text", "edm | none", "`edm`: (σ² + σ_data²)/(σ σ_data)²"),
    Field("diffusion.clip", "float", "≥ 0", "the denoiser clamps to ± this, in training and sampling; 0 does not clamp"),
    Field("diffusion.control_sigma", "float", "≥ 0", "of `det_x2`: 0 is the network as it is, else the scalings of a denoiser at that level are put around it, without noise"),
    Field("diffusion.sampler.num_steps", "int", "≥ 1, < 2147483648", "T"),
    Field("diffusion.sampler.num_resamples", "int", "≥ 1, < 2147483648", "R: runs of every transition, with noising back in between"),
    Field("diffusion.sampler.s_churn", "float", "≥ 0", "S_churn: noise added at every transition"),
    Field("diffusion.sampler.sigma_min", "float", "> 0", "σ of the last step"),
    Field("diffusion.sampler.sigma_max", "float", "> 0", "σ that the estimate is noised to"),
    Field("diffusion.sampler.rho", "float", "> 0", "spacing of the levels in between"),
    Field("diffusion.sampler.solver", "text", "", "`euler`, `heun`, or one of your own"),
    Field("consistency.sigma_data", "float", "> 0", "σ_data of the consistency function"),
    Field("consistency.num_levels", "int", "≥ 2, < 2147483648", "levels of the distillation grid"),
    Field("consistency.sigma_min", "float", "> 0", "lowest level of the grid, at which the function is the identity"),
    Field("consistency.sigma_max", "float", "> 0", "highest level of the grid"),
    Field("consistency.rho", "float", "> 0", "spacing of the grid, and of the sampler's levels"),
    Field("consistency.draw", "text", "released | paper", "how level and number of the teacher's steps are drawn"),
    Field("consistency.consistency_weight", "float", "≥ 0", "weight of the distillation term"),
    Field("consistency.dsm_weight", "float", "≥ 0", "weight of the denoising term"),
    Field("consistency.dsm_uniform_limit", "float", "> 0, ≤ 1", "upper end of the uniform half of the denoising term's levels, as a part of the grid"),
    Field("consistency.target_rate", "float", "≥ 0, ≤ 1", "rate of the student's running average, the target"),
    Field("consistency.evaluate", "text", "online | target", "which of the two separates; `online` is the student's average where `ema_rate` keeps one"),
    Field("consistency.sampler.num_steps", "int", "≥ 1, < 2147483648", "T"),
    Field("consistency.sampler.sigma_max", "float", "> 0", "σ that the estimate is noised to"),
    Field("consistency.sampler.renoise", "text", "released | standard", "`standard`: noise after every call but the last; `released`: not before the last either"),
    Field("consistency.sampler.clip", "float", "≥ 0", "the result is clamped to ± this; 0 does not clamp"),
    Field("optim.name", "text", "adam | radam | adamw | prodigy | muon", "`adam` and `radam` as released, without decay; `prodigy` takes lr as a factor, 1.0; `muon` moves matrices and convolutions, AdamW the rest"),
    Field("optim.lr", "float", "≥ 0", "learning rate"),
    Field("optim.b1", "float", "≥ 0, < 1", "rate of the first moment (of `muon`'s matrices it is 0.95)"),
    Field("optim.b2", "float", "≥ 0, < 1", "rate of the second moment"),
    Field("optim.eps", "float", "> 0", "added to the root of the second moment"),
    Field("optim.weight_decay", "float", "≥ 0", "decoupled; of `adamw`, `prodigy` and `muon`"),
    Field("optim.accumulate", "int", "≥ 1, < 2147483648", "micro-batches of `data.batch` per optimiser step"),
    Field("optim.clip_norm", "float", "≥ 0", "largest global norm of the gradient; 0 does not clip"),
    Field("optim.schedule", "text", "constant | cosine | linear", "of the learning rate; the released configs' is constant"),
    Field("optim.warmup_steps", "int", "≥ 0, < 2147483648", "steps over which the rate rises from 0"),
    Field("optim.decay_steps", "int", "≥ 0, < 2147483648", "steps over which it falls, the last ones; 0: all after the warm-up"),
    Field("optim.final_lr", "float", "≥ 0", "rate that `cosine` and `linear` have come to when the last step is done"),
    Field("optim.freeze", "texts", "", "patterns of parameters' paths, such as `band_split/*`, that stay as they are"),
    Field("ema_rate", "float", "≥ 0, < 1", "rate of a running average of the parameters, at step t at most (1 + t)/(10 + t); 0 keeps none (released)"),
    Field("init_from.deterministic", "text", "", "model folder, or working directory of a run, of the separator to refine; for the deterministic stage, of the parameters to go on from (fine-tuning)"),
    Field("init_from.diffusion", "text", "", "the same of the teacher of `consistency`"),
    Field("init_from.start", "text", "", "with `warm_start`, another separator of the same sizes whose parameters `diffusion` or `det_x2` begins with instead of the frozen one's: two that were trained apart err apart"),
    Field("init_from.warm_start", "bool", "", "whether `diffusion` or `det_x2` begins with the deterministic parameters where names match"),
    Field("data.train", "text", "", "folder of records"),
    Field("data.validation", "text", "", "folder of records; none validates"),
    Field("data.batch", "int", "≥ 1, < 2147483648", "examples of a micro-batch, over all devices, whose number divides it"),
    Field("data.crop", "int", "≥ 1, < 2147483648", "samples of an example"),
    Field("data.mix_across_songs", "float", "≥ 0, ≤ 1", "probability that stems come from different songs"),
    Field("data.equal_songs", "bool", "", "songs alike (released for MUSDB18), else by length"),
    Field("data.gain_db", "low, high", "", "dB, range of a gain per stem"),
    Field("data.validation_split", "text", "train | validation | test", "the split that validates. Released: validation for Slakh2100, **test** for MUSDB18 (`data_prep.musdb18hq --validation` holds songs out)"),
    Field("data.tail", "text", "drop | pad", "what becomes of the end of a validation track; `pad`: with silence (MUSDB18)"),
    Field("data.min_active", "int", "≥ 0, < 2147483648", "stems that must sound in a validation window. Released: 2 for Slakh2100, 0 for MUSDB18"),
    Field("data.workers", "int", "≥ 0", "processes that load the data; 0 loads in threads"),
    Field("data.preload", "bool", "", "decode all records into memory"),
    Field("data.augment.channel_swap", "float", "≥ 0, ≤ 1", "probability per stem; ranges of the effects are in `msr_jax/data/augment.py`"),
    Field("data.augment.reversal", "float", "≥ 0, ≤ 1", "probability per stem"),
    Field("data.augment.polarity", "float", "≥ 0, ≤ 1", "probability per stem"),
    Field("data.augment.pitch_shift", "float", "≥ 0, ≤ 1", "probability per stem, in the workers"),
    Field("data.augment.time_stretch", "float", "≥ 0, ≤ 1", "probability per stem, in the workers"),
    Field("data.augment.equaliser", "float", "≥ 0, ≤ 1", "probability per stem"),
    Field("data.augment.distortion", "float", "≥ 0, ≤ 1", "probability per stem"),
    Field("data.augment.noise", "float", "≥ 0, ≤ 1", "probability per stem"),
    Field("data.augment.option_leak", "bool", "", "a stem's options leak into the others, as in the released program"),
    Field("data.augment.mixup", "floats", "≥ 0, ≤ 1", "probabilities of a first and of a second further chunk of a stem"),
    Field("data.augment.mixup_gain", "low, high", "≥ 0", "range of each chunk's gain"),
    Field("data.augment.loudness", "low, high", "≥ 0", "range of a stem's gain"),
    Field("train.steps", "int", "≥ 1, < 2147483648", "optimiser steps of the stage, a multiple of `steps_per_dispatch` like the next three"),
    Field("train.log_every", "int", "≥ 1, < 2147483648", "steps"),
    Field("train.validate_every", "int", "≥ 1, < 2147483648", "steps"),
    Field("train.checkpoint_every", "int", "≥ 1, < 2147483648", "steps"),
    Field("train.steps_per_dispatch", "int", "≥ 1, < 2147483648", "steps that run as one compiled scan"),
    Field("train.keep", "int", "≥ 1", "newest checkpoints that stay"),
    Field("train.keep_best", "int", "≥ 0", "best checkpoints by validation that stay too"),
    Field("train.checkpoints", "text", "", "another place for checkpoints, such as `gs://…`"),
    Field("train.max_skipped", "int", "≥ 0, < 2147483648", "steps whose loss or gradient is not finite change nothing and are counted; more than so many in a row end the run"),
    Field("train.validation_windows", "int", "≥ 0, < 2147483648", "windows of a validation, spread over the split; 0 takes all"),
    Field("train.wandb_project", "text", "", "logs to W&B too (pip install wandb)"),
    Field("mesh.data", "int", "-1 or ≥ 1", "devices that share the batch; -1 takes what is left"),
    Field("mesh.fsdp", "int", "-1 or ≥ 1", "devices that share the parameters too"),
    Field("mesh.fsdp_min_size", "int", "≥ 0, < 2147483648", "arrays of fewer elements are not split"),
)  # fmt: skip

_ZERO_INIT = Field(
    "zero_init_output",
    "bool",
    "",
    "starts the last block (RoFormers: the masks) at zero, after a warm start too; off as published",
)

_LORA = Field(
    "lora_rank",
    "int",
    "≥ 0, < 2147483648",
    "trains adapters of that rank beside the matrices of attention and feed-forward instead of the network, and merges them into it when the model is written; 0: none",
)

# What the RoFormers have in common.
_ROFORMER = (
    Field("dim", "int", "≥ 1, < 2147483648", "width of a token"),
    Field("depth", "int", "≥ 1, < 2147483648", "layers"),
    Field("stereo", "bool", "", "two channels, else one"),
    Field("num_stems", "int", "≥ 1, < 2147483648", "the number of `stems`"),
    Field("time_transformer_depth", "int", "≥ 0, < 2147483648", "transformers over time in each layer"),
    Field("freq_transformer_depth", "int", "≥ 0, < 2147483648", "transformers over bands in each layer"),
    Field("linear_transformer_depth", "int", "≥ 0, < 2147483648", "transformers of linear attention in each layer"),
    Field("dim_head", "int", "≥ 2, < 2147483648", "of each head, even"),
    Field("heads", "int", "≥ 1, < 2147483648", ""),
    Field("stft_n_fft", "int", "≥ 2, < 2147483648", "samples of a transform"),
    Field("stft_hop_length", "int", "≥ 1, < 2147483648", "samples from one frame to the next"),
    Field("stft_win_length", "int", "≥ 1, < 2147483648", "samples of the window"),
    Field("stft_normalized", "bool", "", "spectra divided by the root of `stft_n_fft`"),
    Field("zero_dc", "bool", "", "sets the lowest bin of the estimates to zero"),
    Field("mask_estimator_depth", "int", "≥ 1, < 2147483648", "layers of a mask head (Mel-Band: those inside of it, one fewer)"),
    Field("mlp_expansion_factor", "int", "≥ 1, < 2147483648", "width of the layers inside a mask head, in `dim`"),
    Field("skip_connection", "bool", "", "adds what earlier layers gave to the input of each"),
    Field("attention_bias", "bool", "", "biases of the projections of attention, which a few public weights have"),
    Field("attn_dropout", "float", "≥ 0, < 1", "in training"),
    Field("ff_dropout", "float", "≥ 0, < 1", "in training"),
    Field("stft_adapter_hidden", "int", "≥ 1, < 2147483648", "channels inside the adapter of the spectrum"),
    _ZERO_INIT,
    Field("pass_mixture", "float", "", "starts a refiner's spectrum adapter with so many times the mixture's spectrum; 0 as published"),
    Field("mask_scale", "float", "", "multiplies what a refiner's masks give; 1 as published"),
    Field("remat", "bool", "", "computes what lies inside of transformers and mask heads again in the backward pass"),
    _LORA,
)  # fmt: skip

# The fields of `model`, by its `name`: the networks' sizes under their published names. A backbone that is not here, such as one
# of your own, checks its fields itself.
MODEL_FIELDS = {
    "unet1d": (
        Field("in_channels", "int", "≥ 1, < 2147483648", "= `channels`"),
        Field("channels", "int", "≥ 1, < 2147483648", "of the first level"),
        Field("patch_factor", "int", "≥ 1, < 2147483648", "samples of a patch; divides `channels`"),
        Field("multipliers", "ints", "≥ 1, < 2147483648", "of `channels`, at the first level and after each of the others"),
        Field("factors", "ints", "≥ 1, < 2147483648", "by which each level samples down"),
        Field("num_blocks", "ints", "≥ 1, < 2147483648", "residual blocks of each level"),
        Field("attentions", "bools", "", "whether each level has a transformer"),
        Field("attention_heads", "int", "≥ 1, < 2147483648", ""),
        Field("attention_features", "int", "≥ 1, < 2147483648", "of each head"),
        Field("attention_multiplier", "int", "≥ 1, < 2147483648", "width of the feed-forward part"),
        Field("resnet_groups", "int", "≥ 1, < 2147483648", "of the group norms"),
        Field("kernel_multiplier_downsample", "int", "≥ 1, < 2147483648", "taps of a down-sampling, per factor"),
        Field("context_features", "int", "≥ 1, < 2147483648", "the number of `stems`"),
        _ZERO_INIT,
        Field("remat", "ints", "≥ 0, < 2147483648", "levels (0 is the shallowest) whose activations are computed again in the backward pass"),
        _LORA,
    ),
    "bs_roformer": (
        *_ROFORMER,
        Field("freqs_per_bands", "ints", "≥ 1, < 2147483648", "bins of each band, `stft_n_fft`/2 + 1 in all"),
    ),
    "mel_band_roformer": (
        *_ROFORMER,
        Field("num_bands", "int", "≥ 1, < 2147483648", "mel bands, which overlap; with `sample_rate` and `stft_n_fft` they make their widths"),
        Field("sample_rate", "int", "≥ 1, < 2147483648", "Hz, of the mel bands"),
        Field("match_input_audio_length", "bool", "", "whether the published program answers with all samples, or with whole hops; here it is all"),
    ),
}  # fmt: skip

# What a step takes of training data, in samples: a thousand times what the largest machine holds, and little enough for
# compilers, which end the process where a product of sizes leaves 64 bits.
OF_A_STEP = ("optim.accumulate", "data.batch", "data.crop", "channels")
LARGEST_STEP = 2**48

# Pairs that must rise.
RISING = (
    ("diffusion.sampler.sigma_min", "diffusion.sampler.sigma_max"),
    ("consistency.sigma_min", "consistency.sigma_max"),
)
# In a recipe alone: model folders of other programs hold others, and are computed as they say.
RISING_IN_RECIPES = (("consistency.sigma_min", "consistency.sampler.sigma_max"),)


def fields_of(model: str) -> dict[str, Field]:
    """The rows by full name, with those of the backbone `model` ("unet1d")."""
    own = (f._replace(name=f"model.{f.name}") for f in MODEL_FIELDS.get(model, ()))
    return {f.name: f for f in (*FIELDS, *own)}


def _within(value: float, conditions: str) -> bool:
    """Whether a number meets "≥ 0, < 1", or "-1 or ≥ 1"."""
    tests = {
        "≥": lambda bound: value >= bound,
        ">": lambda bound: value > bound,
        "≤": lambda bound: value <= bound,
        "<": lambda bound: value < bound,
    }

    def holds(condition: str) -> bool:
        sign, _, bound = condition.rpartition(" ")
        return tests[sign](float(bound)) if sign else value == float(bound)

    return any(all(holds(c) for c in part.split(", ")) for part in conditions.split(" or "))


def _fits(field: Field, value: Any) -> bool:
    if not KINDS[field.kind][1](value):
        return False
    if not field.range:
        return True
    if field.kind == "text":
        return value in field.range.split(" | ")
    numbers = value if isinstance(value, list | tuple) else () if isinstance(value, bool) else (value,)
    return all(_within(v, field.range) for v in numbers)


OF_32_BITS = ", < 2147483648"  # told to whom it matters


def _wanted(field: Field, value: Any) -> str:
    if field.kind == "text" and field.range:
        return f"one of {field.range.replace(' | ', ', ')}"
    is_huge = any(_is_whole(v) and v >= 2**31 for v in (value if isinstance(value, list | tuple) else [value]))
    limits = (field.range if is_huge else field.range.removesuffix(OF_32_BITS)).replace(", ", " and ")
    for sign, words in (("≥", "at least"), (">", "above"), ("≤", "at most"), ("<", "below")):
        limits = limits.replace(sign, words)
    return limits if KINDS[field.kind][1](value) else f"{KINDS[field.kind][0]}{limits and ', '}{limits}"


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def check_field(name: str, value: Any, where: str, told: str = "", model: str = "bs_roformer") -> Any:
    """A value from outside, checked by its row; lists come back as tuples.

    Args:
      name: the field, such as "sample_rate" or "model.dim".
      where: begins the sentence, such as "--config x.yaml: ".
      told: the field's name there, if it is another, such as "audio.sample_rate".
      model: the backbone, for a name that begins with "model.".

    >>> check_field("model.freqs_per_bands", [2, 2, 4], "config.")
    (2, 2, 4)
    >>> check_field("sample_rate", "44.1k", "x.yaml: ", "audio.sample_rate")
    Traceback (most recent call last):
    msr_jax.errors.UserError: x.yaml: audio.sample_rate must be a whole number, at least 1, not "44.1k"

    Raises:
      UserError: another kind, or out of range.
      KeyError: no such field.
    """
    field = fields_of(model)[name]
    if not _fits(field, value):
        raise UserError(f"{where}{told or name} must be {_wanted(field, value)}, not {_shown(value)}")
    return tuple(value) if isinstance(value, list) else value


def leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 3e-4, …} of nested mappings.

    >>> leaves({"seed": 0, "optim": {"lr": 3e-4}})
    {'seed': 0, 'optim.lr': 0.0003}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _check_sections(config: Mapping[str, Any], known: Mapping[str, Field], where: str, prefix: str = "") -> None:
    """Raises UserError where a field stands for a section, or a section for a field."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        is_section = any(field.startswith(f"{name}.") for field in known)
        if isinstance(value, Mapping) and name in known:
            raise UserError(f"{where}{name} must be {_wanted(known[name], value)}, not {_shown(value)}")
        if is_section and not isinstance(value, Mapping):
            raise UserError(f"{where}{name} must be a section with fields of its own, not {_shown(value)}")
        if isinstance(value, Mapping):
            _check_sections(value, known, where, f"{name}.")


def check_config(config: Mapping[str, Any], where: str = "config.", is_whole: bool = True) -> None:
    """Check all fields of a config, and those that have to fit each other.

    Args:
      config: nested mappings; what is under `own` is yours and is not looked at.
      where: begins the sentence.
      is_whole: refuse names that are no field's; a model folder may have some of another version's.

    Raises:
      UserError: a field of another kind, out of range, unknown, or that contradicts another.
    """
    model = config.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    if not isinstance(name, str):
        raise UserError(f"{where}model must be a section with a name and the sizes of a network, not {_shown(model)}")
    known, found = fields_of(name), leaves(config)
    _check_sections(config, known, where)
    for key, value in found.items():
        if key == "model.name" or key.startswith("own.") or (key.startswith("model.") and name not in MODEL_FIELDS):
            continue
        if key in known:
            check_field(key, value, where, model=name)
        elif is_whole:
            raise UserError(f"{where}{key} is no setting; those of your own go under `own`, as config.own.NAME")
    per = found.get("train.steps_per_dispatch", 1)
    for key in ("steps", "log_every", "validate_every", "checkpoint_every"):
        if (steps := found.get(f"train.{key}", per)) % per:
            raise UserError(
                f"{where}train.{key} ({steps}) must be a positive multiple of train.steps_per_dispatch ({per})"
            )
    for low, high in (*RISING, *(RISING_IN_RECIPES if is_whole else ())):
        if low in found and high in found and found[low] > found[high]:
            raise UserError(f"{where}{low} ({found[low]}) must be at most {high} ({found[high]})")
    _check_sizes(found, name, where)
    taken = {key: found.get(key, 1) for key in OF_A_STEP}
    if (samples := math.prod(taken.values())) > LARGEST_STEP:
        raise UserError(
            f"{where}{' × '.join(taken)} is {samples} samples a step, more than any machine holds; take less"
        )
    bands_at, rate = found.get("model.sample_rate"), found.get("sample_rate")
    if is_whole and None not in (bands_at, rate) and bands_at != rate:
        raise UserError(f"{where}sample_rate is {rate}, and model.sample_rate, at which bands are laid out, {bands_at}")


def _check_sizes(found: Mapping[str, Any], name: str, where: str) -> None:
    """Raises UserError unless the network takes the config's channels and stems."""
    roformer = {"channels": 2 if found.get("model.stereo") else 1, "stems": found.get("model.num_stems")}
    sizes = {
        "unet1d": {"channels": found.get("model.in_channels"), "stems": found.get("model.context_features")},
        "bs_roformer": roformer,
        "mel_band_roformer": roformer,
    }.get(name, {})
    for key, size in sizes.items():
        given = found.get(key)
        count = len(given) if isinstance(given, Sequence) else given
        if None not in (size, count) and count != size:
            raise UserError(f"{where}{key} is {_shown(given)}, and the network of config.model takes {size}")


def table(rows: Sequence[Field], prefix: str = "") -> str:
    """Rows as a Markdown table."""
    cell = lambda text: text.replace("|", "\\|")
    lines = ["| field | kind | range | meaning |", "|---|---|---|---|"]
    for f in rows:
        shown = ", ".join(f"`{c}`" for c in f.range.split(" | ")) if f.kind == "text" and f.range else f.range
        lines.append(f"| `{prefix}{f.name}` | {f.kind} | {shown} | {cell(f.meaning)} |")
    return "\n".join(lines)


def tables() -> str:
    """All fields in Markdown, as in `configs/README.md`."""
    parts = [table(FIELDS)]
    for name, rows in MODEL_FIELDS.items():
        parts.append(f"With `model.name` `{name}`:\n\n{table(rows, 'model.')}")
    return "\n\n".join(parts)
