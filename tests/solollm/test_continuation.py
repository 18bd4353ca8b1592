"""A run says what comes next, and goes on only where that comes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from solollm.backend import Batch, StepMetrics
from solollm.certificate import Continuation
from solollm.checkpoint import Checkpoint, Environment, add_continuation, open_checkpoint
from solollm.cli import main
from solollm.config import RunConfig
from solollm.continuation import BANDS, compare, tolerance_between
from solollm.data.stream import batch_digest
from solollm.errors import IntegrityError, StoppedBySignal
from solollm.horizon import updated
from solollm.packing import pack, unpack
from solollm.pretraining import pretrain, resume
from solollm.registry import Selected
from solollm.resume_proof import tiny_config
from solollm.run_streams import open_split
from solollm.runs import Run
from solollm.testing.toy import ToyBackend, ToySession
from solollm.testing.watching import StopAt
from solollm.tokenizer import Tokenizer

HERE = Environment(backend="torch", device="cpu", micro_batch_size=2, compute_dtype="float32")
PROMISED = Continuation(batches=("a", "b"), losses=(2.0, 4.0), grad_norm=0.5)


@pytest.fixture
def config(
    small_corpus: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> RunConfig:
    """Twelve steps on the toy backend."""
    monkeypatch.setattr(
        "solollm.pretraining.select_backend", lambda name: Selected(ToyBackend(), "a test")
    )
    made = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, 12)
    return updated(made, "optimizer", name="adamw")


def stopped(config: RunConfig, run: Path, step: int = 4) -> Checkpoint:
    """The checkpoint of a run that was stopped after the row of `step`."""
    with pytest.raises(StoppedBySignal):
        pretrain(config, run, sinks=[StopAt(step)])
    return open_checkpoint(max((run / "checkpoints").iterdir()))


def test_a_stopped_run_promises_what_an_unmoved_one_does(config: RunConfig, tmp_path: Path) -> None:
    """Guards a certificate that speaks of other batches or of other weights than the next step's:
    its numbers are those that an undisturbed run logs one and two steps later."""
    pretrain(config, tmp_path / "straight")
    metrics = Run.open(tmp_path / "straight").read_metrics()
    rows = {row["step"]: row for row in metrics if row["kind"] == "train"}
    checkpoint = stopped(config, tmp_path / "run")
    step, promised = checkpoint.step, checkpoint.certificate.continuation
    assert promised is not None
    assert promised.losses[0] == rows[step + 1]["loss"]
    assert promised.grad_norm == rows[step + 1]["grad_norm"]
    stream = open_split(config, config.data.corpus, "train", batch_size=6, seq_len=64)
    digests = tuple(batch_digest(stream.batch(number)) for number in (step, step + 1))
    assert promised.batches == digests
    assert promised.losses[1] == pytest.approx(promised.losses[0], rel=0.2)  # at the same weights
    assert promised.losses[1] != rows[step + 2]["loss"]


def test_a_stop_at_a_saved_step_promises_too(config: RunConfig, tmp_path: Path) -> None:
    """Guards the stop that falls on a scheduled save, whose checkpoint is there already."""
    config = updated(config, "checkpoint", every_steps=1)
    checkpoint = stopped(config, tmp_path / "run")
    assert checkpoint.certificate.continuation is not None
    kinds = [event["kind"] for event in Run.open(tmp_path / "run").read_events()]
    assert kinds.count("checkpoint_saved") == checkpoint.step


def test_the_same_machine_goes_on_to_the_bit(config: RunConfig, tmp_path: Path) -> None:
    """Guards a check that is skipped, or that lets the same machine deviate."""
    checkpoint = stopped(config, tmp_path / "run")
    watcher = StopAt(None)
    resume(tmp_path / "run", sinks=[watcher])
    (proven,) = watcher.of_kind("continuation_proven")
    assert proven["step"] == checkpoint.step
    assert (proven["deviation"], proven["tolerance"]) == (0.0, 0.0)
    assert proven["result"] == "equal to the bit"
    assert "continuation_proven" in [e["kind"] for e in Run.open(tmp_path / "run").read_events()]


@pytest.mark.parametrize("field", ["losses", "grad_norm", "batches"])
def test_another_continuation_is_refused_and_nothing_changes(
    config: RunConfig, tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a run that goes on wrong: one part in 10^6 is too much on the same machine, and a
    refusal leaves lineage, plan, metrics and checkpoints as they were."""
    run = tmp_path / "run"
    checkpoint = stopped(config, run)
    promised = checkpoint.certificate.continuation
    assert promised is not None
    wrong = {
        "losses": (promised.losses[0], promised.losses[1] * (1 + 1e-6)),
        "grad_norm": promised.grad_norm * (1 + 1e-6),
        "batches": (promised.batches[0], "0" * 32),
    }
    add_continuation(checkpoint.path, promised.model_copy(update={field: wrong[field]}))
    before = contents(run)
    assert main(["resume", str(run), "--json"]) == 3
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["kind"] == "IntegrityError"
    number = {"losses": "loss of batch", "grad_norm": "gradient norm", "batches": "batch"}[field]
    assert number in error["what"] + error["why"]
    after = contents(run)
    after.pop("events.jsonl"), before.pop("events.jsonl")
    assert after == before


def test_a_backend_that_computes_something_else_is_refused(
    small_corpus: Path, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the promise itself: the toy takes every tensor of a Llama, bit for bit, and computes
    another function with them."""
    pytest.importorskip("torch")
    config = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, 12)
    config = updated(config, "optimizer", name="adamw")
    with pytest.raises(StoppedBySignal):
        pretrain(config, tmp_path / "run", backend="torch", sinks=[StopAt(4)])
    monkeypatch.setattr(
        "solollm.pretraining.select_backend", lambda name: Selected(ToyBackend(), "a test")
    )
    with pytest.raises(IntegrityError, match="does not go on here as it would have"):
        resume(tmp_path / "run")


def test_a_stop_that_cannot_look_ahead_is_a_stop_all_the_same(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the checkpoint of a run whose next loss is not finite, or whose disk fills up."""
    calls = iter([False] * 1 + [True] * 99)

    def probe(self: ToySession, batch: Batch) -> StepMetrics:
        return StepMetrics(math.inf if next(calls) else 1.0, 1.0, 1, False)

    monkeypatch.setattr(ToySession, "probe_step", probe)
    checkpoint = stopped(config, tmp_path / "run")
    assert checkpoint.certificate.continuation is None
    (event,) = [
        e for e in Run.open(tmp_path / "run").read_events() if e["kind"] == "continuation_missing"
    ]
    assert "not finite" in event["reason"]


def test_a_run_without_a_promise_goes_on(config: RunConfig, tmp_path: Path) -> None:
    """Guards checkpoints of killed runs, which promise nothing, against a refusal."""
    run = tmp_path / "run"
    pretrain(config, run)
    (run / "checkpoints" / "step-00000012" / "config.json").write_text("damaged")
    watcher = StopAt(None)
    assert resume(run, sinks=[watcher]).start_step == 8
    assert watcher.of_kind("continuation_proven") == []


def test_tolerances() -> None:
    """Guards the bands: none on the same machine, the coarser dtype's across, and cards whose
    kernels are not repeatable are not held to bits."""
    coarse = HERE.model_copy(update={"compute_dtype": "bfloat16"})
    loose = HERE.model_copy(update={"settings": {"deterministic": False}})
    other = HERE.model_copy(update={"backend": "mlx"})
    assert tolerance_between(HERE, HERE, same_machine=True) == 0
    assert tolerance_between(coarse, coarse, same_machine=True) == 0
    assert tolerance_between(HERE, HERE, same_machine=False) == 2e-4
    assert tolerance_between(HERE, other, same_machine=True) == 2e-4
    assert tolerance_between(loose, loose, same_machine=True) == 2e-4
    for pair in ((HERE, coarse), (coarse, HERE), (coarse, other)):
        assert tolerance_between(*pair, same_machine=True) == BANDS["bfloat16"]


def test_deviations_are_relative_and_the_largest_is_named() -> None:
    """Guards a deviation of one number that hides behind another."""
    found = PROMISED.model_copy(update={"losses": (2.0, 4.0004), "grad_norm": 0.5001})
    comparison = compare(PROMISED, found, step=7, tolerance=2e-4)
    assert comparison.place == "the gradient norm of step 8"
    assert comparison.deviation == pytest.approx(2e-4)
    assert compare(PROMISED, PROMISED, step=7, tolerance=0).holds
    assert not compare(PROMISED, found, step=7, tolerance=1e-4).holds


def test_another_codec_of_the_base_is_held_to_its_losses() -> None:
    """Guards: a QLoRA run that no other backend may go on with; one that any may, whatever it
    makes of it."""
    found = PROMISED.model_copy(update={"losses": (2.1, 4.1), "grad_norm": 0.9})
    comparison = compare(PROMISED, found, step=7, tolerance=2e-4, is_requantised=True)
    assert comparison.holds
    assert comparison.place == "the loss of step 8"
    assert not compare(PROMISED, found, step=7, tolerance=2e-4).holds
    wrong = PROMISED.model_copy(update={"losses": (2.3, 4.0)})
    assert not compare(PROMISED, wrong, step=7, tolerance=2e-4, is_requantised=True).holds


def contents(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file()
    }


def test_another_processor_is_another_machine(config: RunConfig, tmp_path: Path) -> None:
    """Guards the move between two machines of one backend: the band instead of bits, settings
    planned anew, and said."""
    run = tmp_path / "run"
    stopped(updated(config, "train", micro_batch_size=2), run)
    lineage = json.loads((run / "lineage.json").read_text())
    lineage[0]["environment"]["cpu"] = "another processor"
    (run / "lineage.json").write_text(json.dumps(lineage))
    watcher = StopAt(None)
    result = resume(run, sinks=[watcher])
    (proven,) = watcher.of_kind("continuation_proven")
    assert proven["tolerance"] == 2e-4
    (changed,) = watcher.of_kind("environment_changed")
    assert "cpu was another processor, is " in changed["changes"]
    assert "micro_batch_size was 2, is 6" in changed["changes"]
    assert open_checkpoint(result.checkpoint).state.environment.micro_batch_size == 6


class FastToy(ToyBackend):
    """Computes in other pieces, under another name."""

    name = "fast"


def test_a_promise_made_elsewhere_is_held_to_the_band(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a run that was killed, packed with another backend, and goes on with its own: the
    promise is not of its own bits, and must not be refused for that."""
    run = tmp_path / "run"
    pretrain(updated(config, "train", micro_batch_size=1), run)
    with monkeypatch.context() as patch:
        patch.setattr(
            "solollm.pretraining.select_backend", lambda name: Selected(FastToy(), "a test")
        )
        pack(run, tmp_path / "run.solo", step=8)
    moved = unpack(tmp_path / "run.solo", tmp_path / "there").run
    promised = open_checkpoint(moved / "checkpoints" / "step-00000008").certificate.continuation
    assert promised is not None
    assert promised.environment is not None
    assert promised.environment["backend"] == "fast"
    watcher = StopAt(None)
    resume(moved, sinks=[watcher])
    assert watcher.of_kind("continuation_proven")[0]["tolerance"] == 2e-4
    assert watcher.of_kind("environment_changed") == []
