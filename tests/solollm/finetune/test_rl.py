"""DPO and GRPO end to end: they learn, and a run that goes on is the run that never stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solollm import horizon
from solollm.backend import IGNORED
from solollm.checkpoint import latest_checkpoint
from solollm.config import GrpoTable, RunConfig
from solollm.errors import ConfigError, IntegrityError, StoppedBySignal
from solollm.finetune.rewards import Answered, Scorer, exact, final_answer, gsm8k
from solollm.finetune.rollouts import Rollouts, group_advantages, laid_out, request_seed
from solollm.finetune.tuning import finetune, finetune_config, prepare_tuning
from solollm.horizon import updated
from solollm.pretraining import prepare, resume
from solollm.registry import find_backends
from solollm.runs import Run
from solollm.testing.watching import StopAt

MakeConfig = Callable[..., RunConfig]
AVAILABLE = [c.name for c in find_backends() if c.probe.available and c.name in ("torch", "mlx")]
# What takes long is run on one of them, and on the other with the slow ones.
LEARNING = [pytest.param(n, marks=pytest.mark.slow) if n == "mlx" else n for n in AVAILABLE]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and answers of one digit."""
    path = tmp_path_factory.mktemp("digits") / "digits.jsonl"
    rows = [{"question": f"{n % 2}", "answer": f"{n % 2}"} for n in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in Run.open(run).read_metrics() if row["kind"] == kind]


def end_of(run: Path) -> str:
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return str(checkpoint.certificate.digest)


def forget_last(run: Path, step: int) -> None:
    shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("backend", LEARNING)
def test_dpo_learns_what_is_preferred(
    dpo: MakeConfig, tmp_path: Path, backend: str, method: str
) -> None:
    """Guards the way from pairs to weights: a reference that moves, a pair the wrong way round."""
    config = dpo(f"finetune.method={method}", "train.steps=60", "eval.every_steps=20",
                 "checkpoint.every_steps=0", "checkpoint.keep_best=false")  # fmt: skip
    finetune(config, tmp_path / "run", backend=backend)
    rows, held_out = trained(tmp_path / "run"), trained(tmp_path / "run", "eval")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # the model is its own reference
    assert np.mean([row["loss"] for row in rows[-5:]]) < 0.5 * rows[0]["loss"]
    assert held_out[-1]["loss"] < held_out[0]["loss"] < np.log(2)
    assert held_out[-1]["margin"] > held_out[0]["margin"] > 0
    assert held_out[-1]["accuracy"] >= 0.9
    # The loss of a pair over the bytes of a token is no bits per byte.
    assert all(row["bits_per_byte"] is None for row in rows + held_out)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stopped_dpo_goes_on_to_the_same_bits(
    dpo: MakeConfig, tmp_path: Path, method: str
) -> None:
    """Guards: a reference that is measured anew, with weights that have moved on."""
    config = dpo(f"finetune.method={method}", "train.steps=6")
    finetune(config, tmp_path / "straight", backend="torch")
    finetune(config, tmp_path / "stopped", backend="torch")
    forget_last(tmp_path / "stopped", 6)
    assert resume(tmp_path / "stopped").start_step == 3
    assert end_of(tmp_path / "stopped") == end_of(tmp_path / "straight")
    forget_last(tmp_path / "stopped", 6)
    shutil.rmtree(tmp_path / "stopped" / "data" / "reference")
    with pytest.raises(IntegrityError, match="log-probabilities of the reference"):
        resume(tmp_path / "stopped")


@pytest.fixture(scope="module")
def guesser(make_base: Callable[[int], Path]) -> Path:
    """A model of one layer."""
    return make_base(1)


@pytest.fixture(scope="module")
def grpo(guesser: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """A config whose reward is the share of digits, right or not, among an answer's characters."""
    folder = tmp_path_factory.mktemp("reward")
    (folder / "digit_reward.py").write_text(
        "def share(prompt, completion, answer):\n"
        "    digits = sum(c in '0123456789' for c in completion)\n"
        "    return digits / max(1, len(completion))\n",
        encoding="utf-8",
    )

    def make(*overrides: str) -> RunConfig:
        os.chdir(folder)
        return finetune_config(None, [
            f"train.init_from={json.dumps(str(guesser))}",
            f"finetune.data={json.dumps([str(digits)])}", "finetune.objective=grpo",
            "finetune.method=full", "data.seq_len=64", "train.batch_size=32", "eval.batches=1",
            "finetune.grpo.group_size=8", "finetune.grpo.max_new_tokens=4",
            'finetune.grpo.reward="digit_reward:share"', "eval.sample_tokens=2",
            "log.every_steps=1", "checkpoint.every_steps=3", "optimizer.lr=0.01",
            "finetune.held_out_fraction=0.2", "backend_options.mlx.compile=false", *overrides,
        ])  # fmt: skip

    return make


@pytest.fixture(autouse=True)
def _same_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("backend", LEARNING)
def test_grpo_raises_its_reward(grpo: MakeConfig, tmp_path: Path, backend: str) -> None:
    """Guards the way from a reward to weights: advantages of the wrong answer, or none."""
    config = grpo("train.steps=40", "checkpoint.every_steps=0", "checkpoint.keep_best=false",
                  "schedule.warmup_fraction=0.1")  # fmt: skip
    finetune(config, tmp_path / "run", backend=backend)
    rewards = [row["reward"] for row in trained(tmp_path / "run")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.3
    assert all(row["reward_timeouts"] == 0 for row in trained(tmp_path / "run"))


@pytest.mark.parametrize("backend", LEARNING)
def test_a_stopped_grpo_draws_the_same_answers(
    grpo: MakeConfig, tmp_path: Path, backend: str
) -> None:
    """Guards random bits that depend on what was drawn before, or on the process."""
    config = grpo("train.steps=5")
    finetune(config, tmp_path / "straight", backend=backend)
    finetune(config, tmp_path / "stopped", backend=backend)
    forget_last(tmp_path / "stopped", 5)
    assert resume(tmp_path / "stopped").start_step == 3
    assert end_of(tmp_path / "stopped") == end_of(tmp_path / "straight")
    drawn = [[row["reward"] for row in trained(tmp_path / n)] for n in ("straight", "stopped")]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 5


@pytest.mark.parametrize("objective", ["dpo", "dpo with an adapter", "grpo"])
def test_hours_become_steps_of_the_objective(
    dpo: MakeConfig, grpo: MakeConfig, tmp_path: Path, objective: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Guards `train.hours`: steps that are timed without reference, base or answers."""
    session_type = pytest.importorskip("solollm_torch.session").TorchSession
    monkeypatch.setattr(horizon, "_PROBE_SECONDS", 0.0)
    watched = (Rollouts, "batch") if objective == "grpo" else (session_type, "token_logprobs")
    really, calls = getattr(*watched), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return really(*arguments, **options)

    monkeypatch.setattr(*watched, counted)
    method = "lora" if objective == "dpo with an adapter" else "full"
    make = grpo if objective == "grpo" else dpo
    tuned = prepare_tuning(make("train.hours=0.0005", f"finetune.method={method}"))
    tuned.samples.save(tmp_path / "data")
    config = updated(tuned.config, "data", corpus=str(tmp_path / "data"))
    steps = prepare(config, backend="torch").config.train.steps
    assert steps is not None
    assert 1 <= steps < 1800, "a processor takes no step in a millisecond"
    assert len(calls) == 4, "one step to warm up, three to be timed"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (['finetune.grpo.reward="gsm9k"'], "is no reward"),
        (['finetune.grpo.reward="nowhere:score"'], "there is no nowhere.py"),
        (['finetune.grpo.reward="regex"'], "has no pattern"),
        (['finetune.grpo.reward="regex"', 'finetune.grpo.pattern="(["'], "no regular expression"),
    ],
)
def test_a_reward_that_cannot_be_had_is_refused_before_anything_is_written(
    grpo: MakeConfig, tmp_path: Path, settings: list[str], said: str
) -> None:
    """Guards: a run of that name left behind, which neither resumes nor begins again; a pattern
    that every answer fulfils."""
    with pytest.raises(ConfigError, match=said) as caught:
        finetune(grpo("train.steps=1", *settings), tmp_path / "run", backend="torch")
    assert caught.value.fix
    assert not (tmp_path / "run").exists()


def test_groups_that_do_not_fit_are_refused(grpo: MakeConfig, dpo: MakeConfig) -> None:
    """Guards a step with half a group, and a KL term with nothing to be near to."""
    with pytest.raises(ConfigError, match="splits groups"):
        prepare_tuning(grpo("train.batch_size=12"))
    with pytest.raises(ConfigError, match="splits pairs"):
        prepare_tuning(dpo("train.batch_size=3"))
    with pytest.raises(ConfigError, match="needs a reference"):
        prepare_tuning(grpo("finetune.grpo.beta=0.1"))


def test_answers_lie_in_rows_behind_their_prompts() -> None:
    """Guards prompts that are trained on, and means over the wrong tokens."""
    rows = [((5, 6), (7, 8, 1), 0.5), ((5,), (9,), -1.0)]
    batch = laid_out(rows, 3, GrpoTable())
    assert batch.input_ids[0, :4].tolist() == [5, 6, 7, 8]
    assert batch.labels[0, :5].tolist() == [IGNORED, 7, 8, 1, IGNORED]
    assert (batch.labels[2] == IGNORED).all()
    assert batch.denominator == 4
    assert batch.advantages is not None
    assert batch.advantages[0, :5].tolist() == [0, 0.5, 0.5, 0.5, 0]
    by_row = laid_out(rows, 3, GrpoTable(loss_type="grpo"))
    assert by_row.denominator == 2
    assert by_row.token_weights is not None
    assert by_row.token_weights[0, 1] == np.float32(1 / 3)
    assert laid_out(rows, 3, GrpoTable(loss_type="dr_grpo", max_new_tokens=10)).denominator == 20


def test_advantages_are_trls() -> None:
    """Guards the sample deviation (n - 1), the small constant, and groups that are all alike."""
    found = group_advantages(np.array([1.0, 0.0, 0.0, 3.0, 3.0, 3.0]), 3, "group")
    expected = (1 - 1 / 3) / (np.sqrt(1 / 3) + 1e-4)
    assert found[0, 0] == pytest.approx(expected)
    assert found[1].tolist() == [0, 0, 0]
    assert group_advantages(np.array([1.0, 0.0]), 2, "none").tolist() == [[0.5, -0.5]]


def test_seeds_differ_by_everything_that_they_count() -> None:
    """Guards groups whose answers are all the same."""
    seeds = {request_seed(a, b, c, d) for a in range(3) for b in range(3) for c in range(3)
             for d in range(3)}  # fmt: skip
    assert len(seeds) == 81
    assert request_seed(1, 2, 3, 4) == request_seed(1, 2, 3, 4)


def test_right_numbers_are_found() -> None:
    """Guards commas, trailing points, and numbers that stand elsewhere."""
    assert final_answer("9 apples\n#### 1,234.") == "1234"
    assert final_answer("the answer is 7") is None
    assert final_answer("#### 3 or rather: The answer is $1,250.") == "1250"
    assert final_answer("The answer is 3, so #### 4") == "4"
    assert gsm8k("so #### 18", "steps 3\n#### 18.0") == 1
    assert gsm8k("18", "#### 18") == 0
    assert exact(" Yes  sir", "yes sir") == 1


def scored(tmp_path: Path, code: str, **table: Any) -> list[float]:
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    scorer = Scorer(GrpoTable(**{"reward": "mine:score", "reward_seconds": 2.0, **table}))
    try:
        return scorer.rewards([Answered("2 + 2?", "It is 4.", "4"), Answered("?", "no", "5")])
    finally:
        scorer.close()


def test_a_users_function_rewards(tmp_path: Path) -> None:
    """Guards arguments in another order."""
    code = "def score(prompt, completion, answer):\n    return 2.5 * (answer in completion)\n"
    assert scored(tmp_path, code) == [2.5, 0]
    pattern = r"is {answer}\b"
    assert scored(tmp_path, "", reward="regex", pattern=pattern) == [1, 0]


def test_a_changed_reward_file_is_noticed(
    grpo: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a run that goes on by another reward than it began with, and nobody knows."""
    file = tmp_path / "mine.py"
    file.write_text("def score(prompt, completion, answer):\n    return len(completion) % 2\n")
    first = file.read_bytes()
    config = grpo("finetune.grpo.reward=mine:score", "train.steps=4", "checkpoint.every_steps=2")
    monkeypatch.chdir(tmp_path)
    finetune(config, tmp_path / "run", backend="torch")
    forget_last(tmp_path / "run", 4)
    file.write_bytes(first + b"\n")
    with pytest.raises(
        IntegrityError, match=r"mine\.py .* is not the reward .* began with"
    ) as told:
        resume(tmp_path / "run")
    assert "reward.json" in told.value.fix
    assert Run.open(tmp_path / "run").last_ending() == ""
    file.write_bytes(first)
    assert resume(tmp_path / "run").start_step == 2
    forget_last(tmp_path / "run", 4)
    file.write_bytes(first + b"\n")
    (tmp_path / "run" / "data" / "reward.json").unlink()
    assert resume(tmp_path / "run").step == 4


def test_a_function_that_hangs_gives_nothing(tmp_path: Path) -> None:
    """Guards a run that waits for ever; the next answer is rewarded again."""
    code = "def score(prompt, completion, answer):\n    while answer == '4': pass\n    return 1\n"
    assert scored(tmp_path, code) == [0, 1]


def test_a_function_that_fails_is_told(tmp_path: Path) -> None:
    """Guards zeros that hide a mistake in the user's own file."""
    with pytest.raises(ConfigError, match="does not work") as caught:
        scored(tmp_path, "def score(prompt, completion, answer):\n    return answer + 1\n")
    assert "TypeError" in str(caught.value.why)
    with pytest.raises(ConfigError, match="no reward"):
        scored(tmp_path, "", reward="../evil:score")
    with pytest.raises(ConfigError, match=r"there is no other\.py"):
        scored(tmp_path, "", reward="other:score")


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_what_a_stopped_run_promises_holds(
    dpo: MakeConfig, grpo: MakeConfig, tmp_path: Path, objective: str
) -> None:
    """Guards certificates that measure answers which were drawn, and never come again elsewhere."""
    config = (dpo if objective == "dpo" else grpo)("train.steps=6", "checkpoint.every_steps=0")
    with pytest.raises(StoppedBySignal):
        finetune(config, tmp_path / "run", backend="torch", sinks=[StopAt(2)])
    watcher = StopAt()
    assert resume(tmp_path / "run", sinks=[watcher]).step == 6
    proven = watcher.of_kind("continuation_proven")
    assert len(proven) == 1
    assert proven[0]["deviation"] == 0
