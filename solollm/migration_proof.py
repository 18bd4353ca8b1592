"""Proof that a run moves: from one backend to another, against the run that stayed.

Each backend trains a run undisturbed. At a cut, the checkpoint of one is packed, unpacked and gone
on with by the other: the same way that a run takes to another machine. Then every step is laid
beside the unmoved run's: the digest of its batch and its learning rate, which must be equal, and
its loss, which must be within the band. What a backend takes in and gives out again without a step
must be equal to the bit. `solollm verify migration` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from solollm.backend import TensorSource
from solollm.checkpoint import Checkpoint, open_checkpoint, step_name
from solollm.config import RunConfig
from solollm.continuation import tolerance_between
from solollm.data.stream import StepStream, batch_digest
from solollm.environments import Recorded
from solollm.errors import ConfigError
from solollm.horizon import Shape, updated
from solollm.optim_codec import Quantized, State, dequantize
from solollm.packing import pack, unpack
from solollm.pretraining import open_session, prepare, pretrain, resume
from solollm.run_log import Row
from solollm.run_paths import with_paths_to
from solollm.run_streams import open_streams
from solollm.runs import Run
from solollm.tensorfile import tensor_digest

_GROUPS = (
    ("embed_tokens", "embedding"), ("lm_head", "head"), ("self_attn", "attention"),
    ("mlp", "feed-forward"),
)  # fmt: skip


class StepPair(NamedTuple):
    """One step of the moved run, beside the unmoved one's. `batch` and `lr` as both have them."""

    step: int
    batch: str
    lr: float
    loss: float
    unmoved_loss: float

    @property
    def deviation(self) -> float:
        return abs(self.loss - self.unmoved_loss) / abs(self.unmoved_loss)


@dataclass(frozen=True)
class Move:
    """One way, from `source` to `target`. `tolerance` is of losses (0: equal bits);
    `continuation`: how what came next compared at the cut; `groups`: kind of tensor to the largest
    deviation of the last checkpoints, relative to the kind's largest magnitude."""

    source: str
    target: str
    cut: int
    tolerance: float
    continuation: str
    state_is_equal: bool
    batches_equal: bool
    lr_equal: bool
    steps: tuple[StepPair, ...]
    groups: Mapping[str, float]

    @property
    def deviation(self) -> float:
        """The largest of all losses after the cut."""
        return max(pair.deviation for pair in self.steps)

    @property
    def holds(self) -> bool:
        equal = self.state_is_equal and self.batches_equal and self.lr_equal
        return equal and self.deviation <= self.tolerance


def prove_migration(
    config: RunConfig, folder: Path, *, backends: tuple[str, str], cut: int
) -> Iterator[Move]:
    """Train `config` on each backend and move it both ways at step `cut`, under `folder`; one way
    if both names are the same. `config.train.steps` must be set.

    Raises:
        ConfigError: the cut is not within the run.
        IntegrityError: what comes next after a move is not what was promised.
        BackendError, PlanError, StorageError.
    """
    steps = config.train.steps or 0
    if not 0 < cut < steps:
        raise ConfigError(f"--cut {cut} is not within a run of {steps} steps")
    config = updated(config, "checkpoint", every_steps=cut, keep_latest=1 + -(-steps // cut))
    config = updated(updated(config, "eval", every_steps=0), "log", every_steps=1)
    unmoved = {name: folder / name for name in backends}
    for name, run in unmoved.items():
        pretrain(config, run, backend=name)
    ways = [backends] if len(unmoved) == 1 else [backends, (backends[1], backends[0])]
    for source, target in ways:
        place = folder / f"{source}-to-{target}"
        pack(unmoved[source], place.with_suffix(".solo"), step=cut, backend=source)
        moved = unpack(place.with_suffix(".solo"), place).run
        state_is_equal = _comes_back(moved, target)
        resume(moved, backend=target)
        yield _compared(unmoved[source], moved, cut=cut, state_is_equal=state_is_equal)


def _compared(unmoved: Path, moved: Path, *, cut: int, state_is_equal: bool) -> Move:
    before, after = _last(unmoved), _last(moved)
    events = Run.open(moved).read_events()
    proven = next(event for event in events if event["kind"] == "continuation_proven")
    rows, unmoved_rows = _rows(moved), _rows(unmoved)
    steps = range(cut + 1, after.step + 1)
    digests, unmoved_digests = _digests(moved, steps), _digests(unmoved, steps)
    pairs = [
        StepPair(step, digest, rows[step]["lr"], rows[step]["loss"], unmoved_rows[step]["loss"])
        for step, digest in zip(steps, digests, strict=True)
    ]
    source, target = before.state.environment, after.state.environment
    return Move(
        source=source.backend,
        target=target.backend,
        cut=cut,
        tolerance=tolerance_between(source, target, same_machine=True),
        continuation=proven["result"],
        state_is_equal=state_is_equal,
        batches_equal=digests == unmoved_digests,
        lr_equal=all(rows[step]["lr"] == unmoved_rows[step]["lr"] for step in steps),
        steps=tuple(pairs),
        groups=_group_deviations(before, after),
    )


def _comes_back(run: Path, backend: str) -> bool:
    """Whether a session gives the checkpoint out again as it took it in, tensor for tensor."""
    opened = Run.open(run)
    checkpoint = _last(run)
    recorded = Recorded.of(opened, checkpoint)
    prepared = prepare(with_paths_to(opened.config, run), backend=backend, recorded=recorded)
    streams = open_streams(
        prepared.config, batch_size=prepared.shape.batch_size, seq_len=prepared.shape.seq_len
    )
    with (
        closing(open_session(prepared, streams, checkpoint).session) as session,
        closing(session.snapshot()) as snapshot,
    ):
        parameters = {name: tensor_digest(tensor) for name, tensor in snapshot.parameters()}
        moments = {name: tensor_digest(tensor) for name, tensor in snapshot.optimizer()}
        state = dict(snapshot.session_state)
    certified = checkpoint.certificate
    tensors_equal = (parameters, moments) == (dict(certified.parameters), dict(certified.optimizer))
    return tensors_equal and state == checkpoint.state.session_state


def _last(run: Path) -> Checkpoint:
    """The newest checkpoint, which is intact: it has just been made."""
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    return open_checkpoint(run / "checkpoints" / step_name(max(steps)))


def _rows(run: Path) -> dict[int, Row]:
    return {row["step"]: row for row in Run.open(run).read_metrics() if row["kind"] == "train"}


def _digests(run: Path, steps: Sequence[int]) -> list[str]:
    """Digests of the batches of these steps, from the corpus that the run reads."""
    config = with_paths_to(Run.open(run).config, run)
    shape = Shape.of(config)
    streams = open_streams(config, batch_size=shape.batch_size, seq_len=shape.seq_len)
    stream: StepStream = streams.train
    return [batch_digest(stream.batch(step - 1)) for step in steps]


def _group_deviations(before: Checkpoint, after: Checkpoint) -> dict[str, float]:
    """Kind of tensor to its largest deviation."""
    largest: dict[str, tuple[float, float]] = {}
    for sources in (
        (before.parameters(), after.parameters()),
        (before.optimizer(), after.optimizer()),
    ):
        for name in sources[0].names():
            if name.endswith(".absmax"):
                continue
            expected, found = (_values(source, name) for source in sources)
            difference = float(np.abs(found - expected).max(initial=0))
            magnitude = float(np.abs(expected).max(initial=0))
            so_far = largest.get(_group(name), (0.0, 0.0))
            largest[_group(name)] = (max(so_far[0], difference), max(so_far[1], magnitude))
    return {group: most / size if size else most for group, (most, size) in largest.items()}


def _values(source: TensorSource, name: str) -> np.ndarray:
    """float32 values; 8-bit states are decoded."""
    tensor = source.read(name)
    if tensor.dtype != "U8":
        return tensor.float32()
    absmax = source.read(f"{name}.absmax").data
    state = cast(State, name.partition(".")[0])
    return dequantize(Quantized(tensor.data, absmax), state)


def _group(name: str) -> str:
    """`weights of attention`, `exp_avg of norms` and the like."""
    first = name.partition(".")[0]
    what = "weights" if first in ("model", "lm_head") else first
    place = "norms" if "norm" in name else next(kind for part, kind in _GROUPS if part in name)
    return f"{what} of {place}"
