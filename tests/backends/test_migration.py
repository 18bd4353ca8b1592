"""One run on two backends: MLX to torch and torch to MLX, through real checkpoints on disk.

The undisturbed run of the first backend saves at the cut and goes on to its end; the second backend
opens that checkpoint and goes on from it. Both must see the same batches at the same learning
rates, and their losses must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("torch", reason="these tests need torch")
from solollm_mlx.backend import MlxBackend
from solollm_torch.backend import TorchBackend

from solollm.architecture import ModelConfig
from solollm.backend import Backend, Plan, SessionOptions, TrainSession
from solollm.checkpoint import (
    DataPosition,
    Environment,
    TrainerState,
    open_checkpoint,
    save_checkpoint,
)
from solollm.config import OptimizerTable, ScheduleTable
from solollm.data.stream import BatchStream, batch_digest, open_stream
from solollm.resume_proof import tiny_training
from solollm.schedule import lr_at
from solollm.testing.bench import require_same_state, state_of
from solollm.testing.snapshots import TOKEN_IDS, TOKENIZER_FILES

STEPS, CUT, ROWS, LENGTH = 40, 17, 4, 32
LOSS_TOLERANCE = 2e-4  # relative, fp32: the numerics contract, docs/design.md section 4
BACKENDS: dict[str, Backend] = {"mlx": MlxBackend(), "torch": TorchBackend()}
SMALL = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a run is trained. With `packed` off, attention crosses document borders."""

    optimizer: str
    state_bits: int = 32
    tied: bool = False
    micro_batch_size: int = ROWS
    packed: bool = True

    @property
    def model(self) -> ModelConfig:
        return SMALL.model_copy(update={"tie_word_embeddings": self.tied, "qk_norm": self.tied})

    def session(self, backend: str, *, seed: int = 0) -> TrainSession:
        table = OptimizerTable.model_validate(
            {"name": self.optimizer, "state_bits": self.state_bits, "momentum_warmup_steps": 25}
        )
        options = SessionOptions(table, seed=seed, backend_options={"compile": False})
        plan = Plan(self.micro_batch_size, False, "float32", LENGTH, ROWS)
        return BACKENDS[backend].train_session(self.model, options, plan)


RECIPES = {
    "adamw": Recipe("adamw", micro_batch_size=3),
    "adamw-8bit-tied": Recipe("adamw", state_bits=8, tied=True, packed=False),
    "muon-tied": Recipe("muon", tied=True),
    "muon-8bit": Recipe("muon", state_bits=8, micro_batch_size=3),
}
DIRECTIONS = [("mlx", "torch"), ("torch", "mlx")]


class Step(NamedTuple):
    digest: str
    lr: float
    loss: float


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_training(tmp_path_factory.mktemp("corpus"), steps=STEPS).data.corpus)


def stream_of(corpus: Path, recipe: Recipe) -> BatchStream:
    return open_stream(
        corpus, split="train", seq_len=LENGTH, batch_size=ROWS, seed=5,
        mask_documents=recipe.packed,
    )  # fmt: skip


def train(session: TrainSession, stream: BatchStream, first: int, last: int) -> list[Step]:
    steps = []
    for step in range(first, last):
        batch = stream.batch(step)
        lr = lr_at(step, total_steps=STEPS, peak_lr=4e-3, table=ScheduleTable())
        loss = session.train_step(batch, lr=lr).result().loss
        steps.append(Step(batch_digest(batch), lr, loss))
    return steps


def save(folder: Path, session: TrainSession, recipe: Recipe, stream: BatchStream) -> Path:
    snapshot = session.snapshot()
    step = int(session.session_state["updates"])
    state = TrainerState(
        step=step,
        session_state=dict(snapshot.session_state),
        data=DataPosition(fingerprint=stream.fingerprint, seed=5, step=step),
        environment=Environment(
            backend="any", device="cpu", micro_batch_size=ROWS, compute_dtype="float32"
        ),
    )
    path = save_checkpoint(
        folder, model=recipe.model, snapshot=snapshot, state=state,
        tokenizer_files=TOKENIZER_FILES, token_ids=TOKEN_IDS,
    )  # fmt: skip
    snapshot.close()
    return path


def go_on(path: Path, backend: str, recipe: Recipe, *, with_optimizer: bool = True) -> TrainSession:
    """A session of `backend` that stands where the checkpoint does."""
    session, checkpoint = recipe.session(backend, seed=99), open_checkpoint(path)
    session.import_parameters(checkpoint.parameters())
    if with_optimizer:
        session.import_optimizer(checkpoint.optimizer(), checkpoint.state.session_state)
    checkpoint.close()
    return session


_SLOW = {"muon-tied": pytest.mark.slow}  # what it has, the others have between them
_PARAMS = [pytest.param(name, marks=_SLOW.get(name, ())) for name in RECIPES]


@pytest.fixture(scope="module", params=_PARAMS)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return RECIPES[request.param]


class Unmoved(NamedTuple):
    steps: list[Step]
    checkpoint: Path  # of the cut


@pytest.fixture(scope="module")
def unmoved(
    recipe: Recipe, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Unmoved]:
    """The undisturbed run of each backend."""
    runs, stream = {}, stream_of(corpus, recipe)
    for backend in BACKENDS:
        session = recipe.session(backend)
        steps = train(session, stream, 0, CUT)
        path = save(tmp_path_factory.mktemp(backend), session, recipe, stream)
        runs[backend] = Unmoved(steps + train(session, stream, CUT, STEPS), path)
        session.close()
    return runs


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
def test_a_moved_run_goes_on_as_the_unmoved_one(
    recipe: Recipe, corpus: Path, unmoved: dict[str, Unmoved], source: str, target: str
) -> None:
    """Guards every part of a run's state against being understood differently on the other side:
    moments, counters, names, orientation, data position, learning rate."""
    expected, path = unmoved[source]
    session, stream = go_on(path, target, recipe), stream_of(corpus, recipe)
    moved = expected[:CUT] + train(session, stream, CUT, STEPS)
    assert [step[:2] for step in moved] == [step[:2] for step in expected]
    losses = [step.loss for step in expected]
    assert losses[-1] < 0.9 * losses[0], "the comparison must cover real learning"
    np.testing.assert_allclose([step.loss for step in moved], losses, rtol=LOSS_TOLERANCE)


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
def test_state_is_bit_equal_there_and_back(
    recipe: Recipe, corpus: Path, unmoved: dict[str, Unmoved], tmp_path: Path,
    source: str, target: str,
) -> None:  # fmt: skip
    """Guards against rounding, reordering or forgetting on the way: the checkpoint of the second
    backend must be that of the first, tensor for tensor, and the first must take it back."""
    path, stream = unmoved[source].checkpoint, stream_of(corpus, recipe)
    there = go_on(path, target, recipe)
    returned = save(tmp_path, there, recipe, stream)
    first, second = open_checkpoint(path), open_checkpoint(returned)
    assert second.certificate == first.certificate
    assert second.state.session_state == first.state.session_state
    back = go_on(returned, source, recipe)
    require_same_state(state_of(back), state_of(go_on(path, source, recipe)), "there and back")


def test_a_forgotten_optimizer_state_shows(corpus: Path, tmp_path: Path) -> None:
    """Guards the comparison itself: a migration that loses the moments must not pass it."""
    recipe = RECIPES["adamw"]
    session, stream = recipe.session("torch"), stream_of(corpus, recipe)
    train(session, stream, 0, 8)
    path = save(tmp_path, session, recipe, stream)
    expected = [step.loss for step in train(session, stream, 8, 12)]
    forgetful = go_on(path, "mlx", recipe, with_optimizer=False)
    losses = [step.loss for step in train(forgetful, stream, 8, 12)]
    assert not np.allclose(losses, expected, rtol=10 * LOSS_TOLERANCE)
