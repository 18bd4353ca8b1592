"""A supervised run: real child processes on the NumPy backend, killed and failing as scripted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from solollm.architecture import ModelConfig
from solollm.checkpoint import latest_checkpoint
from solollm.config import RunConfig, dump_config, parse_config
from solollm.errors import BackendError
from solollm.runs import Run
from solollm.supervisor import Supervisor
from solollm.testing.hosts import ScriptedHost
from solollm.tokenizer import Tokenizer
from solollm.vitals import Vitals

# A trainer on the NumPy backend. What goes wrong in which of its lives is the last argument.
CHILD = """
import json, os, signal, sys, time
from importlib.metadata import EntryPoint
from pathlib import Path
from solollm import registry
from solollm.config import load_config
from solollm.errors import SoloLLMError
from solollm.pretraining import pretrain, resume
from solollm.testing.hosts import ScriptedHost
from solollm.testing.toy import ToySession
from solollm.vitals import Vitals

folder, memory, script = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
lives = folder / "lives"
life = len(lives.read_text().splitlines()) if lives.exists() else 0
with lives.open("a") as file:
    file.write(json.dumps(memory) + "\\n")
plan = script[life] if life < len(script) else {}
registry.entry_points = lambda group: [EntryPoint("toy", "solollm.testing.toy:ToyBackend", group)]
real_step = ToySession.train_step
steps = 0

def train_step(self, batch, *, lr):
    global steps
    steps += 1
    if plan.get("fault") and self.plan.micro_batch_size > plan.get("rows", 0) and steps > 3:
        raise RuntimeError(plan["fault"])
    if steps == plan.get("kill_after"):
        while steps > 4 and not list(folder.glob("run/checkpoints/step-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if plan.get("slow"):
        time.sleep(0.05)
    return real_step(self, batch, lr=lr)

ToySession.train_step = train_step
if plan.get("kill_at_once"):
    os.kill(os.getpid(), signal.SIGKILL)
host = ScriptedHost([Vitals(), Vitals(), Vitals(plan.get("pressure", "normal"))])
run = folder / "run"
try:
    if (run / "run.toml").exists():
        resume(run, memory=memory, host=host)
    else:
        pretrain(load_config(folder / "run-config.toml"), run, host=host)
except SoloLLMError as error:
    sys.exit(error.exit_code)
"""
METAL = "[METAL] Command buffer execution failed: "
OUT_OF_MEMORY = METAL + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
WATCHDOG = METAL + "Impacting Interactivity (0000000e)"
STEPS, ROWS = 24, 4


class Nursery:
    """A run and the lives that a test writes for it."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.run = folder, folder / "run"
        (folder / "run-config.toml").write_text(dump_config(config))

    def supervisor(self, *script: Mapping[str, Any], **options: Any) -> Supervisor:
        return Supervisor(
            self.run, self.command({}, script), lambda memory: self.command(memory, script),
            **{"host": ScriptedHost(), "first_pause_seconds": 0.01, **options},
        )  # fmt: skip

    def command(self, memory: Mapping[str, Any], script: Any) -> list[str]:
        words = [str(self.folder), json.dumps(dict(memory)), json.dumps(list(script))]
        return [sys.executable, "-c", CHILD, *words]

    def lives(self) -> list[dict[str, Any]]:
        """The memory settings that each life was started with."""
        return [json.loads(line) for line in (self.folder / "lives").read_text().splitlines()]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in Run.open(self.run).read_events() if event["kind"] == kind]

    def losses(self) -> dict[int, float]:
        rows = Run.open(self.run).read_metrics()
        return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}

    def digest(self) -> str:
        checkpoint, _ = latest_checkpoint(self.run / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.step == STEPS
        return checkpoint.certificate.digest


@pytest.fixture
def nursery(
    tmp_path: Path, small_corpus: Path, small_tokenizer: Tokenizer
) -> Callable[..., Nursery]:
    def make(name: str = "one", **train: Any) -> Nursery:
        model = ModelConfig(
            vocab_size=small_tokenizer.padded_vocab_size, hidden_size=8, intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
            max_position_embeddings=32,
        )  # fmt: skip
        config = parse_config({
            "model": {"config": model.model_dump()},
            "data": {"corpus": str(small_corpus), "seq_len": 32},
            "optimizer": {"name": "adamw", "lr": 0.01},
            "train": {"steps": STEPS, "batch_size": ROWS, "micro_batch_size": ROWS, **train},
            "checkpoint": {"every_steps": 4, "every_minutes": 0},
            "eval": {"every_steps": 0, "batches": 1, "sample_every_steps": 1000},
            "log": {"every_steps": 1},
            "machine": {"check_seconds": 1e-9},
        })  # fmt: skip
        (tmp_path / name).mkdir()
        return Nursery(tmp_path / name, config)

    return make


def test_a_run_killed_twice_ends_in_the_bits_of_an_undisturbed_one(nursery) -> None:
    """A night's training that ends with the first crash; a restart that loses or repeats steps."""
    straight, killed = nursery("straight"), nursery("killed")
    assert straight.supervisor().supervise() == 0
    assert killed.supervisor({"kill_after": 7}, {"kill_after": 9}).supervise() == 0
    assert killed.digest() == straight.digest()
    assert killed.losses() == straight.losses()
    restarts = killed.events("restarted")
    assert [(e["cause"], e["ending"]) for e in restarts] == [("killed", "SIGKILL")] * 2
    assert killed.lives() == [{}, {}, {}]


def test_a_memory_fault_halves_the_micro_batch_and_keeps_the_batch(nursery) -> None:
    """The same step tried again and again; or a smaller batch, which is another training."""
    straight, short = nursery("straight"), nursery("short")
    straight.supervisor().supervise()
    fault = {"fault": OUT_OF_MEMORY, "rows": 1}
    assert short.supervisor(fault, fault).supervise() == 0
    assert short.lives() == [{}, {"micro_batch_size": 2}, {"micro_batch_size": 1}]
    assert [e["cause"] for e in short.events("restarted")] == ["memory", "memory"]
    assert short.losses() == pytest.approx(straight.losses(), rel=1e-5)
    assert Run.open(short.run).read_plan()["micro_batch_size"] == 1
    assert Run.open(short.run).config.train.batch_size == ROWS


def test_a_gpu_fault_restarts_with_the_same_micro_batch(nursery) -> None:
    """The watchdog's text taken for a lack of memory, or for a bug that is not tried again."""
    made = nursery()
    assert made.supervisor({"fault": WATCHDOG}).supervise() == 0
    assert made.lives() == [{}, {}]
    assert made.events("restarted")[0]["cause"] == "gpu"
    assert made.events("fault")[0]["error"] == WATCHDOG


def test_memory_pressure_saves_then_goes_on_smaller_once_it_is_gone(nursery) -> None:
    """A restart into the same shortage; steps lost though there was time to save."""
    made = nursery()
    host = ScriptedHost([Vitals("critical"), Vitals("critical"), Vitals("warning")])
    assert made.supervisor({"pressure": "critical"}, host=host).supervise() == 0
    assert host.looks == 3
    assert made.lives() == [{}, {"micro_batch_size": 2}]
    (stopped,) = made.events("stopped")
    assert (stopped["cause"], stopped["step"]) == ("memory_pressure", 3)
    assert made.events("continuation_proven"), "the second life has not checked what was promised"
    assert made.events("restarted")[0]["ending"] == "exit code 75"


def test_a_kill_for_memory_is_known_by_the_systems_count(nursery) -> None:
    """The kernel's killer taken for somebody's `kill -9`, and the same micro-batch tried again."""
    made = nursery()
    host = ScriptedHost(oom_kills=(2, 3, 3))
    assert made.supervisor({"kill_after": 7}, host=host).supervise() == 0
    assert made.lives() == [{}, {"micro_batch_size": 2}]


def test_failing_again_and_again_without_progress_ends(nursery) -> None:
    """A machine that is restarted into the same crash all night."""
    made = nursery()
    deaths = [{"kill_after": 3}, {"kill_after": 7}, *[{"kill_at_once": True}] * 9]
    supervisor = made.supervisor(*deaths, max_restarts=2)
    with pytest.raises(BackendError, match="3 times since its last checkpoint"):
        supervisor.supervise()
    assert len(made.lives()) == 4, "progress in the first life starts the count anew"
    assert made.events("given_up")[0]["in_a_row"] == 3


def test_what_no_restart_mends_is_not_tried_again(nursery) -> None:
    """A setting that is wrong, or a program's own error, tried six times."""
    made = nursery(micro_batch_size=None, compute_dtype="float16")
    assert made.supervisor().supervise() == 2
    assert made.lives() == [{}]
    broken = nursery("two")
    assert broken.supervisor({"fault": "shapes do not match"}).supervise() == 1
    assert broken.lives() == [{}]


def test_one_row_that_does_not_fit_is_the_end(nursery) -> None:
    """Half of one row."""
    made = nursery(micro_batch_size=1)
    with pytest.raises(BackendError, match="single row") as caught:
        made.supervisor(*[{"fault": OUT_OF_MEMORY}] * 3).supervise()
    assert "seq_len" in caught.value.fix
    assert made.lives() == [{}, {"activation_checkpointing": True}]


SUPERVISE = """
import sys, json
from pathlib import Path
from solollm.supervisor import Supervisor
words = json.loads(sys.argv[2])
sys.exit(Supervisor(Path(sys.argv[1]), words, lambda memory: words).supervise())
"""


def supervised(made: Nursery) -> subprocess.Popen[bytes]:
    """A supervisor in a process of its own, whose child has taken its first step."""
    words = made.command({}, [{"slow": True}])
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(made.run), json.dumps(words)], process_group=0
    )
    rows = made.run / "metrics.jsonl"
    wait_until(lambda: rows.exists() and rows.stat().st_size > 0)
    return process


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_passes_through_once_and_is_obeyed(nursery, number: int, code: int) -> None:
    """A Ctrl-C that reaches the child twice and so costs the steps since its last save; one after
    which the run is started again."""
    made = nursery()
    process = supervised(made)
    os.kill(process.pid, number)
    assert process.wait() == code
    assert made.events("stopped")[0]["signal"] == signal.Signals(number).name
    assert len(made.lives()) == 1
    assert not made.events("restarted")


def test_ctrl_z_suspends_the_training_too_and_fg_goes_on(nursery) -> None:
    """A shell that says "Stopped" while the GPU works on; a child that is never continued."""
    import psutil

    made = nursery()
    process = supervised(made)
    (child,) = psutil.Process(process.pid).children()
    both = (psutil.Process(process.pid), child)
    os.killpg(process.pid, signal.SIGTSTP)  # what a terminal does: the child has another group
    wait_until(lambda: all(each.status() == psutil.STATUS_STOPPED for each in both))
    steps = len(made.losses())
    time.sleep(0.3)
    assert len(made.losses()) == steps < STEPS
    os.killpg(process.pid, signal.SIGCONT)
    assert process.wait() == 0
    assert len(made.losses()) == STEPS
    assert len(made.lives()) == 1


def test_ctrl_backslash_ends_the_training_too(nursery) -> None:
    """A prompt that comes back while the run goes on unseen, and holds its lock."""
    made = nursery()
    process = supervised(made)
    os.killpg(process.pid, signal.SIGQUIT)
    assert process.wait() == 128 + signal.SIGQUIT
    assert len(made.lives()) == 1
    assert not made.events("restarted")
