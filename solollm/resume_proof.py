"""Proof that a run survives being killed: same bits in the end as a run that nobody touched.

One run trains undisturbed. A second one, of the same configuration, is killed by SIGKILL again and
again, at random moments of its training and aimed into its saves, and resumed each time in another
process. Both must end with equal bytes in every weight and every optimizer tensor, and with the
same loss logged at every step. `solollm verify resume` prints it.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from solollm import durable
from solollm.architecture import ModelConfig
from solollm.checkpoint import latest_checkpoint
from solollm.config import RunConfig, parse_config
from solollm.data.build import build_corpus
from solollm.errors import BackendError, IntegrityError
from solollm.pretraining import pretrain, resume
from solollm.run_log import Row
from solollm.runs import Run
from solollm.tokenizer import Tokenizer

_END_SECONDS = 300.0  # from the last step to the end of the process
_SAVE_PAUSE_SECONDS = 0.001  # per system call of a save, so that there is a save to be killed in
_MOMENT_SECONDS = 0.05
_POLL_SECONDS = 0.001
# The last is what PyTorch imports, for a second, at the first backward pass.
PRELOADED = [
    "__main__", "solollm.resume_proof", "torch", "torch.fx.experimental.symbolic_shapes",
]  # fmt: skip


class Life(NamedTuple):
    """One process of the killed run. `last_step` is the last one that was logged; `in_save`:
    whether a half-written checkpoint was left behind."""

    start_step: int
    last_step: int
    in_save: bool


@dataclass(frozen=True)
class ResumeProof:
    """What was compared. Digests cover the bytes of all tensors of the last checkpoint."""

    steps: int
    lives: tuple[Life, ...]
    straight_digest: str
    killed_digest: str
    losses_equal: bool

    @property
    def kills_in_save(self) -> int:
        return sum(life.in_save for life in self.lives)

    @property
    def is_equal(self) -> bool:
        return self.straight_digest == self.killed_digest and self.losses_equal


def prove_resume(
    config: RunConfig,
    folder: Path,
    *,
    kills: int,
    seed: int = 0,
    start_method: Literal["spawn", "forkserver"] = "spawn",
    on_life: Callable[[Life], None] = lambda life: None,
) -> ResumeProof:
    """Train `config` twice under `folder`, once killed `kills` times, and compare. Its steps must
    be set: a horizon in hours would be measured anew for each run.

    "spawn" gives every life a fresh interpreter; "forkserver" forks them all from one that has
    imported the framework, which is faster and proves a little less.

    Raises:
        BackendError: a life ended by itself with an error, or the run is too short for that many
            kills.
    """
    nursery = _Nursery(config, start_method)
    straight, killed = folder / "straight", folder / "killed"
    nursery.live_out(straight)
    chance = random.Random(seed)
    lives: list[Life] = []
    for left in range(kills, 0, -1):
        # Each life gets its share of the steps that are left, give or take; every second one goes
        # on from there into its next save.
        share = chance.uniform(0.1, 1.5) / (left + 1)
        lives.append(nursery.live_briefly(killed, share, aim=left % 2 == 0, chance=chance))
        on_life(lives[-1])
    nursery.live_out(killed)
    return ResumeProof(
        steps=Run.open(straight).config.train.steps or 0,
        lives=tuple(lives),
        straight_digest=_final_digest(straight),
        killed_digest=_final_digest(killed),
        losses_equal=_losses(straight) == _losses(killed),
    )


def tiny_training(folder: Path, *, steps: int) -> RunConfig:
    """A training in miniature, with a corpus of its own from the Python standard library."""
    corpus = folder / "corpus"
    build_corpus([Path(json.__file__).parent], corpus, vocab_size=512)
    vocab_size = Tokenizer.load(corpus / "tokenizer").padded_vocab_size
    return tiny_config(corpus, vocab_size, steps)


def tiny_config(corpus: Path, vocab_size: int, steps: int) -> RunConfig:
    """A model that trains on one core in milliseconds per step, with packing and micro-batches."""
    model = ModelConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    return parse_config(
        {
            "model": {"config": model.model_dump()},
            "data": {"corpus": str(corpus), "seq_len": 64},
            "train": {"steps": steps, "batch_size": 6, "micro_batch_size": 4},
            "checkpoint": {"every_steps": 8, "every_minutes": 0},
            "eval": {"every_steps": 0, "batches": 1},
            "log": {"every_steps": 1},
        }
    )


class _Nursery:
    """Where the processes of one configuration come from."""

    def __init__(self, config: RunConfig, start_method: Literal["spawn", "forkserver"]) -> None:
        self._config = config.model_dump(mode="json")
        self._context: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            self._context.set_forkserver_preload(PRELOADED)

    def live_out(self, run: Path) -> None:
        """Train to the end."""
        with self._life(run) as (process, steps):
            for _ in steps:
                pass
            process.join(_END_SECONDS)
            if process.exitcode != 0:
                raise _ended_early(process)

    def live_briefly(self, run: Path, share: float, *, aim: bool, chance: random.Random) -> Life:
        """Train for a share of the steps that are left, with `aim` also on into the next save, and
        a moment more; then be killed."""
        total = int(self._config["train"]["steps"])
        with self._life(run) as (process, steps):
            start_step = next(steps, 0)
            last_step = start_step + max(1, int(share * (total - start_step)))
            for step in steps:
                if step >= last_step:
                    break
            while aim and process.is_alive() and not _half_saved(run):
                time.sleep(_POLL_SECONDS)
            time.sleep(chance.uniform(0, _MOMENT_SECONDS))
            process.kill()
            process.join()
            if process.exitcode != -signal.SIGKILL:
                raise _ended_early(process)
        logged = [row["step"] for row in Run.open(run).read_metrics()]
        return Life(start_step, max(logged, default=0), _half_saved(run))

    @contextmanager
    def _life(self, run: Path) -> Iterator[tuple[Any, Iterator[int]]]:
        """A process that trains `run`, and its steps as they are logged: first the one it starts
        from. It is dead when this is left."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_live, args=(str(run), self._config, theirs))
        process.start()
        theirs.close()
        try:
            yield process, _received(ours)
        finally:
            process.kill()
            process.join()
            ours.close()


class _SlowDisk(durable.Disk):
    """A disk on which a save takes long enough to be killed in."""

    def write(self, fd: int, data: memoryview) -> int:
        time.sleep(_SAVE_PAUSE_SECONDS)
        return super().write(fd, data)

    def sync(self, fd: int) -> None:
        time.sleep(_SAVE_PAUSE_SECONDS)
        super().sync(fd)

    def rename(self, source: Path, target: Path) -> None:
        time.sleep(_SAVE_PAUSE_SECONDS)
        super().rename(source, target)


class _StepSink:
    """Tells the parent the step a life starts from, then each step that it logs."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def start(self, facts: Row) -> None:
        self._connection.send(facts["start_step"])

    def metrics(self, row: Row) -> None:
        self._connection.send(row["step"])

    def evaluation(self, row: Row) -> None: ...
    def sample(self, row: Row) -> None: ...
    def event(self, row: Row) -> None: ...
    def finish(self, summary: Row) -> None: ...


def _live(run: str, config: dict[str, Any], connection: Connection) -> None:
    """The body of a child: begin the run, or go on with it."""
    durable.DISK = _SlowDisk()
    path, sinks = Path(run), [_StepSink(connection)]
    if (path / "run.toml").exists():
        resume(path, sinks=sinks)
    else:
        pretrain(parse_config(config), path, sinks=sinks)


def _received(connection: Connection) -> Iterator[int]:
    """Numbers until the sender has ended."""
    while True:
        try:
            yield int(connection.recv())
        except EOFError:
            return


def _ended_early(process: Any) -> BackendError:
    return BackendError(
        f"a process of the proof ended by itself (exit code {process.exitcode})",
        why="it failed, with its traceback above, or the run was over before it was killed",
        fix="ask for fewer --kills or more --steps",
    )


def _half_saved(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(
        path.name.startswith(durable.TEMPORARY) for path in folder.iterdir()
    )


def _final_digest(run: Path) -> str:
    opened = Run.open(run)
    checkpoint, damaged = latest_checkpoint(opened.checkpoints)
    if checkpoint is None or checkpoint.step != opened.config.train.steps:
        raise IntegrityError(f"{run} has no checkpoint of its last step", why="; ".join(damaged))
    return checkpoint.certificate.digest


def _losses(run: Path) -> list[tuple[int, float]]:
    rows = Run.open(run).read_metrics()
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
