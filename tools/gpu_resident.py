"""Part `resident` of tools/gpu_check.py: a 1.3B that lies on the card, in bf16, sequences of 2048.

First the step as it is by default, then transformers with Liger's kernels, both compiled: what the
claim compares. Then every switch by itself, first those that no card has run yet. Nobody
recomputes anything, which 80 GB have room for; where that fails, the variant that recomputes is
taken. Peers hold pure bf16 weights and moments, which is less work than ours. Both sides are
compiled block by block: the same granularity, and a compile time that fits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from gpu_check import attempt
from gpu_sessions import (
    DrawnResident,
    busiest_kernels,
    datasheet_flops,
    gemm_flops,
    make_session,
    memory_cap,
    memory_peak,
    model_of,
    random_batch,
    synchronize,
    timed_steps,
)
from solollm_torch.session import TorchSession
from torch import Tensor, nn
from torch.nn import functional

from solollm.architecture import ModelConfig
from solollm.backend import Batch, Plan

Options = dict[str, bool | int | float | str]
Shape = tuple[int, int, int]  # rows of a micro-batch, micro-batches, positions
LIGER = "transformers+liger+compile"
NUM_STEPS, NUM_WARM_UP = 3, 2
SWITCHES: dict[str, tuple[Options, dict[str, Any]]] = {  # options, and what of the plan or table
    # No card has run these; recording ends the process where it fails inside a kernel.
    "Muon, bf16 products": ({"newton_schulz": "bfloat16"}, {"name": "muon"}),
    "cut-cross-entropy loss": ({"loss": "cce"}, {}),
    "split masters, 8-bit moments": ({"master": "split"}, {"state_bits": 8}),
    "8-bit moments, compiled updates": ({"compiled_updates": True}, {"state_bits": 8}),
    "CUDA graphs": ({"cuda_graphs": True}, {}),
    "recomputing": ({}, {"recompute": True}),
    "not compiled": ({"compile": False}, {}),
    "8-bit moments": ({}, {"state_bits": 8}),
    "Muon": ({}, {"name": "muon"}),
    "Liger loss": ({"loss": "liger"}, {}),
    "packed, mask": ({"attention": "mask"}, {"packed": True}),
    "packed, varlen": ({"attention": "varlen"}, {"packed": True}),
    "packed, flex": ({"attention": "flex"}, {"packed": True}),
    "fp8 products": ({"fp8": True}, {}),
}


def figures(device: torch.device, *, tiny: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every variant's tokens per second and memory."""
    model = model_of("1.3b", tiny=tiny)
    shape = (2, 2, 64) if tiny else (*_rows(device), 2048)
    ours = partial(_ours, model, device, shape=shape)
    peer = partial(_peer, model=model, device=device, shape=shape)
    flops = model.flops_per_token(shape[2])
    yield "of the model", lambda: {**model.model_dump(), "flops": flops, "shape": shape}
    yield "of the card", lambda: {"gemm": gemm_flops(device), "datasheet": datasheet_flops(device)}
    yield "default", partial(ours, {}, {"profiled": True})
    yield LIGER, partial(peer, LIGER)
    yield "transformers+compile", partial(peer, "transformers+compile")
    for name, (options, other) in SWITCHES.items():
        yield name, partial(ours, options, other)


def _rows(device: torch.device) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches: 32 rows a step, and as many at once as there is
    room for without recomputing (61 GB of activations for 16)."""
    return (16, 2) if torch.cuda.get_device_properties(device).total_memory > 110e9 else (8, 4)


def conclude(measured: dict[str, Any]) -> None:
    """Shares of what the card can, and our default beside each peer."""
    card, model = measured.get("of the card", {}), measured.get("of the model", {})
    default = measured.get("default", {})
    for name, variant in measured.items():
        if "tokens_per_second" not in variant or "gemm" not in card:
            continue
        rate = variant["tokens_per_second"] * model["flops"]
        variant["flops"], variant["share_of_gemm"] = rate, rate / card["gemm"]
        peak = card["datasheet"]
        variant["share_of_datasheet"] = rate / peak if peak else None
        if name.startswith("transformers") and "tokens_per_second" in default:
            ratio = default["tokens_per_second"] / variant["tokens_per_second"]
            variant["ours_to_this"] = ratio


def _with_room(steps: Callable[[bool], dict[str, Any]]) -> dict[str, Any]:
    """What `steps` measures without recomputing anything, where that fits, else with."""
    try:
        return steps(False)
    except torch.cuda.OutOfMemoryError:
        pass  # and outside of the handler again: until here the failure holds the tensors
    return steps(True)


def _ours(
    model: ModelConfig,
    device: torch.device,
    options: Options,
    other: dict[str, Any],
    *,
    shape: Shape,
) -> dict[str, Any]:
    """`other`: of the optimizer's table; besides `packed`, `recompute` and `profiled`."""
    table = {"state_bits": 32, **other}
    must_recompute, packed = table.pop("recompute", False), table.pop("packed", False)
    profiled = table.pop("profiled", False)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    rows, count, length = shape

    def steps(recompute: bool) -> dict[str, Any]:
        plan = Plan(rows, recompute, dtype, length, rows * count)
        with memory_cap(device, None):
            session = make_session(
                DrawnResident, model, plan, device=device, options=options, table=table
            )
            batches = [_batch(model, shape, seed, packed=packed) for seed in range(NUM_STEPS)]
            begun = time.perf_counter()
            seconds, loss = timed_steps(session, batches, device, warm_up=NUM_WARM_UP)
            warm_up = time.perf_counter() - begun - sum(seconds)
            measured = {
                **_speed(seconds, shape), "loss": loss, "warm_up_seconds": warm_up,
                "memory": memory_peak(device), "recompute": recompute, "optimizer": table,
                "settings": dict(session.settings),
            }  # fmt: skip
            if profiled:
                step = partial(_step, session, batches[0])
                measured["profile"] = attempt(partial(busiest_kernels, step, device))
            session.close()
        return measured

    return steps(True) if must_recompute else _with_room(steps)


def _step(session: TorchSession, batch: Batch) -> None:
    session.train_step(batch, lr=1e-4).result()


def _peer(name: str, *, model: ModelConfig, device: torch.device, shape: Shape) -> dict[str, Any]:
    if "liger" in name and find_spec("liger_kernel") is None:
        raise ModuleNotFoundError("liger_kernel is not installed")
    return _with_room(lambda recompute: _peer_steps(name, model, device, recompute, shape=shape))


def _peer_steps(
    name: str, model: ModelConfig, device: torch.device, recompute: bool, *, shape: Shape
) -> dict[str, Any]:
    """transformers, bf16 throughout, fused AdamW."""
    rows, count, _ = shape
    with memory_cap(device, None):
        module, loss_of = _peer_module(name, model, device)
        if recompute:
            module.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        seconds = []
        for index in range(NUM_WARM_UP + NUM_STEPS):
            batch = _batch(model, shape, index, packed=False)
            ids, labels = (
                torch.from_numpy(a.astype("int64")).to(device)
                for a in (batch.input_ids, batch.labels)
            )
            synchronize(device)
            begun = time.perf_counter()
            for start in range(0, rows * count, rows):
                part = slice(start, start + rows)
                loss = loss_of(module, ids[part], labels[part])
                (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            synchronize(device)
            if index >= NUM_WARM_UP:
                seconds.append(time.perf_counter() - begun)
        peak = memory_peak(device)
    return {**_speed(seconds, shape), "memory": peak, "recompute": recompute}


def _peer_module(
    name: str, model: ModelConfig, device: torch.device
) -> tuple[Any, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    """The module, its blocks compiled, and (module, ids, labels) -> loss."""
    from solollm_torch.peers import liger_loss, with_liger
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = model.to_hf()
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config._attn_implementation = "sdpa"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        module: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    module.train()
    on_card = device.type == "cuda"
    cross_entropy = torch.compile(_cross_entropy) if on_card else _cross_entropy

    def plain_loss(module: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(module(input_ids=ids, use_cache=False).logits, labels)

    loss = plain_loss
    if "liger" in name:
        module, loss = with_liger(module), liger_loss
    if on_card:
        for layer in module.model.layers:
            layer.compile()
    return module, loss


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _batch(model: ModelConfig, shape: Shape, seed: int, *, packed: bool) -> Batch:
    rows, count, length = shape
    return random_batch(model, rows * count, length, seed=seed, packed=packed)


def _speed(seconds: list[float], shape: Shape) -> dict[str, Any]:
    rows, count, length = shape
    return {
        "tokens_per_second": rows * count * length / statistics.median(seconds),
        "seconds": seconds,
    }
