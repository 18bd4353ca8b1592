"""The check for cards, without a card: what it says, and that every part runs on a tiny model."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch.autograd import DeviceType

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
    pytest.importorskip("transformers")
    found = measured(check, "resident", tmp_path / "gpu.json")
    assert found["default"]["share_of_gemm"] > 0
    assert found["fp8 products"]["tokens_per_second"] > 0
    assert found["transformers+compile"]["ours_to_this"] > 0
    assert "NVIDIA" in found["packed, varlen"]["failed"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing:FutureWarning")  # the peer's
def test_the_qlora_part_stands_beside_its_peer(check: Any, tmp_path: Path) -> None:
    """A figure of ours alone proves nothing about another stack."""
    for module in ("bitsandbytes", "peft", "transformers"):
        pytest.importorskip(module)
    found = measured(check, "qlora", tmp_path / "gpu.json")
    assert found["ours"]["speedup"] > 0, found


def test_what_claims_rest_on_and_no_card_has_run_comes_first(check: Any) -> None:
    """The minutes of a lent card went to figures that were there, and those asked for were left."""
    card, switches = torch.device("cuda", 0), importlib.import_module("gpu_resident").SWITCHES
    names = [n for n, _ in importlib.import_module("gpu_offload").figures(card, tiny=False)]
    assert [n for n in names if not n.startswith("of ")][:3] == [
        "streaming, lagged, 16384 tokens per step",
        "streaming, lagged, 16384 tokens per step, compiled updates",
        "streaming, exact, 65536 tokens per step",
    ]
    assert len(names) == len(set(names)) == 9
    assert list(switches)[:5] == [
        "Muon, bf16 products", "cut-cross-entropy loss", "split masters, 8-bit moments",
        "8-bit moments, compiled updates", "CUDA graphs",
    ]  # fmt: skip


def test_a_failing_profiler_costs_no_figure(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where counters are not for everybody, the step's speed was lost with its profile."""
    resident = importlib.import_module("gpu_resident")
    refused = Mock(side_effect=RuntimeError("no counters for you"))
    monkeypatch.setattr(resident, "busiest_kernels", refused)
    found = resident._ours(
        resident.model_of("1.3b", tiny=True), torch.device("cpu"), {}, {"profiled": True},
        shape=(2, 1, 64),
    )  # fmt: skip
    assert found["tokens_per_second"] > 0
    assert found["profile"] == {"failed": "RuntimeError: no counters for you"}


def test_a_kernel_counts_once(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch gives an operator the time of its kernels, too: a step was busy twice its length."""
    sessions = importlib.import_module("gpu_sessions")
    rows = [
        SimpleNamespace(
            key=key, device_type=place, is_user_annotation=key == "step", count=1,
            self_device_time_total=micros, self_cpu_time_total=1.0,
        )
        for key, place, micros in (
            ("aten::mm", DeviceType.CPU, 4000.0), ("gemm", DeviceType.CUDA, 4000.0),
            ("step", DeviceType.CUDA, 9000.0), ("copy", DeviceType.CUDA, 1000.0),
        )
    ]  # fmt: skip
    watch = MagicMock()
    watch.return_value.__enter__.return_value.key_averages.return_value = rows
    monkeypatch.setattr(sessions, "profile", watch)
    monkeypatch.setattr(sessions, "synchronize", lambda device: None)
    found = sessions.busiest_kernels(lambda: None, torch.device("cuda", 0))
    assert found["busy_milliseconds"] == 5.0
    assert [kernel["name"] for kernel in found["kernels"]] == ["gemm", "copy"]


class Part:
    """A part of three figures, the second of which fails."""

    def __init__(self, seen: Callable[[], dict[str, Any]]) -> None:
        self._seen, self.before_last = seen, {}

    def figures(self, device: object, *, tiny: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "one", lambda: {"value": 1}
        yield "two", self._fail
        yield "three", self._last

    def conclude(self, found: dict[str, Any]) -> None:
        for figure in found.values():
            figure["concluded"] = len(found)

    def _fail(self) -> None:
        raise MemoryError("no room")

    def _last(self) -> dict[str, Any]:
        self.before_last = self._seen()
        return {"value": 3}


def test_every_figure_is_on_the_disk_before_the_next_begins(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight minutes of a rented card lost with the process that held their figures, or one figure
    taken again that erases all others."""
    out = tmp_path / "gpu.json"
    part = Part(lambda: json.loads(out.read_text())["resume"]["measured"])
    monkeypatch.setattr(check.importlib, "import_module", lambda name: part)
    found = measured(check, "resume", out)
    assert part.before_last["one"] == {"value": 1, "concluded": 2}
    assert part.before_last["two"]["failed"] == "MemoryError: no room"
    assert found["three"] == {"value": 3, "concluded": 3}
    assert check.main(["resume", "--tiny", "--only", "three", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["resume"]["measured"].keys() == {"one", "two", "three"}
    monkeypatch.setattr(check, "faulthandler", Mock())  # it would end this process
    assert check.main(["resume", "--tiny", "--limit", "-1", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["resume"]["measured"]["three"]["value"] == 3


def test_wheels_that_travel_serve_what_is_not_installed(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a network has no other way; the standard library, and the NumPy that its
    PyTorch was built for, are not replaced."""
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_along.py", "value = 7")
        wheel.writestr("json.py", "raise AssertionError('another json than the installed one')")
    with zipfile.ZipFile(tmp_path / "numpy-9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("numpy/__init__.py", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    check.use_wheels(tmp_path, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked" / "numpy").exists()
    assert importlib.import_module("carried_along").value == 7
    assert importlib.import_module("json") is json


def teardown_module() -> None:
    for name in (
        "gpu_check", "gpu_sessions", "gpu_resident", "gpu_offload", "gpu_resume", "gpu_qlora",
        "carried_along",
    ):  # fmt: skip
        sys.modules.pop(name, None)
