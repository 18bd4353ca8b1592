"""The answers that a step of GRPO draws from the model before it trains on them: how many, and how
long that takes on a device.

Every answer is taken to be as long as it may be, so a plan is an upper bound: how early a model
stops is known by drawing alone. What the drawing holds in memory is the backend's to say
(`Backend.rollout_bytes`); the planner sets it against the step's own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from solollm.architecture import ModelConfig
from solollm.backend import Plan
from solollm.config import RunConfig
from solollm.devices import Device

# Each token is chosen on the host from all logits, by the one reference in `sampling`: nanoseconds
# of one Zen 3 core per logit, as docs/results/plan.md has measured them.
_CHOICE_SECONDS_PER_LOGIT = 30e-9
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Drawing(NamedTuple):
    """`answers` of a step, so many of them `at_once`, to `prompts`; each of up to `new_tokens`."""

    answers: int
    at_once: int
    new_tokens: int
    prompts: int

    @property
    def rounds(self) -> int:
        """How often every weight is read for it."""
        return math.ceil(self.answers / self.at_once) * self.new_tokens


def drawing_of(config: RunConfig, batch_size: int, seq_len: int) -> Drawing | None:
    """What a step of this config draws; None where it draws nothing."""
    if config.finetune is None or config.finetune.objective != "grpo":
        return None
    table = config.finetune.grpo
    return Drawing(
        answers=batch_size,
        at_once=min(table.rollout_batch_size, batch_size),
        new_tokens=min(table.max_new_tokens, seq_len),
        prompts=max(1, batch_size // table.group_size),
    )


def forward_flops(model: ModelConfig, plan: Plan) -> float:
    """Per token: a third of forward and backward."""
    return model.flops_per_token(plan.seq_len) / 3


def token_seconds(model: ModelConfig, device: Device, *, item_bytes: float) -> float:
    """The least that one token of one sequence takes: the weights that multiply, read once."""
    return item_bytes * model.num_matrix_parameters() / device.bandwidth


def drawing_seconds(model: ModelConfig, drawing: Drawing, plan: Plan, device: Device) -> float:
    """Of one step: prompts are read once per group; then the weights, and what is cached, are read
    once per round, or multiplied with, whichever takes longer; then each token is chosen."""
    item = _ITEM_BYTES[plan.compute_dtype]
    forward = forward_flops(model, plan)
    prompt_tokens = max(1, plan.seq_len - drawing.new_tokens)
    reading = drawing.prompts * prompt_tokens * forward / device.training_flops
    cached = 2 * item * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    held = drawing.at_once * cached * (prompt_tokens + drawing.new_tokens / 2)
    weights = item * model.num_matrix_parameters()
    moved = (weights + held) / (device.bandwidth * device.decode_share.value)
    multiplied = drawing.at_once * forward / device.training_flops
    chosen = drawing.at_once * model.vocab_size * _CHOICE_SECONDS_PER_LOGIT
    return reading + drawing.rounds * (max(moved, multiplied) + chosen)
