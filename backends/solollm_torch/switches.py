"""What a session may do otherwise, all off by default: the `backend_options` that choose it, and
whether this machine can.

    attention   auto | documents | mask | varlen | flex    how packed documents are kept apart
    loss        own | liger | cce                     whose cross-entropy
    recompute   auto | none | attention | feed_forward | parts | block
                what is computed again in backward; auto: the plan's activation checkpointing
    fp8         the blocks' products in 8-bit floating point
    cuda_graphs record each compiled block once and replay it
    newton_schulz  float32 | bfloat16                  what Muon's iterations multiply in
    compiled_updates  8-bit moments updated in one compiled pass

Each stays off until a card has shown that it gains (`tools/gpu_check.py resident`), and where its
gain costs something else: docs/results/gpu.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from solollm.architecture import ModelConfig
from solollm.errors import BackendError, ConfigError
from solollm_torch.attention import WAYS, Way
from solollm_torch.compiling import missing_compiler
from solollm_torch.fp8 import require_fp8
from solollm_torch.fused_loss import LossAndGradient, choose_loss
from solollm_torch.gradients import DTYPES
from solollm_torch.packed_attention import require_flex, require_varlen, varlen_agrees

Given = Mapping[str, bool | int | float | str]
SWITCHES = ("attention", "loss", "recompute", "fp8", "cuda_graphs", "newton_schulz",
            "compiled_updates")  # fmt: skip
PARTS: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    "attention": frozenset({"attention"}),
    "feed_forward": frozenset({"feed_forward"}),
    "parts": frozenset({"attention", "feed_forward"}),
}


class Switches(NamedTuple):
    """`recompute`: the parts of a block that are computed again, unless `recomputes_blocks`."""

    attention: Way
    loss: LossAndGradient
    recompute: frozenset[str]
    recomputes_blocks: bool
    fp8: bool
    cuda_graphs: bool
    newton_schulz: torch.dtype
    compiled_updates: bool

    @classmethod
    def of(
        cls, given: Given, model: ModelConfig, device: torch.device, *, compute: torch.dtype,
        compiled: bool, plan: bool,
    ) -> Switches:  # fmt: skip
        """`plan`: whether blocks are to be recomputed where `recompute` leaves it open.

        Raises:
            ConfigError: not a choice. BackendError: this machine, or its packages, cannot.
        """
        blocks, parts = _recompute(str(given.get("recompute", "auto")), plan)
        fp8, graphs = bool(given.get("fp8", False)), bool(given.get("cuda_graphs", False))
        if fp8:
            require_fp8(model, device)
        if graphs and not (compiled and device.type == "cuda"):
            raise BackendError(
                "cuda_graphs needs compiled blocks on an NVIDIA card",
                why="what is recorded is what the compiler has made",
                fix="leave the option `cuda_graphs` out",
            )
        chosen = str(given.get("attention", "auto"))
        if chosen == "auto":
            way = _fastest_attention(model, device, compute, compiled=compiled)
        else:
            way = _attention(chosen, device)
        loss = choose_loss(str(given.get("loss", "own")), device, compiled=compiled)
        products = _products(str(given.get("newton_schulz", "float32")))
        updates = bool(given.get("compiled_updates", False))
        if updates and missing_compiler(device):
            raise BackendError(
                "compiled_updates needs a compiler",
                why=missing_compiler(device),
                fix="leave the option `compiled_updates` out",
            )
        return cls(way, loss, parts, blocks, fp8, graphs, products, updates)


def _fastest_attention(
    model: ModelConfig, device: torch.device, compute: torch.dtype, *, compiled: bool
) -> Way:
    if device.type == "cpu" and not compiled:
        return "documents"
    is_narrow = compute != torch.float32  # which the kernel over lengths does not know
    if device.type == "cuda" and is_narrow and varlen_agrees(device, compute, model.head_dim):
        return "varlen"
    return "mask"


def _attention(chosen: str, device: torch.device) -> Way:
    if chosen == "varlen":
        require_varlen(device)
    if chosen == "flex":
        require_flex(device)
    if chosen == "documents" and device.type != "cpu":
        raise BackendError(
            "attention = documents is the CPU's",
            why="it calls the CPU's kernel once per document",
            fix="leave the option `attention` out",
        )
    for way in WAYS:
        if chosen == way:
            return way
    raise ConfigError(f"attention = {chosen!r} is not a choice", fix=f"use auto, {', '.join(WAYS)}")


def _recompute(chosen: str, plan: bool) -> tuple[bool, frozenset[str]]:
    if chosen == "auto":
        return plan, frozenset()
    if chosen == "block":
        return True, frozenset()
    if chosen not in PARTS:
        raise ConfigError(
            f"recompute = {chosen!r} is not a choice",
            fix=f"use auto, block, {', '.join(PARTS)}",
        )
    return False, PARTS[chosen]


def _products(chosen: str) -> torch.dtype:
    if chosen not in DTYPES:
        raise ConfigError(
            f"newton_schulz = {chosen!r} is not a choice", fix=f"use {' or '.join(DTYPES)}"
        )
    return DTYPES[chosen]
