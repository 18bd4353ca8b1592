"""`solollm verify migration` on the two real backends."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("torch", reason="these tests need torch")

from solollm.cli import main

LOSS_TOLERANCE = 2e-4  # relative, fp32: the numerics contract, docs/design.md section 4


def test_the_proof_of_migration_holds_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the command on real backends, and the margin that docs/results/migration.md shows."""
    command = ["verify", "migration", "--backends", "mlx,torch", "--steps", "10", "--cut", "5"]
    assert main([*command, "--json"]) == 0
    moves = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(move["source"], move["target"]) for move in moves] == [
        ("mlx", "torch"), ("torch", "mlx"),
    ]  # fmt: skip
    for move in moves:
        assert move["state_is_equal"]
        assert 0 < move["deviation"] < 0.1 * LOSS_TOLERANCE
        assert [step["step"] for step in move["steps"]] == [6, 7, 8, 9, 10]
