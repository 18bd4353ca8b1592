"""Two processes on MLX's ring backend: one step of both is one step of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")

SCRIPT = """
import sys
from pathlib import Path
import mlx.core as mx, numpy as np
from solollm.backend import Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.testing.bench import UNTIED, make_batch, state_of
from solollm_mlx.backend import MlxBackend

options = SessionOptions(OptimizerTable(name="adamw"), backend_options={"compile": False})
ranks = MlxBackend().ranks()
assert ranks.largest(float(ranks.rank), -float(ranks.rank)) == (ranks.world_size - 1, 0)
session = MlxBackend().train_session(UNTIED, options, Plan(2, False, "float32", 24, 5))
batch = make_batch(rows=5)  # three rows here, two there
arrays = {name: np.array(array) for name, array in session.gradients(batch).items()}
metrics = session.train_step(batch, lr=1e-2).result()
arrays["loss"] = np.array(metrics.loss)
arrays["logprobs"] = session.token_logprobs(batch)
arrays["after"] = state_of(session).parameters["model.layers.1.mlp.up_proj.weight"].data
np.savez(Path(sys.argv[1]) / f"{session.rank}-of-{session.world_size}.npz", **arrays)
"""


def run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, timeout=120
    )


def test_two_ranks_make_the_step_of_one_process(tmp_path: Path) -> None:
    """Guards the sum over ranks: a mean of means, a rank's own norm, weights that drift apart."""
    script = tmp_path / "step.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run([sys.executable, str(script), str(tmp_path)], tmp_path)
    main = "from mlx._distributed_utils.launch import main; main()"  # what `mlx.launch` runs
    launch = [sys.executable, "-c", main, "-n", "2", "--backend", "ring", "-p", str(port)]
    launch += ["--python", sys.executable]
    run([*launch, str(script), str(tmp_path)], tmp_path)
    alone = np.load(tmp_path / "0-of-1.npz")
    first, second = (np.load(tmp_path / f"{rank}-of-2.npz") for rank in (0, 1))
    for name in alone.files:
        np.testing.assert_array_equal(first[name], second[name], err_msg=f"{name}: ranks differ")
        scale = np.abs(alone[name]).max()
        np.testing.assert_allclose(
            first[name], alone[name], rtol=0, atol=1e-6 * scale, err_msg=name
        )
