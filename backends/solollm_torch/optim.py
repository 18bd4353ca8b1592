"""AdamW and Muon over canonical tensors, with fp32, bf16 or 8-bit states.

The canonical Hugging Face tensor is the unit, whatever the decoder's own storage is: parameters
and gradients arrive as views of it by name. States are named as they lie on disk. What is not
stored in fp32 is decoded, updated and encoded again, a chunk at a time (`storage`).

Shapes: N matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from solollm.adapters import AdapterOptions, trained_table
from solollm.architecture import ModelConfig, ParameterSpec
from solollm.backend import DType, TensorSource
from solollm.config import OptimizerTable
from solollm.optim_codec import State
from solollm_torch.codec import CodedState
from solollm_torch.compiled_updates import Numbers, can_compile, coded_adamw
from solollm_torch.products import add_products
from solollm_torch.state import TAGS, load_states
from solollm_torch.state_specs import states_of, zero_states
from solollm_torch.storage import Plain, Rounded, Storage, master_storage

CHUNK_ELEMENTS = 1 << 19  # decoded at once on the CPU: whole blocks, and it fits the cache
DEVICE_CHUNK_ELEMENTS = 1 << 24
MUON_BATCH_ELEMENTS = 1 << 22  # matrices orthogonalised at once: bounds the scratch memory
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024, https://kellerjordan.github.io/posts/muon
NEWTON_SCHULZ_STEPS = 5


class Update(NamedTuple):
    """What every tensor's update shares; see `Optimizer.step`."""

    lr: float
    updates: int
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Optimizer:
    """The states of some or all parameters of a model, and the update of their weights.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for every tensor, or Muon (Jordan 2024) for
    the block matrices and AdamW for the rest. Weight decay is decoupled and only where the name
    table says so. A Muon update is scaled by 0.2 sqrt(max(R, C)), so that its root mean square is
    that of AdamW and one lr serves both (Liu et al. 2025, arXiv:2502.16982).

    Attributes:
        products: what Muon's iterations multiply in; the session sets it.
        compiles: whether 8-bit moments are updated by `compiled_updates`; likewise.
    """

    products = torch.float32
    compiles = False

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        model: ModelConfig,
        table: OptimizerTable,
        adapter: AdapterOptions | None = None,
        residuals: Mapping[str, Tensor] | None = None,
        states: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        first_elements: Mapping[str, int] | None = None,
    ) -> None:
        """Works on its arguments in place.

        Args:
            parameters: canonical name -> contiguous master (or a view), float32 or bfloat16; the
                model's other parameters are somebody else's.
            adapter: the parameters are those of this adapter of the model.
            residuals: int16, for bfloat16 masters that are split (`split_master`); a bfloat16
                master without one is rounded stochastically.
            states: where the states lie, by their name on disk; None: new, zero.
            seed: of stochastic rounding.
            first_elements: of a whole tensor, where `parameters` holds a stretch of it.
        """
        specs = [spec for spec in trained_table(model, adapter) if spec.name in parameters]
        self._parameters, self._table = dict(parameters), table
        if states is None:
            states = zero_states(specs, table, {n: p.device for n, p in parameters.items()})
        self._states = dict(states)
        self._fused: dict[bool, list[str]] = {True: [], False: []}  # by decay
        self._chunked: list[ParameterSpec] = []
        matrices: dict[tuple[int, ...], list[str]] = {}
        self._masters: dict[str, Storage] = {}
        self._stored: dict[str, Storage] = {}  # states by their name
        for spec in specs:
            weight, residual = parameters[spec.name], (residuals or {}).get(spec.name)
            stream = (seed, spec.name, (first_elements or {}).get(spec.name, 0))
            self._masters[spec.name] = master_storage(weight, residual, stream)
            for state in states_of(spec, table):
                self._stored[f"{state}.{spec.name}"] = self._storage(state, stream)
            if table.name == "muon" and spec.group == "matrix":
                matrices.setdefault(spec.shape, []).append(spec.name)
            elif self._is_plain(spec.name):
                self._fused[spec.decay].append(spec.name)
            else:
                self._chunked.append(spec)
        self._muon = [batch for names in matrices.values() for batch in self._batches(names)]

    @torch.no_grad()
    def step(
        self,
        gradients: Mapping[str, Tensor],
        *,
        lr: float,
        updates: int,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Apply one update in place.

        `gradients`: float32 or bfloat16, by canonical name; each is used as gradient * grad_scale
        (0-dim fp32, the clip factor) and holds no promised value afterwards. `updates`: how many
        were applied before this one. `found_inf` (0-dim fp32): where it is 1 nothing changes; the
        device decides, without telling the host.
        """
        if found_inf is not None and host_decides(found_inf):
            if found_inf.item():
                return
            found_inf = None
        update = Update(lr, updates, grad_scale, found_inf)
        for decay, names in self._fused.items():
            parameters = [self._parameters[name] for name in names]
            exp_avg = [self._states[f"exp_avg.{name}"] for name in names]
            exp_avg_sq = [self._states[f"exp_avg_sq.{name}"] for name in names]
            wide = [gradients[name].float() for name in names]
            self._adamw((parameters, wide, exp_avg, exp_avg_sq), update, decay=decay)
        numbers = None
        if self.compiles and self._chunked:
            device = self._parameters[self._chunked[0].name].device
            numbers = Numbers.of(self._table, device, **update._asdict())
        for spec in self._chunked:
            self._chunked_adamw(spec, gradients[spec.name], update, numbers)
        for names in self._muon:
            self._orthogonal_step(names, gradients, update)

    def specs(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        """Name, dtype and shape of every state, in table order."""
        return [(name, TAGS[t.dtype], tuple(t.shape)) for name, t in self._states.items()]

    def export(self, state_name: str) -> Tensor:
        """The state itself, not a copy: valid until the next `step`."""
        return self._states[state_name]

    def load(self, source: TensorSource) -> None:
        """Take every state from `source`; raises as `load_states`."""
        load_states(self._states, source, self._table)

    def _storage(self, state: State, stream: tuple[int, str, int]) -> Storage:
        """`stream`: seed, parameter and first element, as `master_storage` takes them."""
        seed, parameter, first = stream
        name = f"{state}.{parameter}"
        values = self._states[name].view(-1)
        if values.dtype == torch.uint8:
            return CodedState(state, values, self._states[f"{name}.absmax"])
        return (
            Plain(values) if values.dtype == torch.float32 else Rounded(values, seed, name, first)
        )

    def _is_plain(self, parameter: str) -> bool:
        held = [self._masters[parameter]]
        held += [self._stored[f"{state}.{parameter}"] for state in ("exp_avg", "exp_avg_sq")]
        return all(isinstance(storage, Plain) for storage in held)

    def _batches(self, names: Sequence[str]) -> list[list[str]]:
        size = max(1, MUON_BATCH_ELEMENTS // self._parameters[names[0]].numel())
        return [list(names[start : start + size]) for start in range(0, len(names), size)]

    def _adamw(
        self,
        tensors: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]],
        update: Update,
        *,
        decay: bool,
    ) -> None:
        """The fused kernel: on CPU five times the speed of torch's default."""
        parameters, gradients, exp_avg, exp_avg_sq = tensors
        if not parameters:
            return
        table, scale = self._table, update.grad_scale
        step = torch.full((), update.updates + 1.0, device=parameters[0].device)
        torch._fused_adamw_(
            parameters, gradients, exp_avg, exp_avg_sq, [], [step] * len(parameters),
            lr=update.lr, beta1=table.beta1, beta2=table.beta2, eps=table.eps,
            weight_decay=table.weight_decay if decay else 0.0, amsgrad=False, maximize=False,
            grad_scale=None if scale is None else scale.reciprocal(), found_inf=update.found_inf,
        )  # fmt: skip

    def _chunked_adamw(
        self, spec: ParameterSpec, gradient: Tensor, update: Update, numbers: Numbers | None
    ) -> None:
        """`numbers`: those of the update, where the compiler may have it."""
        flat, step = gradient.reshape(-1), update.updates
        master = self._masters[spec.name]
        first, second = (self._stored[f"{s}.{spec.name}"] for s in ("exp_avg", "exp_avg_sq"))
        if numbers is not None and can_compile(master, first, second, flat.numel()):
            for chunk in chunks(flat):
                coded_adamw(
                    (master, first, second), chunk, flat[chunk], numbers, table=self._table,
                    decay=spec.decay,
                )  # fmt: skip
            return
        for chunk in chunks(flat):
            weight, exp_avg, exp_avg_sq = (s.decode(chunk) for s in (master, first, second))
            tensors = ([weight], [flat[chunk].float()], [exp_avg], [exp_avg_sq])
            self._adamw(tensors, update, decay=spec.decay)
            master.encode(chunk, weight, step)
            first.encode(chunk, exp_avg, step)
            second.encode(chunk, exp_avg_sq, step)

    def _momentum(self, updates: int) -> float:
        table = self._table
        if updates >= table.momentum_warmup_steps:
            return table.momentum
        done = updates / table.momentum_warmup_steps
        return table.momentum_start + (table.momentum - table.momentum_start) * done

    def _orthogonal_step(
        self, names: list[str], gradients: Mapping[str, Tensor], update: Update
    ) -> None:
        wide = [gradients[name].float() for name in names]
        stacked = torch.stack(wide, out=_scratch((len(wide), *wide[0].shape), wide[0]))  # [N, R, C]
        if update.grad_scale is not None:
            stacked.mul_(update.grad_scale)
        for name, gradient in zip(names, stacked, strict=True):
            self._accumulate(name, gradient, update)
        directions = orthogonalize(stacked, self.products)
        rate = -update.lr * 0.2 * math.sqrt(max(stacked.shape[1:]))
        for name, direction in zip(names, directions, strict=True):
            self._take_direction(name, direction, rate, update)

    def _take_direction(self, name: str, direction: Tensor, rate: float, update: Update) -> None:
        """weight = weight * (1 - lr * decay) + direction * rate."""
        everything, found_inf = slice(0, direction.numel()), update.found_inf
        weight = self._masters[name].decode(everything)
        before = weight.clone() if found_inf is not None else None
        weight.mul_(1 - update.lr * self._table.weight_decay)
        weight.add_(direction.reshape(-1), alpha=rate)
        _put_back(weight, before, found_inf)
        self._masters[name].encode(everything, weight, update.updates)

    def _accumulate(self, name: str, gradient: Tensor, update: Update) -> None:
        """Take the gradient into the momentum and leave Nesterov's mean of both in `gradient`."""
        momentum = self._momentum(update.updates)
        state, flat = self._stored[f"momentum_buffer.{name}"], gradient.view(-1)
        for chunk in chunks(flat):
            buffer = state.decode(chunk)
            before = buffer.clone() if update.found_inf is not None else None
            buffer.lerp_(flat[chunk], 1 - momentum)
            flat[chunk] = flat[chunk].lerp(buffer, momentum)
            _put_back(buffer, before, update.found_inf)
            state.encode(chunk, buffer, update.updates)


def host_decides(found_inf: Tensor) -> bool:
    """Whether reading it costs no wait for a device."""
    return found_inf.device.type == "cpu"


def chunk_elements(device: torch.device) -> int:
    """How many elements are decoded at once."""
    return CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS


def chunks(flat: Tensor) -> Iterator[slice]:
    """Stretches of an update, each of whole blocks of the 8-bit codec: bounded scratch memory, in
    cache on the CPU, and few launches elsewhere."""
    size = chunk_elements(flat.device)
    return (slice(s, min(s + size, flat.numel())) for s in range(0, flat.numel(), size))


def _put_back(values: Tensor, before: Tensor | None, found_inf: Tensor | None) -> None:
    """Undo a change where `found_inf` is 1."""
    if before is not None and found_inf is not None:
        values.copy_(torch.where(found_inf > 0, before, values))


def orthogonalize(matrices: Tensor, products: torch.dtype = torch.float32) -> Tensor:
    """The nearest half-orthogonal matrices, roughly: fp32 [N, R, C] to the same shape with singular
    values near 1, by five Newton-Schulz steps on each (Jordan 2024). The shorter side is squared.

    `products`: bfloat16 is what a card multiplies fastest, and as Jordan has it. The iteration
    contracts towards its fixed points, so that rounding on the way changes little of where it ends.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = _scratch(tuple(matrices.shape), matrices)
    torch.div(matrices, torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7, out=x)
    x = x.to(products)
    side = min(matrices.shape[1:])
    squares = (len(matrices), side, side)
    gram, polynomial = _scratch(squares, x), _scratch(squares, x)  # [N, S, S], S = min(R, C)
    following = _scratch(tuple(x.shape), x)
    for _ in range(NEWTON_SCHULZ_STEPS):
        add_products(gram, *((x.mT, x) if tall else (x, x.mT)), beta=0, alpha=1, out=gram)
        add_products(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        left, right = (x, polynomial) if tall else (polynomial, x)
        add_products(x, left, right, beta=a, alpha=1, out=following)
        x, following = following, x
    return x.float()


def _scratch(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised, of one size in memory for all batches, so that a processor's kept memory
    serves one after the other."""
    size = math.prod(shape)
    return like.new_empty(max(size, MUON_BATCH_ELEMENTS))[:size].view(shape)
