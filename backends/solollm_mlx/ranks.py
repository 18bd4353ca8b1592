"""The processes that `mlx.launch` started, as one of them sees it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from solollm.backend import Ranks


class MlxRanks(Ranks):
    """See `solollm.backend.Ranks`; alone where no launcher was used."""

    def __init__(self) -> None:
        self._group = mx.distributed.init()
        self.rank, self.world_size = self._group.rank(), self._group.size()

    def largest(self, *values: float) -> tuple[float, ...]:
        if self.world_size == 1:
            return values
        # On the CPU's stream: a GPU that waits for the network is ended by Apple's watchdog.
        every = mx.distributed.all_max(mx.array(values), group=self._group, stream=mx.cpu)
        return tuple(np.array(every).tolist())
