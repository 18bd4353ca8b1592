"""Low-rank adapters over the decoder's own storage, with hand-written gradients.

The frozen base keeps the decoder's fused matrices (or NF4 codes of each canonical one, see
`quant`); the factors of every canonical matrix stand beside them, those of one fused matrix
sharing one product with the input. Names on the outside are PEFT's (`solollm.adapters`).

Shapes: N positions, I inputs, O rows of a stored matrix, r rank, n adapted parts of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from solollm.adapters import PEFT_PREFIX, AdapterOptions, adapter_table
from solollm.architecture import ModelConfig, initial_parameter, parameter_table
from solollm.backend import TensorSource
from solollm_torch.kernels import Kernels
from solollm_torch.masters import Masters
from solollm_torch.model import Block, Decoder
from solollm_torch.products import add_outer, product
from solollm_torch.quant import Nf4Matrix
from solollm_torch.state import load_parameters

# A block's stored matrix -> the canonical ones it holds, as rows one after another.
STORED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}


class Part(NamedTuple):
    """An adapted canonical matrix within a stored one: its rows, and its place in the shared A."""

    name: str
    rows: slice
    ranks: slice


class FrozenMatrix(Protocol):
    """A stored base matrix that nobody trains."""

    def weight(self) -> Tensor:
        """[O, I] in the compute dtype; not to be kept."""


class DenseBase:
    """A frozen matrix as it is: the decoder's own."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    def weight(self) -> Tensor:
        return self._matrix


class Nf4Base:
    """A stored matrix whose canonical parts are NF4 codes, decoded anew at every use."""

    def __init__(self, parts: Sequence[Nf4Matrix], like: Tensor) -> None:
        self.parts = parts
        self.kernels: Kernels | None = None
        self._like = like

    def weight(self) -> Tensor:
        rows = sum(part.shape[0] for part in self.parts)
        whole = self._like.new_empty(rows, self.parts[0].shape[1])
        start = 0
        for part in self.parts:
            part.decode_into(whole[start : start + part.shape[0]], self.kernels)
            start += part.shape[0]
        return whole


class _FrozenWeights(Masters):
    """What a base is read into: the decoder's own tensors, or the codes in their place."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.codes: dict[str, Nf4Matrix] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        if name in self.codes:
            self.codes[name].encode(tensor)
        else:
            super().write(name, tensor)


class AdaptedMatrix(nn.Module):
    """A stored matrix with its factors: x [..., I] to [..., O].

    Parameters: a [n r, I], the A of each part one after the other; b, n of [rows of the part, r].
    """

    def __init__(
        self, base: FrozenMatrix, parts: Sequence[Part], in_features: int, options: AdapterOptions
    ) -> None:
        super().__init__()
        self.base, self.parts, self.scale = base, tuple(parts), options.scale
        self.enabled = True
        rank = options.rank
        self.a = nn.Parameter(torch.empty(rank * len(parts), in_features))
        self.b: list[nn.Parameter] = nn.ParameterList(  # type: ignore[assignment]
            [nn.Parameter(torch.empty(p.rows.stop - p.rows.start, rank)) for p in parts]
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return product(x, self.base.weight().to(x.dtype))
        adapted: Tensor = _Adapted.apply(x, self, self.a, *self.b)  # type: ignore[no-untyped-call]
        return adapted

    @torch.no_grad()
    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add scale (x A^T) B^T to `out` [N, O], for x [N, I]; without gradients."""
        if not self.parts:
            return
        low = nn.functional.linear(x, self.a.to(x.dtype))  # [N, n r]
        for part, b in zip(self.parts, self.b, strict=True):
            up = b.to(x.dtype).t()
            out[:, part.rows].addmm_(low[:, part.ranks], up, alpha=self.scale)

    def merged(self) -> Tensor:
        """The weight [O, I] that computes the same, fp32."""
        whole = self.base.weight().float().clone()
        for part, b in zip(self.parts, self.b, strict=True):
            whole[part.rows].addmm_(b.data, self.a.data[part.ranks], alpha=self.scale)
        return whole


class _Adapted(Function):
    """x W^T + scale (x A^T) B^T with W frozen: no gradient and no copy of W outlives a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: AdaptedMatrix, a: Tensor, *b: Tensor) -> Tensor:
        out = product(x, matrix.base.weight().to(x.dtype))  # [..., O]
        low = product(x, a.to(x.dtype)) if len(a) else x[..., :0]  # [..., n r]
        rows, low_rows = out.view(-1, out.shape[-1]), low.flatten(0, -2)
        for part, factor in zip(matrix.parts, b, strict=True):
            up = factor.to(x.dtype).t()  # [r, rows]
            rows[:, part.rows].addmm_(low_rows[:, part.ranks], up, alpha=matrix.scale)
        ctx.save_for_backward(x, low)
        ctx.matrix, ctx.factors = matrix, (a, *b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low = ctx.saved_tensors
        matrix, (a, *b) = ctx.matrix, ctx.factors
        grad_rows = grad.flatten(0, -2)  # [N, O]
        x_rows, low_rows = x.flatten(0, -2), low.flatten(0, -2)
        grad_low = torch.empty_like(low_rows)  # [N, n r]
        grads_b = []
        low_rows = low_rows * matrix.scale  # the scale goes onto the smaller matrices
        for part, factor in zip(matrix.parts, b, strict=True):
            of_part = grad_rows[:, part.rows]  # [N, rows]
            torch.mm(of_part, factor.to(grad.dtype), out=grad_low[:, part.ranks])
            grads_b.append(add_outer(factor, of_part, low_rows[:, part.ranks]))
        grad_low *= matrix.scale
        grad_a = add_outer(a, grad_low, x_rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, matrix.base.weight().to(grad.dtype).t())
            grad_x.view(-1, grad_x.shape[-1]).addmm_(grad_low, a.to(grad.dtype))
        return (grad_x, None, grad_a, *grads_b)


class Adapter(nn.Module):
    """The adapter of a whole decoder; what a session trains, saves and loads in its place.

    Making one freezes the decoder and puts its matrices behind `AdaptedMatrix`es.
    """

    def __init__(self, decoder: Decoder, options: AdapterOptions) -> None:
        super().__init__()
        self.options, self._config = options, decoder.config
        self._decoder = [decoder]  # in a list: its parameters are not this module's
        self._base_weights = _FrozenWeights(decoder.masters())
        decoder.requires_grad_(False)
        shapes = {spec.name: spec.shape for spec in parameter_table(decoder.config)}
        matrices = []
        for index, block in enumerate(decoder.layers):
            for stored, names in STORED.items():
                canonical = [f"model.layers.{index}.{name}" for name in names]
                sizes = [shapes[f"{name}.weight"] for name in canonical]
                base = self._base(block, stored, canonical, sizes)
                parts = parts_of(canonical, sizes, options)
                if parts or isinstance(base, Nf4Base):
                    matrix = AdaptedMatrix(base, parts, sizes[0][1], options)
                    block.adapted[stored] = matrix
                    matrices.append(matrix)
        self.matrices: list[AdaptedMatrix] = nn.ModuleList(matrices)  # type: ignore[assignment]
        self.to(decoder.embed_tokens.device)
        self.load(
            (spec.name, torch.from_numpy(initial_parameter(spec, options.seed)))
            for spec in adapter_table(decoder.config, options)
        )

    def _base(
        self, block: Block, stored: str, canonical: Sequence[str], sizes: Sequence[tuple[int, ...]]
    ) -> FrozenMatrix:
        if self.options.base_bits is None:
            return DenseBase(getattr(block, stored).data)
        like = block.input_layernorm.data
        parts = [Nf4Matrix(size, like.device, like.dtype) for size in sizes]
        for name, part in zip(canonical, parts, strict=True):
            self._base_weights.codes[f"{name}.weight"] = part
        return Nf4Base(parts, like)

    def import_base(self, source: TensorSource) -> None:
        """Take the base's tensors one at a time. Raises IntegrityError as `load_parameters`."""
        load_parameters(self._base_weights, source)

    def use(self, kernels: Kernels | None) -> None:
        """Decode the base with compiled loops."""
        for matrix in self.matrices:
            if isinstance(matrix.base, Nf4Base):
                matrix.base.kernels = kernels

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The base alone."""
        for matrix in self.matrices:
            matrix.enabled = False
        try:
            yield
        finally:
            for matrix in self.matrices:
                matrix.enabled = True

    def canonical_views(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """PEFT's name -> view, in table order, of what `of` gives for each stored parameter."""
        views: dict[str, Tensor] = {}
        for matrix in self.matrices:
            a = of(matrix.a)
            for part, b in zip(matrix.parts, matrix.b, strict=True):
                views[f"{PEFT_PREFIX}{part.name}.lora_A.weight"] = a[part.ranks]
                views[f"{PEFT_PREFIX}{part.name}.lora_B.weight"] = of(b)
        return views

    def masters(self) -> dict[str, Tensor]:
        """PEFT's name -> the factor itself (a view: writing to it changes the model)."""
        return self.canonical_views(lambda parameter: parameter.data)

    @torch.no_grad()
    def load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Copy (name, tensor) pairs into the factors."""
        masters = self.masters()
        for name, tensor in tensors:
            masters[name].copy_(tensor)


def adapted_decoder(
    config: ModelConfig, options: AdapterOptions, device: torch.device, dtype: torch.dtype
) -> tuple[Decoder, Adapter]:
    """A decoder without weights yet, frozen, in `dtype`, and the adapter that trains over it. The
    matrices of a quantised base are never allocated."""
    if options.base_bits is None:
        decoder = Decoder(config, device=device, dtype=dtype)
        return decoder, Adapter(decoder, options)
    decoder = Decoder(config, device="meta", dtype=dtype)
    for name, parameter in decoder.named_parameters():
        if name.rpartition(".")[2] not in STORED:
            owner = decoder.get_submodule(name.rpartition(".")[0])
            empty = nn.Parameter(torch.empty_like(parameter, device=device))
            setattr(owner, name.rpartition(".")[2], empty)
    return decoder, Adapter(decoder, options)


def parts_of(
    canonical: Sequence[str], sizes: Sequence[tuple[int, ...]], options: AdapterOptions
) -> list[Part]:
    """The adapted ones of the canonical matrices that one stored matrix holds."""
    parts: list[Part] = []
    start = 0
    for name, (rows, _) in zip(canonical, sizes, strict=True):
        if name.rpartition(".")[2] in options.target_modules:
            first = len(parts) * options.rank
            place = slice(start, start + rows)
            parts.append(Part(name, place, slice(first, first + options.rank)))
        start += rows
    return parts
