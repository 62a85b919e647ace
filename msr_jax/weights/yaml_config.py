"""What the YAMLs beside public weights tell: the network's fields, stems, rate and chunk."""

from collections.abc import Iterator, Mapping
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
    except RecursionError as error:
        raise UserError(
            f"--config {path} is nested too deep to be read; take the YAML that came with the weights"
        ) from error
    if not isinstance(told, dict):
        raise UserError(f"--config {path} holds no fields")
    return told


def _mappings(told: Any) -> Iterator[Mapping[Any, Any]]:
    """The nested mappings from the outside in, each once: aliases may have one stand in many places, or inside of itself."""
    level, seen = [told], set()
    while level:
        found = [value for value in level if isinstance(value, Mapping)]
        level = []
        for value in found:
            if id(value) not in seen:
                seen.add(id(value))
                level += value.values()
                yield value


def find_section(told: Any, *names: str) -> dict[str, Any]:
    """The first mapping inside nested mappings that has all of these fields, from the outside in; {} if there is none."""
    return next((dict(value) for value in _mappings(told) if all(name in value for name in names)), {})


def find_sections(told: Mapping[str, Any], network: str) -> dict[str, Any]:
    """The sections of a config at one level, `model` among them with the fields of `network`, a name of a backbone.

    A section that is called so comes first, with whatever it holds: other mappings may have a dim and a depth too, as those that
    an anchor names. Without one it is the mapping that has both, or the config itself where fields stand at its top.
    """
    known = _known(network)
    for around in _mappings(told):
        section = find_section(around.get("model"), "dim", "depth") or around.get("model")
        if isinstance(section, Mapping) and known & set(section):
            return {**told, **around, "model": dict(section)}
    section = find_section(told, "dim", "depth") or told
    if not known & set(section):  # what another network has in its own is refused by name
        section = told["model"] if isinstance(told.get("model"), Mapping) else {}
    return {**told, "model": dict(section)}


def _known(network: str) -> set[str]:
    return {field.name for field in fields(NETWORKS[network])} - INNER - OURS


def told_sizes(told: Mapping[str, Any], network: str, where: str) -> dict[str, Any]:
    """The fields of `network`, a name of a backbone, among those of a published config, checked.

    Raises:
      UserError: a field asks for another network, or has a value that it cannot have.
    """
    refuse_foreign_fields(told, where)
    bands, other = {"mel_band_roformer": ("freqs_per_bands", "BS"), "bs_roformer": ("num_bands", "Mel-Band")}[network]
    if told.get(bands) is not None:
        raise UserError(f"{where} is of a {other}-RoFormer, by its {bands}; the weights are of the other family")
    for name, values in FIXED.items():
        if name in told and told[name] not in values:
            raise UserError(f"{where} says {name} = {told[name]}; only {values[-1]} is supported")
    for name in ("time_transformer_depth", "freq_transformer_depth"):
        if told.get(name) == 0 and (network == "mel_band_roformer" or name.startswith("time")):
            raise UserError(f"{where} says {name} = 0; a network without such transformers is not supported")
    shown = {name: value for name, value in told.items() if name in _known(network) and value is not None}
    return {name: check_field(f"model.{name}", value, f"{where}: ", model=network) for name, value in shown.items()}


def told_recipe(told: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """What a config of the public training code tells of `stems`, `sample_rate` and `segment`: its own name for it, and the value."""
    section = lambda name: found if isinstance(found := told.get(name), Mapping) else {}
    audio, training, inference = section("audio"), section("training"), section("inference")
    stems = [training["target_instrument"]] if training.get("target_instrument") else training.get("instruments")
    is_cut = inference.get("chunk_size") is not None
    found = {
        "stems": ("training.instruments", stems),
        "sample_rate": ("audio.sample_rate", audio.get("sample_rate")),
        "segment": ("inference.chunk_size", inference["chunk_size"])
        if is_cut
        else ("audio.chunk_size", audio.get("chunk_size")),
    }
    return {field: (name, value) for field, (name, value) in found.items() if value is not None}


def read_recipe(config: Any, told: Mapping[str, Any], where: str = "--config") -> None:
    """Sets stems, rate and segment of the model from a config of the public training code, where it tells them.

    Raises:
      UserError: more or fewer stems than the weights have, or a value that cannot be.
    """
    for field, (name, value) in told_recipe(told).items():
        config[field] = check_field(field, value, f"{where}: ", told=name)
    count = config.model["num_stems"]
    if len(config.stems) != count:
        shown = ", ".join(config.stems)
        raise UserError(f"{where} names {len(config.stems)} stems ({shown}), but the weights have {count}")
