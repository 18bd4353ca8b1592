"""The single operations of a block, with hand-written gradients for eager execution.

Eager autograd spends passes over memory that one formula per operation does not, and it allocates a
second matrix for every weight's gradient. The functions here avoid both. Under `torch.compile` and
without gradients each is its plain formula; the compiler fuses better than a hand could. Where the
session has compiled `kernels`, they take the place of the formulas.
What each saves is measured in `docs/results/torch_step_profile.md`.

**Gradients of weights.** Where `weight.grad` is allocated, `linear` adds to it in place, in fp32.

Shapes: B rows, T positions, N = all positions, H query heads, K key/value heads, D head size,
F intermediate size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from solollm.architecture import ModelConfig
from solollm_torch.kernels import Kernels
from solollm_torch.products import add_outer, product


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


def by_hand() -> bool:
    """Whether to use the hand-written gradients: eager, and gradients may be wanted."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed: [..., out]."""
    if by_hand():
        result: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
        return result
    return product(x, weight.to(x.dtype))


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return product(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x,) = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, ctx.weight.to(grad.dtype).t())
        if ctx.needs_input_grad[1]:
            grad_weight = add_outer(ctx.weight, grad.flatten(0, -2), x.flatten(0, -2))
        return grad_x, grad_weight


def embedding(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` of weight [V, C] in `dtype`: [..., C]."""
    if by_hand() and weight.dtype != torch.float32:
        result: Tensor = _Embedding.apply(ids, weight, dtype)  # type: ignore[no-untyped-call]
        return result
    return functional.embedding(ids, weight).to(dtype)


class _Embedding(Function):
    """Gradients of a token's occurrences are added up in fp32, whatever the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = len(weight)
        return functional.embedding(ids, weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        backward = torch.ops.aten.embedding_dense_backward
        return None, backward(grad.float(), ids, ctx.num_rows, -1, False), None


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: Kernels | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019).

    A compute dtype below fp32 is widened inside. CUDA has fused kernels for both directions.
    """
    result: Tensor
    if by_hand() and kernels is not None:
        result = _KernelRMSNorm.apply(x, weight, eps, kernels)  # type: ignore[no-untyped-call]
        return result
    if by_hand() and x.device.type == "cpu":
        result = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return result
    return functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide, size = x.float(), x.shape[-1]
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()  # [..., 1]
        inverse = inverse.div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed: Tensor = (wide * inverse).mul_(weight)
        return normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad, size = x.float(), grad.float(), x.shape[-1]
        both = (grad * wide).reshape(-1, size)  # [N, C]
        grad_weight = None
        if ctx.needs_input_grad[1]:
            column = inverse.reshape(-1, 1)  # [N, 1]
            grad_weight = torch.mm(column.t(), both).view(size)
        along = torch.mv(both, weight.float()).view(inverse.shape)  # [..., 1]: <grad * weight, x>
        along.mul_(inverse).mul_(inverse).mul_(inverse).div_(-size)
        grad_x = (grad * weight).mul_(inverse).addcmul_(wide, along)
        return grad_x.to(x.dtype), grad_weight, None


class _KernelRMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
        out, inverse = kernels.rms_norm(x, weight.float(), eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.kernels = kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        return *ctx.kernels.rms_norm_backward(grad, x, weight.float(), inverse), None, None


def swiglu(gate_up: Tensor, kernels: Kernels | None = None) -> Tensor:
    """silu(gate) * up of [..., 2 F]: [..., F] (Shazeer 2020, arXiv:2002.05202)."""
    result: Tensor
    if by_hand() and kernels is not None:
        result = _KernelSwiGLU.apply(gate_up, kernels)  # type: ignore[no-untyped-call]
        return result
    if by_hand():
        result = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
        return result
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_both = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.mul(functional.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_both


class _KernelSwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kernels = kernels
        return kernels.swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.kernels.swiglu_backward(grad, *ctx.saved_tensors), None


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the halves of every head: x [B, T, heads, D], rotary of its T positions."""
    cos = rotary.cos.unsqueeze(-2).to(x.dtype)  # [T, 1, D/2]
    sin = rotary.sin.unsqueeze(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def split_heads(
    qkv: Tensor,
    num_heads: int,
    rotary: Rotary,
    *,
    norms: tuple[nn.Parameter, nn.Parameter] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, H + 2 K, D] to rotated q [B, H, T, D] and k [B, K, T, D], and v [B, K, T, D].

    `norms`: the weights [D] of the RMSNorm on query and on key heads, before the rotation. The
    caller gives `qkv` away: with gradients it is rotated in place.
    """
    if norms is None and by_hand():
        q, k, v = _SplitHeads.apply(qkv, num_heads, rotary)  # type: ignore[no-untyped-call]
        return q, k, v
    q, k, v = torch.split(qkv, _head_counts(qkv, num_heads), dim=-2)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    q, k = rotate(q, rotary), rotate(k, rotary)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _head_counts(qkv: Tensor, num_heads: int) -> list[int]:
    num_kv_heads = (qkv.shape[-2] - num_heads) // 2
    return [num_heads, num_kv_heads, num_kv_heads]


class _SplitHeads(Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, num_heads: int, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        counts = _head_counts(qkv, num_heads)
        ctx.rotary, ctx.num_rotated = rotary, counts[0] + counts[1]
        # Detached: the outputs are new tensors to autograd, in the memory of the projection.
        qkv = qkv.detach()
        _rotate_in_place(qkv[:, :, : ctx.num_rotated], rotary.cos, rotary.sin)
        q, k, v = torch.split(qkv, counts, dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None]:
        grad = torch.cat((q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), dim=2)
        _rotate_in_place(grad[:, :, : ctx.num_rotated], ctx.rotary.cos, -ctx.rotary.sin)
        return grad, None, None


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotate` of x [B, T, heads, D] by tables [T, D/2], overwriting it."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(crossed)
