"""The proof that faults end well: it holds on the NumPy backend, and sees each broken promise."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from solollm.cli import main
from solollm.errors import BackendError
from solollm.fault_proof.arming import signal_at_row
from solollm.fault_proof.ground import STEPS, Base, Fault, Ground, make_base
from solollm.fault_proof.lives import PROGRAM, Nursery
from solollm.fault_proof.proof import FAULTS, Outcome, chosen_faults, provoke
from solollm.horizon import updated
from solollm.resume_proof import tiny_config
from solollm.tokenizer import Tokenizer

Judge = Callable[..., Outcome]

# The NumPy backend with one promise broken each, as a package of somebody else would bring it. What
# breaks the program around it does so when the backend is made, in the processes of the proof.
MUTANTS = '''
import shutil
from solollm import checkpoint, errors, pretraining, runs, signals
from solollm.checkpoint_writer import CheckpointWriter
from solollm.manifest import Manifest
from solollm.testing.toy import ToyBackend, ToySession


class WithSession(ToyBackend):
    session = ToySession

    def train_session(self, model, options, plan):
        return self.session(model, options, plan)


class Forgetful(WithSession):
    class session(ToySession):
        def import_optimizer(self, source, state):
            self.updates = int(state["updates"])


class Mixing(WithSession):
    """A step that is not finite moves the weights all the same."""

    class session(ToySession):
        def train_step(self, batch, *, lr):
            pending = super().train_step(batch, lr=lr)
            if pending.result().skipped:
                self.weights["model.norm.weight"] += 1
            return pending


class Deaf(ToyBackend):
    def __init__(self):
        signals.StopRequest._handle = lambda self, number, frame: None


class Trusting(ToyBackend):
    def __init__(self):
        checkpoint._prove = lambda *arguments: None


class Greedy(ToyBackend):
    """Makes room for a save before it stands."""

    def __init__(self):
        real = CheckpointWriter._write

        def write(self, *arguments):
            shutil.rmtree(min(self._folder.glob("step-*")))
            return real(self, *arguments)

        CheckpointWriter._write = write


class Unlocked(ToyBackend):
    def __init__(self):
        import contextlib

        pretraining.locked = lambda *arguments: contextlib.nullcontext()


class Beginning(ToyBackend):
    def __init__(self):
        pretraining.latest_for_all = lambda *arguments: (None, [])


class Credulous(ToyBackend):
    def __init__(self):
        pretraining.prove_corpora = lambda config: None


class Miscounting(ToyBackend):
    def __init__(self):
        errors.StorageError.exit_code = 1


class Silent(ToyBackend):
    def __init__(self):
        real = runs.Run.append_event
        runs.Run.append_event = lambda self, kind, **fields: (
            None if kind == "metrics_mended" else real(self, kind, **fields))
'''
BROKEN = {
    "Forgetful": ("kill-in-a-step", "digest is not that of the undisturbed run"),
    "Mixing": ("nan-step", "has changed weights or optimizer"),
    "Deaf": ("sigterm", "ended with 0, not 143"),
    "Trusting": ("file-swapped", r"went on from step \[12\], not 6"),
    "Greedy": ("full-in-the-weights", "not intact ones of"),
    "Unlocked": ("two-at-once", "ended with 0, not 1"),
    "Beginning": ("checkpoints-gone", "ended with 0, not 3"),
    "Credulous": ("corpus-changed", "ended with 0, not 3"),
    "Miscounting": ("failing-flush", "ended with 1, not 74"),
    "Silent": ("torn-metrics", "nobody was told"),
}


def install(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in `folder` whose backend is `toy`, found as any other is, by new processes too."""
    about = folder / "toy-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[solollm.backends]\ntoy = {kind}\n")
    (folder / "mutants.py").write_text(MUTANTS)
    monkeypatch.syspath_prepend(folder)
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), path))))
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def nursery() -> Nursery:
    """Forks from a process without a framework."""
    return Nursery("forkserver", PROGRAM)


@pytest.fixture(scope="module")
def base(
    small_corpus: Path, small_tokenizer: Tokenizer, nursery: Nursery,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Base]:  # fmt: skip
    """The two runs that every fault begins with, on the NumPy backend."""
    folder = tmp_path_factory.mktemp("faults")
    config = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, STEPS)
    config = updated(config, "optimizer", name="adamw").model_copy(update={"backend": "toy"})
    with pytest.MonkeyPatch.context() as patch:
        install(folder / "package", "solollm.testing.toy:ToyBackend", patch)
        yield make_base(config, folder / "base", nursery)


@pytest.fixture
def judge(base: Base, nursery: Nursery) -> Judge:
    """How a fault, of the catalogue if it is a name, ends."""

    def provoked(fault: str | Fault, place: str = "") -> Outcome:
        if isinstance(fault, str):
            (fault,) = chosen_faults([fault])
        folder = base.cut.parent.parent / f"{fault.name}{place}"
        return provoke(fault, folder, base, nursery)

    return provoked


@pytest.mark.parametrize(
    "name",
    ["second-signal", "bit-in-the-state", "half-applied-step"],
)
def test_a_fault_ends_as_promised(judge: Judge, name: str) -> None:
    """Guards the promise, and the proof against faults that only one backend's files have."""
    outcome = judge(name)
    assert outcome.verdict == "ok", outcome.seen
    assert not outcome.folder.exists()


@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_broken_promise_is_seen(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Guards against a proof that cannot fail: each of these programs breaks one promise."""
    install(tmp_path, f"mutants:{kind}", monkeypatch)
    name, found = BROKEN[kind]
    outcome = judge(name, f"-{kind}")
    assert outcome.verdict == "failed", outcome.seen
    assert re.search(found, outcome.seen), outcome.seen
    assert (outcome.folder / "life-1.txt").exists(), "what the processes said is not kept"


def test_a_fault_that_never_comes_is_no_proof(judge: Judge) -> None:
    """Guards against a kill that is aimed past the end of the run, and passes as survived."""

    def late(ground: Ground) -> str:
        ground.resume(ground.run(), arm=partial(signal_at_row, STEPS + 1, signal.SIGHUP))
        return "survived"

    outcome = judge(Fault("late", "nothing", "nothing", late))
    assert (outcome.verdict, outcome.seen) == ("failed", "the fault itself did not come about")


def test_a_training_that_fails_by_itself_is_no_base(
    base: Base, nursery: Nursery, small_corpus: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Guards against comparing broken runs with a broken one."""
    config = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, STEPS)
    broken = updated(config, "data", corpus=str(tmp_path / "typo"))
    with pytest.raises(BackendError, match=r"the straight run of the proof ended with 2, not 0"):
        make_base(broken, tmp_path / "base", nursery)


def test_the_catalogue_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards --list, and names that are given twice or cannot be asked for."""
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 45
    assert main(["verify", "faults", "--list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == names
    assert all(row["done"] and row["promise"] for row in rows)
    assert main(["verify", "faults", "--list", "--only", "sigterm"]) == 0
    assert "saves first and ends with 143" in capsys.readouterr().out
    assert main(["verify", "faults", "--only", "sigtrem"]) == 2
    assert "did you mean `sigterm`?" in capsys.readouterr().err
