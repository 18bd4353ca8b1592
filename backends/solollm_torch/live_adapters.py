"""Several adapters over one base, in one batch: each row gets the product of its own factors.

The base's product is one for all rows. Of each adapter that the call has rows of, the low-rank
product is added to all of them, times a share: its scale in the rows it belongs to, zero in the
others. No factor is gathered per row and no row is moved, and the work grows with the number of
adapters in the call, not of those loaded.

Shapes: N rows, I inputs, O rows of a stored matrix, r rank, n adapted parts of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from solollm.adapted import AdapterFolder
from solollm.adapters import PEFT_PREFIX
from solollm.architecture import ModelConfig, parameter_table
from solollm_torch.adapter import STORED, Part, parts_of

BASE_ALONE = 0  # the number of rows without an adapter


class Factors(NamedTuple):
    """What stands beside one stored matrix: a [n r, I], the A of each part one after the other;
    b, n of [r, rows of the part]."""

    a: Tensor
    b: tuple[Tensor, ...]
    parts: tuple[Part, ...]

    def add_to(self, out: Tensor, x: Tensor, share: Tensor | float) -> None:
        """Add share (x A^T) B^T to `out` [N, O], for x [N, I] and a share [N, 1] or of all rows."""
        low = functional.linear(x, self.a).mul_(share)  # [N, n r]
        for part, b in zip(self.parts, self.b, strict=True):
            out[:, part.rows].addmm_(low[:, part.ranks], b)


class Share(NamedTuple):
    """One adapter of a call: its factors by layer and stored matrix, and what each row has of it:
    [N, 1], or one number where all rows are alike."""

    layers: tuple[Mapping[str, Factors], ...]
    of_rows: Tensor | float


class LiveAdapters:
    """Adapters by name, numbered from 1; `default`: the name of the one that a request without a
    name gets, or None for the base alone."""

    def __init__(
        self,
        adapters: Mapping[str, AdapterFolder],
        default: str | None,
        model: ModelConfig,
        like: Tensor,
    ) -> None:
        """`like`: of the dtype and on the device that products are computed in."""
        self._like = like
        self._numbers = {name: number for number, name in enumerate(adapters, 1)}
        self._default = self._numbers[default] if default is not None else BASE_ALONE
        self._layers = [_layers(adapter, model, like) for adapter in adapters.values()]
        self._scales = [adapter.options.scale for adapter in adapters.values()]

    def number(self, name: str | None) -> int:
        """What stands for a request's adapter in `shares`."""
        return self._default if name is None else self._numbers[name]

    def shares(self, numbers: np.ndarray) -> tuple[Share, ...]:
        """The adapters that rows of these numbers [N] have, each once."""
        present = np.unique(numbers)
        found = []
        for number in present[present != BASE_ALONE].tolist():
            scale: Tensor | float = self._scales[number - 1]
            if len(present) > 1:
                column = torch.from_numpy((numbers == number).astype(np.float32) * scale)
                scale = column[:, None].to(self._like.device, self._like.dtype)
            found.append(Share(self._layers[number - 1], scale))
        return tuple(found)


def _layers(
    adapter: AdapterFolder, model: ModelConfig, like: Tensor
) -> tuple[Mapping[str, Factors], ...]:
    sizes = {spec.name: spec.shape for spec in parameter_table(model)}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(adapter.array(name)).to(like.device, like.dtype)

    layers = []
    for index in range(model.num_hidden_layers):
        of_layer: dict[str, Factors] = {}
        for stored, names in STORED.items():
            canonical = [f"model.layers.{index}.{name}" for name in names]
            shapes = [sizes[f"{name}.weight"] for name in canonical]
            parts = parts_of(canonical, shapes, adapter.options)
            if parts:
                stems = [f"{PEFT_PREFIX}{part.name}" for part in parts]
                a = torch.cat([tensor(f"{stem}.lora_A.weight") for stem in stems])
                b = [tensor(f"{stem}.lora_B.weight").t().contiguous() for stem in stems]
                of_layer[stored] = Factors(a, tuple(b), tuple(parts))
        layers.append(of_layer)
    return tuple(layers)
