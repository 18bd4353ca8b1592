"""The layer check finds what it is there to find."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layers = load_tool("check_layers")


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("solollm/config.py", "from solollm.trainer import Trainer", "may not import trainer"),
        ("solollm/config.py", "from solollm import trainer", "may not import trainer"),
        ("solollm/config.py", "from . import trainer", "may not import trainer"),
        ("solollm/data/build.py", "from ..trainer import Trainer", "may not import trainer"),
        ("solollm/data/__init__.py", "from ..cli import main", "may not import cli"),
        ("solollm/config.py", "def f():\n    import solollm.cli", "may not import cli"),
        ("solollm/planner.py", "import torch", "imports torch at the top"),
        ("solollm/planner.py", "from transformers import x", "imports transformers at the top"),
        ("solollm/planner.py", "import solollm_torch.backend", "imports the backend"),
        ("solollm/planner.py", "def f():\n    from solollm_torch import x", "imports the backend"),
        ("backends/solollm_torch/model.py", "import solollm.trainer", "a backend may not import"),
        ("backends/solollm_torch/model.py", "import solollm_mlx", "imports the backend"),
        ("solollm/novelty.py", "", "`novelty` has no layer"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, problem: str) -> None:
    """An import that climbs, hides in a function or is spelt relatively, and passes."""
    (found,) = {line.split(": ", 1)[1] for line in layers.check({path: source})}
    assert problem in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("solollm/trainer.py", "from solollm.backend import Batch\nimport numpy"),
        ("solollm/data/build.py", "from solollm.data.shards import x\nfrom .stream import y"),
        ("solollm/config.py", "from solollm.architecture import ModelConfig"),
        ("solollm/planner.py", "def f():\n    import torch"),
        ("backends/solollm_torch/model.py", "import torch\nfrom solollm.backend import Batch"),
        ("backends/solollm_torch/model.py", "from solollm_torch.loss import x\nfrom . import y"),
        ("solollm/cli.py", "from solollm import __version__"),
    ],
)
def test_a_good_import_passes(path: str, source: str) -> None:
    """A check so strict that nobody can live with it."""
    assert layers.check({path: source}) == []


def test_a_circle_within_a_layer_is_found() -> None:
    """Two files of one layer that need each other."""
    sources = {
        "solollm/runs.py": "import solollm.checkpoint",
        "solollm/checkpoint.py": "from solollm.schedule import x",
        "solollm/schedule.py": "def f():\n    from solollm.runs import Run",
    }
    (problem,) = layers.check(sources)
    assert problem.startswith("circle: solollm.checkpoint -> solollm.schedule -> solollm.runs")


def test_a_line_number_is_given() -> None:
    """A problem that one has to search for."""
    source = "x = 1\n\nimport solollm.cli\n"
    assert layers.check({"solollm/config.py": source})[0].startswith("solollm/config.py:3: ")


def test_this_checkout_keeps_its_layers() -> None:
    """The rule broken since the last run."""
    assert layers.check(layers.read_sources()) == []
