"""Imports point one way: down the table of msr_jax/README.md, and never round in a circle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import msr_jax

ROOT = Path(__file__).resolve().parents[1]
TABLE = (ROOT / "msr_jax" / "README.md").read_text().split("## Who may import whom")[1]
LAYERS = re.findall(r"^\| `([\w.]+)` \|", TABLE, re.M)  # low to high
FILES = [*ROOT.glob("msr_jax/*.py"), *ROOT.glob("msr_jax/*/*.py"), *ROOT.glob("data_prep/*.py")]


def name_of(path):
    """`train.loop` of msr_jax/train/loop.py; `data_prep.render` of data_prep/render.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("msr_jax.")


MODULES = {name_of(path): path for path in FILES if path.name != "__init__.py"}


def layer_of(module):
    """The row of a module: the longest name in the table that it is or lies in."""
    rows = [k for k, layer in enumerate(LAYERS) if module == layer or module.startswith(f"{layer}.")]
    assert rows, f"{module} is in no row of msr_jax/README.md"
    return max(rows, key=lambda k: len(LAYERS[k]))


def imports_of(source):
    """Modules of this project that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written whole"
            names = [node.module] + [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            own = name.removeprefix("msr_jax.")
            found |= {own} & set(MODULES)
    return found


def upward(module, source):
    """The imports of a module that point up."""
    return sorted(m for m in imports_of(source) if layer_of(m) > layer_of(module))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_points_up(module):
    assert upward(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("models.unet1d", "from msr_jax.methods.losses import mse"),
        ("methods.stages", "def late():\n    import msr_jax.train.loop"),
        ("train.loop", "from msr_jax.plan.program import training_program"),
        ("plan.flops", "from msr_jax.train import state"),
        ("data.records", "from data_prep.writer import convert"),
    ],
)
def test_a_planted_import_that_points_up_is_found(module, planted):
    assert upward(module, f"{MODULES[module].read_text()}\n{planted}\n")


def test_modules_import_each_other_in_no_circle():
    graph = {module: imports_of(path.read_text()) - {module} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()
    graph["audio.io"].add("cli")
    graph["cli"] = graph["cli"] | {"audio.io"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_every_row_of_the_table_is_a_module_or_a_folder():
    for layer in LAYERS:
        place = ROOT / "msr_jax" / layer.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file() or (ROOT / layer).is_dir()


def test_no_file_is_longer_than_450_lines():
    assert [str(path) for path in FILES if len(path.read_text().splitlines()) > 450] == []


def test_a_python_prompt_completes_the_two_functions():
    assert {"load", "load_ensemble"} <= set(dir(msr_jax))
