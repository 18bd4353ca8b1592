"""What `test_two_ranks.py` does alone and runs in each of two processes: a script, no test.

    python ranks_at_work.py FOLDER

It trains every variant and writes `FOLDER/RANK-of-SIZE.npz`: losses and norms, log-probabilities,
and on rank 0 the state after half of the steps. Then it goes on from what one process alone has
left in the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from conftest import LiveBytes
from solollm_torch import masters
from solollm_torch.backend import TorchBackend
from solollm_torch.sharded_session import ShardedSession

from solollm.architecture import ModelConfig
from solollm.backend import DictSource, HostTensor, Plan, SessionOptions, TrainSession
from solollm.config import OptimizerTable
from solollm.errors import ConfigError
from solollm.testing.bench import TIED, UNTIED, State, lively_parameters, make_batch, state_of

STEPS, HALF = 20, 10
# An odd vocabulary: ranks hold uneven numbers of rows.
ODD = UNTIED.model_copy(update={"vocab_size": 97})


class Variant(NamedTuple):
    model: ModelConfig
    optimizer: dict[str, Any]
    options: Mapping[str, bool | int | float | str] = MappingProxyType({})
    checkpointing: bool = False


VARIANTS = {
    "adamw-tied": Variant(TIED, {"name": "adamw"}),
    "adamw-offload-checkpointing": Variant(ODD, {"name": "adamw"}, {"offload": "fsdp"}, True),
    "muon": Variant(UNTIED, {"name": "muon"}),
    "muon-lagged-offload": Variant(
        TIED, {"name": "muon", "clip": "lagged"}, {"offload": "fsdp"}
    ),
    "compact": Variant(
        ODD,
        {"name": "adamw", "clip": "lagged", "state_bits": 16},
        {"offload": "fsdp", "master": "split"},
    ),
}  # fmt: skip


def session_of(variant: Variant) -> TrainSession:
    table = OptimizerTable.model_validate({"momentum_warmup_steps": 4, **variant.optimizer})
    # Sharded sessions have no compiled loops: the one process must not have them either.
    options = SessionOptions(
        table, backend_options={"threads": 1, "kernels": False, **variant.options}
    )
    plan = Plan(2, variant.checkpointing, "float32", 24, 5)
    session = TorchBackend().train_session(variant.model, options, plan)
    session.import_parameters(DictSource(lively_parameters(variant.model)))
    return session


def steps(session: TrainSession, first: int, last: int) -> np.ndarray:
    """float64 [steps, 2]: loss and gradient norm. Of five rows ranks get two and three."""
    metrics = [
        session.train_step(make_batch(i % 4, rows=5), lr=1e-2).result() for i in range(first, last)
    ]
    return np.array([(m.loss, m.grad_norm) for m in metrics])


def state_here(session: TrainSession) -> State | None:
    """All of the state on rank 0, None elsewhere."""
    if session.rank == 0:
        return state_of(session)
    snapshot = session.snapshot()
    snapshot.attend()
    snapshot.close()
    return None


def arrays_of(state: State, prefix: str) -> dict[str, np.ndarray]:
    named = {f"{prefix}/p/{n}": t.data for n, t in state.parameters.items()}
    named |= {f"{prefix}/{t.dtype}/{n}": t.data for n, t in state.optimizer.items()}
    return named | {f"{prefix}/s/{n}": np.array(v) for n, v in state.session_state.items()}


def state_in(arrays: Any, prefix: str) -> State:
    found: dict[str, dict[str, Any]] = {"p": {}, "o": {}, "s": {}}
    for key in arrays.files:
        if not key.startswith(f"{prefix}/"):
            continue
        kind, name = key.removeprefix(f"{prefix}/").split("/")
        data = arrays[key]
        if kind == "s":
            found["s"][name] = data.item()
        else:
            tag: Any = "F32" if kind == "p" else kind
            group = found["p" if kind == "p" else "o"]
            group[name] = HostTensor(tag, tuple(data.shape), data)
    return State(found["p"], found["o"], found["s"])


def run(name: str, variant: Variant) -> dict[str, np.ndarray]:
    session = session_of(variant)
    found = {f"{name}/first": steps(session, 0, HALF)}
    found[f"{name}/logprobs"] = session.token_logprobs(make_batch(9, rows=5))
    state = state_here(session)
    if state is not None:
        found |= arrays_of(state, f"{name}/half")
    found[f"{name}/second"] = steps(session, HALF, STEPS)
    session.close()
    return found


def go_on(name: str, variant: Variant, left: Any) -> dict[str, np.ndarray]:
    """From what another number of ranks had after half of the steps."""
    session, state = session_of(variant), state_in(left, f"{name}/half")
    session.import_parameters(DictSource(state.parameters))
    session.import_optimizer(DictSource(state.optimizer), state.session_state)
    found = {f"{name}/continued": steps(session, HALF, STEPS)}
    session.close()
    return found


def bytes_of(name: str, variant: Variant) -> dict[str, np.ndarray]:
    """Bytes that this rank holds, those of the whole state, the most that one snapshot adds, and
    those of the largest tensor."""
    session = session_of(variant)
    assert isinstance(session, ShardedSession)
    steps(session, 0, 1)
    own = [*session._masters.weights.values(), *session._masters.residuals.values()]
    held = sum(t.numel() * t.element_size() for t in [*own, *session._states.values()])
    with LiveBytes() as watch:
        snapshot = session.snapshot()
        sizes = []
        if session.rank == 0:
            for stream in (snapshot.parameters(), snapshot.optimizer()):
                sizes += [tensor.data.nbytes for _, tensor in stream]
        else:
            snapshot.attend()
        snapshot.close()
    session.close()
    whole = torch.tensor([sum(sizes), max(sizes, default=0)])
    dist.broadcast(whole, 0)
    return {f"{name}/bytes": np.array([held, watch.peak, *whole.tolist()])}


def main() -> None:
    folder, ranks = Path(sys.argv[1]), TorchBackend().ranks()
    found: dict[str, np.ndarray] = {}
    for name, variant in VARIANTS.items():
        found |= run(name, variant)
    assert ranks.largest(float(ranks.rank), -float(ranks.rank)) == (ranks.world_size - 1, 0)
    left = np.load(folder / "0-of-1.npz")
    masters.JOINED_ELEMENTS = 64  # so that joining halves shows beside these small tensors
    for name, variant in VARIANTS.items():
        found |= bytes_of(name, variant)
        if name != "compact":  # whose bits depend on the ranks: there is nothing to compare
            found |= go_on(name, variant, left)
    try:
        session_of(Variant(TIED, {"name": "adamw", "state_bits": 8}))
    except ConfigError as error:
        found["refused"] = np.array(str(error))
    np.savez(folder / f"{ranks.rank}-of-{ranks.world_size}.npz", **found)


if __name__ == "__main__":
    main()
