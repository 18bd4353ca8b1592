"""The processes that `mlx.launch` started, as one of them sees it.

MLX's ring raises where a neighbour's connection closes. It does not notice a rank that stands
still, and its other transports notice nothing at all, so the ranks also watch over one another
beside it (`solollm.lifeline` in the core); here is where they reach each other.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from solollm.backend import Ranks
from solollm.errors import BackendError, rank_lost_on

# MLX's errors have no type of their own; this is the ring's (mlx #4060, in 0.32.4).
_LOST = ("[ring] connection to a peer was lost",)
lost_ranks_named = functools.partial(rank_lost_on, _LOST)
MEETING_SECONDS = 600.0
_WORD_BYTES = 200


class MlxRanks(Ranks):
    """See `solollm.backend.Ranks`; alone where no launcher was used."""

    def __init__(self) -> None:
        self._group = join()
        self.rank, self.world_size = self._group.rank(), self._group.size()
        if self.world_size > 1:
            self.host = own_host(self.rank)
            self.local_world_size = max(1, hosts_of_ranks().count(self.host))

    def largest(self, *values: float) -> tuple[float, ...]:
        if self.world_size == 1:
            return values
        with lost_ranks_named():
            # On the CPU's stream: a GPU that waits for the network is ended by Apple's watchdog.
            every = mx.distributed.all_max(mx.array(values), group=self._group, stream=mx.cpu)
            return tuple(np.array(every).tolist())

    def gather(self, text: str) -> Sequence[str]:
        if self.world_size == 1:
            return [text]
        word = np.frombuffer(text.encode().ljust(_WORD_BYTES, b"\0"), np.uint8)
        with lost_ranks_named():
            every = mx.distributed.all_gather(mx.array(word), group=self._group, stream=mx.cpu)
            words = np.array(every).reshape(self.world_size, _WORD_BYTES)
        return [bytes(word).rstrip(b"\0").decode() for word in words]


def join() -> mx.distributed.Group:
    """MLX's group, which it makes once.

    Raises:
        BackendError: the other processes cannot be reached. One that does not come at all is waited
            for in C, with Python's lock held: then a timer that needs neither ends this process.
    """
    launched = "MLX_RANK" in os.environ
    if launched:
        faulthandler.dump_traceback_later(MEETING_SECONDS, exit=True, file=2)
    try:
        return mx.distributed.init()
    except RuntimeError as error:
        raise BackendError(
            "the processes of this run do not find each other",
            why=str(error).splitlines()[0],
            fix="check mlx.launch's --hosts or --hostfile, and its --starting-port",
        ) from error
    finally:
        if launched:
            faulthandler.cancel_dump_traceback_later()


def hosts_of_ranks(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Where the neighbours reach each rank's machine, as the ring was told; empty otherwise."""
    path = environment.get("MLX_HOSTFILE")
    addresses = json.loads(Path(path).read_text()) if path else []
    return [str(of_rank[0]).rpartition(":")[0] for of_rank in addresses]


def own_host(rank: int, environment: Mapping[str, str] = os.environ) -> str:
    """Where the neighbours reach this machine, by what the launcher has said: the ring's list, or
    the network in which JACCL's coordinator lies. Empty where neither is known."""
    coordinator = environment.get("MLX_JACCL_COORDINATOR")
    if coordinator:
        return _own_address_towards(coordinator.rpartition(":")[0])
    hosts = hosts_of_ranks(environment)
    return hosts[rank] if hosts else ""


def _own_address_towards(host: str) -> str:
    """This machine's address in the network of another's. Nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
