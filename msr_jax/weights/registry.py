"""Public models by name: the table of them, and their files, fetched and imported once."""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from msr_jax.errors import UserError, first_line, is_of_disk
from msr_jax.files import clear, passing
from msr_jax.machine import home
from msr_jax.weights.detect import clean_names, detect_arch
from msr_jax.weights.lightning import read_checkpoint
from msr_jax.weights.model_folder import BUNDLED, find_model, is_whole, save_model
from msr_jax.weights.roformer_weights import read_roformer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TABLE = Path(__file__).with_name("registry.yaml")
HUB = "https://huggingface.co"
TIMEOUT = 30  # seconds without an answer


@cache
def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Each model's fields by its name; `model` are those of its network, `rate` is in Hz."""
    table = yaml.safe_load(path.read_text())
    of_shape = lambda entry: {"model": dict(table["shapes"][entry["shape"]]), "rate": table["rate"]}
    return {name: {**of_shape(entry), **entry} for name, entry in table["models"].items()}


def told_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the YAML beside a model's weights tells, in its sections."""
    network = {**entry["model"], "num_stems": len(entry["stems"]), "heads": 8, "dim_head": 64}
    network |= {"time_transformer_depth": 1, "freq_transformer_depth": 1}
    return {
        "model": {name: value for name, value in network.items() if name != "network"},
        "audio": {"sample_rate": entry["rate"], "chunk_size": entry["chunk"]},
        "training": {"instruments": list(entry["stems"])},
    }


def address_of(entry: Mapping[str, Any]) -> str:
    """Where the file is fetched from; HF_ENDPOINT names another server than the Hub itself."""
    file = entry["file"]
    if not file.startswith("hf:"):
        return file
    owner, repo, path = file.removeprefix("hf:").split("/", 2)
    return f"{(os.environ.get('HF_ENDPOINT') or HUB).rstrip('/')}/{owner}/{repo}/resolve/main/{path}"


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


def refuse_url(place: str) -> None:
    """Raises UserError for an address where a file or folder of this machine is named."""
    if re.match(r"https?:/", place):  # a path has lost a slash of it
        raise UserError(
            f"{place} is an address on the web: import a file of the Hub as hf:OWNER/REPO/FILE, or download it and name the file"
        )


def folder_of(name: str) -> Path:
    """Where the model's folder is, once it has been fetched."""
    return home() / "models" / name


def is_at_hand(name: str) -> bool:
    """Whether the model has been fetched, and its folder is whole."""
    try:
        return is_whole(folder_of(name))
    except UserError:  # there is no place for it
        return False


def find_named(place: str | Path, say: Callable[[str], None] = print) -> Path:
    """The model folder of `--model`: one that is there, or "bundled", or a name of the table, fetched and imported at its first use.

    Args:
      say: gets the terms and what goes on, before the download.

    Raises:
      UserError: neither; or the file cannot be fetched, is not the one that the table knows, or cannot be imported; or
        HF_HUB_OFFLINE forbids to fetch it.
    """
    refuse_url(str(place))
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
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):  # as the Hub's own library reads it
        state = "not whole in" if folder.exists() else "not in"
        raise UserError(f"{name} is {state} {folder.parent}, and HF_HUB_OFFLINE forbids to fetch it; unset that")
    with _alone(name, say):
        if is_at_hand(name):  # another process has fetched it meanwhile
            return find_model(folder)
        if folder.exists():
            if not (folder / "config.json").is_file():  # not known to be a model's: it would not be replaced
                raise UserError(f"{folder} holds no model; remove it, and {name} is fetched again")
            say(f"{folder} is damaged, and is replaced")
        say(terms_of(name, entry))
        say(f"fetching {entry['size'] / 1e6:.0f} MB from {address_of(entry)}")
        place = passing(_downloads() / name)  # a folder, of this process alone where there are no locks
        try:
            _import(name, entry, _fetch(name, entry, place))
        finally:
            clear(place)
    say(f"imported into {folder}")
    return folder


def _downloads() -> Path:
    return home() / "downloads"


@contextmanager
def _alone(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, no other process fetches the model of that name; what those that were killed had fetched of it is gone.

    Without locks (Windows, some disks of several hosts) each process fetches for itself.

    Raises:
      UserError: the folder of downloads cannot be written to.
    """
    try:
        _downloads().mkdir(parents=True, exist_ok=True)
        file = os.open(_downloads() / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write to {_downloads()}: {error.strerror or error}") from error
    try:
        if _lock(file, lambda: say(f"another process fetches {name}; waiting for it")):
            for left in _downloads().glob(f".{glob.escape(name)}.*.tmp"):
                clear(left)
        yield
    finally:
        os.close(file)


def _lock(file: int, waits: Callable[[], None]) -> bool:
    """Hold a file's lock until it is closed; False where there are no locks. `waits` is called before any waiting."""
    if not fcntl:
        return False
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _import(name: str, entry: Mapping[str, Any], path: Path) -> None:
    """Write the model folder of a file that was fetched."""
    folder = folder_of(name)
    try:
        checkpoint = read_checkpoint(path)
        checkpoint = checkpoint._replace(state_dict=clean_names(checkpoint.state_dict))
        arch = detect_arch(checkpoint.state_dict, name)
        found = read_roformer(checkpoint, arch, told_of(entry), name, "the table of public models")
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model(folder, found.config, found.weights)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    except UserError as error:  # it may name the file, which is gone by the time that this is read
        raise UserError(str(error).replace(str(path), address_of(entry))) from error


def _fetch(name: str, entry: Mapping[str, Any], place: Path) -> Path:
    """The file of weights, in the folder `place`, its size and SHA-256 those of the table."""
    import pooch  # slow to import, and no model that is at hand needs it
    import requests

    address, path = address_of(entry), place / f"{name}{Path(entry['file']).suffix}"
    try:
        place.mkdir(parents=True)
        pooch.HTTPDownloader(timeout=TIMEOUT)(address, str(path), None)
    except (OSError, ValueError) as error:  # those of its HTTP client are OSErrors, and some are both
        if isinstance(error, requests.HTTPError) and (answer := error.response) is not None:
            page = f"; read the model's page, {page_of(entry)}" if answer.status_code in (401, 403) else ""
            told = f"the server answers {answer.status_code} {answer.reason}".rstrip()
            raise UserError(f"{address} cannot be fetched, as {told}{page}") from error
        if is_of_disk(error):
            raise UserError(f"cannot write to {_downloads()}: {first_line(error)}") from error
        if isinstance(error, ValueError):  # from the environment or a server: the table's addresses are good
            raise UserError(
                f"{address} cannot be fetched; look at HF_ENDPOINT and at the proxies that the environment names, such as"
                f" ALL_PROXY ({first_line(error)})"
            ) from error
        raise UserError(
            f"{name} is not in {folder_of(name).parent} yet and cannot be fetched; is there a network? ({first_line(error)})"
        ) from error
    size = path.stat().st_size
    if size != entry["size"]:
        raise UserError(
            f"{address} gave {size} bytes, not the {entry['size']} of the table of models; nothing was kept"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.get("sha256", found):
        raise UserError(
            f"what {address} gives is not the file that the table of models knows (its SHA-256 is another);"
            " nothing was kept"
        )
    return path
