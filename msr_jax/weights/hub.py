"""Files of model repositories on the Hugging Face Hub, through `huggingface_hub` (extra `web`)."""

import hashlib
import re
from pathlib import Path

from msr_jax.errors import UserError, first_line

WEIGHTS = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")


def fetch(address: str) -> Path:
    """Path of a file of `hf:OWNER/REPO[/FILE]` in the Hub's cache; downloaded once, resumed where it broke off.

    The content is compared with the SHA-256 that the Hub gives for large files. Without FILE, the repository must hold one
    file of weights. HF_ENDPOINT and HF_HOME name another server and another cache.

    Raises:
      UserError: no such library, network, repository or file, no single file of weights, or a wrong checksum.
    """
    parts = address.removeprefix("hf:").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(f"'{address}' is no address on the Hub: write hf:OWNER/REPO or hf:OWNER/REPO/FILE")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError("hf: addresses need the extra `web`: pip install 'msr_jax[web]'") from error
    repo = "/".join(parts[:2])
    try:
        if len(parts) == 3:
            name = parts[2]
        else:
            names = [n for n in huggingface_hub.list_repo_files(repo) if n.endswith(WEIGHTS)]
            if len(names) != 1:
                found = ", ".join(names[:5]) or "none"
                raise UserError(f"{repo} holds {len(names)} files of weights ({found}): name one, {address}/FILE")
            name = names[0]
        return _verified(Path(huggingface_hub.hf_hub_download(repo, name)), address)
    except UserError:
        raise
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        raise UserError(f"the Hub has no such file: {address} ({first_line(error)})") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{address} cannot be fetched; is there a network? ({first_line(error)})") from error
    except Exception as error:
        if type(error).__module__.startswith(("httpx", "httpcore", "requests")):  # raised through by some versions
            raise UserError(f"{address} cannot be fetched; is there a network? ({first_line(error)})") from error
        raise


def _verified(path: Path, address: str) -> Path:
    """The path, if the file has the checksum that the cache names it by; else the file is removed."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):  # of small files it is another hash, of git's
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            blob.unlink()
            raise UserError(f"{address} arrived damaged (its SHA-256 is {found}, not {blob.name}); try again")
    return path
