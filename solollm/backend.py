# sizes: one page holds the whole seam, so that a backend can be written from it alone
"""THE SEAM: what crosses between the core and a backend, and nothing else does.

It is one optimizer step wide. NumPy goes in, a handle to a few floats comes out. The core owns
configuration, names, initial weights, data order, lr(step), the loop, files and plans; a backend
owns the decoder, its gradients, the optimizer and the device. `solollm.testing.conformance` is the
executable definition of this page; `solollm.testing.toy` is the smallest backend that passes it.

Shapes: B rows of the global batch, T positions, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from solollm.adapters import AdapterOptions
from solollm.architecture import ModelConfig, initial_parameter, parameter_table
from solollm.config import OptimizerTable
from solollm.errors import BackendError

IGNORED = -100  # the label of a position without a target

DType = Literal["F32", "F16", "BF16", "I16", "I32", "U32", "U8"]
ITEM_BYTES: Mapping[str, int] = {
    "F32": 4, "F16": 2, "BF16": 2, "I16": 2, "I32": 4, "U32": 4, "U8": 1,
}  # fmt: skip
BITS_DTYPE: Mapping[str, type[np.generic]] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I16": np.int16,
    "I32": np.int32, "U32": np.uint32, "U8": np.uint8,
}  # fmt: skip
Objective = Literal["lm", "dpo", "grpo"]
ComputeDType = Literal["float32", "bfloat16", "float16"]
FinishReason = Literal["stop", "length", "cancelled"]


class HostTensor(NamedTuple):
    """A tensor as bits on the host. `data` is C-contiguous with dtype `BITS_DTYPE[dtype]` (bf16 as
    uint16: NumPy has none) and shape `shape`."""

    dtype: DType
    shape: tuple[int, ...]
    data: np.ndarray

    @classmethod
    def of(cls, array: np.ndarray) -> HostTensor:
        """Wrap a float32, float16, int16, int32 or uint8 array (uint16 is not guessed as bf16)."""
        tags: dict[str, DType] = {
            "float32": "F32", "float16": "F16", "int16": "I16", "int32": "I32", "uint8": "U8",
        }  # fmt: skip
        tag = tags.get(array.dtype.name)
        if tag is None:
            raise BackendError(f"no host tensor dtype for NumPy {array.dtype.name}")
        return cls(tag, tuple(array.shape), np.ascontiguousarray(array).reshape(array.shape))

    def float32(self) -> np.ndarray:
        """The values as float32 (bf16 and fp16 are widened exactly)."""
        if self.dtype == "BF16":
            widened: np.ndarray = (self.data.astype(np.uint32) << 16).view(np.float32)
            return widened
        return self.data.astype(np.float32)


class TensorSource(Protocol):
    """Named tensors read one at a time: a checkpoint file, a snapshot, a dict in a test."""

    def names(self) -> Sequence[str]: ...
    def read(self, name: str) -> HostTensor: ...


class DictSource:
    """A `TensorSource` over a mapping."""

    def __init__(self, tensors: Mapping[str, HostTensor]) -> None:
        self._tensors = tensors

    @classmethod
    def collect(cls, pairs: Iterable[tuple[str, HostTensor]]) -> DictSource:
        """Hold every pair; copies, so that the producer may go on."""
        return cls({n: HostTensor(t.dtype, t.shape, t.data.copy()) for n, t in pairs})

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def read(self, name: str) -> HostTensor:
        return self._tensors[name]


class InitialWeights:
    """A `TensorSource` of the core's initial weights: any base will do where only time counts."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self._specs, self._seed = {spec.name: spec for spec in parameter_table(model)}, seed

    def names(self) -> Sequence[str]:
        return list(self._specs)

    def read(self, name: str) -> HostTensor:
        return HostTensor.of(initial_parameter(self._specs[name], self._seed))


@dataclass(frozen=True)
class Batch:
    """The GLOBAL batch of one optimizer step.

    Attributes:
        input_ids: int32 [B, T].
        labels: int32 [B, T]; the target of position t, already shifted; -100 = no target.
        segment_ids: int32 [B, T] or None; attention stays within equal ids of a row (documents are
            contiguous and ids never decrease along a row). None: plain causal.
        denominator: what the summed loss is divided by; the core sets it for the whole batch, so a
            session returns sum / denominator and never a mean of means.
        token_weights: float32 [B, T], a factor per target.
        reference_logprobs, advantages: float32 [B, T]; DPO's and GRPO's.
        pair_ids: int32 [B]; rows 2k and 2k+1 are chosen and rejected of pair k, never split. DPO's
            denominator counts pairs.

    Every rank receives the same global batch and takes a contiguous slice of rows.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    denominator: float
    segment_ids: np.ndarray | None = None
    token_weights: np.ndarray | None = None
    reference_logprobs: np.ndarray | None = None
    advantages: np.ndarray | None = None
    pair_ids: np.ndarray | None = None

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORED).sum())


class StepMetrics(NamedTuple):
    """loss in nats per token; grad_norm before clipping; targets; skipped: a non-finite step.

    partial: a lagged update (`clip = "lagged"`) had already changed some of the weights when the
    step turned out not to be finite. The state is between two steps: go back to a checkpoint.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool
    partial: bool = False


class PendingMetrics(ABC):
    """A step under way. `result()` is the only host-device synchronisation of training."""

    @abstractmethod
    def result(self) -> StepMetrics: ...


class MemoryStats(NamedTuple):
    """Bytes on the compute device now and at the session's peak (on CPU: of the process)."""

    current_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Copies:
    """What a train step copied between the host's memory and the device's: bytes, and seconds of
    each way and of the computation standing still for them. None where copies take their turn with
    the computation, as on a processor."""

    loaded_bytes: int
    stored_bytes: int
    load_seconds: float | None = None
    store_seconds: float | None = None
    stalled_seconds: float | None = None


class MatmulRate(NamedTuple):
    """Floating-point operations of a matrix product, per second of the clock and of processor time
    (which says nothing of a GPU)."""

    per_second: float
    per_cpu_second: float


class Snapshot(ABC):
    """A session's state at one step. Safe to stream on another thread while training goes on.

    `optimizer()` yields `exp_avg.<name>`, `exp_avg_sq.<name>`, `momentum_buffer.<name>`; 8-bit
    states yield U8 codes under that name and fp32 `<state>.<name>.absmax` (see `optim_codec`).

    With several ranks, rank 0 streams and closes its snapshot while every other rank calls `attend`
    on its own.
    """

    session_state: Mapping[str, int | float]
    is_live: bool = False  # reads the session's own memory: costs none if the next step waits

    def attend(self) -> None:  # noqa: B027
        """Give rank 0 what it streams; returns when it has closed its snapshot."""

    @abstractmethod
    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        """Masters in table order, one tensor live at a time: its memory may be the next one's."""

    @abstractmethod
    def optimizer(self) -> Iterator[tuple[str, HostTensor]]: ...

    @abstractmethod
    def parameter_specs(self) -> Sequence[tuple[str, DType, tuple[int, ...]]]:
        """What `parameters()` will yield, so that a file's header can be written first."""

    @abstractmethod
    def optimizer_specs(self) -> Sequence[tuple[str, DType, tuple[int, ...]]]: ...

    def close(self) -> None:  # noqa: B027
        """Release what the snapshot holds."""


@dataclass(frozen=True)
class SessionOptions:
    """How a session trains; everything that is neither the model nor the plan. With an `adapter`
    only its tensors are trained, exported and imported, under the names of
    `solollm.adapters.adapter_table`; the frozen base comes through `TrainSession.import_base`.
    `solollm.preference` says what DPO and GRPO compute with `beta`, and DPO with
    `label_smoothing`."""

    optimizer: OptimizerTable
    seed: int = 0
    objective: Objective = "lm"
    beta: float = 0.0
    label_smoothing: float = 0.0
    adapter: AdapterOptions | None = None
    backend_options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What the planner decided for this machine; stored beside the run. `settings` are the
    `backend_options` that it chose, `state_bits` what it keeps moments in where that is its choice,
    `host_memory_bytes` what lies beside a card's own memory."""

    micro_batch_size: int
    activation_checkpointing: bool
    compute_dtype: ComputeDType
    seq_len: int
    batch_size: int
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    memory_limit_bytes: int = 0
    host_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    state_bits: int | None = None


@dataclass(frozen=True)
class MemoryCosts:
    """A backend's coefficients for the planner, in bytes.

    `fixed` once; `per_parameter` for masters, gradients and optimizer; `per_token` of a
    micro-batch with and without activation checkpointing (all layers); `loss_chunk` once.

    Attributes:
        state_bytes: the tensors of `per_parameter_bytes` one by one, exact, where the backend
            counts them; then these are planned with.
        allocator_per_token_bytes, allocator_per_token_checkpointed_bytes: what the allocator cannot
            use again meanwhile, beside the two per token.
        cast_bytes: copies of weights in the compute dtype that stay for the backward pass where
            blocks are not recomputed.
        host_bytes: what the session holds in the host's memory beside a card's, by name, and
            `host_per_token_bytes` of a micro-batch.
        traffic_bytes: what crosses the link between them, the busier way, per "micro-batch" and
            per "update"; `overlaps_copies`: beside the computation.
        update_dtype: what Muon's orthogonalisations multiply in.
    """

    fixed_bytes: int
    per_parameter_bytes: float
    per_token_bytes: float
    per_token_checkpointed_bytes: float
    loss_chunk_bytes: int
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    allocator_per_token_bytes: float = 0.0
    allocator_per_token_checkpointed_bytes: float = 0.0
    cast_bytes: int = 0
    host_bytes: Mapping[str, int] = field(default_factory=dict)
    host_per_token_bytes: float = 0.0
    traffic_bytes: Mapping[str, int] = field(default_factory=dict)
    overlaps_copies: bool = False
    update_dtype: ComputeDType = "float32"


class Way(NamedTuple):
    """One way to hold and train a model, for the planner to choose from.

    `settings` are `backend_options`; `state_bits` what it keeps moments in, None for whatever the
    optimizer's table says. `cost` says in a few words what it costs the user, empty for the plain
    way. One that needs `consent`, because it changes what is learnt, is offered and not taken.
    """

    name: str
    settings: Mapping[str, bool | int | float | str] = {}
    state_bits: int | None = None
    cost: str = ""
    consent: bool = False


class Ranks:
    """The processes that train one model together, as one of them sees it: alone by default; the
    backend's own kind where a launcher (torchrun, mlx.launch) has started several.

    Rank 0 writes the run's files, nobody else does. Methods of this and of a session, but for
    `memory` and `close`, are called by all ranks in the same order; where one has ended, the
    others' raise RankLost.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # of them on this machine
    host: str = ""  # where its neighbours reach this machine, if that is known

    def gather(self, text: str) -> Sequence[str]:
        """What each rank says, at most 200 bytes, in order of ranks."""
        return [text]

    def largest(self, *values: float) -> tuple[float, ...]:
        """Each value's largest over all ranks, rounded to float32 where there are several."""
        return values


class Probe(NamedTuple):
    """What is known of a backend without importing its framework."""

    available: bool
    reason: str
    device: str
    priority: int


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do here, as data. `adapters`: "lora", and "qlora-<codec>" where a frozen
    base can be held in 4 bits, with the codec's name. `paged_states`: 8-bit states may lie in
    memory that moves between card and host by itself."""

    device: str
    train_dtypes: tuple[ComputeDType, ...]
    preferred_dtype: ComputeDType
    objectives: tuple[Objective, ...]
    optimizers: tuple[str, ...]
    state_bits: tuple[int, ...] = (32,)
    adapters: tuple[str, ...] = ()
    paged_states: bool = False
    multi_device: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)


class TrainSession(ABC):
    """Parameters and optimizer, living on a device. Never holds the trainer."""

    rank: int = 0
    world_size: int = 1

    @property
    def settings(self) -> Mapping[str, bool | int | float | str]:
        """What was decided here and decides bits (threads, compile, ...), as the
        `backend_options` that bring it about again. A resume on the same machine passes them."""
        return {}

    @abstractmethod
    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        """Forward, backward, clip, update. A non-finite step leaves the state as it was and
        reports `skipped`."""

    @abstractmethod
    def probe_step(self, batch: Batch) -> StepMetrics:
        """Forward and backward that change nothing."""

    @abstractmethod
    def eval_step(self, batch: Batch) -> tuple[float, int]:
        """(summed negative log-likelihood in nats, number of targets)."""

    @abstractmethod
    def token_logprobs(self, batch: Batch, *, adapter: bool = True) -> np.ndarray:
        """float32 [B, T]: log p(label) at each position, 0 where there is no target."""

    @abstractmethod
    def engine(self, options: EngineOptions) -> Engine:
        """An engine over the session's own weights, valid until the next `train_step`."""

    @abstractmethod
    def snapshot(self) -> Snapshot: ...

    @abstractmethod
    def import_parameters(self, source: TensorSource) -> None:
        """Take every parameter. Raises IntegrityError naming missing, unexpected and misshapen."""

    @abstractmethod
    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        """Take the optimizer's tensors and `session_state`; the same errors."""

    def import_base(self, source: TensorSource) -> None:
        """Take the frozen base of an adapter session, canonical names and shapes, tensor by tensor
        (quantised as it is read where the options say so). Comes before the first step, and may
        come once. Raises IntegrityError as `import_parameters`."""
        raise BackendError("this session has no frozen base: it trains every parameter")

    @property
    @abstractmethod
    def session_state(self) -> Mapping[str, int | float]:
        """`updates`: optimizer updates applied; loss scale and its counter; lagged norm."""

    @abstractmethod
    def memory(self) -> MemoryStats: ...

    def copies(self) -> Copies | None:
        """What the last `train_step` copied, counted as it went; None where nothing counts it."""
        return None

    def release_cache(self) -> None:  # noqa: B027
        """Give the system back what is held only to be fast: memory is short."""

    @abstractmethod
    def close(self) -> None: ...


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. `seed` makes a request's tokens a function of (weights, prompt)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


# (token ids so far, float32 [V] logits) -> float32 [V]; runs on the host.
LogitsProcessor = Callable[[Sequence[int], np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Request:
    """One sequence to continue. `prompt_ids` must not be empty. With `score_prompt` the first
    event carries the log-probability of every prompt token but the first. `adapter`: one of the
    engine's by name; None: the engine's default, if it has one, else the base alone."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()
    score_prompt: bool = False
    logits_processors: Sequence[LogitsProcessor] = ()
    adapter: str | None = None


class PromptScores(NamedTuple):
    """For prompt tokens 1..n-1: float32 log-probabilities, and whether each was the argmax."""

    logprobs: np.ndarray
    is_greedy: np.ndarray


class TokenEvent(NamedTuple):
    """One new token of one request; `token` is -1 where a request ends without one (a scored
    prompt with max_new_tokens 0, a cancelled request)."""

    request_id: int
    token: int
    logprob: float
    finish_reason: FinishReason | None
    prompt_scores: PromptScores | None = None


class Decoder(ABC):
    """Continuous batched decoding. Requests may join and leave between steps."""

    @abstractmethod
    def add(self, request: Request) -> int:
        """Queue a request. Raises ConfigError for an empty or too long prompt or a bad id."""

    @abstractmethod
    def step(self) -> list[TokenEvent]:
        """Advance every active request by one token; [] when nothing is left."""

    @abstractmethod
    def cancel(self, request_id: int) -> None: ...


@dataclass(frozen=True)
class EngineOptions:
    """`max_batch_size` sequences at once, up to `max_seq_len` tokens each (0: the model's).
    `vocab_size`: ids from here on are padding rows and are never sampled (0: none). `adapters`:
    folders in PEFT's layout or mlx-lm's by the names that requests use; `adapter`: the default
    among them."""

    max_batch_size: int = 8
    max_seq_len: int = 0
    vocab_size: int = 0
    adapters: Mapping[str, Path] = field(default_factory=dict)
    adapter: str | None = None
    compute_dtype: ComputeDType | Literal["auto"] = "auto"
    backend_options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


class Engine(ABC):
    """Weights ready to generate. `generate`, `stream` and `loglikelihood` are written once on top
    of it, in `solollm.generation`."""

    model: ModelConfig
    options: EngineOptions

    @abstractmethod
    def open(self) -> Decoder: ...

    def close(self) -> None:  # noqa: B027
        """Release the weights."""


class Peer(ABC):
    """Another training stack on the same framework, for `solollm bench train` alone."""

    @abstractmethod
    def step(self, batch: Batch, lr: float) -> float:
        """One optimizer step; gives the loss before it, in nats per token."""

    def read(self, documents: Sequence[np.ndarray], batch_size: int, lr: float) -> list[float]:
        """One pass over documents (int32 ids) in batches of its own making; each step's loss."""
        raise BackendError("this stack takes batches only, no documents")

    @abstractmethod
    def close(self) -> None: ...


class Backend(ABC):
    """One per entry point of the group `solollm.backends`. Constructing it imports no framework;
    its methods may."""

    name: str

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Availability without importing the framework, in under 50 ms."""

    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @abstractmethod
    def memory_costs(
        self,
        model: ModelConfig,
        options: SessionOptions,
        compute_dtype: ComputeDType,
        *,
        device: str = "",
    ) -> MemoryCosts:
        """What a session costs on `device` ("cpu", "cuda", "gpu"; empty: this machine's)."""

    def rollout_bytes(
        self,
        model: ModelConfig,
        options: SessionOptions,
        compute_dtype: ComputeDType,
        *,
        sequences: int,
        length: int,
        device: str = "",
    ) -> Mapping[str, int]:
        """What a session's `engine` takes beside its state, by name, while it draws `sequences` at
        once of up to `length` positions (GRPO)."""
        return {}

    def ways(self, device: str = "", *, adapter: bool = False) -> Sequence[Way]:
        """How models can be held on `device`, the fastest first; `adapter`: a frozen base and an
        adapter."""
        return (Way("resident"),)

    @abstractmethod
    def train_session(
        self, model: ModelConfig, options: SessionOptions, plan: Plan
    ) -> TrainSession:
        """A session with the core's initial weights of `options.seed`; with an adapter, with the
        adapter's first values of its own seed, and without a base until `import_base`."""

    @abstractmethod
    def engine(self, checkpoint: Path, options: EngineOptions) -> Engine: ...

    def ranks(self) -> Ranks:
        """This process among those that were started to train together; the same every time."""
        return Ranks()

    def dtype_rates(self, seconds: float) -> Mapping[ComputeDType, float]:
        """Operations per second in each compute dtype on this device, measured for about
        `seconds`; empty where there is nothing to choose."""
        return {}

    def peers(self) -> Mapping[str, str]:
        """The other training stacks that `peer` can bring to the same step, by name: what
        each lacks on this machine (a package, or a device), empty where it can run."""
        return {}

    def peer(
        self,
        name: str,
        model: ModelConfig,
        table: OptimizerTable,
        *,
        seed: int,
        compute_dtype: ComputeDType = "float32",
    ) -> Peer:
        """One of them, over the core's initial weights of `seed`."""
        raise BackendError(f"the {self.name} backend has no peer {name!r} here")

    def copy_bytes_per_second(self) -> float:
        """What copying reaches of the compute device's memory, bytes read and written together; 0
        where it is not measured."""
        return 0.0

    def matmul_rate(
        self, model: ModelConfig, num_tokens: int, compute_dtype: ComputeDType = "float32"
    ) -> MatmulRate:
        """What this process reaches now at the shape of the model's largest layer, for about a
        second; zeros where it is not measured."""
        return MatmulRate(0.0, 0.0)

    def memory(self, *, restart_peak: bool = False) -> MemoryStats:
        """What this process holds on the device, for benchmarks; zeros where it is not counted.
        `restart_peak`: the peak begins anew from now."""
        return MemoryStats(0, 0)
