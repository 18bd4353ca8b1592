"""The single operations of a block, each in any floating dtype; weights are cast to the input's.

Shapes: B rows, T positions, C features, H query heads, K key/value heads, D head size, F
intermediate size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from solollm.architecture import ModelConfig


class Rotary(NamedTuple):
    """cos and sin of position times frequency, float32 [T, D/2] (or [B, T, D/2])."""

    cos: Tensor
    sin: Tensor

    @property
    def device(self) -> torch.device:
        return self.cos.device


def rotary_table(config: ModelConfig, length: int, device: torch.device) -> Rotary:
    """cos and sin of positions 0 to length - 1, each float32 [length, D/2].

    RoPE, Su et al. 2021, arXiv:2104.09864, half-split as in HF Llama; Llama 3's scaling slows the
    low frequencies down by `factor` and blends in between.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent  # [D/2], radians per position
    scaling = config.rope_scaling
    if scaling is not None:
        wavelength = 2 * math.pi / frequency
        turns = scaling.original_max_position_embeddings / wavelength
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)  # [T, D/2]
    return Rotary(angle.cos().to(device), angle.sin().to(device))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the halves of every head: x [B, T, heads, D], rotary of its T positions."""
    cos = rotary.cos.unsqueeze(-2).to(x.dtype)  # [T, 1, D/2]
    sin = rotary.sin.unsqueeze(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def project_heads(
    qkv: Tensor,
    num_heads: int,
    rotary: Rotary,
    norms: tuple[nn.Parameter, nn.Parameter] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, H + 2 K, D] to rotated q [B, H, T, D] and k [B, K, T, D], and v [B, K, T, D].

    `norms`: the weights [D] of the RMSNorm on query and on key heads, before the rotation.
    """
    num_kv_heads = (qkv.shape[-2] - num_heads) // 2
    q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=-2)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    q, k = rotate(q, rotary), rotate(k, rotary)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed: [..., out]."""
    return functional.linear(x, weight.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""
    return functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 F]: [..., F] (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
