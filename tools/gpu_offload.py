"""Part `offload7b` of tools/gpu_check.py: a 7B in 22.5 GiB of a card, which stand for one of 24 GB.

The same model, batch and arithmetic once with everything on the card and no cap, where it fits,
and streamed under the cap: with one micro-batch per step and with four, updates after the backward
pass (exact) and inside it (lagged). Overlap is max(computation, copies) over the step: 1 where
nothing waits for anything. A real 24 GB card is slower in its arithmetic and on its link, so the
rates measured on this one stand beside the bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from gpu_sessions import (
    DrawnResident,
    DrawnStreaming,
    Options,
    copy_rates,
    gemm_flops,
    make_session,
    memory_cap,
    memory_peak,
    model_of,
    random_batch,
    timed_steps,
)
from solollm_torch.offload import StreamingSession
from solollm_torch.traffic import Streaming, host_bytes, step_traffic

from solollm.architecture import ModelConfig
from solollm.backend import Plan
from solollm.benchmark import overlap
from solollm.config import OptimizerTable

CAP_GIB = 22.5
CLAIMS = {
    "tokens per second, H200": 7500, "share of uncapped": 0.9, "overlap": 0.9, "pinned GiB": 48,
}  # fmt: skip
Shape = tuple[int, int, int]  # rows of a micro-batch, micro-batches, positions


RESIDENT, COMPILED = "resident, uncapped", "compiled updates"


def figures(device: torch.device, *, tiny: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The streaming session in each mode, and the uncapped one: what is claimed of first."""
    model = model_of("7b", tiny=tiny)
    rows, length = (2, 64) if tiny else (8, 2048)
    yield "of the model", lambda: {**model.model_dump(), "cap_gib": CAP_GIB, "claims": CLAIMS}
    yield "of the card", lambda: {
        "gemm": gemm_flops(device), "copy_gb_per_second": copy_rates(device),
    }  # fmt: skip
    run, once = partial(_run, model, device), (rows, 1, length)
    names = {
        (clip, count): f"streaming, {clip}, {count * rows * length} tokens per step"
        for clip in ("lagged", "exact") for count in (1, 4)
    }  # fmt: skip

    def streamed(clip: str, count: int, more: Options) -> Callable[[], Any]:
        return partial(run, shape=(rows, count, length), clip=clip, streaming=True, more=more)

    resident = partial(run, shape=once, clip="exact", streaming=False)
    compiles = {"compiled_updates": True}
    on_card = device.type == "cuda"  # a processor compiles for half a minute
    yield names["lagged", 1], streamed("lagged", 1, {})
    if on_card:
        yield f"{names['lagged', 1]}, {COMPILED}", streamed("lagged", 1, compiles)
    yield names["exact", 4], streamed("exact", 4, {})
    yield RESIDENT, resident
    if on_card:
        yield f"{RESIDENT}, {COMPILED}", partial(resident, more=compiles)
    for clip, count in (("lagged", 4), ("exact", 1)):
        yield names[clip, count], streamed(clip, count, {})


def conclude(measured: dict[str, Any]) -> None:
    """Streaming's share of the speed that the same code has with everything on the card."""
    for name, found in measured.items():
        kind = f"{RESIDENT}, {COMPILED}" if name.endswith(COMPILED) else RESIDENT
        whole = measured.get(kind, {}).get("tokens_per_second")
        if whole and name.startswith("streaming") and "tokens_per_second" in found:
            found["share_of_uncapped"] = found["tokens_per_second"] / whole


def _run(
    model: ModelConfig, device: torch.device, *, shape: Shape, clip: str, streaming: bool,
    more: Options = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    rows, count, length = shape
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    plan = Plan(rows, True, dtype, length, rows * count)
    options: dict[str, bool | int | float | str] = {"master": "split", **more}
    if streaming:
        options |= {"offload": "streaming", "offload_residuals": True}
    with memory_cap(device, CAP_GIB if streaming else None):
        session = make_session(
            DrawnStreaming if streaming else DrawnResident, model, plan, device=device,
            options=options, table={"clip": clip},
        )  # fmt: skip
        batches = [
            random_batch(model, rows * count, length, seed=s, packed=False) for s in range(3)
        ]
        seconds, loss = timed_steps(session, batches, device, warm_up=2)
        measured = {
            "tokens_per_second": rows * count * length / statistics.median(seconds),
            "seconds": seconds, "loss": loss, "memory": memory_peak(device),
        }  # fmt: skip
        if isinstance(session, StreamingSession):
            measured |= _copies(session, model, clip, seconds=seconds[-1], shape=shape)
        session.close()
    return measured


def _copies(
    session: StreamingSession, model: ModelConfig, clip: str, *, seconds: float, shape: Shape
) -> dict[str, Any]:
    """Bytes of the last step beside the formula, and how much of the copies nobody waited for."""
    rows, count, length = shape
    table = OptimizerTable.model_validate({"name": "adamw", "state_bits": 8, "clip": clip})
    item = 2 if session.compute_dtype == torch.bfloat16 else 4
    formula = step_traffic(
        model, table, Streaming("split", 2, offload_residuals=True), num_micro_batches=count,
        residual_bytes=rows * count * length * model.hidden_size * item,
    )  # fmt: skip
    return {
        "moved": session.traffic._asdict(), "formula": formula._asdict(),
        "pinned_gib": host_bytes(model, table, "split") / 2**30,
        "pinned_residuals_gib": session.pinned_residual_bytes() / 2**30,
        "lane_seconds": dict(session.lane_seconds()),
        "overlap": overlap(session.copies(), seconds),
    }  # fmt: skip
