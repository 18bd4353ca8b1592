"""Part `resume` of tools/gpu_check.py: a run goes on to the same bits, and one begun elsewhere goes
on here within the written band.

Deterministic kernels, bf16 arithmetic: six steps without a break against three, a snapshot, a new
session, and three. Then ten steps begun on the CPU, by MLX where it is installed and by PyTorch
where not, and gone on with on the card and on the CPU side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from gpu_sessions import TINY, make_session, random_batch
from solollm_torch.offload import StreamingSession
from solollm_torch.session import TorchSession

from solollm.architecture import ModelConfig
from solollm.backend import DictSource, Plan, SessionOptions, TrainSession
from solollm.config import OptimizerTable
from solollm.dial import preset

BANDS = {"float32": 2e-4, "bfloat16": 1e-2}  # of a loss, relative; see `solollm.continuation`
VARIANTS: dict[str, dict[str, Any]] = {
    "resident": {"options": {}},
    "resident, split masters, lagged": {
        "options": {"master": "split"},
        "table": {"clip": "lagged"},
    },
    "streaming, exact": {"options": {"offload": "streaming"}},
    "streaming, lagged": {"options": {"offload": "streaming"}, "table": {"clip": "lagged"}},
    "streaming, bf16 masters": {"options": {"offload": "streaming", "master": "bfloat16"}},
}


def figures(device: torch.device, *, tiny: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Whether each variant resumes bitwise; the deviation of a run that moves here."""
    model = TINY if tiny else preset("125m", 4096)
    shape = (4, 64) if tiny else (8, 512)
    yield "of the model", model.model_dump
    for dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        name = f"begun elsewhere, {dtype}"
        yield name, partial(_moved, TINY, device, dtype=dtype, shape=(4, 64))
    for name, how in VARIANTS.items():
        yield name, partial(_bitwise, model, device, shape=shape, **how)
    yield "streaming equals resident", partial(_equal, model, device, shape=shape)


def conclude(measured: dict[str, Any]) -> None:
    """Each figure stands by itself."""


def _session(
    model: ModelConfig, device: torch.device, shape: tuple[int, int], how: Mapping[str, Any]
) -> TorchSession:
    rows, length = shape
    options = {"compile": False, **how["options"]}
    if device.type == "cuda":
        options["deterministic"] = True
    kind = StreamingSession if options.get("offload") == "streaming" else TorchSession
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return make_session(
        kind, model, Plan(rows // 2, True, dtype, length, rows), device=device, options=options,
        table=how.get("table"),
    )  # fmt: skip


def _bitwise(
    model: ModelConfig, device: torch.device, *, shape: tuple[int, int], **how: Any
) -> dict[str, Any]:
    straight, first = (_session(model, device, shape, how) for _ in range(2))
    losses = [_step(straight, model, shape, index) for index in range(6)]
    again = [_step(first, model, shape, index) for index in range(3)]
    second = _session(model, device, shape, how)
    _take_over(second, first)
    first.close()
    again += [_step(second, model, shape, index) for index in range(3, 6)]
    same = _same(straight, second) and losses == again
    for session in (straight, second):
        session.close()
    return {"bitwise": same, "losses": losses}


def _equal(model: ModelConfig, device: torch.device, *, shape: tuple[int, int]) -> dict[str, Any]:
    """Streaming beside resident with the same masters, on this device."""
    sessions = [
        _session(model, device, shape, {"options": {"master": "split", **more}})
        for more in ({}, {"offload": "streaming"})
    ]
    for index in range(4):
        for session in sessions:
            _step(session, model, shape, index)
    same = _same(*sessions)
    for session in sessions:
        session.close()
    return {"bitwise": same}


def _moved(
    model: ModelConfig, device: torch.device, *, dtype: Any, shape: tuple[int, int]
) -> dict[str, Any]:
    rows, length = shape
    begun = _elsewhere(model, rows, length)
    for index in range(5):
        _step(begun, model, shape, index)
    there = TorchSession(
        model, SessionOptions(OptimizerTable(name="adamw")), Plan(rows, False, dtype, length, rows),
        device,
    )  # fmt: skip
    _take_over(there, begun)
    pairs = [
        (_step(there, model, shape, index), _step(begun, model, shape, index))
        for index in range(5, 10)
    ]
    deviation = max(abs(a - b) / abs(b) for a, b in pairs)
    return {
        "begun_by": type(begun).__name__, "largest_relative_deviation": deviation,
        "band": BANDS[dtype], "holds": deviation <= BANDS[dtype],
    }  # fmt: skip


def _elsewhere(model: ModelConfig, rows: int, length: int) -> TrainSession:
    """MLX where it is installed, PyTorch on the CPU where not."""
    plan = Plan(rows, False, "float32", length, rows)
    options = SessionOptions(OptimizerTable(name="adamw"), backend_options={"compile": False})
    if find_spec("mlx") is not None:
        from solollm_mlx.backend import MlxBackend

        return MlxBackend().train_session(model, options, plan)
    return TorchSession(model, options, plan, torch.device("cpu"))


def _step(session: TrainSession, model: ModelConfig, shape: tuple[int, int], index: int) -> float:
    batch = random_batch(model, *shape, seed=index, packed=False)
    return session.train_step(batch, lr=1e-3).result().loss


def _take_over(target: TrainSession, source: TrainSession) -> None:
    snapshot = source.snapshot()
    target.import_parameters(DictSource.collect(snapshot.parameters()))
    target.import_optimizer(DictSource.collect(snapshot.optimizer()), snapshot.session_state)
    snapshot.close()


def _same(one: TrainSession, other: TrainSession) -> bool:
    ours, theirs = one.snapshot(), other.snapshot()
    pairs = zip(
        [*ours.parameters(), *ours.optimizer()], [*theirs.parameters(), *theirs.optimizer()],
        strict=True,
    )  # fmt: skip
    return all(np.array_equal(a[1].data, b[1].data) for a, b in pairs)
