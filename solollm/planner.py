"""Does it fit, and in what pieces: where the state lies, the micro-batch, checkpointing and dtype.

The backend gives coefficients (`Backend.memory_costs`) for each way it can hold a model
(`Backend.ways`), the machine its free memory; here they are multiplied. The global batch is never
changed: a smaller micro-batch only means more of them per step. Time and energy are in
`solollm.forecast`, devices that are not this machine in `solollm.devices`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from solollm.architecture import ModelConfig
from solollm.backend import (
    Backend,
    Capabilities,
    ComputeDType,
    MemoryCosts,
    Plan,
    Ranks,
    SessionOptions,
    Way,
)
from solollm.config import RunConfig
from solollm.dial import PRESET_NAMES, preset
from solollm.drawing import Drawing, drawing_of
from solollm.dtype_choice import preferred_dtype
from solollm.errors import ConfigError, PlanError
from solollm.hardware import Machine, read_machine

# The rest is left for what no formula counts: fragmentation, the allocator; on a processor, whose
# memory is everybody's, other programs too.
_USABLE_SHARE = {"cpu": 0.8, "gpu": 0.9}
# A processor trains no faster with larger micro-batches than this: measured, its rate is level
# from about a thousand tokens up.
_CPU_MICRO_BATCH_TOKENS = 4096
# Beyond this a GPU gains nothing either, and a plan is easier to read.
_GPU_MICRO_BATCH_TOKENS = 1 << 17
_OF_A_STEP = ("activations", "loss", "allocator")  # there while a step trains, and not between


@dataclass(frozen=True)
class Room:
    """Bytes that a run may use: of the device, and of the host's memory beside a card. `device`
    is the backend's name for it, empty for this machine's own."""

    device_bytes: int
    host_bytes: int = 0
    is_cpu: bool = True
    device: str = ""


@dataclass(frozen=True)
class Layout:
    """One way to run a step, and what it costs, by name of what takes it."""

    way: Way
    micro_batch_size: int
    activation_checkpointing: bool
    costs: MemoryCosts
    device_bytes: Mapping[str, int]
    host_bytes: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.device_bytes.values())

    def beside_drawing(self, drawn_bytes: int) -> Layout:
        """The layout of a step that draws answers first. They are done with when training begins,
        so only what they take beyond its activations is counted."""
        shared = sum(self.device_bytes.get(name, 0) for name in _OF_A_STEP)
        if drawn_bytes <= shared:
            return self
        table = {**self.device_bytes, "drawing answers": drawn_bytes - shared}
        return replace(self, device_bytes=table)

    def missing_bytes(self, room: Room) -> int:
        """By how much it misses the room, on the device and beside it; 0 where it fits."""
        host = sum(self.host_bytes.values())
        return max(0, self.total_bytes - room.device_bytes) + max(0, host - room.host_bytes)

    def fits(self, room: Room) -> bool:
        return not self.missing_bytes(room)


@dataclass(frozen=True)
class Question:
    """What is to be fitted. Frozen, so that a remedy is a `replace`."""

    model: ModelConfig
    options: SessionOptions
    batch_size: int
    seq_len: int
    compute_dtype: ComputeDType
    micro_batch_size: int | None
    activation_checkpointing: bool | None
    ways: tuple[Way, ...]
    max_tokens: int  # of a micro-batch that the planner chooses; one row is always allowed
    drawing: Drawing | None = None


def plan(
    model: ModelConfig,
    options: SessionOptions,
    config: RunConfig,
    backend: Backend,
    *,
    batch_size: int,
    seq_len: int,
    machine: Machine | None = None,
) -> Plan:
    """The fastest way to run this step that fits this machine's free memory.

    Settings given in the config are kept; what is left open is chosen: the largest micro-batch
    without activation checkpointing, else the largest with it, in the first of the backend's ways
    that fits. On a processor "largest" ends where more rows gain nothing.

    Raises:
        ConfigError: a compute dtype that the backend cannot train in.
        PlanError: nothing fits; the message holds the byte table and the cheapest change that does.
    """
    capabilities = backend.capabilities()
    room = room_of_all(room_here(capabilities.device, machine or read_machine()), backend.ranks())
    dtype = compute_dtype(config, capabilities)
    question = ask(
        model, options, config, backend,
        room=room, compute_dtype=dtype, batch_size=batch_size, seq_len=seq_len,
    )  # fmt: skip
    layout = best_layout(question, backend, room)
    if layout is None:
        raise does_not_fit(question, backend, room, capabilities)
    return as_plan(question, layout, room)


def ask(
    model: ModelConfig,
    options: SessionOptions,
    config: RunConfig,
    backend: Backend,
    *,
    room: Room,
    compute_dtype: ComputeDType,
    batch_size: int,
    seq_len: int,
) -> Question:
    """The question that a config puts: what it fixes stays, the rest is the planner's choice."""
    return Question(
        model, options, batch_size, seq_len, compute_dtype,
        config.train.micro_batch_size, config.train.activation_checkpointing,
        tuple(_allowed_ways(options, config, backend, room)),
        _CPU_MICRO_BATCH_TOKENS if room.is_cpu else _GPU_MICRO_BATCH_TOKENS,
        drawing_of(config, batch_size, seq_len),
    )  # fmt: skip


def as_plan(question: Question, layout: Layout, room: Room) -> Plan:
    """The plan of a layout that was chosen."""
    return Plan(
        micro_batch_size=layout.micro_batch_size,
        activation_checkpointing=layout.activation_checkpointing,
        compute_dtype=question.compute_dtype,
        seq_len=question.seq_len,
        batch_size=question.batch_size,
        memory_bytes=layout.device_bytes,
        memory_limit_bytes=room.device_bytes,
        host_memory_bytes=layout.host_bytes,
        settings=dict(layout.way.settings),
        state_bits=layout.way.state_bits,
    )


def room_here(device: str, machine: Machine) -> Room:
    """What a session on `device` ("cpu", "cuda:0", "mps", ...) may use on this machine."""
    limit = memory_limit_bytes(device, machine)
    if _is_cpu(device, machine):
        return Room(limit)
    has_own = any(gpu.vendor == "nvidia" for gpu in machine.gpus)
    host = int(machine.available_bytes * _USABLE_SHARE["cpu"]) if has_own else 0
    return Room(limit, host, is_cpu=False)


def room_of_all(room: Room, ranks: Ranks) -> Room:
    """What each of several ranks may use: the least that one of them has. Those of one machine
    share its memory, but have a card each."""
    shared, own = ranks.local_world_size, 1 if not room.is_cpu else ranks.local_world_size
    least = ranks.largest(-(room.device_bytes // own), -(room.host_bytes // shared))
    return replace(room, device_bytes=int(-least[0]), host_bytes=int(-least[1]))


def memory_limit_bytes(device: str, machine: Machine) -> int:
    """Bytes that a session on `device` ("cpu", "cuda:0", "mps", ...) may use here."""
    index = device.partition(":")[2]
    if _is_cpu(device, machine):
        return int(machine.available_bytes * _USABLE_SHARE["cpu"])
    gpu = machine.gpus[min(int(index) if index.isdigit() else 0, len(machine.gpus) - 1)]
    return int((gpu.free_bytes or machine.available_bytes) * _USABLE_SHARE["gpu"])


def format_bytes(count: int) -> str:
    """Human bytes in binary units with three digits: `1.25 GiB`."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def compute_dtype(config: RunConfig, capabilities: Capabilities) -> ComputeDType:
    """The config's, or the one that this machine prefers. Raises ConfigError where it has none."""
    asked = config.train.compute_dtype
    if asked == "auto":
        return preferred_dtype(capabilities)
    if asked not in capabilities.train_dtypes:
        raise ConfigError(
            f"train.compute_dtype {asked} cannot be trained in on {capabilities.device}",
            why=f"this backend offers {', '.join(capabilities.train_dtypes)}",
            fix="use `auto`",
        )
    return asked


def best_layout(question: Question, backend: Backend, room: Room) -> Layout | None:
    """The first that fits, of the ways that need no consent."""
    return next(
        (
            layout
            for way in question.ways
            if not way.consent
            for layout in layouts(question, backend, way, room)
            if layout.fits(room)
        ),
        None,
    )


def layouts(question: Question, backend: Backend, way: Way, room: Room) -> Iterator[Layout]:
    """Every way the settings leave open to run a step, the fastest first."""
    options = options_of(question.options, way)
    place = {"device": room.device} if room.device else {}
    costs = backend.memory_costs(question.model, options, question.compute_dtype, **place)
    drawn = 0
    if question.drawing is not None:
        drawn = sum(
            backend.rollout_bytes(
                question.model, options, question.compute_dtype,
                sequences=question.drawing.at_once, length=question.seq_len, **place,
            ).values()
        )  # fmt: skip
    asked = question.activation_checkpointing
    for checkpointing in (False, True) if asked is None else (asked,):
        for rows in _micro_batch_sizes(question):
            layout = _layout(question, way, costs, (rows, checkpointing))
            yield layout.beside_drawing(drawn)


def options_of(options: SessionOptions, way: Way) -> SessionOptions:
    """The session options of a way."""
    if way.state_bits is not None and way.state_bits != options.optimizer.state_bits:
        table = options.optimizer.model_copy(update={"state_bits": way.state_bits})
        options = replace(options, optimizer=table)
    return replace(options, backend_options={**options.backend_options, **way.settings})


def does_not_fit(
    question: Question, backend: Backend, room: Room, capabilities: Capabilities
) -> PlanError:
    """The refusal: the table of the smallest way to run it, and the cheapest change that fits."""
    smallest = min(
        (s for w in question.ways for s in layouts(question, backend, w, room) if not w.consent),
        key=lambda layout: (layout.missing_bytes(room), layout.total_bytes),
    )
    rows = [f"{name} {format_bytes(size)}" for name, size in smallest.device_bytes.items()]
    host = sum(smallest.host_bytes.values())
    beside = f" and {format_bytes(host)} beside the card" if host else ""
    had = f" and {format_bytes(room.host_bytes)}" if host else ""
    return PlanError(
        f"this run needs {format_bytes(smallest.total_bytes)} of memory{beside} even with"
        f" micro-batches of {smallest.micro_batch_size} row(s) of {question.seq_len} tokens;"
        f" {format_bytes(room.device_bytes)}{had} can be used here",
        why=", ".join(rows),
        fix=_cheapest_change(question, backend, room, capabilities),
    )


def _allowed_ways(
    options: SessionOptions, config: RunConfig, backend: Backend, room: Room
) -> list[Way]:
    """The backend's ways that contradict nothing that the config says, else the config's own. One
    that was asked for by its settings needs no further consent."""
    given, table = options.backend_options, options.optimizer
    fixed_bits = "state_bits" in config.optimizer.model_fields_set
    allowed = []
    for way in backend.ways(room.device, adapter=options.adapter is not None):
        agrees = all(given.get(key, value) == value for key, value in way.settings.items())
        same_place = given.get("offload", "none") == way.settings.get("offload", "none")
        if not agrees or not ("offload" not in given or same_place):
            continue
        if fixed_bits and way.state_bits not in (None, table.state_bits):
            continue
        if table.paged and "offload" in way.settings:
            continue
        asked = all(key in given for key in way.settings)
        allowed.append(way._replace(consent=way.consent and not asked))
    return allowed or [Way("as configured")]


def _is_cpu(device: str, machine: Machine) -> bool:
    return device.partition(":")[0] == "cpu" or not machine.gpus


def _micro_batch_sizes(question: Question) -> list[int]:
    """The setting; or the batch and the powers of two below it, descending. (The last micro-batch
    of a step may be smaller than the others.)"""
    whole = question.batch_size
    if question.micro_batch_size is not None:
        return [min(question.micro_batch_size, whole)]
    most = max(1, question.max_tokens // question.seq_len)
    powers = [1 << bit for bit in range(whole.bit_length()) if 1 << bit < whole]
    return [rows for rows in (whole, *reversed(powers)) if rows <= most]


def _layout(question: Question, way: Way, costs: MemoryCosts, pieces: tuple[int, bool]) -> Layout:
    rows, checkpointing = pieces
    per_token = costs.per_token_checkpointed_bytes if checkpointing else costs.per_token_bytes
    lost = costs.allocator_per_token_bytes
    if checkpointing:
        lost = costs.allocator_per_token_checkpointed_bytes
    tokens = rows * question.seq_len
    state = costs.state_bytes or {
        "weights, gradients, optimizer": int(
            costs.per_parameter_bytes * question.model.num_parameters()
        )
    }
    table = {
        "framework": costs.fixed_bytes,
        **state,
        "activations": int(per_token * tokens),
        "loss": costs.loss_chunk_bytes,
    }
    if lost:
        table["allocator"] = int(lost * tokens)
    if costs.cast_bytes and not checkpointing:
        table["weights to compute with"] = costs.cast_bytes
    host = dict(costs.host_bytes)
    if costs.host_per_token_bytes:
        host["activations"] = int(costs.host_per_token_bytes * tokens)
    return Layout(way, rows, checkpointing, costs, table, host)


def _cheapest_change(
    question: Question, backend: Backend, room: Room, capabilities: Capabilities
) -> str:
    """The first remedy that fits, in the order of what it costs the user."""
    for advice, changed in _remedies(question, backend, room, capabilities):
        layout = best_layout(changed, backend, room)
        if layout is not None:
            host = sum(layout.host_bytes.values())
            beside = f" and {format_bytes(host)} beside the card" if host else ""
            return f"{advice}: it then needs {format_bytes(layout.total_bytes)}{beside}"
    return "no setting makes it fit: use a machine with more free memory"


def _remedies(
    question: Question, backend: Backend, room: Room, capabilities: Capabilities
) -> Iterator[tuple[str, Question]]:
    free = replace(question, micro_batch_size=None, activation_checkpointing=None)
    if free != question:
        yield "leave micro-batch and activation checkpointing to the planner", free
    if free.drawing is not None:
        for at_once in (free.drawing.at_once // 4, 1):
            if 0 < at_once < free.drawing.at_once:
                free = replace(free, drawing=free.drawing._replace(at_once=at_once))
                yield f"--set finetune.grpo.rollout_batch_size={at_once}", free
    if "bfloat16" in capabilities.train_dtypes and question.compute_dtype == "float32":
        free = replace(free, compute_dtype="bfloat16")
        yield "--set train.compute_dtype=bfloat16", free
    if 8 in capabilities.state_bits and question.options.optimizer.state_bits != 8:
        optimizer = question.options.optimizer.model_copy(update={"state_bits": 8})
        free = replace(free, options=replace(question.options, optimizer=optimizer))
        yield "--set optimizer.state_bits=8", free
    for way in question.ways:
        if way.consent:
            switches = [
                f"--set backend_options.{backend.name}.{k}={v}" for k, v in way.settings.items()
            ]
            agreed = way._replace(consent=False)
            yield f"{' '.join(switches)} ({way.name}: {way.cost})", replace(free, ways=(agreed,))
    for length in (question.seq_len // 2, question.seq_len // 4):
        if length >= 128:
            yield f"--set data.seq_len={length}", replace(free, seq_len=length)
    for name in reversed(PRESET_NAMES):
        smaller = preset(name, question.model.vocab_size)
        if smaller.num_parameters() < question.model.num_parameters():
            length = min(question.seq_len, smaller.max_position_embeddings)
            yield f"use --preset {name}", replace(free, model=smaller, seq_len=length)
