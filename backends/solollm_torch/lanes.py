"""Two lanes between host and device, beside the computation: one up, one down.

The streaming session is written against `Lanes` and knows no stream, event or pinned page. A copy
may run at any time between its call and the moment when its mark is waited for; it begins after the
marks it names. What that means on a card is in `CudaLanes`; `CpuLanes` copies at once, from one
part of the memory to another, so that the same session runs, counts its bytes and is tested without
a card. The tests run it over lanes that copy as late as they may.

Words: *load* is host to device, *store* device to host. A *mark* is a point in a lane or in the
computation; None is one long past.
"""

from __future__ import annotations

import mmap
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from solollm.errors import BackendError

Mark = Any  # each kind of lanes has its own


class Lanes(ABC):
    """Copies beside a computation. `loaded_bytes` and `stored_bytes` count what was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loaded_bytes = self.stored_bytes = 0

    @abstractmethod
    def host_buffer(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the host, uninitialised, such that copies from it can run beside
        the computation."""

    def device_buffer(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the device, uninitialised."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def load(self, target: Tensor, source: Tensor, after: Sequence[Mark] = ()) -> Mark:
        """Copy up once the marks `after` are reached. Both are contiguous, of one dtype and shape,
        and must stay as they are until the returned mark is."""
        self.loaded_bytes += source.nbytes
        return self._copy("load", target, source, after)

    def store(self, target: Tensor, source: Tensor, after: Sequence[Mark] = ()) -> Mark:
        """Copy down; the same."""
        self.stored_bytes += source.nbytes
        return self._copy("store", target, source, after)

    @abstractmethod
    def mark(self) -> Mark:
        """Where the computation has got to: everything queued so far."""

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """What is computed from now on comes after `mark`."""

    @abstractmethod
    def synchronize(self) -> None:
        """The host waits for both lanes: its memory may then be read and written."""

    def restart_clocks(self) -> None:  # noqa: B027
        """Forget the times of the copies and waits so far."""

    def seconds(self) -> Mapping[str, float]:
        """Since the clocks were restarted: how long the `load` and `store` lanes have copied, and
        how long the computation has `stalled` for them. Waits for the device. Empty where nothing
        runs beside the computation."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Give host memory back."""

    @abstractmethod
    def _copy(self, lane: str, target: Tensor, source: Tensor, after: Sequence[Mark]) -> Mark: ...


class CpuLanes(Lanes):
    """Host and device are two places in the same memory; every copy happens at its call."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def host_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def _copy(self, lane: str, target: Tensor, source: Tensor, after: Sequence[Mark]) -> Mark:
        target.copy_(source)


class CudaLanes(Lanes):
    """A stream for each lane; marks are events. Host buffers are registered with the driver in
    whole pages of their own: PyTorch's pinned allocator rounds sizes up to powers of two, and a
    page that two buffers share would be registered twice, which the driver refuses."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._streams = {
            lane: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for lane in ("load", "store")
        }
        self._registered: list[Tensor] = []
        # Memory that is freed while it is registered bars its addresses for every later buffer, so
        # lanes that nobody closed give theirs back too. At exit the driver does that by itself.
        self._unregister = weakref.finalize(self, _unregister, device, self._registered)
        self._unregister.atexit = False
        self._intervals: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
            "load": [], "store": [], "stalled": [],
        }  # fmt: skip

    def host_buffer(self, num_bytes: int) -> Tensor:
        pages = -(-num_bytes // mmap.PAGESIZE)
        whole = torch.empty((pages + 1) * mmap.PAGESIZE, dtype=torch.uint8)
        begin = -whole.data_ptr() % mmap.PAGESIZE
        buffer = whole[begin : begin + pages * mmap.PAGESIZE]
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
        if status != 0:
            self._forget_error()
            raise BackendError(
                f"the driver does not pin {num_bytes / 2**30:.2f} GiB of host memory",
                why=f"cudaHostRegister fails with error {status};"
                f" {self._pinned_bytes() / 2**30:.1f} GiB are pinned already",
                fix="free host memory, raise `ulimit -l`, or take master = bfloat16",
            )
        self._registered.append(buffer)
        return buffer[:num_bytes]

    def mark(self) -> Mark:
        return self._event(torch.cuda.current_stream(self.device))

    def wait(self, mark: Mark) -> None:
        if mark is None:
            return
        compute = torch.cuda.current_stream(self.device)
        before = self._event(compute)
        compute.wait_event(mark)
        self._intervals["stalled"].append((before, self._event(compute)))

    def synchronize(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

    def restart_clocks(self) -> None:
        for intervals in self._intervals.values():
            intervals.clear()

    def seconds(self) -> Mapping[str, float]:
        torch.cuda.synchronize(self.device)
        return {
            name: sum(begun.elapsed_time(ended) for begun, ended in intervals) / 1e3
            for name, intervals in self._intervals.items()
        }

    def close(self) -> None:
        self._unregister()

    def _copy(self, lane: str, target: Tensor, source: Tensor, after: Sequence[Mark]) -> Mark:
        stream = self._streams[lane]
        for mark in after:
            if mark is not None:
                stream.wait_event(mark)
        begun = self._event(stream)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        on_device = source if lane == "store" else target
        on_device.record_stream(stream)  # its memory is not to be given to others before that
        ended = self._event(stream)
        self._intervals[lane].append((begun, ended))
        return ended

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def _pinned_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._registered)

    def _forget_error(self) -> None:
        """The runtime keeps its last error until it is asked for, and PyTorch would take it for one
        of the next kernel."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device)
            torch.cuda.synchronize(self.device)


def _unregister(device: torch.device, buffers: list[Tensor]) -> None:
    torch.cuda.synchronize(device)  # no copy may be under way
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for buffer in buffers:
        runtime.cudaHostUnregister(buffer.data_ptr())
    buffers.clear()


def lanes_for(device: torch.device) -> Lanes:
    """The lanes of a device."""
    return CudaLanes(device) if device.type == "cuda" else CpuLanes()
