"""Runs from a configuration, on the torch backend: resumed ones equal undisturbed ones, bitwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from solollm.architecture import ModelConfig
from solollm.backend import Batch, PendingMetrics
from solollm.checkpoint import open_checkpoint
from solollm.config import RunConfig, parse_config
from solollm.data.shards import shard_path
from solollm.data.stream import batch_digest
from solollm.errors import (
    ConfigError,
    IntegrityError,
    RunLocked,
    StoppedBySignal,
    StorageError,
)
from solollm.horizon import updated
from solollm.packing import pack
from solollm.pretraining import prepare, pretrain, resume
from solollm.resume_proof import tiny_config
from solollm.runs import Run
from solollm.testing.watching import StopAt
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import train_tokenizer

torch = pytest.importorskip("torch")
STEPS = 20  # more than an epoch of the small corpus


@pytest.fixture(scope="module")
def config(small_corpus: Path, small_tokenizer: Tokenizer) -> RunConfig:
    """Packed rows, three micro-batches per step of unequal size, saves every 5 steps."""
    made = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, STEPS)
    made = updated(made, "train", micro_batch_size=2, batch_size=5)
    made = updated(made, "checkpoint", every_steps=5)
    model = ModelConfig(
        vocab_size=small_tokenizer.padded_vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64,
    )  # fmt: skip
    made = updated(made, "model", config=model)
    return updated(made, "eval", sample_every_steps=STEPS, sample_tokens=4)


@pytest.fixture(scope="module")
def straight(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed. Not to be written to."""
    run = tmp_path_factory.mktemp("straight") / "run"
    pretrain(config, run)
    return run


def cut(config: RunConfig, run: Path, step: int) -> None:
    """Train up to the row of `step`, then stop by a signal."""
    with pytest.raises(StoppedBySignal):
        pretrain(config, run, sinks=[StopAt(step)])


def final_digest(run: Path, step: int = STEPS) -> str:
    return open_checkpoint(run / "checkpoints" / f"step-{step:08d}").certificate.digest


def losses(run: Path) -> list[tuple[int, float]]:
    rows = Run.open(run).read_metrics()
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("step", [1, 4, 13, 17])
def test_resume_equals_straight_run(config, straight, tmp_path, step) -> None:
    """Guards against any state that a checkpoint forgets: moments, updates, data position, best."""
    run = tmp_path / "run"
    cut(config, run, step)
    watcher = StopAt()
    result = resume(run, sinks=[watcher])
    assert 0 < result.start_step < STEPS
    assert final_digest(run) == final_digest(straight)
    assert losses(run) == losses(straight)
    assert watcher.of_kind("environment_changed") == []
    last = open_checkpoint(result.checkpoint).state
    expected = open_checkpoint(straight / "checkpoints" / f"step-{STEPS:08d}").state
    assert last.tokens_seen == expected.tokens_seen
    assert last.session_state == expected.session_state


def test_a_run_stopped_twice_equals_a_straight_run(config, straight, tmp_path) -> None:
    """Guards against a drift that one resume does not show."""
    run = tmp_path / "run"
    cut(config, run, 3)
    with pytest.raises(StoppedBySignal):
        resume(run, sinks=[StopAt(11)])
    resume(run)
    assert final_digest(run) == final_digest(straight)
    assert losses(run) == losses(straight)


def test_a_run_killed_before_its_first_save_starts_over(config, straight, tmp_path) -> None:
    """Guards against a run that can be neither resumed nor begun."""
    run = tmp_path / "run"
    cut(config, run, 2)
    shutil.rmtree(run / "checkpoints")
    (run / "events.jsonl").unlink()
    assert resume(run).start_step == 0
    assert final_digest(run) == final_digest(straight)
    assert losses(run) == losses(straight)


def test_token_ids_of_every_step_do_not_depend_on_micro_batch_or_stops(
    config, tmp_path, monkeypatch
) -> None:
    """Guards against data order that follows the hardware or the number of restarts."""
    from solollm_torch.session import TorchSession

    seen: dict[int, str] = {}
    train_step = TorchSession.train_step

    def recording(self: TorchSession, batch: Batch, *, lr: float) -> PendingMetrics:
        pending = train_step(self, batch, lr=lr)
        seen[len(seen)] = batch_digest(batch)
        return pending

    monkeypatch.setattr(TorchSession, "train_step", recording)
    short = updated(updated(config, "train", steps=8, batch_size=8), "eval", sample_every_steps=8)
    orders = []
    for number, micro_batch_size in enumerate((1, 2, 4, 8)):
        seen.clear()
        run = tmp_path / f"run{number}"
        cut(updated(short, "train", micro_batch_size=micro_batch_size), run, number + 1)
        assert resume(run).step == 8
        orders.append(list(seen.values()))
    assert len(set(orders[0])) == 8
    assert all(order == orders[0] for order in orders)


def test_a_damaged_checkpoint_is_passed_over_and_said(config, straight, tmp_path) -> None:
    """Guards against trusting the newest files after a crash of the disk."""
    run = tmp_path / "run"
    cut(config, run, 12)
    newest = max((run / "checkpoints").iterdir())
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    watcher = StopAt()
    result = resume(run, sinks=[watcher])
    assert result.start_step == 10
    assert newest.name in watcher.of_kind("checkpoint_damaged")[0]["reason"]
    assert final_digest(run) == final_digest(straight)
    assert losses(run) == losses(straight)


def test_without_an_intact_checkpoint_nothing_is_started_over(config, tmp_path) -> None:
    """Guards against a run that silently begins again where a repair could have saved it."""
    run = tmp_path / "run"
    cut(config, run, 4)
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"no checkpoint of .* is intact"):
        resume(run)


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(config, tmp_path) -> None:
    """Guards against weeks of history dropped because the disk with the checkpoints was not
    mounted."""
    run = tmp_path / "run"
    cut(config, run, 6)
    before = losses(run)
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="had saved up to step 7"):
        resume(run)
    assert losses(run) == before
    (tmp_path / "elsewhere").rename(run / "checkpoints")
    assert resume(run).start_step == 7


def test_a_page_that_fails_hides_no_other_error(config, tmp_path, monkeypatch) -> None:
    """Guards against a run that was stopped and ends as one whose page found no room."""
    noting = Run.append_event

    def full(*_: Any) -> None:
        raise StorageError("no room")

    def note(self: Run, kind: str, **fields: Any) -> None:
        full() if kind == "report_failed" else noting(self, kind, **fields)

    monkeypatch.setattr("solollm.pretraining.write_report", full)
    monkeypatch.setattr(Run, "append_event", note)
    cut(config, tmp_path / "run", 2)


def test_a_corpus_that_is_not_there_any_more_is_asked_for(config, small_corpus, tmp_path) -> None:
    """Guards against being told to build another corpus, and against a finished run that cannot
    be looked at without its corpus."""
    run, corpus = tmp_path / "run", tmp_path / "corpus"
    shutil.copytree(small_corpus, corpus)
    cut(updated(config, "data", corpus=str(corpus)), run, 4)
    corpus.rename(tmp_path / "moved")
    for attempt in (lambda: resume(run), lambda: pack(run, tmp_path / "run.solo")):
        with pytest.raises(ConfigError, match=r"resume --corpus FOLDER"):
            attempt()
    assert resume(run, corpus=tmp_path / "moved").step == STEPS
    assert resume(run).start_step == STEPS


def test_another_corpus_is_refused_with_both_fingerprints(config, other_corpus, tmp_path) -> None:
    """Guards against a run that goes on with other data than it began with."""
    run = tmp_path / "run"
    cut(config, run, 4)
    expected = open_checkpoint(max((run / "checkpoints").iterdir())).state.data.fingerprint
    with pytest.raises(IntegrityError, match=expected) as caught:
        resume(run, corpus=other_corpus)
    assert (
        len({word for word in caught.value.what.replace(",", " ").split() if len(word) == 32}) == 2
    )


@pytest.mark.parametrize("table", ["corpus", "decay_corpus"])
def test_a_corpus_of_which_one_bit_is_turned_over_is_not_trained_on(
    config, small_corpus, other_corpus, tmp_path, table
) -> None:
    """Guards against steps on data that a disk has changed: sizes and fingerprint, which is that of
    the index, stay the same, and the run ended in other bits with nobody told."""
    run, corpus = tmp_path / "run", tmp_path / "corpus"
    shutil.copytree(small_corpus if table == "corpus" else other_corpus, corpus)
    config = updated(config, "data", **{table: str(corpus)})
    cut(config, run, 4)
    shard = shard_path(corpus, "train", 0)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(IntegrityError, match=rf"{shard.name} is damaged"):
        resume(run)
    assert (run / "metrics.jsonl").read_bytes() == before
    with pytest.raises(IntegrityError, match=rf"{shard.name} is damaged"):
        pretrain(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_project_folder_can_be_moved_as_a_whole(
    config, straight, small_corpus, tmp_path, monkeypatch
) -> None:
    """Guards against absolute paths in a run."""
    home = tmp_path / "home"
    shutil.copytree(small_corpus, home / "corpora" / "small")
    monkeypatch.chdir(home)
    run = Path("runs/a")
    cut(updated(config, "data", corpus="corpora/small"), run, 4)
    everything = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert str(tmp_path).encode() not in everything
    monkeypatch.chdir(tmp_path)
    home.rename(tmp_path / "moved")
    resume(Path("moved/runs/a"))
    assert final_digest(Path("moved/runs/a")) == final_digest(straight)


def test_a_finished_run_is_left_alone(straight) -> None:
    """Guards against training past the horizon, or writing to a run that is done."""
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*.*")}
    result = resume(straight)
    assert result.start_step == result.step == STEPS
    assert result.loss == losses(straight)[-1][1]
    after = {path: path.stat().st_mtime_ns for path in straight.rglob("*.*")}
    assert {p: t for p, t in after.items() if p.name != "lock"} == {
        p: t for p, t in before.items() if p.name != "lock"
    }


def test_resume_keeps_what_decides_bits(config, tmp_path) -> None:
    """Guards against a resume whose micro-batch or threads follow the machine's mood."""
    run = tmp_path / "run"
    threads = torch.get_num_threads()
    cut(updated(config, "train", micro_batch_size=1), run, 3)
    settings = (run / "run.toml").read_text()
    assert "micro_batch_size = 1\n" in settings  # without it, the planner would choose
    (run / "run.toml").write_text(settings.replace("micro_batch_size = 1\n", ""))
    torch.set_num_threads(threads + 1)
    try:
        resume(run)
    finally:
        torch.set_num_threads(threads)
    last = open_checkpoint(max((run / "checkpoints").iterdir())).state.environment
    assert last.micro_batch_size == 1
    assert last.settings["threads"] == threads


def test_a_changed_version_is_said(config, tmp_path, monkeypatch) -> None:
    """Guards against bits that change without a word after an upgrade."""
    from solollm_torch.backend import TorchBackend

    run = tmp_path / "run"
    cut(config, run, 2)
    real = TorchBackend.capabilities

    def upgraded(self: TorchBackend) -> Any:
        from dataclasses import replace

        return replace(real(self), versions={"torch": "9.9"})

    monkeypatch.setattr(TorchBackend, "capabilities", upgraded)
    watcher = StopAt()
    resume(run, sinks=[watcher])
    assert "9.9" in watcher.of_kind("environment_changed")[0]["changes"]
    lineage = Run.open(run).read_lineage()
    assert [part["environment"]["versions"]["torch"] for part in lineage][-1] == "9.9"
    assert len(lineage) == 2


def test_a_run_goes_on_with_another_backend(config, straight, tmp_path, monkeypatch) -> None:
    """Guards against a checkpoint that only its own backend understands, a silent change, and
    settings of the old place that are kept in the new one."""
    from solollm_torch.backend import TorchBackend

    from solollm.registry import Selected

    class OtherBackend(TorchBackend):
        """The same computation under another name: nothing is pinned to what was recorded."""

        name = "other"

    run = tmp_path / "run"
    cut(config, run, 4)
    monkeypatch.setattr(
        "solollm.pretraining.select_backend", lambda name: Selected(OtherBackend(), name)
    )
    watcher = StopAt()
    result = resume(run, backend="other", sinks=[watcher])
    assert "backend was torch, is other" in watcher.of_kind("environment_changed")[0]["changes"]
    proven = watcher.of_kind("continuation_proven")[0]
    assert proven["step"] == result.start_step
    assert proven["deviation"] < proven["tolerance"] == 2e-4
    assert watcher.facts["backend_reason"] == "other"
    environment = open_checkpoint(result.checkpoint).state.environment
    assert environment.backend == "other"
    assert environment.micro_batch_size == 5  # planned anew: config.toml's 2 was for elsewhere
    got, expected = losses(run), losses(straight)
    assert [step for step, _ in got] == [step for step, _ in expected]
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in expected], rel=2e-4)
    parts = Run.open(run).read_lineage()
    assert [part["first_step"] for part in parts] == [0, result.start_step]


def test_init_from_takes_weights_and_nothing_else(config, straight, tmp_path) -> None:
    """Guards against an --init-from that is ignored, or that drags old moments along."""
    source = straight / "checkpoints" / f"step-{STEPS:08d}"
    raw = config.model_dump(mode="json", exclude_none=True)
    raw["model"] = {}
    raw["train"] |= {"steps": 1, "init_from": str(source)}
    raw["optimizer"] = {"lr": 1e-9}
    result = pretrain(parse_config(raw), tmp_path / "run")
    got, expected = open_checkpoint(result.checkpoint), open_checkpoint(source)
    name = "model.layers.0.mlp.gate_proj.weight"
    before = expected.parameters().read(name).float32()
    after = got.parameters().read(name).float32()
    assert abs(after - before).max() < 1e-6
    assert got.model == expected.model
    assert got.state.session_state["updates"] == 1


def test_init_from_refuses_another_tokenizer(config, straight, tmp_path) -> None:
    """Guards against weights whose ids mean other tokens."""
    source = tmp_path / "model"
    shutil.copytree(straight / "checkpoints" / f"step-{STEPS:08d}", source)
    train_tokenizer(["quite another text, with other pairs of letters"] * 3, 290).save(source)
    raw = config.model_dump(mode="json", exclude_none=True)
    raw["model"] = {}
    raw["train"]["init_from"] = str(source)
    with pytest.raises(ConfigError, match=r"the tokenizer of .* is not the corpus's"):
        prepare(parse_config(raw))
    raw["model"] = {"depth": 2}
    raw["train"]["init_from"] = str(straight / "checkpoints" / f"step-{STEPS:08d}")
    with pytest.raises(ConfigError, match="is fixed, but the config sets depth"):
        prepare(parse_config(raw))
    raw["train"]["init_from"] = str(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        prepare(parse_config(raw))


def test_a_run_in_use_is_refused(config, tmp_path) -> None:
    """Guards against two writers in one folder."""
    run = tmp_path / "run"
    cut(config, run, 2)
    with Run.open(run).lock(), pytest.raises(RunLocked):
        resume(run)
    with pytest.raises(ConfigError, match="holds a run already"):
        pretrain(config, run)


def test_the_decay_stage_reads_the_second_corpus(
    config, other_corpus, tmp_path, monkeypatch
) -> None:
    """Guards against a decay corpus that is never read, or read from the first step."""
    from solollm.data.stream import BatchStream

    read: list[tuple[str, int]] = []
    batch = BatchStream.batch

    def recording(self: BatchStream, step: int) -> Batch:
        read.append((self.fingerprint, step))
        return batch(self, step)

    staged = updated(updated(config, "data", decay_corpus=str(other_corpus)), "train", steps=6)
    monkeypatch.setattr(BatchStream, "batch", recording)
    pretrain(staged, tmp_path / "run")
    steps_of: dict[str, set[int]] = {}
    for fingerprint, step in read:
        steps_of.setdefault(fingerprint, set()).add(step)
    # Steps 0 to 2 of the first; 0 to 2 of the second, and 3 ahead of time; the held-out batch.
    assert sorted(map(sorted, steps_of.values())) == [[0], [0, 1, 2], [0, 1, 2, 3]]
    cosine = updated(staged, "schedule", name="cosine")
    with pytest.raises(ConfigError, match="no decay stage"):
        pretrain(cosine, tmp_path / "cosine")


def test_a_missing_corpus_is_said_before_anything_is_written(tmp_path) -> None:
    """Guards against empty run folders after a typo."""
    with pytest.raises(ConfigError, match="no corpus is given"):
        pretrain(RunConfig(), tmp_path / "run")
    with pytest.raises(ConfigError, match="is not a built corpus"):
        pretrain(parse_config({"data": {"corpus": str(tmp_path / "typo")}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
