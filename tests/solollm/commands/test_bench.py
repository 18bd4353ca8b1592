"""`solollm bench train`, as typed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from solollm.commands.bench import command

pytest.importorskip("torch", reason="these tests need torch")
_SMALL = ("train", "--backend", "torch", "--alone", "--depth", "1", "--rounds", "1",
          "--batch-size", "1", "--seq-len", "32")  # fmt: skip


def _run(*words: str) -> str:
    result = CliRunner().invoke(command, [*_SMALL, *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_two_ways_are_compared_at_80_columns() -> None:
    """A table that folds, or that hides which peers there were."""
    text = _run("--way", "resident", "--way", "streaming")
    assert "solollm, streaming" in text
    assert "MB up" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "transformers" in text, "installed or not, each known peer is named"


def test_json_is_one_document() -> None:
    """Progress or a table on standard output beside it."""
    written = json.loads(_run("--json"))
    assert written["work"]["seq_len"] == 32
    assert [stack["name"] for stack in written["stacks"]] == ["solollm"]
