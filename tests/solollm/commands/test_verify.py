"""`solollm verify resume`: the verdict and its exit code; the proof is test_resume_proof's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from solollm.cli import main
from solollm.config import RunConfig, dump_config
from solollm.resume_proof import Life, ResumeProof, tiny_config
from solollm.tokenizer import Tokenizer


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, int]]:
    """Replaces the twenty processes by one outcome: equal, unless the seed is 1."""
    asked: list[tuple[RunConfig, int]] = []

    def prove(config: RunConfig, folder: Path, *, kills: int, **options: Any) -> ResumeProof:
        asked.append((config, kills))
        life = Life(start_step=8, last_step=21, in_save=True)
        options["on_life"](life)
        killed = "b" * 64 if options["seed"] == 1 else "a" * 64
        return ResumeProof(config.train.steps or 0, (life,) * kills, "a" * 64, killed, True)

    monkeypatch.setattr("solollm.resume_proof.prove_resume", prove)
    return asked


def test_equal_states_end_with_0(proofs, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a proof of too short a run: its steps grow with the kills."""
    assert main(["verify", "resume", "--kills", "2"]) == 0
    printed = capsys.readouterr().out
    assert "killed after step    21, in a save" in printed
    assert "2 kills, 2 of them in a save" in printed
    assert "EQUAL" in printed
    (config, kills), *_ = proofs
    assert (config.train.steps, kills) == (30, 2)


def test_unequal_states_end_with_3(proofs, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a failed proof that a script takes for a passed one."""
    assert main(["verify", "resume", "--kills", "1", "--seed", "1"]) == 3
    captured = capsys.readouterr()
    assert "NOT EQUAL" in captured.out
    assert "the killed run is not equal to the undisturbed one" in captured.err


@pytest.mark.parametrize("what", ["resume", "migration", "faults"])
def test_runs_are_kept_in_a_new_folder_only(
    proofs, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards one's own folder of runs: `--folder runs` put a corpus and two runs among them."""
    (tmp_path / "mine").mkdir()
    assert main(["verify", what, "--folder", str(tmp_path)]) == 2
    assert "give --folder the name of a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "file").write_text("mine")
    assert main(["verify", what, "--folder", str(tmp_path / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert proofs == []


def test_a_training_of_ones_own_is_proved(
    proofs, small_corpus: Path, small_tokenizer: Tokenizer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Guards against --config that is read and then not used."""
    path = tmp_path / "own.toml"
    own = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, 77)
    path.write_text(dump_config(own))
    arguments = ["verify", "resume", "--config", str(path), "--kills", "1", "--json"]
    assert main(arguments) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["steps"], shown["equal"], shown["kills_in_save"]) == (77, True, 1)
    assert proofs[0][0].model == own.model
