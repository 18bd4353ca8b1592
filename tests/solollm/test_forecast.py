"""Seconds, kilowatt-hours and money: the arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from solollm.adapters import AdapterOptions
from solollm.backend import MemoryCosts, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.devices import device
from solollm.dial import preset
from solollm.drawing import Drawing, drawing_seconds, token_seconds
from solollm.forecast import copied_bytes_per_step, forecast, muon_flops, trained_flops

MODEL = preset("2.7b", 32_768)
ADAMW = SessionOptions(OptimizerTable(name="adamw"))
PLAN = Plan(4, False, "bfloat16", 2048, 64)
COSTS = MemoryCosts(0, 16, 1, 1, 0)


def test_a_resident_step_is_operations_over_the_rate() -> None:
    """Recomputing counted as useful work, or steps confused with tokens."""
    card = device("rtx-4090")
    told = forecast(MODEL, PLAN, card, COSTS, options=ADAMW, steps=100, price_per_kwh=0.1)
    step = MODEL.flops_per_token(2048) * 64 * 2048 / card.training_flops
    assert told.step_seconds == pytest.approx(step)
    assert told.tokens_per_second == pytest.approx(64 * 2048 / step)
    assert told.tokens == 100 * 64 * 2048
    assert told.kilowatt_hours == pytest.approx(card.watts * 100 * step / 3.6e6)
    assert told.money == pytest.approx(told.kilowatt_hours * 0.1)
    assert not told.is_measured
    again = replace(PLAN, activation_checkpointing=True)
    slower = forecast(MODEL, again, card, COSTS, options=ADAMW, steps=100, price_per_kwh=0.1)
    assert slower.step_seconds == pytest.approx(step * 4 / 3)


def test_copies_hide_behind_the_computation_only_where_they_overlap() -> None:
    """An offloaded step forecast at resident speed although the link is the limit."""
    card = device("rtx-4090")
    moved = {"micro-batch": 10**12, "update": 4 * 10**12}
    plan = replace(PLAN, batch_size=8)
    costs = replace(COSTS, traffic_bytes=moved)
    assert copied_bytes_per_step(costs, plan) == 6 * 10**12
    serial = forecast(MODEL, plan, card, costs, options=ADAMW, steps=1, price_per_kwh=0)
    assert serial.copy_seconds == pytest.approx(6e12 / card.link)
    assert serial.step_seconds == pytest.approx(serial.compute_seconds + serial.copy_seconds)
    hidden = replace(costs, overlaps_copies=True)
    beside = forecast(MODEL, plan, card, hidden, options=ADAMW, steps=1, price_per_kwh=0)
    assert beside.step_seconds == pytest.approx(max(beside.compute_seconds, beside.copy_seconds))


def test_a_measured_step_replaces_the_estimate() -> None:
    """A calibration that changes nothing."""
    told = forecast(
        MODEL,
        PLAN,
        device("h200"),
        COSTS,
        options=ADAMW,
        steps=3,
        price_per_kwh=0,
        step_seconds=7.0,
    )
    assert (told.seconds, told.is_measured) == (21.0, True)
    assert told.of_steps(6).seconds == 42.0
    assert told.of_steps(6).tokens == 2 * told.tokens


def test_muon_pays_for_its_orthogonalisations() -> None:
    """Small batches forecast as fast under Muon as under AdamW."""
    square = MODEL.model_copy(update={"num_hidden_layers": 1})
    assert muon_flops(square, ADAMW.optimizer) == 0
    expected = 0.0
    hidden, inter = square.hidden_size, square.intermediate_size
    for rows, columns in [(hidden, hidden)] * 4 + [(inter, hidden)] * 3:
        short, long = min(rows, columns), max(rows, columns)
        expected += 5 * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)
    assert muon_flops(square, OptimizerTable(name="muon")) == pytest.approx(expected)


def test_a_frozen_base_and_a_reference_change_the_operations() -> None:
    """A LoRA run planned with gradients of weights that it does not train; DPO without the forward
    passes of its reference."""
    full = trained_flops(MODEL, PLAN, ADAMW)
    adapter = replace(ADAMW, adapter=AdapterOptions(rank=8))
    assert trained_flops(MODEL, PLAN, adapter) == pytest.approx(full * 2 / 3)
    again = replace(PLAN, activation_checkpointing=True)
    assert trained_flops(MODEL, again, adapter) == pytest.approx(full)
    dpo = replace(ADAMW, objective="dpo", beta=0.1)
    head = 2 * MODEL.vocab_size * MODEL.hidden_size * 64 * 2048
    assert trained_flops(MODEL, PLAN, dpo) == pytest.approx(full + head)
    card = device("rtx-4090")
    told = forecast(MODEL, PLAN, card, COSTS, options=dpo, steps=1, price_per_kwh=0)
    assert told.reference_seconds == pytest.approx(full / 3 / card.training_flops)
    assert told.step_seconds == pytest.approx(told.compute_seconds + told.reference_seconds)
    without_kl = replace(ADAMW, objective="grpo")
    plain = forecast(MODEL, PLAN, card, COSTS, options=without_kl, steps=1, price_per_kwh=0)
    assert plain.reference_seconds == 0


def test_answers_are_drawn_at_the_speed_of_the_memory() -> None:
    """Rollouts planned at training speed, or as if every answer read the weights by itself."""
    card = device("rtx-4090")
    plan = replace(PLAN, seq_len=512)
    few = Drawing(answers=8, at_once=8, new_tokens=256, prompts=1)
    seconds = drawing_seconds(MODEL, few, plan, card)
    weights = 256 * token_seconds(MODEL, card, item_bytes=2.0) / card.decode_share.value
    assert weights < seconds < 3 * weights
    in_turns = few._replace(at_once=1)
    assert drawing_seconds(MODEL, in_turns, plan, card) > 3 * seconds
    many = few._replace(answers=512, at_once=64, prompts=64)
    assert drawing_seconds(MODEL, many, plan, card) > 8 * seconds
    told = forecast(
        MODEL, plan, card, COSTS, options=replace(ADAMW, objective="grpo"), steps=1,
        price_per_kwh=0, step_seconds=5.0, drawing=few,
    )  # fmt: skip
    assert told.step_seconds == pytest.approx(5.0 + seconds), "a measured step draws nothing"


def test_muon_multiplies_at_the_rate_of_its_dtype() -> None:
    """A plan for an H200 that takes fp32 products for as fast as bf16 ones: days too short."""
    muon = SessionOptions(OptimizerTable(name="muon"))
    card = device("h200")
    seconds = {}
    for dtype in ("float32", "bfloat16"):
        costs = replace(COSTS, update_dtype=dtype)
        told = forecast(MODEL, PLAN, card, costs, options=muon, steps=1, price_per_kwh=0)
        seconds[dtype] = told.step_seconds
    flops = muon_flops(MODEL, muon.optimizer)
    slower = flops / (67e12 * card.share.value) - flops / card.training_flops
    assert seconds["float32"] - seconds["bfloat16"] == pytest.approx(slower)
    mac = device("m4-max-64")
    assert mac.float32_training_flops == mac.training_flops
