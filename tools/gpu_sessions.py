"""What the parts of tools/gpu_check.py share: sessions with weights drawn on the device, timed
steps, the rates that a card reaches in the same run.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from solollm_torch.offload import StreamingSession
from solollm_torch.session import TorchSession
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import Batch, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.dial import preset

DATASHEET_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "4090": 165.2, "5090": 209.5,
                    "3090": 71.0}  # fmt: skip  # dense bf16 with fp32 accumulation
VOCAB_SIZE = 32_000
TINY = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, head_dim=16, max_position_embeddings=128,
)  # fmt: skip
Options = Mapping[str, bool | int | float | str]


class _Drawn(TorchSession):
    """Initial weights from the device's own generator: a speed does not depend on their values, and
    the core's take minutes for billions."""

    def _initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator(self._device).manual_seed(seed)
        for spec in parameter_table(self._model):
            if len(spec.shape) == 1:
                yield spec.name, torch.ones(spec.shape, device=self._device)
            else:
                drawn = torch.empty(spec.shape, device=self._device)
                yield spec.name, drawn.normal_(0.0, 0.02, generator=generator)


class DrawnResident(_Drawn, TorchSession):
    """A resident session of such weights."""


class DrawnStreaming(_Drawn, StreamingSession):
    """A streaming one."""


def model_of(name: str, *, tiny: bool) -> ModelConfig:
    """A preset, or the tiny model in its place."""
    return TINY if tiny else preset(name, VOCAB_SIZE)


def make_session(
    kind: type[TorchSession],
    model: ModelConfig,
    plan: Plan,
    *,
    device: torch.device,
    options: Options,
    table: Mapping[str, Any] | None = None,
) -> TorchSession:
    """AdamW with 8-bit moments, unless the table says otherwise."""
    optimizer = OptimizerTable.model_validate({"name": "adamw", "state_bits": 8, **(table or {})})
    return kind(model, SessionOptions(optimizer, backend_options=dict(options)), plan, device)


def random_batch(model: ModelConfig, rows: int, length: int, *, seed: int, packed: bool) -> Batch:
    """Random tokens; packed: documents of about a quarter of a row."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, model.vocab_size, (rows, length + 1)).astype(np.int32)
    segments = None
    if packed:
        segments = (generator.random((rows, length)) < 4 / length).cumsum(1).astype(np.int32)
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), float(rows * length), segments)


def timed_steps(
    session: TorchSession, batches: list[Batch], device: torch.device, *, warm_up: int = 2
) -> tuple[list[float], float]:
    """Seconds of each step after `warm_up` steps, each finished before the next begins; and the
    last one's loss, by which two ways to the same numbers are told from others."""
    seconds, loss = [], 0.0
    for index in range(warm_up + len(batches)):
        synchronize(device)
        begun = time.perf_counter()
        loss = session.train_step(batches[index % len(batches)], lr=1e-4).result().loss
        synchronize(device)
        if index >= warm_up:
            seconds.append(time.perf_counter() - begun)
    return seconds, loss


def busiest_kernels(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """What one step spends its time in: the kernels that take most of it, in milliseconds, and how
    much of the step any kernel runs at all."""
    on_card = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with profile(activities=kinds) as watch:
        begun = time.perf_counter()
        step()
        synchronize(device)
        seconds = time.perf_counter() - begun
    name = "self_device_time_total" if on_card else "self_cpu_time_total"
    # An operator on the processor has the time of the kernels that it began, once more.
    place = DeviceType.CUDA if on_card else DeviceType.CPU
    found = (row for row in watch.key_averages() if row.device_type == place)
    rows = [
        (getattr(row, name) / 1e3, row.count, row.key[:100])
        for row in found if not row.is_user_annotation
    ]  # fmt: skip
    rows.sort(reverse=True)
    return {
        "step_milliseconds": seconds * 1e3, "busy_milliseconds": sum(row[0] for row in rows),
        "kernels": [{"ms": ms, "calls": calls, "name": key} for ms, calls, key in rows[:30]],
    }  # fmt: skip


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_flops(device: torch.device, *, size: int = 8192, rounds: int = 10) -> float:
    """bf16 FLOP/s of one large product, now; float32 where that is a processor."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = size if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = a @ a
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(rounds):
        torch.mm(a, a, out=out)
    synchronize(device)
    return 2.0 * size**3 * rounds / (time.perf_counter() - begun)


def copy_rates(device: torch.device, *, num_bytes: int = 1 << 30) -> dict[str, float]:
    """GB/s up and down over pinned memory, one way at a time; empty without a card."""
    if device.type != "cuda":
        return {}
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    rates = {}
    for name, target, source in (("up", there, host), ("down", host, there)):
        target.copy_(source, non_blocking=True)
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(4):
            target.copy_(source, non_blocking=True)
        synchronize(device)
        rates[name] = 4 * num_bytes / (time.perf_counter() - begun) / 1e9
    return rates


def datasheet_flops(device: torch.device) -> float | None:
    """The card's dense bf16 peak, None for one that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * t for key, t in DATASHEET_TFLOPS.items() if key in name), None)


def memory_peak(device: torch.device) -> dict[str, int]:
    """Bytes allocated and reserved at most since the last reset."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


@contextmanager
def memory_cap(device: torch.device, gib: float | None) -> Iterator[None]:
    """No more than so many GiB of the card for what is allocated inside."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    share = 1.0 if gib is None else min(1.0, gib * 2**30 / total)
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
