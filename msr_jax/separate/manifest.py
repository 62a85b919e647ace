"""What became of every song, a JSON object a line: what other tools join with their own tables."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msr_jax.audio.io import seekable
from msr_jax.errors import UserError


class Manifest:
    """A JSONL file that grows by a line for each song, and is whole after any kill.

    A line has `source` (as it was named), `sha256` (of that file), `model`, `settings`, `stems` ({name: path}), `levels` ({name:
    RMS in dB below full scale, null for silence}), `seconds` (of audio), `work_seconds`, `kept` (stems that were there before) and
    `error` (null, or the sentence).
    """

    def __init__(self, path: Path):
        """Raises UserError if it cannot be written, or is another kind of file."""
        self.path = path
        self.sources: set[str] = set()  # that it holds without an error
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            rows = [json.loads(line) for line in whole.splitlines()]
            self.sources = {row["source"] for row in rows if row["error"] is None}
            if whole != text:  # a line that a full disk cut off
                path.write_text(whole, encoding="utf-8")
            path.touch()
        except OSError as error:
            raise UserError(f"cannot write --manifest {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--manifest {path} is no manifest of separated songs; name another file") from error

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line. Raises UserError, as on a full disk."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --manifest {self.path}: {error.strerror}") from error


def sha256_of(path: Path) -> str | None:
    """Of a file's bytes; None where they cannot be read."""
    try:
        with open(seekable(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, UserError):
        return None
