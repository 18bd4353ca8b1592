"""Adapters on MLX over GSM8K: they learn, a stopped run goes on to the same bits, and a run moves
to PyTorch and back.

The base is a small byte-level decoder, trained on Shakespeare for a moment; the adapter then learns
another kind of text. Figures: run with `-m slow -rP`; they are in docs/results/migration.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("torch", reason="these tests need torch")
pytest.importorskip("bitsandbytes", reason="these tests need bitsandbytes")
from solollm_mlx.backend import MlxBackend
from solollm_torch.backend import TorchBackend

from solollm.adapters import AdapterOptions
from solollm.architecture import ModelConfig
from solollm.backend import (
    Backend,
    Batch,
    DictSource,
    HostTensor,
    Plan,
    SessionOptions,
    TrainSession,
)
from solollm.config import OptimizerTable
from solollm.testing.bench import State, require_same, require_same_state, state_of
from solollm.testing.conformance_state import take_over

pytestmark = pytest.mark.slow  # 40 processor seconds
STEPS, CUT, ROWS, LENGTH = 60, 30, 4, 64
SAME_BASE = 2e-4  # relative, fp32: the numerics contract
OTHER_CODES = 2e-2  # of losses, where the base's codec changes: docs/results/migration.md
BACKENDS: Mapping[str, Backend] = {"mlx": MlxBackend(), "torch": TorchBackend()}
MODEL = ModelConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=LENGTH,
)  # fmt: skip
METHODS = {"lora": None, "qlora": 4}


@dataclass(frozen=True)
class Text:
    """Bytes as ids; a step's rows are a function of the step."""

    ids: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(cls, text: str) -> Text:
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return cls(ids[: -20 * LENGTH], ids[-20 * LENGTH :])

    def batch(self, step: int) -> Batch:
        starts = np.random.default_rng(step).integers(0, len(self.ids) - LENGTH - 1, ROWS)
        return _batch(np.stack([self.ids[start : start + LENGTH + 1] for start in starts]))

    def loss(self, session: TrainSession) -> float:
        """Nats per byte of what is not trained on."""
        rows = [self.held_out[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(19)]
        total, count = session.eval_step(_batch(np.stack(rows)))
        return total / count


def _batch(rows: np.ndarray) -> Batch:
    labels = np.ascontiguousarray(rows[:, 1:])
    return Batch(np.ascontiguousarray(rows[:, :-1]), labels, float(labels.size))


def session_of(backend: str, adapter: AdapterOptions | None) -> TrainSession:
    options = SessionOptions(
        OptimizerTable(name="adamw", beta2=0.99), adapter=adapter,
        backend_options={"compile": False},
    )  # fmt: skip
    plan = Plan(ROWS, False, "float32", LENGTH, ROWS)
    return BACKENDS[backend].train_session(MODEL, options, plan)


@pytest.fixture(scope="module")
def gsm8k(shared_data: Path) -> Text:
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:400]]
    return Text.of("\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows))


@pytest.fixture(scope="module")
def base(shared_data: Path) -> Mapping[str, HostTensor]:
    """What Shakespeare leaves in a fresh model."""
    text = Text.of((shared_data / "tinyshakespeare.txt").read_text(encoding="utf-8")[:200_000])
    session = session_of("torch", None)
    for step in range(60):
        session.train_step(text.batch(step), lr=1e-2).result()
    return state_of(session).parameters


@dataclass(frozen=True)
class Tuned:
    """One undisturbed run: losses before and after, of every step, and its state at the cut and
    in the end."""

    before: float
    after: float
    losses: Sequence[float]
    cut: State
    end: State


@pytest.fixture(scope="module")
def start(base: Mapping[str, HostTensor]) -> Callable[[str, str], TrainSession]:
    """start(backend, method): an adapter session over the base."""

    def make(backend: str, method: str) -> TrainSession:
        adapter = AdapterOptions(rank=8, alpha=16, base_bits=METHODS[method])  # type: ignore[arg-type]
        session = session_of(backend, adapter)
        session.import_base(DictSource(base))
        return session

    return make


def losses_of(session: TrainSession, text: Text, steps: range) -> list[float]:
    return [session.train_step(text.batch(step), lr=5e-3).result().loss for step in steps]


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def on(gsm8k: Text, start: Callable[[str, str], TrainSession], method: str) -> Mapping[str, Tuned]:
    """The undisturbed run on each backend."""
    runs = {}
    for backend in BACKENDS:
        session = start(backend, method)
        before = gsm8k.loss(session)
        losses = losses_of(session, gsm8k, range(CUT))
        cut = state_of(session)
        losses += losses_of(session, gsm8k, range(CUT, STEPS))
        runs[backend] = Tuned(before, gsm8k.loss(session), losses, cut, state_of(session))
    return runs


def test_sixty_steps_lower_the_held_out_loss(on: Mapping[str, Tuned], method: str) -> None:
    """Guards: an adapter that fits what it has seen and nothing else, or nothing at all."""
    for backend, run in on.items():
        print(f"{method} on {backend}: held-out {run.before:.4f} -> {run.after:.4f} nats per byte")
        assert run.after < 0.9 * run.before


def test_a_resumed_adapter_ends_in_the_same_bits(
    on: Mapping[str, Tuned], start: Callable[[str, str], TrainSession], gsm8k: Text, method: str
) -> None:
    """Guards: a moment, a count or a code that does not come back."""
    session = start("mlx", method)
    take_over(session, on["mlx"].cut)
    assert losses_of(session, gsm8k, range(CUT, STEPS)) == on["mlx"].losses[CUT:]
    require_same_state(state_of(session), on["mlx"].end, "resumed against undisturbed")


@pytest.mark.parametrize(("origin", "target"), [("mlx", "torch"), ("torch", "mlx")])
def test_a_moved_adapter_goes_on(
    on: Mapping[str, Tuned], start: Callable[[str, str], TrainSession], gsm8k: Text,
    method: str, origin: str, target: str,
) -> None:  # fmt: skip
    """Guards: factors, moments or their count that another backend reads otherwise. They arrive bit
    for bit; losses agree as exactly as the two bases do."""
    stayed = on[origin]
    session = start(target, method)
    take_over(session, stayed.cut)
    arrived = state_of(session)
    require_same(arrived.parameters, stayed.cut.parameters, "factors")
    require_same(arrived.optimizer, stayed.cut.optimizer, "moments")
    assert arrived.session_state["updates"] == CUT
    moved = np.array(losses_of(session, gsm8k, range(CUT, STEPS)))
    off = np.abs(moved / np.array(stayed.losses[CUT:]) - 1)
    held = abs(gsm8k.loss(session) / stayed.after - 1)
    print(f"{method}, {origin} to {target}: losses within {off.max():.1e}, held-out {held:.1e}")
    assert max(off.max(), held) < (SAME_BASE if method == "lora" else OTHER_CODES)
