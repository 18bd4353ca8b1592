"""Updates on the device of a state that lies on the host: each piece comes, is changed, and goes.

Pieces are the blocks and, of the parameters at the model's ends, stretches that fit the same two
slots. They come in the order of the backward pass. While one is updated the next is loaded and the
one before is stored. Stretches begin where the chunks of an update do, so that every kernel sees
the same elements as on a session that holds everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from solollm.architecture import ModelConfig, ParameterSpec
from solollm.config import OptimizerTable
from solollm_torch.host_state import HostState
from solollm_torch.lanes import Lanes, Mark
from solollm_torch.layout import (
    BlockViews,
    Section,
    end_specs,
    slot_bytes,
    stretches,
    update_bytes_per_element,
)
from solollm_torch.optim import Optimizer, chunk_elements
from solollm_torch.state_specs import states_of
from solollm_torch.units import UnitNames
from solollm_torch.weight_ring import WeightRing

NUM_SLOTS = 2
Gradients = Mapping[str, Tensor]
Apply = Callable[[Optimizer, Gradients], None]
Copies = list[tuple[Tensor, Tensor]]  # (on the device, on the host)


class _Piece(NamedTuple):
    """`copies` come and go, `weights` go. A block's weights are in the ring instead; of a stretch,
    `part` says which elements of a parameter it is."""

    optimizer: Optimizer
    copies: Copies
    weights: Copies
    block: int | None = None
    part: tuple[str, slice] | None = None


class StreamedUpdates:
    """The pieces of every unit, in backward order, over two slots."""

    def __init__(
        self,
        model: ModelConfig,
        table: OptimizerTable,
        host: HostState,
        ring: WeightRing,
        *,
        ends: Mapping[str, Tensor],
        seed: int,
        lanes: Lanes,
    ) -> None:
        """`ends`: canonical name -> weight on the device, of what is outside of the blocks."""
        self._model, self._table, self._seed = model, table, seed
        self._host, self._ring, self._lanes, self._ends = host, ring, lanes, ends
        self._chunk = chunk_elements(lanes.device)
        size = slot_bytes(model, table, host.master, self._chunk)
        self._slots = [lanes.device_buffer(size) for _ in range(NUM_SLOTS)]
        self._pieces: list[_Piece] = []
        self._of_unit: list[range] = []
        specs = {spec.name: spec for spec in end_specs(model)}
        names = UnitNames.of(model)
        self._add_ends([specs[name] for name in names.top])
        for index in reversed(range(model.num_hidden_layers)):
            self._pieces.append(self._block(index))
            self._of_unit.append(range(len(self._pieces) - 1, len(self._pieces)))
        self._add_ends([specs[name] for name in names.bottom])
        self._free: list[Mark] = [None] * NUM_SLOTS
        self._loaded: dict[int, Mark] = {}
        self._stored: dict[int, Mark] = {}

    @property
    def num_units(self) -> int:
        return len(self._of_unit)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Of all pieces."""
        return [piece.optimizer for piece in self._pieces]

    def begin(self) -> None:
        """Before the first unit of a step, or ahead of it: its first piece is on its way."""
        self._prefetch(0)

    def run(self, unit: int, gradients: Gradients, apply: Apply) -> None:
        """Update a unit; each is due once per step, in order. `apply` queues the update of a piece
        whose weights and states are there; it gets those of the `gradients` that belong to it."""
        for number in self._of_unit[unit]:
            piece, slot = self._pieces[number], number % NUM_SLOTS
            self._prefetch(number)
            self._prefetch(number + 1)
            self._lanes.wait(self._loaded.pop(number))
            if piece.block is not None:
                self._ring.use(piece.block)
                self._ring.prefetch(piece.block - 1)
            if piece.part is not None:
                name, part = piece.part
                apply(piece.optimizer, {name: gradients[name].reshape(-1)[part]})
            else:
                apply(piece.optimizer, gradients)
            self._write_back(number, slot)

    def _write_back(self, number: int, slot: int) -> None:
        piece, changed = self._pieces[number], self._lanes.mark()
        if piece.block is not None:
            self._ring.write_back(piece.block)
        for on_device, on_host in (*piece.weights, *piece.copies):
            self._stored[number] = self._lanes.store(on_host, on_device, [changed])
        self._free[slot] = self._stored[number]

    def _prefetch(self, number: int) -> None:
        if number in self._loaded or number >= len(self._pieces):
            return
        after = [self._free[number % NUM_SLOTS], self._stored.get(number)]
        for on_device, on_host in self._pieces[number].copies:
            self._loaded[number] = self._lanes.load(on_device, on_host, after)

    def _block(self, index: int) -> _Piece:
        slot = self._slots[len(self._pieces) % NUM_SLOTS][: self._host.layout.update_bytes]
        weights = self._ring.buffers[index % self._ring.num_slots]
        views = BlockViews(self._host.layout, self._model, (weights, slot))
        optimizer = Optimizer(
            views.weights(index), model=self._model, table=self._table,
            residuals=views.residuals(index), states=views.states(index), seed=self._seed,
        )  # fmt: skip
        return _Piece(optimizer, [(slot, self._host.block_updates[index])], [], block=index)

    def _add_ends(self, specs: list[ParameterSpec]) -> None:
        first, size = len(self._pieces), self._slots[0].nbytes
        for spec in specs:
            per_element = update_bytes_per_element(spec, self._table, self._host.master)
            for part in stretches(spec, size // per_element, self._chunk):
                self._pieces.append(self._end(spec, part))
        self._of_unit.append(range(first, len(self._pieces)))

    def _end(self, spec: ParameterSpec, part: slice) -> _Piece:
        """A stretch of a parameter's elements."""
        masters = self._host.masters
        on_host = {f"{s}.{spec.name}": self._host.states[f"{s}.{spec.name}"] for s in
                   states_of(spec, self._table)}  # fmt: skip
        if spec.name in masters.residuals:
            on_host["residual"] = masters.residuals[spec.name]
        on_host = {name: tensor.view(-1)[part] for name, tensor in on_host.items()}
        section = Section.of((name, t.dtype, tuple(t.shape)) for name, t in on_host.items())
        views = section.views(self._slots[len(self._pieces) % NUM_SLOTS])
        copies = [(views[name], on_host[name]) for name in on_host]
        residuals = {spec.name: views.pop("residual")} if "residual" in views else {}
        weight = self._ends[spec.name].view(-1)[part]
        optimizer = Optimizer(
            {spec.name: weight}, model=self._model, table=self._table, residuals=residuals,
            states=views, seed=self._seed, first_elements={spec.name: part.start},
        )  # fmt: skip
        weights = [(weight, masters.weights[spec.name].view(-1)[part])]
        return _Piece(optimizer, copies, weights, part=(spec.name, part))
