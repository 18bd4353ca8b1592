"""Part `resident` of tools/gpu_check.py: a 1.3B that lies on the card, in bf16, sequences of 2048.

First the step as it is by default, its share of the datasheet's peak and of a matrix product timed
in the same run; then every switch by itself; then other stacks. Peers hold pure bf16 weights and
moments, which is less work than ours.
"""

from __future__ import annotations

import gc
import statistics
import time
from importlib.util import find_spec
from typing import Any

import torch
from gpu_sessions import (
    DrawnResident,
    attempt,
    datasheet_flops,
    gemm_flops,
    make_session,
    memory_cap,
    memory_peak,
    model_of,
    random_batch,
    timed_steps,
)
from torch.nn import functional

from solollm.architecture import ModelConfig
from solollm.backend import Plan

BUDGET_SECONDS = 400.0  # of the eight minutes; what does not fit any more is left out, and says so
SWITCHES: dict[str, dict[str, bool | int | float | str]] = {
    "default": {},
    "not compiled": {"compile": False},
    "split masters": {"master": "split"},
    "fp8 products": {"fp8": True},
    "CUDA graphs": {"cuda_graphs": True},
    "Liger loss": {"loss": "liger"},
    "cut-cross-entropy loss": {"loss": "cce"},
}
PACKED: dict[str, dict[str, bool | int | float | str]] = {
    "packed, mask": {"attention": "mask"},
    "packed, varlen": {"attention": "varlen"},
    "packed, flex": {"attention": "flex"},
}


def measure(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Every variant's tokens per second and memory."""
    begun = time.monotonic()
    model = model_of("1.3b", tiny=tiny)
    rows, length = (2, 64) if tiny else (8, 2048)
    found: dict[str, Any] = {
        "model": model.model_dump(), "rows": rows, "seq_len": length,
        "gemm_flops": gemm_flops(device), "datasheet_flops": datasheet_flops(device),
    }  # fmt: skip
    variants: dict[str, Any] = {}
    for name, options in {**SWITCHES, **PACKED}.items():
        if time.monotonic() - begun > BUDGET_SECONDS:
            variants[name] = {"failed": "no time left"}
            continue
        shape = (rows, length, name.startswith("packed"))
        variants[name] = attempt(
            lambda o=options, s=shape: _ours(model, device, options=o, shape=s)
        )
        release(device)
    for name in ("transformers+compile", "transformers+liger+compile"):
        if time.monotonic() - begun > BUDGET_SECONDS:
            variants[name] = {"failed": "no time left"}
            continue
        variants[name] = attempt(lambda n=name: _peer(n, model, device, shape=(rows, length)))
        release(device)
    flops = model.flops_per_token(length)
    for variant in variants.values():
        if "tokens_per_second" in variant:
            rate = variant["tokens_per_second"] * flops
            variant["flops"] = rate
            variant["share_of_gemm"] = rate / found["gemm_flops"]
            peak = found["datasheet_flops"]
            variant["share_of_datasheet"] = rate / peak if peak else None
    return {**found, "variants": variants}


def _ours(
    model: ModelConfig,
    device: torch.device,
    *,
    options: dict[str, bool | int | float | str],
    shape: tuple[int, int, bool],
) -> dict[str, Any]:
    rows, length, packed = shape
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    with memory_cap(device, None):
        session = make_session(
            DrawnResident, model, Plan(rows, True, dtype, length, rows), device=device,
            options=options,
        )  # fmt: skip
        batches = [random_batch(model, rows, length, seed=s, packed=packed) for s in range(5)]
        begun = time.perf_counter()
        seconds = timed_steps(session, batches, device)
        warm_up = time.perf_counter() - begun - sum(seconds)
        peak = memory_peak(device)
        session.close()
    return {
        "tokens_per_second": rows * length / statistics.median(seconds), "seconds": seconds,
        "warm_up_seconds": warm_up, "memory": peak, "options": options,
    }  # fmt: skip


def _peer(
    name: str, model: ModelConfig, device: torch.device, *, shape: tuple[int, int]
) -> dict[str, Any]:
    """transformers, bf16 throughout, fused AdamW, gradient checkpointing as ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rows, length = shape
    if "liger" in name:
        if find_spec("liger_kernel") is None:
            return {"failed": "liger_kernel is not installed"}
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    raw = model.to_hf()
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config._attn_implementation = "sdpa"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with memory_cap(device, None):
        with device:
            module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        module.train()
        module.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        run = torch.compile(module) if device.type == "cuda" else module
        seconds = []
        for index in range(7):
            batch = random_batch(model, rows, length, seed=index, packed=False)
            ids, labels = (
                torch.from_numpy(a.astype("int64")).to(device)
                for a in (batch.input_ids, batch.labels)
            )
            begun = time.perf_counter()
            if "liger" in name:
                loss = run(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss
            else:
                logits = run(input_ids=ids, use_cache=False).logits
                loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            if index >= 2:
                seconds.append(time.perf_counter() - begun)
        peak = memory_peak(device)
    return {
        "tokens_per_second": rows * length / statistics.median(seconds), "seconds": seconds,
        "memory": peak,
    }  # fmt: skip


def release(device: torch.device) -> None:
    """Give back what a variant held, and the code compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
