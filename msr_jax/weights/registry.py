"""Public models by name: the table of them, and their files, fetched and imported once."""

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from msr_jax.errors import UserError, first_line
from msr_jax.runtime import home
from msr_jax.weights.detect import clean_names, detect_arch
from msr_jax.weights.lightning import read_checkpoint
from msr_jax.weights.model_folder import BUNDLED, find_model, save_model
from msr_jax.weights.roformer_weights import read_roformer

TABLE = Path(__file__).with_name("registry.yaml")
HUB = "https://huggingface.co"
TIMEOUT = 30  # seconds without an answer
RATE = 44_100  # Hz, of all of them


@cache
def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Each model's fields by its name; `model` are those of its network."""
    table = yaml.safe_load(path.read_text())
    return {name: {**entry, "model": dict(table["shapes"][entry["shape"]])} for name, entry in table["models"].items()}


def told_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the YAML beside a model's weights tells, in its sections."""
    network = {**entry["model"], "num_stems": len(entry["stems"]), "heads": 8, "dim_head": 64}
    network |= {"time_transformer_depth": 1, "freq_transformer_depth": 1}
    return {
        "model": {name: value for name, value in network.items() if name != "network"},
        "audio": {"sample_rate": RATE, "chunk_size": entry["chunk"]},
        "training": {"instruments": list(entry["stems"])},
    }


def address_of(entry: Mapping[str, Any]) -> str:
    """Where the file is fetched from; HF_ENDPOINT names another server than the Hub itself."""
    file = entry["file"]
    if not file.startswith("hf:"):
        return file
    owner, repo, path = file.removeprefix("hf:").split("/", 2)
    return f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/{owner}/{repo}/resolve/main/{path}"


def page_of(entry: Mapping[str, Any]) -> str:
    """Where a person reads about it."""
    file = entry["file"]
    return f"{HUB}/{'/'.join(file.removeprefix('hf:').split('/')[:2])}" if file.startswith("hf:") else file


def terms_of(name: str, entry: Mapping[str, Any]) -> str:
    """Whose model it is and on what terms, in a line."""
    licence = entry.get("licence", "not said by the documents that this table was made from")
    return (
        f"{name} is by {entry.get('author', 'an unknown author')}; licence: {licence};"
        f" read its page before you use it: {page_of(entry)}"
    )


def folder_of(name: str) -> Path:
    """Where the model's folder is, once it has been fetched."""
    return home() / "models" / name


def is_at_hand(name: str) -> bool:
    """Whether the model has been fetched, and its folder is whole."""
    try:
        return bool(find_model(folder_of(name)))
    except UserError:
        return False


def find_named(place: str | Path, say: Callable[[str], None] = print) -> Path:
    """The model folder of `--model`: one that is there, or "bundled", or a name of the table, fetched and imported at its first use.

    Args:
      say: gets the terms and what goes on, before the download.

    Raises:
      UserError: neither; or the file cannot be fetched, is not the one that the table knows, or cannot be imported.
    """
    if os.path.exists(place) or os.sep in str(place):
        return Path(place)
    if str(place) == "bundled":
        return BUNDLED
    table = read_table(TABLE)
    if str(place) not in table:
        raise UserError(f"{place} is no folder and no name of a public model; `msr models` lists those")
    name = str(place)
    folder, entry = folder_of(name), table[name]
    if is_at_hand(name):
        return find_model(folder)
    say(terms_of(name, entry))
    say(f"fetching {entry['size'] / 1e6:.0f} MB from {address_of(entry)}")
    path = _fetch(name, entry)
    try:
        checkpoint = read_checkpoint(path)
        checkpoint = checkpoint._replace(state_dict=clean_names(checkpoint.state_dict))
        arch = detect_arch(checkpoint.state_dict, name)
        found = read_roformer(checkpoint, arch, told_of(entry), name, "the table of public models")
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model(folder, found.config, found.weights)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        path.unlink(missing_ok=True)
    say(f"imported into {folder}")
    return folder


def _fetch(name: str, entry: Mapping[str, Any]) -> Path:
    """The file of weights, its size and SHA-256 those of the table."""
    import pooch  # slow to import, and no model that is at hand needs it

    pooch.get_logger().setLevel("ERROR")
    address, known = address_of(entry), entry.get("sha256")
    ending = Path(entry["file"]).suffix
    try:
        path = pooch.retrieve(
            address, known, f"{name}{ending}", home() / "downloads", downloader=pooch.HTTPDownloader(timeout=TIMEOUT)
        )
    except ValueError as error:  # a checksum that differs; the file is gone then
        raise UserError(
            f"what {address} gives is not the file that the table of models knows (its SHA-256 is another); nothing was kept"
        ) from error
    except OSError as error:  # those of its HTTP client are
        if error.filename:  # a file's, not the network's
            raise UserError(f"cannot write to {home() / 'downloads'}: {error.strerror or error}") from error
        raise UserError(
            f"{name} is not in {folder_of(name).parent} yet and cannot be fetched; is there a network? ({first_line(error)})"
        ) from error
    size = Path(path).stat().st_size
    if size != entry["size"]:
        Path(path).unlink()
        raise UserError(
            f"{address} gave {size} bytes, not the {entry['size']} of the table of models; nothing was kept"
        )
    return Path(path)
