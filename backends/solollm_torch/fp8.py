"""Matrix products of a block in 8-bit floating point, scaled per tensor at every call.

Forward: inputs and weights as e4m3, whose largest magnitude is brought to 448. Backward: the
gradient of the input from e5m2 gradients (range before precision) and e4m3 weights; the gradient of
the weight stays in the compute dtype. Micikevicius et al. 2022, arXiv:2209.05433. The head, norms
and attention are left alone. The operator is the one that torchao's `float8` calls.

Cards have the units from compute capability 8.9 on; a CPU computes the same slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from solollm.architecture import ModelConfig
from solollm.errors import ConfigError
from solollm_torch.products import add_outer

_MULTIPLE = 16  # of both sides of a product, says the operator
_FIRST_CAPABILITY = (8, 9)


def require_fp8(model: ModelConfig, device: torch.device) -> None:
    """Raise ConfigError where `fp8` cannot be computed."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} multiplies no 8-bit floating point",
            why="that came with compute capability 8.9 (Ada, Hopper)",
            fix="leave the option `fp8` out",
        )
    sides = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "query heads times head_dim": model.num_attention_heads * model.head_dim,
        "key heads times head_dim": model.num_key_value_heads * model.head_dim,
    }
    for name, size in sides.items():
        if size % _MULTIPLE:
            raise ConfigError(
                f"fp8 needs sizes that are multiples of {_MULTIPLE}",
                why=f"{name} is {size}",
                fix="leave the option `fp8` out, or choose another size",
            )


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed: [..., out] in x's dtype."""
    result: Tensor = _Fp8Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return result


class _Fp8Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])  # [N, in]
        product = _product(rows, weight.to(x.dtype), torch.float8_e4m3fn)
        return product.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # [N, out]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            transposed = weight.to(grad.dtype).t().contiguous()  # [in, out]
            grad_x = _product(rows, transposed, torch.float8_e5m2).view(x.shape)
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])  # [N, in]
            if torch.compiler.is_compiling():
                grad_weight = torch.mm(rows.t(), inputs).to(weight.dtype)
            else:
                grad_weight = add_outer(weight, rows, inputs)
        return grad_x, grad_weight


def _product(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [N, in] @ weight [out, in].T, the rows in `dtype`, the weight in e4m3."""
    narrow_rows, rows_scale = _scaled(rows, dtype)
    narrow_weight, weight_scale = _scaled(weight, torch.float8_e4m3fn)
    product: Tensor = torch._scaled_mm(
        narrow_rows, narrow_weight.t(), scale_a=rows_scale, scale_b=weight_scale,
        out_dtype=rows.dtype,
    )  # fmt: skip
    return product


def _scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in `dtype`, and the scale, fp32 0-dim: the largest magnitude becomes the largest
    number."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale
