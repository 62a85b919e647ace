"""The notebook runs from top to bottom, and shows what it says."""

import ast
import json
from pathlib import Path

import numpy as np

NOTEBOOK = Path(__file__).parents[1] / "launch" / "separate.ipynb"


def shown(cell, names):
    """Runs a cell's code; what its last line shows, as a notebook does."""
    tree = ast.parse("".join(cell["source"]))
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    return eval(compile(last, NOTEBOOK.name, "eval"), names) if last else None


def test_the_notebook_runs_top_to_bottom():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)
    names = {}
    results = [shown(cell, names) for cell in cells]
    assert results[0][0] == ["bass", "drums", "guitar", "piano"]
    assert results[-1] == ["bass.wav", "drums.wav", "guitar.wav", "piano.wav"]
    for stem, audio in names["stems"].items():
        assert audio.shape == names["audio"].shape == names["streamed"][stem].shape
        np.testing.assert_allclose(names["pushed"][stem], names["streamed"][stem], atol=1e-4)
