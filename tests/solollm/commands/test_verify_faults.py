"""`solollm verify faults`: what it prints, what it keeps, how it ends; the proof is tested in
tests/solollm/fault_proof."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from solollm.cli import main
from solollm.config import RunConfig
from solollm.fault_proof.proof import FAULTS, Outcome


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a proof whose outcomes are: `sigterm` failed, `read-only-folder` skipped, any
    other is ok."""
    verdicts = {"sigterm": "failed", "read-only-folder": "skipped"}
    place = tmp_path / "place"

    def prove(config: RunConfig, folder: Path, *, faults: Any) -> Iterator[Outcome]:
        for fault in faults:
            verdict: Any = verdicts.get(fault.name, "ok")
            yield Outcome(fault, verdict, f"seen of {fault.name}", 1.5, folder / fault.name)

    def make(prefix: str) -> str:
        place.mkdir()
        return str(place)

    monkeypatch.setattr("solollm.fault_proof.proof.prove_faults", prove)
    monkeypatch.setattr("solollm.fault_proof.proof.training_for_faults", lambda *a: RunConfig())
    monkeypatch.setattr("tempfile.mkdtemp", make)
    return place


def test_kept_promises_end_with_0_and_leave_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a full disk after some proofs; against a skipped fault that passes as ok."""
    words = ["--only", "sigint", "--only", "read-only-folder"]
    assert main(["verify", "faults", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "ok       sigint                    1.5 s  seen of sigint",
        "skipped  read-only-folder          1.5 s  seen of read-only-folder",
    ]
    assert lines[3].startswith("1 ok, 0 failed, 1 skipped, in ")
    assert not place.exists()


def test_a_broken_promise_ends_with_1_and_keeps_the_runs(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a failed proof that a script takes for a passed one, or of which nothing is
    left to look at."""
    assert main(["verify", "faults"]) == 1
    shown = capsys.readouterr()
    assert "FAILED   sigterm" in shown.out
    assert "promised: it saves first and ends with 143" in shown.out
    assert f"1 of {len(FAULTS)} faults did not end as promised: sigterm" in shown.err
    assert str(place) in shown.err
    assert place.exists()


def test_json_is_one_document_per_fault_and_a_sum(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards scripts against text among the documents."""
    assert main(["verify", "faults", "--json", "--only", "sigterm", "--only", "sigint"]) == 1
    first, second, total, error = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["name"], first["verdict"], first["folder"]) == (
        "sigterm", "failed", str(place / "sigterm"),
    )  # fmt: skip
    assert (second["verdict"], second["folder"]) == ("ok", None)
    assert (total["faults"], total["ok"], total["failed"], total["skipped"]) == (2, 1, 1, 0)
    assert error["error"]["exit_code"] == 1


def test_a_folder_of_ones_own_must_be_new(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards files that stand there, and runs of an earlier proof taken for this one's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    assert main(["verify", "faults", "--folder", str(tmp_path / "mine")]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_every_fault_of_the_catalogue_ends_as_promised(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The whole command, on the best backend here."""
    code = main(["verify", "faults", "--json", "--folder", str(tmp_path / "kept")])
    *rows, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert code == 0, [row for row in rows if row.get("verdict") == "failed"]
    assert [row["name"] for row in rows] == [fault.name for fault in FAULTS]
    assert total["failed"] == 0
    assert total["skipped"] <= 3, [row["seen"] for row in rows if row["verdict"] == "skipped"]
    left = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert left == ["base", "corpus"]


def test_the_guide_holds_the_catalogue() -> None:
    """Guards the guide against a fault that is renamed, added, or promised otherwise."""
    guide = Path(__file__).resolve().parents[3] / "docs" / "guides" / "faults.md"
    rows = re.findall(r"^\| `[a-z-]+` .*$", guide.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [f"| `{fault.name}` | {fault.done} | {fault.promise} |" for fault in FAULTS]
