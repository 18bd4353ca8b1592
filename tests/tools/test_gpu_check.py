"""The check for cards, without a card: what it says, and that every part runs on a tiny model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("gpu_check")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says where no card is")
@pytest.mark.parametrize("part", ["resident", "offload7b", "resume", "qlora"])
def test_without_a_card_nothing_is_measured(
    check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    """A file of CPU figures under a card's name would prove claims that nobody has measured."""
    assert check.main([part, "--out", str(tmp_path / "gpu.json")]) == 0
    assert "no CUDA card" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def measured(check: Any, part: str, out: Path) -> dict[str, Any]:
    assert check.main([part, "--tiny", "--out", str(out)]) == 0
    record: dict[str, Any] = json.loads(out.read_text())[part]
    assert record["command"].endswith(f"{part} --tiny")
    assert record["card"] == "none"
    assert {"date", "machine", "versions", "commit"} <= record.keys()
    result: dict[str, Any] = record["measured"]
    return result


def test_the_7b_part_counts_its_bytes_on_a_tiny_model(check: Any, tmp_path: Path) -> None:
    """A part that fails on the card for a reason that has nothing to do with it costs a rented
    hour."""
    offload = measured(check, "offload7b", tmp_path / "gpu.json")
    modes = [name for name in offload if name.startswith("streaming")]
    assert len(modes) == 4
    for name in modes:
        assert offload[name]["moved"] == offload[name]["formula"], offload[name]
        assert offload[name]["share_of_uncapped"] > 0


@pytest.mark.slow
def test_the_resume_part_holds_on_a_tiny_model_and_adds_to_the_file(
    check: Any, tmp_path: Path
) -> None:
    """What a processor can show must hold here already: bits."""
    out = tmp_path / "gpu.json"
    out.write_text('{"offload7b": {}}')
    resume = measured(check, "resume", out)
    bitwise = [v["bitwise"] for v in resume.values() if isinstance(v, dict) and "bitwise" in v]
    assert bitwise == [True] * 6
    assert resume["begun elsewhere, float32"]["holds"]
    assert json.loads(out.read_text()).keys() == {"resume", "offload7b"}


@pytest.mark.slow
def test_the_resident_part_measures_or_says_why_not(check: Any, tmp_path: Path) -> None:
    """One switch that fails must not cost the others; without a card most of them say so."""
    variants = measured(check, "resident", tmp_path / "gpu.json")["variants"]
    assert variants["default"]["share_of_gemm"] > 0
    assert variants["fp8 products"]["tokens_per_second"] > 0
    assert "NVIDIA" in variants["packed, varlen"]["failed"]


def teardown_module() -> None:
    for name in ("gpu_check", "gpu_sessions", "gpu_resident", "gpu_offload", "gpu_resume"):
        sys.modules.pop(name, None)
