"""A training before it is begun: does it fit, how long, how much energy, what would change that.

`plan_training` answers for this machine or for any device of the table, from the same formulas that
a run is started with. Behind `solollm plan`; what is chosen and how bytes are counted is
`solollm.planner`'s, seconds and energy are `solollm.forecast`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from solollm.backend import (
    Backend,
    Batch,
    Capabilities,
    ComputeDType,
    Plan,
    SessionOptions,
    Way,
)
from solollm.calibration import Calibration, Rates, calibrate, synthetic_batch
from solollm.config import RunConfig
from solollm.devices import Device, device, device_table, this_device
from solollm.drawing import drawing_of
from solollm.errors import ConfigError, PlanError
from solollm.forecast import Forecast, forecast, muon_flops, trained_flops
from solollm.hardware import Machine, read_machine
from solollm.horizon import Shape, resolve_model, resolve_shape, session_options, settled
from solollm.planner import (
    Layout,
    Question,
    Room,
    as_plan,
    ask,
    best_layout,
    compute_dtype,
    does_not_fit,
    layouts,
    options_of,
    room_here,
)
from solollm.registry import find_backends, select_backend
from solollm.state_bytes import checkpoint_bytes

DEFAULT_VOCAB_SIZE = 32_768  # where no corpus says how many ids there are
DEFAULT_PRICE = 0.30  # per kilowatt-hour, in whatever the user pays with
# Of a card's memory, what a process gets: a 24 GiB card shows 23.5, and a desktop takes some.
_CARD_SHARE = 0.9375
_HOST_KEPT_BYTES, _HOST_KEPT_SHARE = 4 << 30, 0.1  # of the host's memory, for everything else
_MAC_SHARE = 0.9  # of the part that the system lets the GPU hold
_DEEPEST = 64
_BACKEND_OF = {"cuda": "torch", "apple": "mlx", "cpu": "torch"}
_PLACE_OF = {"cuda": "cuda", "apple": "gpu", "cpu": "cpu"}


@dataclass(frozen=True)
class Option:
    """One way to train the model there. `missing_bytes` is what its memory lacks, 0 where it
    fits; `cost` says what it costs beside time; one
    that needs `consent` is not chosen by itself."""

    name: str
    micro_batch_size: int
    activation_checkpointing: bool
    device_bytes: int
    host_bytes: int
    tokens_per_second: float
    missing_bytes: int
    cost: str
    consent: bool
    is_chosen: bool


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that `solollm plan` shows."""

    device: Device
    backend: str
    room: Room
    shape: Shape
    config: RunConfig
    plan: Plan
    steps: int
    forecast: Forecast
    options: tuple[Option, ...]
    checkpoint_bytes: int
    disk_bytes: int
    price_per_kwh: float
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Wishes:
    """What is asked besides the config. `device` is a name of the table or "this"; `host_bytes`
    the memory beside a card, 0 for the table's; `calibrate_steps` 0 for no measuring. `largest`
    asks for the largest model that its memory holds, instead of one by name."""

    device: str = "this"
    host_bytes: int = 0
    calibrate_steps: int = 0
    price_per_kwh: float = DEFAULT_PRICE
    vocab_size: int = DEFAULT_VOCAB_SIZE
    largest: bool = False


@dataclass(frozen=True)
class _Place:
    """Where the training would run."""

    device: Device
    backend: Backend
    capabilities: Capabilities
    room: Room
    machine: Machine | None  # this one, None for another


def plan_training(config: RunConfig, wishes: Wishes | None = None) -> TrainingPlan:
    """Plan a training, here or on another device.

    With `config.train.hours` and no model named, the model is the deepest whose own horizon fits
    into that time there; with a model named, hours decide the steps. `wishes.largest` takes the
    deepest that fits the memory (and the hours, if any).

    Raises:
        ConfigError: a config or device that makes no sense.
        BackendError: the device's backend is not installed.
        PlanError: it does not fit; says the cheapest change that does.
    """
    wishes = wishes or Wishes()
    place = _place_of(config, wishes)
    named = config.model.preset or config.model.depth or config.model.config
    if wishes.largest or (config.train.hours is not None and not named):
        shape = _deepest(config, wishes, place)
    else:
        shape = resolve_shape(config, resolve_model(config.model, wishes.vocab_size))
    return _planned(config, shape, wishes, place)


def compare_devices(
    config: RunConfig, wishes: Wishes
) -> Iterator[tuple[Device, TrainingPlan | PlanError]]:
    """The same training on every device of the table whose backend is installed."""
    installed = {found.name for found in find_backends() if found.factory is not None}
    for entry in device_table():
        if _BACKEND_OF[entry.kind] not in installed:
            continue
        host = 0 if entry.is_unified else wishes.host_bytes
        asked = replace(wishes, device=entry.name, host_bytes=host, calibrate_steps=0)
        try:
            yield entry, plan_training(config, asked)
        except PlanError as error:
            yield entry, error


def rate_key(backend: str, place: str, dtype: str) -> str:
    """Under which name the rates of this machine are kept."""
    return f"{backend}/{place}/{dtype}"


def _place_of(config: RunConfig, wishes: Wishes) -> _Place:
    if wishes.device != "this":
        entry = device(wishes.device, host_bytes=wishes.host_bytes)
        backend, _ = select_backend_named(_BACKEND_OF[entry.kind])
        dtypes: tuple[ComputeDType, ...] = ("float32",)
        if entry.compute_dtype != "float32":
            dtypes = ("float32", entry.compute_dtype)
        capabilities = replace(
            backend.capabilities(),
            device=_PLACE_OF[entry.kind], train_dtypes=dtypes, preferred_dtype=dtypes[-1],
        )  # fmt: skip
        return _Place(entry, backend, capabilities, _room_of(entry), None)
    backend, _ = select_backend(config.backend)
    capabilities, machine = backend.capabilities(), read_machine()
    entry = this_device(machine, device_name=capabilities.device)
    room = room_here(capabilities.device, machine)
    if wishes.host_bytes and not entry.is_unified:
        room = replace(room, host_bytes=_usable_host_bytes(wishes.host_bytes))
    return _Place(entry, backend, capabilities, room, machine)


def select_backend_named(name: str) -> tuple[Backend, str]:
    """The installed backend of a name, whether or not its device is here.

    Raises:
        BackendError: it is not installed.
    """
    for found in find_backends():
        if found.name == name and found.factory is not None:
            return found.factory(), found.name
    return select_backend(name)


def _room_of(entry: Device) -> Room:
    """What a run may use of a device that is not this machine."""
    place = _PLACE_OF[entry.kind]
    if entry.kind == "cuda":
        usable = int(entry.memory_bytes * _CARD_SHARE)
        return Room(usable, _usable_host_bytes(entry.host_bytes), is_cpu=False, device=place)
    part = 3 / 4 if entry.memory_bytes > 36 << 30 else 2 / 3  # macOS's own limit for the GPU
    return Room(int(entry.memory_bytes * part * _MAC_SHARE), is_cpu=False, device=place)


def _usable_host_bytes(host_bytes: int) -> int:
    return host_bytes - max(_HOST_KEPT_BYTES, int(host_bytes * _HOST_KEPT_SHARE))


def _deepest(config: RunConfig, wishes: Wishes, place: _Place) -> Shape:
    """The deepest model of the dial that fits there, and whose own horizon takes no longer than
    the hours where they are given."""
    hours = config.train.hours
    asked = replace(wishes, calibrate_steps=0)
    for depth in range(_DEEPEST, 0, -1):
        table = config.model.model_copy(update={"depth": depth})
        shape = resolve_shape(config, resolve_model(table, wishes.vocab_size))
        try:
            made = _planned(_without_hours(config), shape, asked, place)
        except PlanError:
            if depth > 1:
                continue
            raise
        if hours is None or made.forecast.hours <= hours:
            return shape
    return shape


def _without_hours(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"hours": None})})


def _planned(config: RunConfig, shape: Shape, wishes: Wishes, place: _Place) -> TrainingPlan:
    backend, room = place.backend, place.room
    options = session_options(config, backend)
    question = ask(
        shape.model, options, config, backend,
        room=room, compute_dtype=compute_dtype(config, place.capabilities),
        batch_size=shape.batch_size, seq_len=shape.seq_len,
    )  # fmt: skip
    layout = best_layout(question, backend, room)
    if layout is None:
        raise does_not_fit(question, backend, room, place.capabilities)
    plan = as_plan(question, layout, room)
    chosen = options_of(options, layout.way)
    measured = _calibrate(shape, chosen, plan, count=wishes.calibrate_steps, place=place)
    entry = _with_rate(place, shape, plan)
    seconds = measured.step_seconds if measured else 0.0
    told = forecast(
        shape.model, plan, entry, layout.costs, options=chosen, steps=1,
        price_per_kwh=wishes.price_per_kwh, step_seconds=seconds, drawing=question.drawing,
    )  # fmt: skip
    steps = _steps(config, shape, told.step_seconds)
    told = told.of_steps(steps)
    size = checkpoint_bytes(shape.model, chosen.optimizer, chosen.adapter)
    kept = config.checkpoint.keep_latest + config.checkpoint.keep_best + 1  # one being written
    return TrainingPlan(
        device=entry, backend=backend.name, room=room, shape=shape,
        config=settled(config, backend, plan), plan=plan, steps=steps, forecast=told,
        options=tuple(_options(question, layout, entry, place)),
        checkpoint_bytes=size, disk_bytes=size * kept, price_per_kwh=wishes.price_per_kwh,
        calibration=measured,
    )  # fmt: skip


def _steps(config: RunConfig, shape: Shape, step_seconds: float) -> int:
    table = config.train
    if table.steps is not None:
        return table.steps
    if table.tokens is not None:
        return max(1, -(-table.tokens // shape.tokens_per_step))
    if table.hours is not None:
        return max(1, int(table.hours * 3600 / step_seconds))
    if config.finetune is not None:
        raise ConfigError(
            "this fine-tuning does not say how long it is",
            why="its steps follow from its rows, which a plan does not read",
            fix="give train.steps, --tokens or --hours",
        )
    return shape.dial_steps


def _with_rate(place: _Place, shape: Shape, plan: Plan) -> Device:
    """This machine's device with the rate that was measured nearest to this width, if any was."""
    if place.machine is None:
        return place.device
    key = rate_key(place.backend.name, place.device.name, plan.compute_dtype)
    rate = Rates().nearest(key, shape.model.hidden_size)
    return replace(place.device, measured_flops=rate) if rate else place.device


def _calibrate(
    shape: Shape, options: SessionOptions, plan: Plan, *, count: int, place: _Place
) -> Calibration | None:
    if not count or place.machine is None:
        return None

    def sample_batch(rows: int, seq_len: int) -> Batch:
        return synthetic_batch(shape.model, rows, seq_len, objective=options.objective)

    measured = calibrate(
        place.backend, shape.model, options, plan,
        sample_batch=sample_batch, steps=count,
    )  # fmt: skip
    work = trained_flops(shape.model, plan, options) + muon_flops(shape.model, options.optimizer)
    rate = work / measured.step_seconds
    key = rate_key(place.backend.name, place.device.name, plan.compute_dtype)
    Rates().add(key, shape.model.hidden_size, rate)
    return measured


def _options(question: Question, chosen: Layout, entry: Device, place: _Place) -> Iterator[Option]:
    """Every way, at its largest micro-batch that fits, recomputing only where it must."""
    for way in _ways_to_show(question, place):
        found = list(layouts(question, place.backend, way, place.room))
        layout = next((one for one in found if one.fits(place.room)), found[-1])
        option = _option(question, layout, entry, place.room)
        yield replace(option, is_chosen=way == chosen.way)


def _ways_to_show(question: Question, place: _Place) -> Iterator[Way]:
    for way in question.ways:
        yield way
        bits = place.capabilities.state_bits
        if way.name == "resident" and 8 in bits and question.options.optimizer.state_bits != 8:
            yield Way("resident, 8-bit", way.settings, 8, "moments rounded to 8 bits", True)


def _option(question: Question, layout: Layout, entry: Device, room: Room) -> Option:
    told = forecast(
        question.model, as_plan(question, layout, room), entry, layout.costs,
        options=options_of(question.options, layout.way), steps=1, price_per_kwh=0.0,
        drawing=question.drawing,
    )  # fmt: skip
    return Option(
        name=layout.way.name,
        micro_batch_size=layout.micro_batch_size,
        activation_checkpointing=layout.activation_checkpointing,
        device_bytes=layout.total_bytes,
        host_bytes=sum(layout.host_bytes.values()),
        tokens_per_second=told.tokens_per_second,
        missing_bytes=layout.missing_bytes(room),
        cost=layout.way.cost,
        consent=layout.way.consent,
        is_chosen=False,
    )


def expect(config: RunConfig, plan: Plan, backend: Backend) -> dict[str, float | bool | str]:
    """What a run of a resolved config should take on this machine, by the names under which
    `solollm.reality` measures it."""
    shape, capabilities, machine = Shape.of(config), backend.capabilities(), read_machine()
    entry = this_device(machine, device_name=capabilities.device)
    room = room_here(capabilities.device, machine)
    device = _with_rate(_Place(entry, backend, capabilities, room, machine), shape, plan)
    options = session_options(config, backend)
    steps = config.train.steps or shape.dial_steps
    told = forecast(
        shape.model, plan, device,
        backend.memory_costs(shape.model, options, plan.compute_dtype),
        options=options, steps=steps, price_per_kwh=DEFAULT_PRICE,
        drawing=drawing_of(config, shape.batch_size, shape.seq_len),
    )  # fmt: skip
    return {
        "tokens_per_second": told.tokens_per_second,
        "peak_memory_bytes": float(sum(plan.memory_bytes.values())),
        "steps": float(steps),
        "tokens": float(told.tokens),
        "seconds": told.seconds,
        "kilowatt_hours": told.kilowatt_hours,
        "rate_source": told.rate_source,
        "is_measured": told.is_measured,
    }


def vocab_size_of(corpus: Path) -> int:
    """The ids that a model of a corpus needs."""
    from solollm.tokenizer import Tokenizer

    return Tokenizer.load(corpus / "tokenizer").padded_vocab_size
