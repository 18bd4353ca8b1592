"""Does it fit, and in what pieces: the micro-batch, checkpointing and dtype of a run.

The backend gives coefficients (`Backend.memory_costs`), the machine its free memory; here they are
multiplied. The global batch is never changed: a smaller micro-batch only means more of them per
step. Time and energy are planned elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from solollm.architecture import ModelConfig
from solollm.backend import Backend, Capabilities, ComputeDType, MemoryCosts, Plan, SessionOptions
from solollm.config import RunConfig
from solollm.dial import PRESET_NAMES, preset
from solollm.errors import ConfigError, PlanError
from solollm.hardware import Machine, read_machine

# The rest is left for what no formula counts: fragmentation, the allocator; on a processor, whose
# memory is everybody's, other programs too.
_USABLE_SHARE = {"cpu": 0.8, "gpu": 0.9}
# A processor trains no faster with larger micro-batches than this: measured, its rate is level
# from about a thousand tokens up.
_CPU_MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class _Shape:
    """One way to run a step, and what it costs."""

    micro_batch_size: int
    activation_checkpointing: bool
    memory_bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.memory_bytes.values())


@dataclass(frozen=True)
class _Question:
    """What is to be fitted. Frozen, so that a remedy is a `replace`."""

    model: ModelConfig
    options: SessionOptions
    batch_size: int
    seq_len: int
    compute_dtype: ComputeDType
    micro_batch_size: int | None
    activation_checkpointing: bool | None
    max_tokens: int  # of a micro-batch that the planner chooses; one row is always allowed


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
    without activation checkpointing, else the largest with it. On a processor "largest" ends where
    more rows gain nothing.

    Raises:
        ConfigError: a compute dtype that the backend cannot train in.
        PlanError: nothing fits; the message holds the byte table and the cheapest change that does.
    """
    machine = machine or read_machine()
    capabilities = backend.capabilities()
    question = _Question(
        model, options, batch_size, seq_len, _compute_dtype(config, capabilities),
        config.train.micro_batch_size, config.train.activation_checkpointing,
        _CPU_MICRO_BATCH_TOKENS if _is_cpu(capabilities.device, machine) else sys.maxsize,
    )  # fmt: skip
    limit = memory_limit_bytes(capabilities.device, machine)
    shape = _best_shape(question, backend, limit)
    if shape is None:
        raise _does_not_fit(question, backend, limit)
    return Plan(
        micro_batch_size=shape.micro_batch_size,
        activation_checkpointing=shape.activation_checkpointing,
        compute_dtype=question.compute_dtype,
        seq_len=seq_len,
        batch_size=batch_size,
        memory_bytes=shape.memory_bytes,
        memory_limit_bytes=limit,
    )


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


def _is_cpu(device: str, machine: Machine) -> bool:
    return device.partition(":")[0] == "cpu" or not machine.gpus


def _compute_dtype(config: RunConfig, capabilities: Capabilities) -> ComputeDType:
    asked = config.train.compute_dtype
    if asked == "auto":
        return capabilities.preferred_dtype
    if asked not in capabilities.train_dtypes:
        raise ConfigError(
            f"train.compute_dtype {asked} cannot be trained in on {capabilities.device}",
            why=f"this backend offers {', '.join(capabilities.train_dtypes)}",
            fix="use `auto`",
        )
    return asked


def _best_shape(question: _Question, backend: Backend, limit: int) -> _Shape | None:
    costs = backend.memory_costs(question.model, question.options, question.compute_dtype)
    return next((s for s in _shapes(question, costs) if s.total_bytes <= limit), None)


def _shapes(question: _Question, costs: MemoryCosts) -> Iterator[_Shape]:
    """Every way the settings leave open, the fastest first."""
    asked = question.activation_checkpointing
    for checkpointing in (False, True) if asked is None else (asked,):
        for rows in _micro_batch_sizes(question):
            yield _shape(question, costs, rows, checkpointing)


def _micro_batch_sizes(question: _Question) -> list[int]:
    """The setting; or the batch and the powers of two below it, descending. (The last micro-batch
    of a step may be smaller than the others.)"""
    whole = question.batch_size
    if question.micro_batch_size is not None:
        return [min(question.micro_batch_size, whole)]
    most = max(1, question.max_tokens // question.seq_len)
    powers = [1 << bit for bit in range(whole.bit_length()) if 1 << bit < whole]
    return [rows for rows in (whole, *reversed(powers)) if rows <= most]


def _shape(question: _Question, costs: MemoryCosts, rows: int, checkpointing: bool) -> _Shape:
    per_token = costs.per_token_checkpointed_bytes if checkpointing else costs.per_token_bytes
    parameters = question.model.num_parameters()
    table = {
        "framework": costs.fixed_bytes,
        "weights, gradients, optimizer": int(costs.per_parameter_bytes * parameters),
        "activations": int(per_token * rows * question.seq_len),
        "loss": costs.loss_chunk_bytes,
    }
    return _Shape(rows, checkpointing, table)


def _does_not_fit(question: _Question, backend: Backend, limit: int) -> PlanError:
    costs = backend.memory_costs(question.model, question.options, question.compute_dtype)
    smallest = min(_shapes(question, costs), key=lambda shape: shape.total_bytes)
    rows = [f"{name} {format_bytes(size)}" for name, size in smallest.memory_bytes.items()]
    return PlanError(
        f"this run needs {format_bytes(smallest.total_bytes)} of memory even with micro-batches of"
        f" {smallest.micro_batch_size} row(s) of {question.seq_len} tokens;"
        f" {format_bytes(limit)} can be used here",
        why=", ".join(rows),
        fix=_cheapest_change(question, backend, limit),
    )


def _cheapest_change(question: _Question, backend: Backend, limit: int) -> str:
    """The first remedy that fits, in the order of what it costs the user."""
    for advice, changed in _remedies(question, backend.capabilities()):
        shape = _best_shape(changed, backend, limit)
        if shape is not None:
            return f"{advice}: it then needs {format_bytes(shape.total_bytes)}"
    return "no setting makes it fit: use a machine with more free memory"


def _remedies(question: _Question, capabilities: Capabilities) -> Iterator[tuple[str, _Question]]:
    free = replace(question, micro_batch_size=None, activation_checkpointing=None)
    if free != question:
        yield "leave micro-batch and activation checkpointing to the planner", free
    if "bfloat16" in capabilities.train_dtypes and question.compute_dtype == "float32":
        free = replace(free, compute_dtype="bfloat16")
        yield "--set train.compute_dtype=bfloat16", free
    if 8 in capabilities.state_bits and question.options.optimizer.state_bits != 8:
        optimizer = question.options.optimizer.model_copy(update={"state_bits": 8})
        free = replace(free, options=replace(question.options, optimizer=optimizer))
        yield "--set optimizer.state_bits=8", free
    for length in (question.seq_len // 2, question.seq_len // 4):
        if length >= 128:
            yield f"--set data.seq_len={length}", replace(free, seq_len=length)
    for name in reversed(PRESET_NAMES):
        smaller = preset(name, question.model.vocab_size)
        if smaller.num_parameters() < question.model.num_parameters():
            length = min(question.seq_len, smaller.max_position_embeddings)
            yield f"use --preset {name}", replace(free, model=smaller, seq_len=length)
