"""Files of model repositories on the Hugging Face Hub, through `huggingface_hub` (extra `web`)."""

import hashlib
import re
from pathlib import Path

from msr_jax.errors import UserError, first_line, is_of_disk

WEIGHTS = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")


def fetch(address: str) -> Path:
    """Path of a file of `hf:OWNER/REPO[/FILE]` in the Hub's cache; downloaded once, resumed where it broke off.

    The content is compared with the SHA-256 that the Hub gives for large files. Without FILE, the repository must hold one
    file of weights. HF_ENDPOINT and HF_HOME name another server and another cache.

    Raises:
      UserError: no such library, network, repository or file, terms that were not accepted, no single file of weights, a full
        disk, or a wrong checksum.
    """
    parts = address.removeprefix("hf:").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(f"'{address}' is no address on the Hub: write hf:OWNER/REPO or hf:OWNER/REPO/FILE")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("hf: addresses need the extra `web`: pip install 'msr_jax[web]'") from error
    repo = "/".join(parts[:2])
    try:
        if len(parts) == 3:
            name = parts[2]
        else:
            names = [n for n in huggingface_hub.list_repo_files(repo) if n.lower().endswith(WEIGHTS)]
            if len(names) != 1:
                found = ", ".join(names[:5]) or "none"
                raise UserError(f"{repo} holds {len(names)} files of weights ({found}): name one, {address}/FILE")
            name = names[0]
        return _verified(Path(huggingface_hub.hf_hub_download(repo, name)), address)
    except UserError:
        raise
    except Exception as error:
        if told := _told(error, address, repo):
            raise UserError(told) from error
        raise


def _told(error: BaseException, address: str, repo: str) -> str | None:
    """What the user is told of an error of the library, of which many are of several kinds at once; None of an unknown one."""
    from huggingface_hub import constants, errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    if cause and (told := _told(cause, address, repo)):  # the library asks for a network where there was an answer, too
        return told
    said = first_line(error)
    is_unanswered = isinstance(error, errors.LocalEntryNotFoundError)  # nor does the cache have the file
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} asks for its terms to be accepted: do so on its page, {constants.ENDPOINT}/{repo}, and give a token of"
            f" that account by HF_TOKEN ({said})"
        )
    is_missing = isinstance(
        error, errors.RepositoryNotFoundError | errors.EntryNotFoundError | errors.HFValidationError
    )
    if is_missing and not is_unanswered:
        return f"the Hub has no such file: {address}, or shows it only to an account, with a token by HF_TOKEN ({said})"
    if is_of_disk(error):
        return f"cannot write to the Hub's cache, {constants.HF_HUB_CACHE}: {said}"
    if isinstance(error, errors.HfHubHTTPError | errors.FileMetadataError):
        return f"{address} cannot be fetched, as the Hub answers: {said}"
    if isinstance(error, ImportError | ValueError) and not is_unanswered:  # of its HTTP client
        return (
            f"{address} cannot be fetched; look at HF_ENDPOINT and at the proxies that the environment names, such as"
            f" ALL_PROXY ({said})"
        )
    # Some versions let errors of their HTTP client through.
    if isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests")):
        return f"{address} cannot be fetched; is there a network? ({said})"
    return None


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
