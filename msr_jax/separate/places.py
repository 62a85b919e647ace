"""Songs and lists that are no files of this machine: `gs://`, `s3://` and what else fsspec knows; and lists as tables."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import gettempdir
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

from msr_jax.audio.io import seekable
from msr_jax.errors import UserError, first_line
from msr_jax.files import clear, clear_left_over, passing
from msr_jax.separate.songs import Task

COLUMN = "path"  # of a table
LOCAL = ("file://", "local://")  # as fsspec calls this machine
OF_CLOUD = ("gs", "gcs", "s3", "s3a", "http", "https")  # what the extra opens


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


def local_path(place: str) -> Path | None:
    """Of a file of this machine, also where a URL names it."""
    path = next((place.removeprefix(start) for start in LOCAL if place.startswith(start)), place)
    return None if is_url(path) else Path(path)


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        is_extra = url.partition("://")[0] in OF_CLOUD
        what = "the extra `cloud`: pip install 'msr_jax[cloud]'" if is_extra else "what is not installed here"
        raise UserError(f"{url} needs {what} ({first_line(error)})") from error
    except ValueError as error:
        raise UserError(f"{url} names no kind of place that can be read ({first_line(error)})") from error
    except Exception as error:  # of a store's own libraries
        raise UserError(f"{url} cannot be opened ({_told_by(error)})") from error


def _told_by(error: Exception) -> str:
    """What an error of a store says; where the system says it, without the name of the file here."""
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """The many errors of many stores as one."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = "it is not there" if isinstance(error, FileNotFoundError) else _told_by(error)
        raise UserError(f"{url} cannot be read ({told})") from error


def name_of(url: str) -> str:
    """The file's name in a URL, as a file here can be called."""
    name = path_of(url).name
    return "song" if name in ("", "..") else name


def path_of(url: str) -> PurePosixPath:
    """Host or bucket, then the web's addresses without what is asked for, and unquoted; the keys of a store are what they are."""
    path = url.partition("://")[2]
    if url.startswith(("http://", "https://")):
        path = unquote(re.split("[?#]", path, maxsplit=1)[0]).replace("\0", "%00")
    return PurePosixPath(path)


def find_urls(url: str, suffixes: frozenset[str]) -> tuple[list[str], str | None]:
    """What a URL stands for: (URLs, the folder that they are in), of a folder or a pattern; (itself, None) of a file."""
    system, path = _file_system(url)
    scheme = url.partition("://")[0]
    root = "/" if local_path(url) else ""
    hidden = lambda found: "/." in f"/{str(found).removeprefix(str(path))}"
    whole = lambda found: str(found) if is_url(found) else f"{scheme}://{root}{str(found).lstrip('/')}"
    with _reading(url):
        if any(sign in url for sign in "*[") and not system.exists(path):
            found = [p for p in sorted(system.glob(path)) if not system.isdir(p)]
            return [whole(p) for p in found if "/." in path or not hidden(p)], None
        if not system.isdir(path):
            return [url], None
        found = sorted(p for p in system.find(path) if str(p).lower().endswith(tuple(suffixes)))
        return [whole(p) for p in found if not hidden(p)], whole(path)


@contextmanager
def at_hand(task: Task) -> Iterator[Task]:
    """Inside, the task's song is a file of this machine; what is wrong with it is said by the task's own name for it.

    What is fetched goes when it is done with, however that ends: a kill's is cleared at the next start.

    Raises:
      UserError: it cannot be fetched.
    """
    if task.url is None:
        with _called(seekable(task.song), task.source):
            yield task
        return
    temporary = Path(gettempdir())
    clear_left_over(temporary)
    folder = passing(temporary / f"msr-{uuid4().hex}")
    song = folder / task.song.name
    try:
        with _reading(task.url):
            system, path = _file_system(task.url)
            folder.mkdir(0o700)
            system.get_file(path, str(song))
        with _called(song, task.url):
            yield task._replace(song=song)
    finally:
        clear(folder)


@contextmanager
def _called(path: Path, name: str) -> Iterator[None]:
    """Inside, what is wrong with a file that is there for a moment is said of what it stands for."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from error


def read_list(place: str) -> list[str]:
    """The songs of a list: a path a line, or of .jsonl and .parquet the column `path`; relative ones are this process's.

    Raises:
      UserError: it cannot be read, has no such column, or names none.
    """
    data = _bytes_of(place)
    kind = (path_of(place) if is_url(place) else PurePosixPath(place)).suffix.lower()
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # as PowerShell writes
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(BytesIO(data), columns=[COLUMN])
            found = list(enumerate(table.column(COLUMN).to_pylist(), 1))
        else:
            text = data.decode("utf-16") if is_utf16 else data.decode("utf-8-sig", "surrogateescape")
            found = [(number, line.strip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    except ImportError as error:
        raise UserError(f"--list {place}: Parquet needs pyarrow: pip install pyarrow") from error
    except (ValueError, KeyError, TypeError, OSError) as error:  # pyarrow's are such
        raise UserError(
            f"--list {place} is not a path a line, nor (.parquet) a table with a column {COLUMN}"
        ) from error
    if kind == ".jsonl":
        found = [(number, _told_in(line)) for number, line in found]
    if wrong := [number for number, path in found if not _can_be_a_path(path)]:
        told = f"an object with a {COLUMN}" if kind == ".jsonl" else "a path"
        raise UserError(f"--list {place}: {'row' if kind == '.parquet' else 'line'} {wrong[0]} is not {told}")
    if not found:
        raise UserError(f"--list {place} names no songs")
    return [path for _, path in found]


def _told_in(line: str) -> Any:
    try:
        return json.loads(line)[COLUMN]
    except (ValueError, KeyError, TypeError):
        return None


def _can_be_a_path(path: Any) -> bool:
    try:
        return isinstance(path, str) and path != "" and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _bytes_of(place: str) -> bytes:
    if is_url(place):
        with _reading(f"--list {place}"):
            system, path = _file_system(place)
            return system.cat_file(path)
    try:
        return Path(place).read_bytes()
    except OSError as error:
        raise UserError(f"--list {place} cannot be read ({error.strerror})") from error
