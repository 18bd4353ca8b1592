"""Copies that come late, or whose order nobody has promised: what a card may do, on the CPU."""

from __future__ import annotations

import mmap
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from solollm_torch import offload
from solollm_torch.lanes import CpuLanes, CudaLanes, Mark
from solollm_torch.offload import StreamingSession
from solollm_torch.residuals import Residuals
from solollm_torch.session import TorchSession
from solollm_torch.weight_ring import WeightRing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solollm.architecture import ModelConfig
from solollm.backend import Batch, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.errors import BackendError

MakeBatch = Callable[..., Batch]


class LateLanes(CpuLanes):
    """Every copy happens at the last moment: when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.queues: dict[str, deque[tuple[Tensor, Tensor, Sequence[Mark]]]] = {
            "load": deque(), "store": deque(),
        }  # fmt: skip
        self.done = {"load": 0, "store": 0}

    def wait(self, mark: Mark) -> None:
        if mark is None:
            return
        lane, number = mark
        while self.done[lane] < number:
            target, source, after = self.queues[lane].popleft()
            for earlier in after:
                self.wait(earlier)
            target.copy_(source)
            self.done[lane] += 1

    def synchronize(self) -> None:
        for lane, queue in self.queues.items():
            self.wait((lane, self.done[lane] + len(queue)))

    def _copy(self, lane: str, target: Tensor, source: Tensor, after: Sequence[Mark]) -> Mark:
        self.queues[lane].append((target, source, tuple(after)))
        return lane, self.done[lane] + len(self.queues[lane])


Clock = dict[str, int]  # actor -> how far of it has surely happened


class CheckedLanes(CpuLanes):
    """Copies at once, and proves with vector clocks that any order allowed by the marks would have
    given the same: two accesses to one place, one of them a write, must be ordered by marks.

    Actors are the computation, the two lanes, and the host, which follows its own program and waits
    for a lane only in `synchronize`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clocks: dict[str, Clock] = {
            actor: {} for actor in ("compute", "load", "store", "host")
        }
        self.ticks = dict.fromkeys(self.clocks, 1)
        self.accesses: dict[int, list[tuple[range, str, int, bool]]] = defaultdict(list)
        self.hosts: set[int] = set()
        self.races: list[str] = []
        self.held: list[
            Tensor
        ] = []  # as `record_stream` does: copied memory is not given to others

    def host_buffer(self, num_bytes: int) -> Tensor:
        buffer = super().host_buffer(num_bytes)
        self.hosts.add(buffer.untyped_storage().data_ptr())
        self.accesses[buffer.untyped_storage().data_ptr()] = []
        return buffer

    def device_buffer(self, num_bytes: int) -> Tensor:
        buffer = super().device_buffer(num_bytes)
        self.accesses[buffer.untyped_storage().data_ptr()] = []
        return buffer

    def mark(self) -> Mark:
        return self._now("compute")

    def wait(self, mark: Mark) -> None:
        _merge(self.clocks["compute"], mark)

    def synchronize(self) -> None:
        for lane in ("load", "store"):
            _merge(self.clocks["host"], self._now(lane))

    def _copy(self, lane: str, target: Tensor, source: Tensor, after: Sequence[Mark]) -> Mark:
        for mark in (*after, self._now("host")):
            _merge(self.clocks[lane], mark)
        with torch._C._DisableTorchDispatch():
            target.copy_(source)
        self.held += [source, target]
        self.access(lane, source, write=False)
        self.access(lane, target, write=True)
        return self._now(lane)

    def access(self, actor: str, tensor: Tensor, *, write: bool) -> None:
        """One read or write of a tensor's bytes; the first access makes its memory known."""
        storage = tensor.untyped_storage()
        begin = tensor.data_ptr() - storage.data_ptr()
        place = range(begin, begin + tensor.nbytes)
        known = self.accesses[storage.data_ptr()]
        for other, whose, tick, wrote in known:
            overlap = max(place.start, other.start) < min(place.stop, other.stop)
            seen = whose == actor or self.clocks[actor].get(whose, 0) >= tick
            if overlap and (write or wrote) and not seen:
                self.races.append(f"{actor} {'writes' if write else 'reads'} what {whose} uses")
        inside = range(place.start, place.stop)
        known[:] = [
            a
            for a in known
            if not (write and a[0].start >= inside.start and a[0].stop <= inside.stop)
        ]
        entry = (place, actor, self.ticks[actor], write)
        if entry not in known:
            known.append(entry)

    def _now(self, actor: str) -> Clock:
        now = {**self.clocks[actor], actor: self.ticks[actor]}
        self.ticks[actor] += 1
        return now


def _merge(clock: Clock, mark: Mark) -> None:
    for actor, tick in (mark or {}).items():
        clock[actor] = max(clock.get(actor, 0), tick)


class Watch(TorchDispatchMode):
    """Tells the lanes what each operator reads and writes of the memory they know."""

    def __init__(self, lanes: CheckedLanes) -> None:
        super().__init__()
        self.lanes = lanes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if not is_view:
            given = [*args, *(kwargs or {}).values()]
            names = [*range(len(args)), *(kwargs or {})]
            by_name = {a.name: a for a in schema.arguments}
            for name, value in zip(names, given, strict=True):
                argument = schema.arguments[name] if isinstance(name, int) else by_name[name]
                self._note(value, write=bool(argument.alias_info and argument.alias_info.is_write))
        return func(*args, **(kwargs or {}))

    def _note(self, value: Any, *, write: bool) -> None:
        for tensor in tree_leaves(value):
            if not isinstance(tensor, Tensor):
                continue
            pointer = tensor.untyped_storage().data_ptr()
            if pointer in self.lanes.accesses:
                actor = "host" if pointer in self.lanes.hosts else "compute"
                self.lanes.access(actor, tensor, write=write)


def make(model: ModelConfig, kind: type[TorchSession], clip: str, **options: Any) -> TorchSession:
    table = OptimizerTable.model_validate(
        {"name": "adamw", "state_bits": 8, "clip": clip, "clip_norm": 0.7}
    )
    given = {"compile": False, "master": "split", **options}
    return kind(
        model, SessionOptions(table, backend_options=given), Plan(4, True, "float32", 64, 8),
        torch.device("cpu"),
    )  # fmt: skip


@pytest.fixture
def model(tiny_config: ModelConfig) -> ModelConfig:
    return tiny_config.model_copy(update={"num_hidden_layers": 5})


@contextmanager
def over(lanes: CpuLanes, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(offload, "lanes_for", lambda device: lanes)
        yield


@pytest.mark.parametrize("clip", ["exact", "lagged"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_late_copies_change_no_bit(
    model: ModelConfig,
    make_batch: MakeBatch,
    monkeypatch: pytest.MonkeyPatch,
    *,
    clip: str,
    offloaded: bool,
) -> None:
    """On a card copies take as long as they take; a wait that is missing shows once a year."""
    with over(LateLanes(), monkeypatch):
        late = make(model, StreamingSession, clip, offload_residuals=offloaded)
    resident = make(model, TorchSession, clip)
    for index in range(3):
        batch = make_batch(8, 64, seed=index)
        assert (
            late.train_step(batch, lr=3e-3).result() == resident.train_step(batch, lr=3e-3).result()
        )
        assert late.eval_step(batch) == resident.eval_step(batch)
    for ours, theirs in zip(
        late.snapshot().parameters(), resident.snapshot().parameters(), strict=True
    ):
        assert ours[1].data.tobytes() == theirs[1].data.tobytes(), ours[0]


def races(
    model: ModelConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch, **how: Any
) -> list[str]:
    """What goes wrong in two steps and an evaluation."""
    lanes = CheckedLanes()
    with over(lanes, monkeypatch):
        session = make(model, StreamingSession, **how)
    with Watch(lanes):
        for index in range(2):
            session.train_step(make_batch(8, 64, seed=index), lr=3e-3).result()
            session.eval_step(make_batch(8, 64))
    return sorted(set(lanes.races))


@pytest.mark.parametrize("clip", ["exact", "lagged"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_every_copy_is_ordered_with_what_uses_its_memory(
    model: ModelConfig,
    make_batch: MakeBatch,
    monkeypatch: pytest.MonkeyPatch,
    *,
    clip: str,
    offloaded: bool,
) -> None:
    """Two uses of one buffer with no mark between them: on the CPU right by luck, on a card wrong
    on a bad day."""
    how = {"clip": clip, "offload_residuals": offloaded, "slots": 3 if offloaded else 2}
    assert races(model, make_batch, monkeypatch, **how) == []


def forgets_the_past(
    self: CheckedLanes, lane: str, target: Tensor, source: Tensor, after: Sequence[Mark]
) -> Mark:
    return _COPY(self, lane, target, source, ())


_COPY = CheckedLanes._copy
FORGOTTEN: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "a copy's arrival": (CheckedLanes, "wait", lambda self, mark: None),
    "what is being computed": (CheckedLanes, "mark", lambda self: None),
    "what a copy comes after": (CheckedLanes, "_copy", forgets_the_past),
    "the last use of a slot": (WeightRing, "release", lambda self, index: None),
    "the last use of a block's input": (Residuals, "done", lambda self, index: None),
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_forgotten_mark_is_found(
    model: ModelConfig, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """The check itself: with any of these left out it must speak up."""
    place, name, nothing = FORGOTTEN[forgotten]
    monkeypatch.setattr(place, name, nothing)
    how = {"clip": "lagged", "offload_residuals": True, "slots": 3}
    assert races(model, make_batch, monkeypatch, **how)


class _Driver:
    """Pins what it is given, page by page, and as the real one refuses a page that is pinned."""

    def __init__(self) -> None:
        self.pinned: dict[int, range] = {}

    def cudaHostRegister(self, place: int, num_bytes: int, flags: int) -> int:
        assert flags == 0
        pages = range(place // mmap.PAGESIZE, (place + num_bytes - 1) // mmap.PAGESIZE + 1)
        if any(set(pages) & set(others) for others in self.pinned.values()):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.pinned[place] = pages
        return 0

    def cudaHostUnregister(self, place: int) -> int:
        del self.pinned[place]
        return 0


@pytest.fixture
def driver(monkeypatch) -> _Driver:
    """Of a card without streams, which those lanes here never copy on."""
    driver = _Driver()
    cuda = SimpleNamespace(
        Stream=lambda _: None, Event=None, cudart=lambda: driver, synchronize=lambda _: None
    )
    names = ("empty", "zeros", "uint8", "Tensor")
    fake = SimpleNamespace(cuda=cuda, **{name: getattr(torch, name) for name in names})
    monkeypatch.setattr("solollm_torch.lanes.torch", fake)
    return driver


def test_pinned_buffers_share_no_page(driver) -> None:
    """Guards small buffers: a page that is registered twice is an error on a card."""
    lanes = CudaLanes(torch.device("cpu"))
    buffers = [lanes.host_buffer(size) for size in (10, 100, 5000, 16 * 1024, 1)]
    assert [buffer.nbytes for buffer in buffers] == [10, 100, 5000, 16 * 1024, 1]
    assert len(driver.pinned) == len(buffers)
    lanes.close()
    lanes.close()
    assert not driver.pinned


def test_lanes_that_nobody_closed_unpin_their_memory(driver) -> None:
    """Guards the sessions after one that was dropped: the addresses came back, still registered,
    and no new buffer could be pinned there."""
    lanes = CudaLanes(torch.device("cpu"))
    buffer = lanes.host_buffer(1 << 20)
    del lanes
    assert not driver.pinned
    assert buffer.nbytes == 1 << 20


def test_memory_that_the_driver_does_not_pin_is_one_error(driver, monkeypatch) -> None:
    """Guards the message, and that what was pinned before it is given back."""
    lanes = CudaLanes(torch.device("cpu"))
    lanes.host_buffer(1 << 30)
    monkeypatch.setattr(driver, "cudaHostRegister", lambda *_: 2)
    with pytest.raises(BackendError, match=r"does not pin 0\.50 GiB") as refused:
        lanes.host_buffer(1 << 29)
    assert "error 2; 1.0 GiB are pinned already" in str(refused.value.why)
    lanes.close()
    assert not driver.pinned
