"""Two processes over gloo: they train as one does, and one goes on where they stopped."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solollm.backend import DictSource
from solollm.testing.bench import require_same_state

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER))  # the script imports the conftest beside it, and this the script
ranks_at_work = pytest.importorskip("ranks_at_work")
EXACT = [name for name in ranks_at_work.VARIANTS if name != "compact"]
TOLERANCE = 1e-5  # of losses and norms over 20 steps, relative


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one process alone found, then each of two."""
    folder = tmp_path_factory.mktemp("ranks")
    alone: dict[str, np.ndarray] = {}
    for name, variant in ranks_at_work.VARIANTS.items():
        alone |= ranks_at_work.run(name, variant)
    np.savez(folder / "0-of-1.npz", **alone)
    script = [sys.executable, str(FOLDER / "ranks_at_work.py"), str(folder)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched = quiet | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [
        subprocess.Popen(script, env=launched | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    try:
        assert [process.wait(timeout=900) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    return [np.load(folder / f"{rank}-of-{size}.npz") for rank, size in ((0, 1), (0, 2), (1, 2))]


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_train_as_one(found: list[Any], name: str) -> None:
    """A mean of means; a head's gradient that was dropped; a clip or a Muon step of one's own rows
    alone. `muon` and `adamw-tied` alone are the session that knows no FSDP2."""
    alone, first, second = found
    for part in ("first", "second", "logprobs"):
        key = f"{name}/{part}"
        np.testing.assert_array_equal(first[key], second[key], err_msg=f"{key}: ranks differ")
        np.testing.assert_allclose(first[key], alone[key], rtol=TOLERANCE, atol=5e-5, err_msg=key)
    losses = [np.concatenate([f[f"{name}/first"], f[f"{name}/second"]]) for f in (alone, first)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=TOLERANCE)


def test_two_ranks_in_compact_mode_learn_what_one_does(found: list[Any]) -> None:
    """Stochastic rounding by a rank's own count of elements; a residual that does not belong to
    its half. Gradients are rounded to bf16 after the sum, so that bits depend on the ranks."""
    alone, first, second = found
    one, two = (
        np.concatenate([f["compact/first"], f["compact/second"]])[:, 0] for f in (alone, first)
    )
    np.testing.assert_array_equal(first["compact/second"], second["compact/second"])
    np.testing.assert_allclose(two, one, rtol=2e-2)
    assert two[-1] < 0.5 * two[0]


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_go_on_where_one_stopped(found: list[Any], name: str) -> None:
    """Rows of another rank; moments or counters left behind."""
    alone, first, _ = found
    np.testing.assert_allclose(first[f"{name}/continued"], alone[f"{name}/second"], rtol=TOLERANCE)


@pytest.mark.parametrize("name", EXACT)
def test_one_goes_on_where_two_ranks_stopped(found: list[Any], name: str) -> None:
    """A checkpoint of two ranks that is not what one process would have written."""
    _, first, _ = found
    left = ranks_at_work.go_on(name, ranks_at_work.VARIANTS[name], first)
    np.testing.assert_allclose(left[f"{name}/continued"], first[f"{name}/second"], rtol=TOLERANCE)


def test_a_checkpoint_of_two_ranks_is_exact(found: list[Any]) -> None:
    """A split master that is saved rounded; a bf16 moment read as something else."""
    _, first, _ = found
    for name, variant in ranks_at_work.VARIANTS.items():
        state = ranks_at_work.state_in(first, f"{name}/half")
        session = ranks_at_work.session_of(variant)
        session.import_parameters(DictSource(state.parameters))
        session.import_optimizer(DictSource(state.optimizer), state.session_state)
        again = ranks_at_work.state_of(session)
        require_same_state(again, state, name)
        session.close()


def test_a_snapshot_holds_no_more_than_one_tensor_beside_the_shard(found: list[Any]) -> None:
    """A gather of the whole model, or a copy of the shard: 7B would need its host memory twice."""
    slack = 4096  # what is sent to say which tensor comes next, and the padding of uneven shards
    for name in ranks_at_work.VARIANTS:
        for rank in found[1:]:
            held, added, whole, largest = rank[f"{name}/bytes"].tolist()
            assert held < 0.52 * whole, name
            assert 0 < added <= largest + slack, name


def test_codes_that_share_a_scale_are_refused(found: list[Any]) -> None:
    """Blocks of 8-bit codes across ranks would be scaled by what one of them sees."""
    assert "state_bits = 8" in str(found[1]["refused"])
