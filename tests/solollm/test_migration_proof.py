"""The proof that a run moves: it holds where it must, and sees each thing that can go wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from solollm.architecture import ModelConfig
from solollm.backend import Capabilities, Plan, SessionOptions, TensorSource
from solollm.cli import main
from solollm.config import RunConfig, dump_config
from solollm.errors import ConfigError, IntegrityError
from solollm.horizon import updated
from solollm.migration_proof import Move, prove_migration
from solollm.registry import Selected
from solollm.resume_proof import tiny_config
from solollm.testing.toy import ToyBackend, ToySession
from solollm.tokenizer import Tokenizer

STEPS, CUT = 12, 5


class OtherBackend(ToyBackend):
    """The toy on another device: the same computation in other micro-batches."""

    name = "other"

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), device="elsewhere")


class ForgetfulSession(ToySession):
    """Takes the weights and starts the optimizer anew."""

    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        self.updates = int(state["updates"])


class ForgetfulBackend(OtherBackend):
    name = "forgetful"

    def train_session(self, model: ModelConfig, options: SessionOptions, plan: Plan) -> ToySession:
        return ForgetfulSession(model, options, plan)


class LossySession(ToySession):
    """Rounds one moment on the way in, by less than any loss shows."""

    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        super().import_optimizer(source, state)
        moment = self.optimizer.states["exp_avg.model.norm.weight"]
        moment[0] = np.nextafter(moment[0], np.float32(1))


class LossyBackend(OtherBackend):
    name = "lossy"

    def train_session(self, model: ModelConfig, options: SessionOptions, plan: Plan) -> ToySession:
        return LossySession(model, options, plan)


BACKENDS = {kind.name: kind for kind in (ToyBackend, OtherBackend, ForgetfulBackend, LossyBackend)}


@pytest.fixture
def config(
    small_corpus: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> RunConfig:
    """Twelve steps; backends are found by the names above."""
    monkeypatch.setattr(
        "solollm.pretraining.select_backend", lambda name: Selected(BACKENDS[name](), "a test")
    )
    made = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, STEPS)
    made = updated(made, "train", micro_batch_size=None)
    return updated(made, "optimizer", name="adamw")


def moves(config: RunConfig, folder: Path, *backends: str) -> list[Move]:
    return list(prove_migration(config, folder, backends=(backends[0], backends[1]), cut=CUT))


def test_from_a_backend_to_itself_nothing_changes(config: RunConfig, tmp_path: Path) -> None:
    """Guards the comparison: on the same backend nothing but equal bits is allowed."""
    (move,) = moves(config, tmp_path, "toy", "toy")
    assert move.holds
    assert (move.tolerance, move.deviation) == (0, 0)
    assert set(move.groups.values()) == {0.0}
    assert move.continuation == "equal to the bit"
    assert [pair.step for pair in move.steps] == list(range(CUT + 1, STEPS + 1))
    assert len({pair.batch for pair in move.steps}) == STEPS - CUT


def test_both_ways_between_two(config: RunConfig, tmp_path: Path) -> None:
    """Guards the other direction, and the band of another device."""
    there, back = moves(config, tmp_path, "toy", "other")
    assert (there.source, there.target) == (back.target, back.source) == ("toy", "other")
    for move in (there, back):
        assert move.holds
        assert move.tolerance == 2e-4
        assert {"weights of embedding", "exp_avg of norms", "exp_avg_sq of head"} <= set(
            move.groups
        )


def test_a_forgotten_optimizer_is_seen(config: RunConfig, tmp_path: Path) -> None:
    """Guards what a look at the next batch alone cannot show: weights moved, moments did not."""
    there, _ = moves(config, tmp_path, "toy", "forgetful")
    assert not there.holds
    assert not there.state_is_equal
    assert there.deviation > there.tolerance
    assert there.batches_equal


def test_one_bit_of_the_state_is_seen(config: RunConfig, tmp_path: Path) -> None:
    """Guards a rounding on the way that no loss shows."""
    there, _ = moves(config, tmp_path, "toy", "lossy")
    assert there.deviation <= there.tolerance
    assert not there.state_is_equal
    assert not there.holds


def test_another_learning_rate_or_batch_is_seen(config: RunConfig, tmp_path: Path) -> None:
    """Guards the verdict against looking at losses only."""
    (move,) = moves(config, tmp_path, "toy", "toy")
    assert not replace(move, lr_equal=False).holds
    assert not replace(move, batches_equal=False).holds


def test_a_cut_outside_the_run_is_refused(config: RunConfig, tmp_path: Path) -> None:
    """Guards against a proof about no step."""
    for cut in (0, STEPS, STEPS + 1):
        with pytest.raises(ConfigError, match="is not within a run of 12 steps"):
            next(prove_migration(config, tmp_path, backends=("toy", "toy"), cut=cut))


def test_another_function_of_the_same_weights_is_refused(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the proof's own way: the certificate stops a wrong move before it trains."""
    monkeypatch.setattr(OtherBackend, "train_session", lambda *a: HalfSession(*a[1:]))
    with pytest.raises(IntegrityError, match="does not go on here"):
        moves(config, tmp_path, "toy", "other")


class HalfSession(ToySession):
    """Reads half of what it was given."""

    def import_parameters(self, source: TensorSource) -> None:
        super().import_parameters(source)
        self.weights["lm_head.weight"] *= np.float32(0.5)


def test_the_command_prints_every_step_and_ends_with_3_where_it_fails(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the skin: table, verdict, JSON, exit codes."""
    file = tmp_path / "config.toml"
    file.write_text(dump_config(config.model_copy(update={"backend": "toy"})))
    given = ["verify", "migration", "--config", str(file), "--cut", str(CUT), "--backends"]
    assert main([*given, "toy,other"]) == 0
    printed = capsys.readouterr().out
    assert "toy to other: HOLDS" in printed
    assert "other to toy: HOLDS" in printed
    assert len(re.findall(rf"^ +{STEPS}  [0-9a-f]{{12}}  ", printed, re.MULTILINE)) == 2
    assert "weights of embedding" in printed
    assert main([*given, "toy,forgetful", "--json"]) == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["holds"] for line in lines[:2]] == [False, True]
    assert lines[0]["steps"][0]["step"] == CUT + 1
    assert lines[-1]["error"]["kind"] == "IntegrityError"
    assert main([*given, "toy"]) == 2
    assert main(["verify", "migration", "--help"]) == 0
    assert "solollm verify migration --backends mlx,torch" in capsys.readouterr().out
