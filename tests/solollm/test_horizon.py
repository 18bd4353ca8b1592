"""What a config leaves open is filled in, once, before a run begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

from solollm import horizon
from solollm.backend import Backend, Batch, Capabilities
from solollm.checkpoint import Environment
from solollm.config import RunConfig, parse_config
from solollm.dial import from_depth
from solollm.environments import Recorded, for_here
from solollm.errors import BackendError, ConfigError, PlanError
from solollm.horizon import (
    Shape,
    deepest_shape,
    resolve,
    resolve_model,
    resolve_shape,
    session_options,
)
from solollm.testing.toy import ToyBackend

VOCAB = 2048


def no_steps(*_: object) -> NoReturn:
    raise AssertionError("nothing has to be measured")


def resolved(raw: dict[str, Any]) -> RunConfig:
    config = parse_config(raw)
    shape = resolve_shape(config, resolve_model(config.model, VOCAB))
    return resolve(config, shape, None, no_steps)  # type: ignore[arg-type]  # never asked


def test_the_dial_fills_in_everything() -> None:
    """Guards against a default that does not work, or is not what the dial says."""
    config = resolved({"model": {"depth": 3}})
    model = from_depth(3, VOCAB)
    dial = horizon.horizon(model)
    shape = Shape.of(config)
    assert shape.model == model
    assert shape.seq_len == model.max_position_embeddings
    assert shape.batch_size == dial.tokens_per_step // shape.seq_len
    assert shape.lr == dial.lr
    assert config.train.steps == math.ceil(dial.total_tokens / shape.tokens_per_step)
    assert resolved({}).model.config == from_depth(4, VOCAB)


def test_a_resolved_config_stays_as_it_is() -> None:
    """Guards against a resume that plans another run than the one it goes on with."""
    config = resolved({"model": {"preset": "15m"}, "train": {"tokens": 10**7}})
    again = resolve(config, Shape.of(config), None, no_steps)  # type: ignore[arg-type]
    assert again == config


@pytest.mark.parametrize(
    ("train", "steps"),
    [({"steps": 7, "tokens": 10**9}, 7), ({"tokens": 1000}, 8), ({"tokens": 1}, 1)],
)
def test_the_first_given_horizon_counts(train: dict[str, Any], steps: int) -> None:
    """Guards against tokens that override steps, and a horizon of no step at all."""
    config = resolved({"data": {"seq_len": 32}, "train": {"batch_size": 4, **train}})
    assert config.train.steps == steps


def test_settings_win_over_the_dial() -> None:
    """Guards against overrides that are silently dropped."""
    config = resolved(
        {
            "model": {"depth": 2, "qk_norm": True, "tie_word_embeddings": False},
            "optimizer": {"lr": 0.5},
            "data": {"seq_len": 100},
            "train": {"batch_size": 3, "steps": 1},
        }
    )
    shape = Shape.of(config)
    assert (shape.lr, shape.seq_len, shape.batch_size) == (0.5, 100, 3)
    assert shape.model.qk_norm
    assert not shape.model.tie_word_embeddings


def test_impossible_shapes_are_refused() -> None:
    """Guards against a model that reads positions or ids it does not have."""
    with pytest.raises(ConfigError, match="positions end at 256"):
        resolved({"model": {"depth": 2}, "data": {"seq_len": 300}})
    small = from_depth(2, 512).model_dump()
    with pytest.raises(ConfigError, match="the model has 512 ids"):
        resolved({"model": {"config": small}})
    with pytest.raises(ConfigError, match="leaves model"):
        Shape.of(RunConfig())


def test_hours_become_steps_by_the_measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against hours that are taken for something else, or not kept."""
    monkeypatch.setattr(horizon, "seconds_per_step", lambda *arguments: 0.5)
    config = resolved({"model": {"depth": 2}, "train": {"hours": 1.0}})
    assert config.train.steps == int(3600 * 0.95 / 0.5)


@pytest.mark.parametrize("speed", [1e9, 1e11, 1e13])
def test_hours_alone_choose_the_deepest_model_that_gets_its_tokens(
    monkeypatch: pytest.MonkeyPatch, speed: float
) -> None:
    """Guards against a model that is too large for the night, or smaller than it could be."""

    def measured(shape: Shape, *others: object) -> float:
        return shape.flops_per_step / speed

    monkeypatch.setattr(horizon, "seconds_per_step", measured)
    monkeypatch.setattr(horizon, "plan_of", lambda *arguments: None)
    config = parse_config({"train": {"hours": 8.0}})
    shape, seconds = deepest_shape(config, VOCAB, None, no_steps)  # type: ignore[arg-type]
    assert seconds in (None, measured(shape))
    budget = 8 * 3600 * 0.95 * speed
    assert shape.flops_per_step * shape.dial_steps <= budget
    deeper = resolve_shape(config, from_depth(shape.model.num_hidden_layers + 1, VOCAB))
    assert deeper.flops_per_step * deeper.dial_steps > budget


def test_hours_alone_stay_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a plan for the night that cannot even start."""

    def fits(shape: Shape, *others: object) -> None:
        if shape.model.num_hidden_layers > 5:
            raise PlanError("too large")

    monkeypatch.setattr(horizon, "plan_of", fits)
    monkeypatch.setattr(horizon, "seconds_per_step", lambda *arguments: 1e-6)
    config = parse_config({"train": {"hours": 8.0}})
    shape, seconds = deepest_shape(config, VOCAB, None, no_steps)  # type: ignore[arg-type]
    assert (shape.model.num_hidden_layers, seconds) == (5, 1e-6)


@pytest.mark.parametrize(
    ("step_seconds", "expected"),
    [(0.01, 300), (0.9, 4), (2.0, 3), (8.0, 3), (15.0, 2), (140.0, 1)],
)
def test_long_steps_are_measured_less_often(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, expected: int
) -> None:
    """A model for 50 days on a processor takes minutes a step; four of them said nothing more."""
    clock, taken = [0.0], []

    @contextmanager
    def steps(*_: object) -> Iterator[Callable[[float], object]]:
        def step(lr: float) -> None:
            clock[0] += step_seconds
            taken.append(lr)

        yield step

    class Timed(ToyBackend):
        def train_session(self, *_: object) -> Any:
            return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(horizon.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(horizon, "plan_of", lambda *_: None)
    config = parse_config({"model": {"depth": 1}})
    shape = resolve_shape(config, resolve_model(config.model, 64))
    found = horizon.seconds_per_step(shape, config, Timed(), steps)
    assert found == pytest.approx(step_seconds)
    assert len(taken) - 1 == pytest.approx(expected, abs=1)  # without the one that warms up


def test_what_was_measured_is_not_measured_again() -> None:
    """`--hours` took three measurements of half a minute where two were enough."""
    config = parse_config({"model": {"depth": 2}, "train": {"hours": 1.0}})
    shape = resolve_shape(config, resolve_model(config.model, VOCAB))
    found = resolve(config, shape, None, no_steps, step_seconds=2.0)  # type: ignore[arg-type]
    assert found.train.steps == int(3600 * 0.95 / 2)


def test_seconds_per_step_are_those_of_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a measurement that trains nothing, or leaves its session behind."""
    torch_backend = pytest.importorskip("solollm_torch.backend")
    monkeypatch.setattr(horizon, "_PROBE_SECONDS", 0.05)
    config = parse_config({"model": {"depth": 1}, "data": {"seq_len": 16}})
    shape = resolve_shape(config, resolve_model(config.model, 64))

    ids = np.zeros((shape.batch_size, 16), np.int32)
    batch = Batch(input_ids=ids, labels=ids, denominator=float(ids.size))
    backend, steps = torch_backend.TorchBackend(), horizon.plain_steps(batch)
    seconds = horizon.seconds_per_step(shape, config, backend, steps)
    assert 0 < seconds < 60


def without_pages(name: str, device: str) -> Backend:
    """A backend of that name, as far as its capabilities go."""

    class Unpaged(ToyBackend):
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), device=device)

    Unpaged.name = name
    return Unpaged()


@pytest.mark.parametrize(("name", "device"), [("torch", "cpu"), ("mlx", "apple gpu")])
def test_pages_are_refused_where_there_are_none(name: str, device: str) -> None:
    """Guards a setting that would be ignored; the message says what to use instead."""
    config = parse_config({"optimizer": {"name": "adamw", "state_bits": 8, "paged": True}})
    with pytest.raises(BackendError) as raised:
        session_options(config, without_pages(name, device))
    assert f"with {name} on {device}" in str(raised.value)
    assert "optimizer.state_bits = 8 alone" in str(raised.value)


@pytest.mark.parametrize("table", [{"name": "adamw"}, {"name": "muon", "state_bits": 8}])
def test_only_8_bit_adamw_is_paged(table: dict[str, Any]) -> None:
    """Guards fp32 states that page in and out whole at every step, unasked."""

    class Paged(ToyBackend):
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), paged_states=True)

    with pytest.raises(ConfigError, match="8-bit AdamW"):
        session_options(parse_config({"optimizer": {**table, "paged": True}}), Paged())
    eight = parse_config({"optimizer": {"name": "adamw", "state_bits": 8, "paged": True}})
    assert session_options(eight, Paged()).optimizer.paged


def test_a_run_that_leaves_its_card_leaves_its_pages() -> None:
    """Guards a run that could not go on elsewhere because of where its states lay."""
    config = parse_config({"optimizer": {"name": "adamw", "state_bits": 8, "paged": True}})
    card = Environment(
        backend="torch", device="cuda", versions={}, micro_batch_size=1, compute_dtype="float32",
        activation_checkpointing=False,
    )  # fmt: skip
    moved = for_here(config, Recorded(card, "another"), ToyBackend())
    assert moved.optimizer == config.optimizer.model_copy(update={"paged": False})
