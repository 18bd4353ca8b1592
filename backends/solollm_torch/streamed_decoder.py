"""The decoder of a model whose blocks are streamed: its ends on the device, the rest in a ring.

Shapes: M rows of a micro-batch, T positions, C hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from solollm.architecture import ModelConfig
from solollm_torch.attention import Segments
from solollm_torch.kernels import Kernels
from solollm_torch.model import Decoder
from solollm_torch.weight_ring import WeightRing


class StreamedDecoder(Decoder):
    """The model's ends; the blocks between them are the ring's. Its forward pass is for whoever
    needs no gradients."""

    def __init__(self, model: ModelConfig, ring: WeightRing, **how: Any) -> None:
        """`how`: device, dtype and compute_dtype of a `Decoder`."""
        super().__init__(model.model_copy(update={"num_hidden_layers": 0}), **how)
        self._ring, self._num_blocks = ring, model.num_hidden_layers

    def use(self, kernels: Kernels | None) -> None:
        super().use(kernels)
        for block in self._ring.blocks:
            block.kernels = kernels

    def forward(self, input_ids: Tensor, segments: Segments | None = None) -> Tensor:
        """int [M, T] to normalised hidden states [M, T, C]."""
        rotary, x = self.rotary(input_ids.shape[1]), self.embed(input_ids)
        for index in range(self._num_blocks):
            block = self._ring.use(index)
            self._ring.prefetch(index + 1)
            x = block(x, rotary, segments)
            self._ring.release(index)
        return self.final_norm(x)
