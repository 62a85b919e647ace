"""Finds and reads the golden fixtures: those of MSR_PARITY_DIR (default ../shared/parity) and the few in tests/fixtures."""

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

TESTS = Path(__file__).resolve().parents[1]
SHIPPED = TESTS / "fixtures"


def parity_folders() -> list[Path]:
    """Folders that hold fixtures; the shipped ones always among them."""
    outside = Path(os.environ.get("MSR_PARITY_DIR", TESTS.parents[1] / "shared" / "parity"))
    return [folder for folder in (outside, SHIPPED) if folder.is_dir()]


def find_fixtures(kind: str) -> list:
    """Fixtures whose JSON says `kind`, or, for network fixtures (which say none), whose file name starts so.

    Returns pytest params, so that a test is named after its file.
    """
    import pytest

    found = {}
    for folder in parity_folders():
        for described in sorted(folder.rglob("*.json")):
            arrays = described.with_suffix(".safetensors")
            if not arrays.exists():
                continue
            named = json.loads(described.read_text()).get("kind")
            if named == kind or (named is None and described.stem.startswith(kind)):
                found.setdefault(str(described.relative_to(folder)), arrays)
    return [pytest.param(path, id=path.stem) for path in found.values()]


def load(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and description of a fixture, from the path of its .safetensors file."""
    return load_file(path), json.loads(Path(path).with_suffix(".json").read_text())


def cases(path: Path):
    """Yield (parameters, arrays without their prefix, tolerance) for every case of a method fixture."""
    arrays, meta = load(path)
    for index, parameters in enumerate(meta["params"]["cases"]):
        prefix = f"case{index}."
        own = {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
        yield {**meta["params"], **parameters}, own, meta["tolerance"]


def assert_close(actual, reference, tolerance: dict) -> None:
    """|actual - reference| ≤ atol + rtol·|reference|, element by element."""
    np.testing.assert_allclose(
        np.asarray(actual), reference, rtol=tolerance.get("rtol", 0), atol=tolerance.get("atol", 0)
    )
