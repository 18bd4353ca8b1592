"""The quickstart's run on another framework and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from solollm import quickstart_move
from solollm.backend import Probe
from solollm.horizon import updated
from solollm.pretraining import pretrain
from solollm.quickstart_move import move_and_back
from solollm.registry import Candidate
from solollm.resume_proof import tiny_training


class Listener:
    """A narrator that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.commands: list[str] = []
        self.tables: list[list[tuple[str, str]]] = []

    def stage(self, title: str, why: str) -> None:
        self.said.append(title)

    def say(self, text: str) -> None:
        self.said.append(text)

    def command(self, arguments: Sequence[str], program: str = "solollm") -> None:
        self.commands.append(arguments[0])

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self.tables.append(list(rows))

    def text(self, prompt: str, continuation: str) -> None: ...


@pytest.mark.slow
def test_a_run_moves_there_and_back_and_says_how_far_it_strayed(tmp_path: Path) -> None:
    """A tour that shows a certificate of nothing, or that never comes back."""
    pytest.importorskip("torch", reason="needs both backends")
    pytest.importorskip("mlx_lm", reason="needs both backends")
    config = tiny_training(tmp_path, steps=24)
    config = updated(config, "checkpoint", every_steps=4, keep_latest=8, keep_best=False)
    config = config.model_copy(update={"backend_options": {
        "mlx": {"compile": False}, "torch": {"compile": False},
    }})  # fmt: skip
    pretrain(config, tmp_path / "run", backend="torch")
    narrator = Listener()
    trip = move_and_back(narrator, tmp_path, tmp_path / "run", "torch")
    assert trip is not None
    assert (trip.home, trip.abroad, trip.cut) == ("torch", "mlx", 4)
    assert trip.holds
    assert 0 < trip.deviation <= trip.tolerance == 2e-4
    assert narrator.commands == ["runs", "runs", "resume", "resume"]
    there, back, losses = narrator.tables[0]
    assert there[0] == "certificate, torch to mlx, step 4"
    assert back[0].startswith("certificate, mlx to torch, step ")
    assert 4 < int(back[0].split()[-1]) < 24
    assert "deviates by" in there[1]
    assert losses[0] == "losses of 20 logged steps"


def test_with_one_backend_it_is_left_out_and_said_how_to_get_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quickstart that ends with an error on a machine with one framework."""
    absent = Candidate("mlx", Probe(False, "mlx is not installed", "", 0), None)
    monkeypatch.setattr(quickstart_move, "find_backends", lambda: [absent])
    narrator = Listener()
    assert move_and_back(narrator, tmp_path, tmp_path / "run", "torch") is None
    assert "--with-mlx" in narrator.said[-1]
    assert "pip install 'solollm[torch,mlx]'" in narrator.said[-1]
