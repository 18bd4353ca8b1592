"""Two processes on MLX's ring backend: their step is that of one process, and so is their end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from solollm.runs import Run, summarize

pytest.importorskip("mlx.core", reason="these tests need mlx")
DEADLINE_SECONDS = 120.0  # of a machine that is busy with other things

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

# Trains for ever, as a run; the row of each step tells the test how far it is.
ENDLESS = """
import sys
from pathlib import Path
from solollm.backend import Plan, SessionOptions
from solollm.config import MachineTable, OptimizerTable, parse_config
from solollm.errors import DataError, SoloLLMError
from solollm.ranks import Follower, locked, on_first, together, watched
from solollm.runs import Run
from solollm.testing.bench import UNTIED, make_batch
from solollm_mlx.backend import MlxBackend

path, config, backend = Path(sys.argv[1]), parse_config({}), MlxBackend()
options = SessionOptions(OptimizerTable(name="adamw"), backend_options={"compile": False})
table = MachineTable(rank_silent_seconds=float(sys.argv[2]))
try:
    with watched(backend.ranks(), table) as ranks:
        if "no data" in sys.argv and ranks.rank == 1:
            raise DataError("no data on this machine")
        run = on_first(ranks, lambda: Run.create(path, config)) or Follower(path, config)
        with locked(run, ranks), together(run, ranks):
            session = backend.train_session(UNTIED, options, Plan(2, False, "float32", 24, 5))
            for step in range(1, 10**6):
                loss = session.train_step(make_batch(rows=5), lr=1e-2).result().loss
                ranks.largest(0)
                run.append_metrics({"step": step, "loss": loss})
except SoloLLMError as error:
    sys.exit(error.exit_code)
"""


class Pair:
    """Two ranks of one script on the ring; leaving the block ends what is left of them."""

    def __init__(self, script: str, folder: Path, *words: str) -> None:
        self.run = folder / "run"
        (folder / "script.py").write_text(script)
        addresses = [[f"127.0.0.1:{port}"] for port in free_ports(2)]
        (folder / "hosts.json").write_text(json.dumps(addresses))
        command = [sys.executable, str(folder / "script.py"), str(self.run), *words]
        self.ranks = [
            subprocess.Popen(
                command,
                env=os.environ | {
                    "MLX_HOSTFILE": str(folder / "hosts.json"), "MLX_RANK": rank,
                    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                },
                stderr=subprocess.PIPE,
            )
            for rank in "01"
        ]  # fmt: skip

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.communicate()

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < end:
            if summarize(self.run).step >= step:
                return
            ended = [p for p in self.ranks if p.poll() is not None]
            assert not ended, ended[0].communicate()
            time.sleep(0.05)
        raise AssertionError(f"step {step} was not reached")


def free_ports(count: int) -> Sequence[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, timeout=120
    )


def test_two_ranks_make_the_step_of_one_process(tmp_path: Path) -> None:
    """Guards the sum over ranks: a mean of means, a rank's own norm, weights that drift apart."""
    script = tmp_path / "step.py"
    script.write_text(SCRIPT)
    (port,) = free_ports(1)
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


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_a_rank_is_killed_the_other_ends_and_the_run_has_failed(
    tmp_path: Path, victim: int
) -> None:
    """A survivor that waits forever in MLX's collective, or a run that looks as if it was stopped
    because the rank that writes is the one that died."""
    with Pair(ENDLESS, tmp_path, "60") as both:
        both.wait_for_step(3)
        both.ranks[victim].kill()
        assert both.ranks[1 - victim].wait(timeout=DEADLINE_SECONDS) == 1
    (failed,) = Run.open(both.run).read_events()
    assert (failed["kind"], failed.get("rank", 0)) == ("failed", 1 - victim)
    assert summarize(both.run).state == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_hangs_the_other_ends_and_the_run_has_failed(
    tmp_path: Path, victim: int
) -> None:
    """A rank that neither dies nor answers; one that holds the run's lock meanwhile, so that the
    run seems to go on; one that wakes up and goes on alone."""
    with Pair(ENDLESS, tmp_path, "2") as both:
        both.wait_for_step(3)
        both.ranks[victim].send_signal(signal.SIGSTOP)
        assert both.ranks[1 - victim].wait(timeout=DEADLINE_SECONDS) == 1
        failed = Run.open(both.run).read_events()[0]
        assert failed["kind"] == "failed"
        assert "said nothing" in failed["reason"]
        assert summarize(both.run).state == "failed"
        both.ranks[victim].send_signal(signal.SIGCONT)
        assert both.ranks[victim].wait(timeout=DEADLINE_SECONDS) == 1
    assert summarize(both.run).state == "failed"


@pytest.mark.slow
def test_a_rank_that_fails_before_it_exchanges_anything_ends_the_other(tmp_path: Path) -> None:
    """A corpus that lies on one machine only, and a rank that waits forever for the other."""
    with Pair(ENDLESS, tmp_path, "60", "no data") as both:
        codes = [process.wait(timeout=DEADLINE_SECONDS) for process in both.ranks]
    assert codes == [1, 5]


def test_a_rank_that_never_comes_is_not_waited_for_forever(tmp_path: Path) -> None:
    """MLX waits for its neighbour in C, with Python's lock held, and without an end."""
    (port, other), hosts = free_ports(2), tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"], [f"127.0.0.1:{other}"]]))
    script = "from solollm_mlx import ranks; ranks.MEETING_SECONDS = 0.5; ranks.join()"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": "0"},
        capture_output=True, timeout=DEADLINE_SECONDS, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert b"Timeout" in ended.stderr


def test_ranks_know_where_their_neighbours_reach_them(tmp_path: Path) -> None:
    """A rank that listens on an address that no other machine can reach."""
    from solollm_mlx.ranks import hosts_of_ranks, own_host

    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["10.0.0.1:1", "10.1.0.1:2"], ["10.0.0.2:3"], ["fd00::2:4"]]))
    ring = {"MLX_HOSTFILE": str(hosts)}
    assert hosts_of_ranks(ring) == ["10.0.0.1", "10.0.0.2", "fd00::2"]
    assert own_host(1, ring) == "10.0.0.2"
    assert own_host(1, {"MLX_JACCL_COORDINATOR": "127.0.0.1:5000"}) == "127.0.0.1"
    assert own_host(0, {}) == ""
