"""What the YAMLs beside public weights tell: the network's fields, stems, rate and chunk."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from msr_jax.config_fields import check_field
from msr_jax.errors import UserError
from msr_jax.models.mask_roformer import INNER
from msr_jax.weights.detect import refuse_foreign_fields
from msr_jax.weights.roformer_names import NETWORKS

# Fields that choose another network than the one here, and the values that are this one.
FIXED = {
    "stft_adapter_type": ("conv2d",),
    "time_emb_type": ("Positional",),
    "use_context_time": (True, False),
    "model_type": ("bs_roformer", "mel_band_roformer", "bs_roformer_stems_in_out_stem_cond_random_stem"),
    "ff_mult": (4,),
}
OURS = {"remat", "zero_init_output", "pass_mixture", "mask_scale"}  # fields of the modules that no YAML has


class _Yaml(yaml.SafeLoader):
    """Plain YAML, and tuples under the tag that the public training code writes; any other tag is refused."""


_Yaml.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A config of the public training code (sections model, audio, training, inference), or of the paper's program.

    Raises:
      UserError: unreadable, no mapping, or with a tag that would run something.
    """
    try:
        told = yaml.load(Path(path).read_text(), _Yaml)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        words = " ".join(str(error).split())
        raise UserError(f"--config {path} is not plain YAML, and nothing in it was run ({words})") from error
    if not isinstance(told, dict):
        raise UserError(f"--config {path} holds no fields")
    return told


def find_section(told: Any, *names: str) -> dict[str, Any]:
    """The first mapping inside nested mappings that has all of these fields, from the outside in; {} if there is none."""
    level = [told]
    while level:
        for value in level:
            if isinstance(value, Mapping) and all(name in value for name in names):
                return dict(value)
        level = [inner for value in level if isinstance(value, Mapping) for inner in value.values()]
    return {}


def told_sizes(told: Mapping[str, Any], network: str, where: str) -> dict[str, Any]:
    """The fields of `network`, a name of a backbone, among those of a published config, checked.

    Raises:
      UserError: a field asks for another network, or has a value that it cannot have.
    """
    refuse_foreign_fields(told, where)
    for name, values in FIXED.items():
        if name in told and told[name] not in values:
            raise UserError(f"{where} says {name} = {told[name]}; only {values[-1]} is supported")
    for name in ("time_transformer_depth", "freq_transformer_depth"):
        if told.get(name) == 0 and (network == "mel_band_roformer" or name.startswith("time")):
            raise UserError(f"{where} says {name} = 0; a network without such transformers is not supported")
    known = {field.name for field in fields(NETWORKS[network])} - INNER - OURS
    shown = {name: value for name, value in told.items() if name in known and value is not None}
    return {name: check_field(f"model.{name}", value, f"{where}: ", model=network) for name, value in shown.items()}


def read_recipe(config: Any, told: Mapping[str, Any], where: str = "--config") -> None:
    """Sets stems, rate and segment of the model from a config of the public training code, where it tells them.

    Raises:
      UserError: more or fewer stems than the weights have, or a value that cannot be.
    """
    section = lambda name: found if isinstance(found := told.get(name), Mapping) else {}
    audio, training, inference = section("audio"), section("training"), section("inference")
    stems = [training["target_instrument"]] if training.get("target_instrument") else training.get("instruments")
    count = config.model["num_stems"]
    if stems is None:
        stems = config.stems if count == len(config.stems) else [f"stem_{k}" for k in range(count)]
    config.stems = check_field("stems", stems, f"{where}: ", told="training.instruments")
    if len(config.stems) != count:
        shown = ", ".join(config.stems)
        raise UserError(f"{where} names {len(config.stems)} stems ({shown}), but the weights have {count}")
    for field, told_as, value in (
        ("sample_rate", "audio.sample_rate", audio.get("sample_rate")),
        ("segment", "audio.chunk_size", audio.get("chunk_size")),
        ("segment", "inference.chunk_size", inference.get("chunk_size")),
    ):
        if value is not None:
            config[field] = check_field(field, value, f"{where}: ", told=told_as)
