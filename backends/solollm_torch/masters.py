"""The master weights of a model by canonical name, whatever they are stored as.

`master` = float32: as they are. split: bfloat16 and an int16 residual, exactly the float32 they
stand for (`split_master`). bfloat16: two bytes, rounded to the nearest when taken over and
stochastically at every update. What is computed with is the float32 or bfloat16 tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from solollm.backend import DType
from solollm.errors import ConfigError
from solollm_torch.split_master import join, split

if TYPE_CHECKING:
    from solollm_torch.model import Decoder

Master = Literal["float32", "split", "bfloat16"]
WEIGHT_DTYPES: Mapping[Master, torch.dtype] = {
    "float32": torch.float32, "split": torch.bfloat16, "bfloat16": torch.bfloat16,
}  # fmt: skip

JOINED_ELEMENTS = 1 << 20  # put together at once while a split weight is saved


class Masters:
    """Views of weights, and of their residuals where they are split. Writing changes the model."""

    def __init__(
        self, weights: Mapping[str, Tensor], residuals: Mapping[str, Tensor] | None = None
    ) -> None:
        self.weights, self.residuals = dict(weights), dict(residuals or {})

    def specs(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        """Name, canonical dtype and shape, in the order of `weights`."""
        return [(name, self._tag(name), tuple(w.shape)) for name, w in self.weights.items()]

    def read(self, name: str) -> Tensor:
        """The canonical tensor: float32, a new one where it is split; or bfloat16 itself."""
        weight = self.weights[name].detach()
        return join(weight, self.residuals[name]) if name in self.residuals else weight

    def writer(self, name: str) -> Callable[[Tensor], None]:
        """What writes the canonical tensor into one on the host, without a copy between."""
        weight, residual = self.weights[name].detach(), self.residuals.get(name)

        def write(target: Tensor) -> None:
            if residual is None:
                target.copy_(weight)
                return
            flat, halves = target.view(-1), (weight.view(-1), residual.view(-1))
            for start in range(0, flat.numel(), JOINED_ELEMENTS):
                part = slice(start, start + JOINED_ELEMENTS)
                flat[part] = join(halves[0][part], halves[1][part])

        return write

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor) -> None:
        """Take a floating-point tensor of the same shape, widened or rounded to the nearest."""
        weight = self.weights[name]
        if name in self.residuals:
            split(tensor.to(weight.device, torch.float32), weight, self.residuals[name])
        else:
            weight.copy_(tensor)

    def _tag(self, name: str) -> DType:
        halves = name in self.residuals
        return "F32" if halves or self.weights[name].dtype == torch.float32 else "BF16"


def master_option(given: Mapping[str, bool | int | float | str], default: Master) -> Master:
    """The option `master`. Raises ConfigError where it is none of the three."""
    chosen = str(given.get("master", default))
    for master in WEIGHT_DTYPES:
        if chosen == master:
            return master
    raise ConfigError(
        f"master = {chosen!r} is not a way to hold weights", fix="use float32, split or bfloat16"
    )


def masters_of(decoder: Decoder, *, split: bool) -> Masters:
    """The decoder's weights; split: with a residual for each."""
    if not split:
        return Masters(decoder.masters())
    residuals = {p: torch.zeros_like(p, dtype=torch.int16) for p in decoder.parameters()}
    return Masters(decoder.masters(), decoder.canonical_views(lambda p: residuals[p]))
