"""Songs and lists that are no files of this machine: `gs://`, `s3://` and what else fsspec knows; and lists as tables."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

from msr_jax.errors import UserError
from msr_jax.separate.songs import Task

COLUMN = "path"  # of a table


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs the extra `cloud`: pip install 'msr_jax[cloud]' ({error})") from error
    except ValueError as error:
        raise UserError(f"{url} names no kind of place that can be read ({error})") from error


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """The many errors of many stores as one."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{url} cannot be read ({reason[0] if reason else type(error).__name__})") from error


def name_of(url: str) -> str:
    """The file's name in a URL, as a file here can be called."""
    return PurePosixPath(unquote(urlsplit(url).path)).name or "song"


def find_urls(url: str, suffixes: frozenset[str]) -> tuple[list[str], str | None]:
    """What a URL stands for: (URLs, the folder that they are in), of a folder or a pattern; (itself, None) of a file."""
    system, path = _file_system(url)
    scheme = url.partition("://")[0]
    whole = lambda found: str(found) if is_url(found) else f"{scheme}://{str(found).lstrip('/')}"
    with _reading(url):
        if any(sign in url for sign in "*["):
            return [whole(p) for p in sorted(system.glob(path)) if not system.isdir(p)], None
        if not system.isdir(path):
            return [url], None
        found = sorted(p for p in system.find(path) if PurePosixPath(p).suffix.lower() in suffixes)
        hidden = lambda p: any(part.startswith(".") for part in PurePosixPath(str(p)).parts)
        return [whole(p) for p in found if not hidden(p)], whole(path)


@contextmanager
def at_hand(task: Task) -> Iterator[Task]:
    """Inside, the task's song is a file of this machine. Raises UserError where it cannot be fetched."""
    if task.url is None:
        yield task
        return
    with TemporaryDirectory(prefix="msr-", ignore_cleanup_errors=True) as folder:
        song = Path(folder) / task.song.name
        with _reading(task.url):
            system, path = _file_system(task.url)
            system.get_file(path, str(song))
        yield task._replace(song=song)


def read_list(place: str) -> list[str]:
    """The songs of a list: a path a line, or of .jsonl and .parquet the column `path`; relative ones are this process's.

    Raises:
      UserError: it cannot be read, has no such column, or names none.
    """
    data = _bytes_of(place)
    kind = PurePosixPath(urlsplit(place).path if is_url(place) else place).suffix.lower()
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            found = pyarrow.parquet.read_table(BytesIO(data), columns=[COLUMN]).column(COLUMN).to_pylist()
        else:
            text = data.decode("utf-8-sig", "surrogateescape")
            found = [line.strip("\r") for line in text.split("\n") if line.strip()]
            if kind == ".jsonl":
                found = [json.loads(line)[COLUMN] for line in found]
        if not all(isinstance(path, str) and path for path in found):
            raise ValueError("not all paths are text")
    except ImportError as error:
        raise UserError(f"--list {place}: Parquet needs pyarrow: pip install pyarrow") from error
    except (ValueError, KeyError, TypeError, OSError) as error:  # pyarrow's are such
        raise UserError(
            f"--list {place} is not a path a line, nor (.jsonl) an object with a {COLUMN} a line, nor (.parquet) a table with a "
            f"column {COLUMN}"
        ) from error
    if not found:
        raise UserError(f"--list {place} names no songs")
    return found


def _bytes_of(place: str) -> bytes:
    if is_url(place):
        with _reading(f"--list {place}"):
            system, path = _file_system(place)
            return system.cat_file(path)
    try:
        return Path(place).read_bytes()
    except OSError as error:
        raise UserError(f"--list {place} cannot be read ({error.strerror})") from error
