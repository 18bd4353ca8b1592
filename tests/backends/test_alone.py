"""Each backend in an environment without the other: a Mac needs no torch, a card no mlx."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BELONGS_TO = {
    "torch": ("torch", "functorch", "torchgen", "triton", "nvidia"),
    "mlx": ("mlx",),
}
SCRIPT = """
import importlib.util, sys
from solollm.backend import EngineOptions, Plan, Request, SessionOptions
from solollm.config import OptimizerTable
from solollm.generation import generate
from solollm.registry import select_backend
from solollm.testing.bench import TIED, make_batch

kept, missing = sys.argv[1:]
assert importlib.util.find_spec(missing) is None, f"{missing} is still here"
backend = select_backend().backend
assert backend.name == kept, backend.name
options = SessionOptions(OptimizerTable(), backend_options={"compile": False})
session = backend.train_session(TIED, options, Plan(4, False, "float32", 24, 6))
for index in range(2):
    loss = session.train_step(make_batch(index), lr=1e-3).result().loss
(completion,) = generate(session.engine(EngineOptions()), [Request((1, 2, 3), 4)])
print(loss, len(completion.ids))
"""


def site_without(folder: Path, prefixes: tuple[str, ...]) -> Path:
    """This environment's packages, those of one it is built upon too, but for those."""
    folder.mkdir()
    for place in map(Path, sys.path):
        if place.name not in ("site-packages", "dist-packages"):
            continue
        for entry in place.iterdir():
            if not entry.name.lower().startswith(prefixes) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.parametrize(("kept", "missing"), [("mlx", "torch"), ("torch", "mlx")])
def test_a_backend_trains_and_generates_without_the_other(
    tmp_path: Path, kept: str, missing: str
) -> None:
    """Guards against an import of one framework in the other's path, or in the core."""
    if importlib.util.find_spec(kept) is None:
        pytest.skip(f"{kept} is not installed")
    site = site_without(tmp_path / "site", BELONGS_TO[missing])
    path = os.pathsep.join(map(str, (site, ROOT, ROOT / "backends")))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT, kept, missing],
        env=environment | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "4"
