"""The processes that torchrun started, as one of them sees it, and the group that they talk in.

Without a launcher a process is alone, and needs a group only to shard over itself: then it makes
one in its own memory. What a lost process looks like is known here too.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from solollm.backend import Ranks
from solollm.errors import BackendError, rank_lost_on
from solollm_torch.launcher import launched

# What gloo and NCCL say when a process at the other end is gone; their errors have no type of
# their own.
_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",
    "Timed out waiting", "communicator was aborted", "remote process exited",
    "recvValue failed", "sendBytes failed",
)  # fmt: skip
lost_ranks_named = functools.partial(rank_lost_on, _LOST)


class TorchRanks(Ranks):
    """See `solollm.backend.Ranks`. What is agreed on is exchanged between the processors: it never
    waits for a card. On one machine the ranks also watch over one another, since gloo and NCCL wait
    half an hour for one that hangs; of several machines torchrun does not tell the addresses."""

    def __init__(self, device: torch.device) -> None:
        join(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.host = "127.0.0.1" if self.local_world_size == self.world_size else ""

    def gather(self, text: str) -> Sequence[str]:
        every = [""] * self.world_size
        with lost_ranks_named():
            dist.all_gather_object(every, text)
        return every

    def largest(self, *values: float) -> tuple[float, ...]:
        shared = torch.tensor(values, dtype=torch.float32)
        with lost_ranks_named():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return tuple(shared.tolist())


def join(device: torch.device) -> None:
    """Make this process's group, once: what the launcher's environment says, else a group of one.

    Raises:
        BackendError: the other processes cannot be reached.
    """
    if dist.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if launched():
            dist.init_process_group(backend)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not re-exported
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    except (RuntimeError, ValueError) as error:
        raise BackendError(
            "the processes of this run do not find each other",
            why=str(error).splitlines()[0],
            fix="check the launcher's --rdzv-endpoint or --master-addr and --master-port",
        ) from error
    atexit.register(_leave)


@functools.cache
def host_group() -> dist.ProcessGroup:
    """A second group between the processors of all ranks, for what goes on beside training: what
    is sent in the one never mixes with the other. Collective when first asked for."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
