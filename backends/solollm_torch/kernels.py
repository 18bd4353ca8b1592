"""The C loops of `kernels.c` and `attention.c`, compiled for this processor at first use.

PyTorch's eager operations make one pass over memory each; on a processor a training step spends a
fifth of its time in them and in attention. Each function here is one pass, float32 on the CPU. Who
may use them is decided by `load`: only where a C compiler is found, and `ops`, `attention` and
`loss` fall back to PyTorch's own operations otherwise. Sharded sessions do not use them.

The compiled file lies in the user's cache folder under a name made of the source, the compiler and
the processor, so that equal names give equal bits.

Shapes: N rows, C hidden size, F intermediate size, V vocabulary, B rows of a batch, T positions,
H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from solollm.errors import ConfigError
from solollm_torch.native import built, version_of

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.c", "attention.c"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("small_products.h", "exponential.h"))
# Without -ffast-math: NaN and infinity must stay what they are, for a bad step to be seen.
FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-std=gnu11",
)  # fmt: skip
OFF = "off"
HEAD_MULTIPLE = 16  # `attention` takes head sizes that this divides


class Places(NamedTuple):
    """Where documents lie in B rows of T positions, laid end to end: int64 [documents, 2] of first
    position and length. They cover all without overlap."""

    documents: Tensor
    longest: int


class Turns(NamedTuple):
    """Documents, and tables [T, D/2] of the rotation of position t of a row."""

    cos: Tensor
    sin: Tensor
    places: Places


class Kernels:
    """The functions of one compiled file. `digest` names its source, compiler and processor."""

    def __init__(self, library: ctypes.CDLL, digest: str) -> None:
        self._library, self.digest = library, digest

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The normalised [..., C], and 1 / root mean square [N] for backward."""
        x = x.contiguous()
        out, inverse = torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])
        self._call("rms_norm", x, weight, out, inverse, *_rows(x), ctypes.c_float(eps))
        return out, inverse

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x [..., C] and of the weight [C]."""
        grad, x = grad.contiguous(), x.contiguous()
        grad_x = torch.empty_like(x)
        parts = x.new_empty(torch.get_num_threads(), x.shape[-1])
        self._call("rms_norm_backward", grad, x, weight, inverse, grad_x, parts, *_rows(x))
        return grad_x, parts.sum(0)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of [..., 2 F]: [..., F]."""
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        self._call("swiglu", gate_up, out, *_rows(out))
        return out

    def swiglu_backward(self, grad: Tensor, gate_up: Tensor) -> Tensor:
        """The gradient of gate_up [..., 2 F]."""
        grad, gate_up = grad.contiguous(), gate_up.contiguous()
        grad_both = torch.empty_like(gate_up)
        self._call("swiglu_backward", grad, gate_up, grad_both, *_rows(grad))
        return grad_both

    def cross_entropy_(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """-log p(label) [n]; logits [n, V] become the gradient of sum(scale * that)."""
        nll = logits.new_empty(len(logits))
        self._call("cross_entropy", logits, labels, scale, nll, *_rows(logits))
        return nll

    def decode_nf4(self, codes: Tensor, pairs: Tensor, scales: Tensor, out: Tensor) -> None:
        """Write level * scale of every NF4 code to `out`: two codes per byte, 64 weights per scale,
        `pairs` [256, 2] the levels of each byte."""
        self._call("decode_nf4", codes, pairs, scales, out, len(scales))

    def attention(self, qkv: Tensor, num_heads: int, turns: Turns) -> tuple[Tensor, Tensor]:
        """Rotation and causal attention of qkv [B, T, H + 2 K, D]: [B, T, H, D], and log-sums
        [B, T, H]."""
        batch, length, _, dim = qkv.shape
        out = qkv.new_empty(batch, length, num_heads, dim)
        log_sum = qkv.new_empty(batch, length, num_heads)
        places, sizes = turns.places, _sizes(qkv, num_heads, turns.places)
        tensors = (qkv, turns.cos, turns.sin, out, log_sum, places.documents)
        self._call("attention", *tensors, *sizes)
        return out, log_sum

    def attention_backward(
        self, grad: Tensor, qkv: Tensor, log_sum: Tensor, turns: Turns
    ) -> Tensor:
        """The gradient of qkv, as it was before the rotation, of grad [B, T, H, D]."""
        grad, grad_qkv = grad.contiguous(), torch.empty_like(qkv)
        places, sizes = turns.places, _sizes(qkv, grad.shape[2], turns.places)
        tensors = (grad, qkv, turns.cos, turns.sin, log_sum, grad_qkv, places.documents)
        self._call("attention_backward", *tensors, *sizes)
        return grad_qkv

    def _call(self, name: str, *arguments: Tensor | int | ctypes.c_float) -> None:
        """Tensors as addresses, integers as 64 bits, and the number of threads last."""
        passed = [_argument(argument) for argument in arguments]
        getattr(self._library, name)(*passed, ctypes.c_int(torch.get_num_threads()))


def _argument(value: Tensor | int | ctypes.c_float) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous(), "a kernel reads plain rows"
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value


def _sizes(qkv: Tensor, num_heads: int, places: Places) -> tuple[int, ...]:
    """Documents and the longest of them, then T, H, K and D."""
    _, length, total, dim = qkv.shape
    kv_heads = (total - num_heads) // 2
    return len(places.documents), places.longest, length, num_heads, kv_heads, dim


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def choose(setting: bool | int | float | str) -> Kernels | None:
    """The kernels, or None for PyTorch's own operations.

    `setting`: auto (kernels where they can be had), true (warn where they cannot), false or off, or
    the digest that an earlier session recorded (used if it can be made again, else warns).

    Raises:
        ConfigError: none of these.
    """
    text = str(setting).lower()
    if text in ("false", OFF):
        return None
    is_digest = len(text) == 12 and set(text) <= set("0123456789abcdef")
    if text not in ("auto", "true") and not is_digest:
        raise ConfigError(f"kernels = {setting!r} is not a choice", fix="use auto, true or false")
    kernels, reason = load()
    if kernels is None and text != "auto":
        warnings.warn(f"training runs without compiled kernels: {reason}", stacklevel=3)
    return kernels


@functools.cache
def load() -> tuple[Kernels | None, str]:
    """The kernels, compiled if this machine has not yet, or why there are none."""
    if not sys.platform.startswith("linux"):
        return None, f"they are not tried on {sys.platform}"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None, "there is no C compiler `cc`"
    digest = _digest(compiler)
    try:
        command = (compiler, *FLAGS, "-shared", "-fPIC", *map(str, SOURCES), "-lm")
        library = ctypes.CDLL(str(built(command, digest)))
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} did not build them: {error}"
    return Kernels(library, digest), ""


def _digest(compiler: str) -> str:
    """12 hexadecimal digits of all that decides the machine code."""
    sources = [path.read_bytes() for path in (*SOURCES, *HEADERS)]
    parts = (*sources, version_of(compiler), repr(FLAGS).encode(), _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _processor() -> str:
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    seen = dict.fromkeys(line for line in lines if line.startswith(wanted))
    return "\n".join([platform.machine(), *seen])
