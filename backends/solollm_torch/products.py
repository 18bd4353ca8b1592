"""Matrix products by the faster of the libraries that PyTorch brings for a processor.

PyTorch multiplies fp32 matrices with MKL, which takes its AVX2 kernels on AMD processors. oneDNN
takes AVX-512 where there is one: with units of 512 bits (Zen 5) that is twice the rate. PyTorch has
no switch for it; the operator here is the one that TorchInductor emits.

Which library is a rule and not a measurement of each process, because runs on one machine must
agree to the bit. What it rests on: `docs/results/torch_step_profile.md`.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ZEN_5 = 26  # AMD's family number
OUTER_ELEMENTS = 1 << 22  # of a weight's gradient, multiplied at once: 16 MiB beside the sums


class Rule(NamedTuple):
    """For which fp32 products on a processor oneDNN is the faster library."""

    forward: bool  # x W^T, and with W transposed
    outer: bool  # dy^T x: gradients of weights, which MKL adds up on the way


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight.T [in, out]; autograd cannot see through it."""
    if _suits(x) and rule().forward:
        return _onednn(x, weight)
    return functional.linear(x, weight)


def add_outer(weight: Tensor, grad_rows: Tensor, rows: Tensor) -> Tensor | None:
    """The gradient of `rows @ weight.T`: grad_rows.T @ rows, [out, in].

    Added to `weight.grad` in place where that is allocated (then None is returned), else returned.
    """
    across, fast = grad_rows.t(), _suits(rows) and rule().outer
    if weight.grad is None:
        whole = _onednn(across, rows.t()) if fast else torch.mm(across, rows)
        return whole.to(weight.dtype)
    if weight.grad.dtype != rows.dtype:
        weight.grad.add_(torch.mm(across, rows))
    elif fast:
        size = max(1, OUTER_ELEMENTS // rows.shape[1])
        for start in range(0, len(across), size):
            part = slice(start, start + size)
            weight.grad[part].add_(_onednn(across[part], rows.t()))
    else:
        weight.grad.addmm_(across, rows)
    return None


def add_products(
    base: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float, out: Tensor
) -> None:
    """out = beta * base + alpha * left @ right of N matrices each. `out` is none of the others, but
    for `base` where `beta` is 0 and it is not read."""
    if not (_suits(left) and rule().forward):
        torch.baddbmm(base, left, right, beta=beta, alpha=alpha, out=out)
        return
    for to, add, a, b in zip(out, base, left, right, strict=True):
        torch.mul(_onednn(a, b.t()), alpha, out=to)
        if beta:
            to.add_(add, alpha=beta)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight.T."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


def _suits(x: Tensor) -> bool:
    on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    return on_cpu and not torch.compiler.is_compiling()


@functools.cache
def rule() -> Rule:
    """Of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not cpuinfo.exists():
        return Rule(False, False)
    return rule_for(cpuinfo.read_text(encoding="utf-8", errors="replace"))


def rule_for(cpuinfo: str) -> Rule:
    """By what Linux says of the processor."""
    wide = "AuthenticAMD" in cpuinfo and "avx512f" in cpuinfo
    family = re.search(r"^cpu family\s*:\s*(\d+)", cpuinfo, re.MULTILINE)
    return Rule(wide, wide and family is not None and int(family[1]) >= ZEN_5)
