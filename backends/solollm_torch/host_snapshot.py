"""A snapshot of a state that is too large to copy: it is read from the live memory.

Before the session changes anything it asks the snapshot. One that is being read on another thread,
as a checkpoint is, holds the session up until it is closed: the next update is most of a step away,
and writing is usually over by then. One that nobody reads elsewhere keeps a copy of everything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from solollm.backend import HostTensor, Snapshot
from solollm_torch.masters import Masters
from solollm_torch.state import TAGS, Specs, to_host


class HostSnapshot(Snapshot):
    """See `solollm.backend.Snapshot`; tensors are copied one at a time as they are read.

    It is not `is_live`, nobody need wait for it: an update that comes before its end does."""

    def __init__(
        self,
        masters: Masters,
        states: Mapping[str, Tensor],
        session_state: Mapping[str, int | float],
    ) -> None:
        self.session_state = dict(session_state)
        self._masters, self._states = masters, dict(states)
        self._changes = threading.Condition()
        self._reader: threading.Thread | None = None
        self._is_private = self._is_closed = False

    @property
    def is_shared(self) -> bool:
        """Whether it still shows memory that the session is about to change."""
        return not (self._is_private or self._is_closed)

    def before_change(self) -> None:
        """Wait for whoever reads it on another thread, or keep a copy."""
        with self._changes:
            while self.is_shared and self._is_read_elsewhere():
                self._changes.wait(1.0)  # a reader may have died without closing it
            if self.is_shared:
                self._masters = Masters(
                    _cloned(self._masters.weights), _cloned(self._masters.residuals)
                )
                self._states = _cloned(self._states)
                self._is_private = True

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        return self._read([n for n, _, _ in self._masters.specs()], lambda n: self._masters.read(n))

    def optimizer(self) -> Iterator[tuple[str, HostTensor]]:
        return self._read(list(self._states), lambda name: self._states[name])

    def parameter_specs(self) -> Specs:
        return self._masters.specs()

    def optimizer_specs(self) -> Specs:
        return [(name, TAGS[t.dtype], tuple(t.shape)) for name, t in self._states.items()]

    def close(self) -> None:
        with self._changes:
            self._is_closed = True
            self._masters, self._states = Masters({}), {}
            self._changes.notify_all()

    def _read(
        self, names: list[str], of: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, HostTensor]]:
        for name in names:
            with self._changes:
                self._reader = threading.current_thread()
                tensor = of(name).clone()
            yield name, to_host(tensor)

    def _is_read_elsewhere(self) -> bool:
        reader = self._reader
        return reader is not None and reader is not threading.current_thread() and reader.is_alive()


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
