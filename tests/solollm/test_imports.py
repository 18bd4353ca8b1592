"""What importing the core, and asking the command line for help, may load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import solollm
from solollm.cli import COMMANDS

HEAVY = {"torch", "mlx", "transformers", "datasets", "tokenizers", "pyarrow", "pandas"}
CORE = Path(solollm.__file__).parent
MODULES = sorted(
    ".".join(("solollm", *path.relative_to(CORE).with_suffix("").parts)).removesuffix(".__init__")
    for path in CORE.rglob("*.py")
)

_SCRIPT = """
import json, sys, time
start = time.perf_counter()
{body}
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""


def _modules_after(body: str) -> tuple[float, set[str]]:
    script = _SCRIPT.format(body=body)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    return seconds, set(modules)


def test_import_solollm_loads_next_to_nothing() -> None:
    """A framework, pydantic or NumPy creeping into `solollm/__init__.py`."""
    seconds, modules = _modules_after("import solollm")
    print(f"import solollm: {seconds:.3f} s")
    assert not modules & (HEAVY | {"numpy", "pydantic", "rich", "click"})


def test_public_names_load_without_a_framework() -> None:
    """A lazily offered name that drags in torch on first use."""
    names = [name for name in solollm.__all__ if name != "__version__"]
    seconds, modules = _modules_after(
        f"import solollm\nfor name in {names!r}: getattr(solollm, name)"
    )
    print(f"all public names: {seconds:.3f} s")
    assert not modules & HEAVY


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_top_level_help_imports_no_command(flag: str) -> None:
    """The lazy table bypassed: every command, and NumPy with it, loaded for a page of help."""
    seconds, modules = _modules_after(f"from solollm.cli import main\nassert main([{flag!r}]) == 0")
    print(f"solollm {flag}: {seconds:.3f} s")
    assert not modules & (HEAVY | {"numpy", "pydantic", "rich"})
    assert not modules & {f"solollm.commands.{name}" for name in COMMANDS}


def test_every_core_module_imports_without_a_framework() -> None:
    """`import torch` at the top of any core file, however deep."""
    body = "import importlib\n" + "\n".join(f"importlib.import_module({m!r})" for m in MODULES)
    body = body.replace("importlib.import_module('solollm.testing.conformance')", "pass")
    _, modules = _modules_after(body)
    assert not modules & HEAVY


def test_probing_backends_imports_no_framework() -> None:
    """A probe that imports its framework: two seconds for every command, even on the wrong box."""
    _, modules = _modules_after(
        "from solollm.registry import find_backends\nassert find_backends()"
    )
    assert not modules & {"torch", "mlx"}
