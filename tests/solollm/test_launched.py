"""`solollm pretrain` and `resume` as a launcher starts them: two processes, one run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solollm.architecture import ModelConfig
from solollm.checkpoint import latest_checkpoint
from solollm.config import dump_config
from solollm.errors import StoppedBySignal
from solollm.horizon import updated
from solollm.pretraining import resume
from solollm.resume_proof import tiny_config
from solollm.run_log import Row
from solollm.runs import Run, summarize
from solollm.tokenizer import Tokenizer

pytest.importorskip("torch")
STEPS = 2000  # more than a test ever reaches
DEADLINE_SECONDS = 300.0  # of a machine that is busy with other things


@pytest.fixture
def settings(tmp_path: Path, small_corpus: Path, small_tokenizer: Tokenizer) -> Path:
    """A config file: five rows a step, of which ranks take two and three; no save but a stop's."""
    made = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, STEPS)
    model = ModelConfig(
        vocab_size=small_tokenizer.padded_vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64,
    )  # fmt: skip
    made = updated(made, "model", config=model)
    made = updated(made, "train", micro_batch_size=2, batch_size=5)
    made = updated(made, "checkpoint", every_steps=0, every_minutes=0.0)
    made = updated(made, "eval", every_steps=3, batches=1, sample_every_steps=4, sample_tokens=4)
    path = tmp_path / "settings.toml"
    path.write_text(dump_config(updated(made, "log", every_steps=1)))
    return path


class Launched:
    """Two processes of one command; leaving the block ends what is left of them."""

    def __init__(self, *words: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [sys.executable, "-m", "solollm", *words, "--backend", "torch", "--json"]
        self.ranks = [
            subprocess.Popen(
                command,
                env=os.environ | {
                    "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in "01"
        ]  # fmt: skip

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.communicate()

    def wait_for_step(self, run: Path, step: int) -> None:
        end = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < end:
            if (run / "metrics.jsonl").exists():
                rows = Run.open(run).read_metrics()
                if any(row["step"] >= step for row in rows):
                    return
            ended = [p for p in self.ranks if p.poll() is not None]
            assert not ended, ended[0].communicate()
            time.sleep(0.05)
        raise AssertionError(f"step {step} was not reached")

    def exit_codes(self) -> list[int]:
        return [process.wait(timeout=DEADLINE_SECONDS) for process in self.ranks]


class StopAt:
    """A sink that ends this process's training at a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.events: list[Row] = []

    def start(self, facts: Row) -> None: ...
    def evaluation(self, row: Row) -> None: ...
    def sample(self, row: Row) -> None: ...
    def finish(self, summary: Row) -> None: ...

    def event(self, row: Row) -> None:
        self.events.append(row)

    def metrics(self, row: Row) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_two_ranks_stop_together_lose_one_and_one_goes_on(tmp_path: Path, settings: Path) -> None:
    """Two writers of one run; a signal that reaches one and leaves the other waiting; a death that
    nobody tells of; a checkpoint of two ranks that one process cannot go on with."""
    path = tmp_path / "run"
    with Launched("pretrain", "--config", str(settings), "--run", str(path)) as both:
        both.wait_for_step(path, 5)
        both.ranks[1].send_signal(signal.SIGTERM)
        assert both.exit_codes() == [143, 143]
        said, silent = (process.communicate()[0] for process in both.ranks)
        assert b"checkpoint_saved" in said
        assert b"checkpoint_saved" not in silent
    run = Run.open(path)
    rows = run.read_metrics()
    trained = [row["step"] for row in rows if row["kind"] == "train"]
    assert trained == list(range(1, len(trained) + 1))
    assert {row["kind"] for row in rows} == {"train", "eval", "sample"}
    kinds = [event["kind"] for event in run.read_events() if event["kind"] != "keep_awake"]
    assert kinds == ["checkpoint_saved", "stopped"]
    checkpoint, damaged = latest_checkpoint(run.checkpoints)
    assert checkpoint is not None
    assert not damaged
    assert checkpoint.state.environment.world_size == 2
    assert checkpoint.certificate.continuation is not None
    saved = checkpoint.step
    checkpoint.close()

    with Launched("resume", str(path)) as both:
        both.wait_for_step(path, saved + 3)
        both.ranks[0].kill()
        assert both.exit_codes() == [-signal.SIGKILL, 1]
    failed = run.read_events()[-1]
    assert (failed["kind"], failed["rank"]) == ("failed", 1)
    assert summarize(path).state == "failed"

    sink = StopAt(saved + 2)
    with pytest.raises(StoppedBySignal):
        resume(path, backend="torch", sinks=[sink])
    proven = [event for event in sink.events if event["kind"] == "continuation_proven"]
    assert proven[0]["deviation"] <= proven[0]["tolerance"] == 2e-4
    changed = [event for event in sink.events if event["kind"] == "environment_changed"]
    assert "world_size was 2, is 1" in changed[0]["changes"]
    assert summarize(path).state == "stopped"


@pytest.mark.slow
def test_a_rank_that_hangs_fails_the_run(tmp_path: Path, settings: Path) -> None:
    """Half an hour of gloo's patience, and a run that says it is running meanwhile."""
    path = tmp_path / "run"
    patience = ["--set", "machine.rank_silent_seconds=5"]
    words = ["pretrain", "--config", str(settings), "--run", str(path), *patience]
    with Launched(*words) as both:
        both.wait_for_step(path, 3)
        both.ranks[0].send_signal(signal.SIGSTOP)
        assert both.ranks[1].wait(timeout=DEADLINE_SECONDS) == 1
        assert summarize(path).state == "failed"
        both.ranks[0].send_signal(signal.SIGCONT)
        assert both.ranks[0].wait(timeout=DEADLINE_SECONDS) == 1
    assert "said nothing" in Run.open(path).read_events()[-1]["reason"]


@pytest.mark.slow
def test_torchrun_ends_with_an_error_when_a_rank_dies(tmp_path: Path, settings: Path) -> None:
    """A launcher's own signal to rank 0 that is taken for a stop by the user."""
    path = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    words = ["-m", "--", "solollm", "pretrain", "--config", str(settings), "--run", str(path)]
    started = subprocess.Popen(
        [*launch, *words, "--backend", "torch"], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        end = time.monotonic() + DEADLINE_SECONDS
        while summarize(path).step < 5 and time.monotonic() < end:
            time.sleep(0.1)
        import psutil

        children = psutil.Process(started.pid).children()
        ranks = {p.environ()["RANK"]: p for p in children if "RANK" in p.environ()}
        ranks["1"].kill()
        assert started.wait(timeout=DEADLINE_SECONDS) != 0
    finally:
        started.kill()
    assert Run.open(path).read_events()[-1]["kind"] == "failed"
    assert summarize(path).state == "failed"


@pytest.mark.slow
def test_mlx_launch_leaves_a_failed_run_when_a_rank_dies(tmp_path: Path, settings: Path) -> None:
    """The launcher itself ends with 0, and the other rank in a collective that never returns."""
    pytest.importorskip("mlx.core")
    path = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    main = "from mlx._distributed_utils.launch import main; main()"  # what `mlx.launch` runs
    launch = [sys.executable, "-c", main, "-n", "2", "--backend", "ring", "-p", str(port)]
    words = ["-m", "solollm", "pretrain", "--config", str(settings), "--run", str(path)]
    started = subprocess.Popen(
        [*launch, "--", sys.executable, *words, "--backend", "mlx"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        end = time.monotonic() + DEADLINE_SECONDS
        while summarize(path).step < 5 and time.monotonic() < end:
            time.sleep(0.1)
        import psutil

        children = psutil.Process(started.pid).children(recursive=True)
        ranks = {p.environ()["MLX_RANK"]: p for p in children if "MLX_RANK" in p.environ()}
        ranks["1"].kill()
        said = b"".join(started.communicate(timeout=DEADLINE_SECONDS))
    finally:
        started.kill()
        started.communicate()
    assert b"rank 1 exited with code -9" in said
    assert b"rank 0 exited with code 1" in said
    assert Run.open(path).read_events()[-1]["kind"] == "failed"
    assert summarize(path).state == "failed"
