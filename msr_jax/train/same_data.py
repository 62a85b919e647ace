"""Whether a run that goes on still has the data that it began with, as the manifests of its records say, and the networks;
and whether all its processes have the same.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msr_jax.data.records import read_manifest
from msr_jax.data.tracks import NAMED
from msr_jax.errors import UserError

LAYOUT = ("hop", "samples", "seed", "tool")  # of records: their length and order, and the version that made them


def data_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells the data of a config from other data, as JSON: {"train" and, if there is one, "validation": {the fields of
    `LAYOUT`, "tracks": [[name, samples, the beginning of its source's SHA-256], …]}}.

    Raises:
      UserError: no records there, or no such split.
    """
    data, found = config["data"], {}
    for part, split in (("train", "train"), ("validation", data.get("validation_split", "validation"))):
        if not data[part]:
            continue
        manifest = read_manifest(data[part])
        if split not in manifest["tracks"]:
            raise UserError(f"{data[part]} has no split '{split}'; it has {', '.join(manifest['tracks'])}")
        sums = manifest["checksums"]
        tracks = [[name, length, sums.get(f"{split}/{name}", "")[:16]] for name, length in manifest["tracks"][split]]
        found[part] = {**{name: manifest.get(name) for name in LAYOUT}, "tracks": tracks}
    return found


def checksum(value: Any) -> str:
    """CRC-32 of what JSON can hold, in hexadecimal."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def networks_identity(frozen: Mapping[str, Any]) -> dict[str, str]:
    """A checksum of each network that a stage builds on, by its name: CRC-32 of its arrays, in the order of their names."""
    return {name: f"{_checksum(params, 0):08x}" for name, params in frozen.items()}


def _checksum(params: Any, crc: int) -> int:
    if isinstance(params, Mapping):
        for name in sorted(params):
            crc = _checksum(params[name], zlib.crc32(name.encode(), crc))
        return crc
    return zlib.crc32(np.ascontiguousarray(params).data, crc)


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words; of what only one of them has, nothing is said."""
    found = []
    for part in (p for p in then if p in now):
        before, after = then[part], now[part]
        old, new = ({name: rest for name, *rest in x["tracks"]} for x in (before, after))
        groups = (
            ("gone", [n for n in old if n not in new]),
            ("new", [n for n in new if n not in old]),
            ("changed", [n for n in new if n in old and old[n] != new[n]]),
        )
        told = [f"{len(names)} {what} ({_some(names)})" for what, names in groups if names]
        if not told and list(old) != list(new):
            told = ["in another order"]
        found += [f"tracks of {part}: {', '.join(told)}"] if told else []
        found += [
            f"{name} of its records in {part}: {before[name]} before, {after[name]} now"
            for name in LAYOUT
            if before[name] != after[name]
        ]
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
