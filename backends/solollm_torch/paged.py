"""Optimizer states in memory that the driver moves between the card and the host, page by page.

What a step does not touch may leave the card while activations need the room, as in bitsandbytes'
paged optimizers (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), whose allocator this uses. Only
the place is theirs: the codes are those of `solollm.optim_codec`, so that a checkpoint is the same
with pages and without, and moves to any backend. What cannot page is refused by the core, from this
backend's capabilities. The allocator gives nothing back before the process ends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _OnCard(NamedTuple):
    """Managed memory, which bitsandbytes hands out as a tensor of the host, as the card's. Holds
    the tensor, so that both live equally long."""

    host: Tensor

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        kind = {torch.float32: "<f4", torch.uint8: "|u1"}[self.host.dtype]
        place = (self.host.data_ptr(), False)  # not read-only
        return {"shape": tuple(self.host.shape), "typestr": kind, "data": place, "version": 3}


def paged_empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like `torch.empty`, on a card."""
    from bitsandbytes.functional import get_paged

    host = get_paged(*shape, dtype=dtype, device=device)  # type: ignore[no-untyped-call]
    return _as_of_card(host, device)


def _as_of_card(host: Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(_OnCard(host), device=device)
