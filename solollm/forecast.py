"""How long a training takes on a device, and what it uses: seconds, kilowatt-hours, money.

Plain arithmetic on a plan: operations over the rate that the device reaches, bytes over its link,
the slower of the two where copies run beside the computation. The rates are a calibration's where
there is one, else the device table's, and then the result is a projection. Memory is the planner's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import MemoryCosts, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.devices import Device
from solollm.drawing import Drawing, drawing_seconds, forward_flops

NEWTON_SCHULZ_STEPS = 5  # of Muon, as both backends take them
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Forecast:
    """One training on one device. Seconds are wall seconds, those of a step but for `seconds`;
    `rate_source` says where the rate of the device comes from, and `is_measured` whether it was
    measured there."""

    tokens: int
    tokens_per_second: float
    step_seconds: float
    compute_seconds: float
    copy_seconds: float
    reference_seconds: float
    drawing_seconds: float
    seconds: float
    kilowatt_hours: float
    money: float
    rate_source: str
    is_measured: bool

    def of_steps(self, steps: int) -> Forecast:
        """The same for another number of steps."""
        factor = steps * self.step_seconds / self.seconds
        return replace(
            self,
            tokens=round(self.tokens * factor),
            seconds=self.seconds * factor,
            kilowatt_hours=self.kilowatt_hours * factor,
            money=self.money * factor,
        )

    @property
    def hours(self) -> float:
        return self.seconds / _SECONDS_PER_HOUR


def forecast(
    model: ModelConfig,
    plan: Plan,
    device: Device,
    costs: MemoryCosts,
    *,
    options: SessionOptions,
    steps: int,
    price_per_kwh: float,
    step_seconds: float = 0.0,
    drawing: Drawing | None = None,
) -> Forecast:
    """What `steps` steps of a plan take. `step_seconds`, where measured, replaces the estimate of
    `train_step`; `drawing` is what GRPO adds to it."""
    tokens = plan.batch_size * plan.seq_len
    rate = device.training_flops
    compute = trained_flops(model, plan, options) / rate
    slow = costs.update_dtype == "float32" != device.compute_dtype
    compute += muon_flops(model, options.optimizer) / (
        device.float32_training_flops if slow else rate
    )
    reference = reference_flops(model, plan, options) / rate
    copies = copied_bytes_per_step(costs, plan) / device.link if device.link else 0.0
    estimated = max(compute, copies) if costs.overlaps_copies else compute + copies
    drawn = drawing_seconds(model, drawing, plan, device) if drawing else 0.0
    step = (step_seconds or estimated) + reference + drawn
    seconds = step * steps
    energy = device.watts * seconds / _SECONDS_PER_HOUR / 1000
    return Forecast(
        tokens=tokens * steps,
        tokens_per_second=tokens / step,
        step_seconds=step,
        compute_seconds=compute,
        copy_seconds=copies,
        reference_seconds=reference,
        drawing_seconds=drawn,
        seconds=seconds,
        kilowatt_hours=energy,
        money=energy * price_per_kwh,
        rate_source="steps of this shape on this machine" if step_seconds else device.share.source,
        is_measured=bool(step_seconds or device.measured_flops),
    )


def trained_flops(model: ModelConfig, plan: Plan, options: SessionOptions) -> float:
    """Operations of `train_step`: passes of a forward's size over its tokens (a frozen base needs
    no gradients of its weights), the head once more where the loss is made of log-probabilities.
    Muon's orthogonalisations come to it."""
    passes = 2.0 if options.adapter is not None else 3.0
    passes += plan.activation_checkpointing
    head = 0.0 if options.objective == "lm" else 2.0 * model.vocab_size * model.hidden_size
    tokens, forward = plan.batch_size * plan.seq_len, forward_flops(model, plan)
    return tokens * (passes * forward + head)


def reference_flops(model: ModelConfig, plan: Plan, options: SessionOptions) -> float:
    """Of the forward pass that DPO's reference takes per step, and that of GRPO's KL term. DPO
    keeps what it found: from the second epoch on there is none."""
    needed = options.objective == "dpo" or (options.objective == "grpo" and options.beta > 0)
    return needed * plan.batch_size * plan.seq_len * forward_flops(model, plan)


def copied_bytes_per_step(costs: MemoryCosts, plan: Plan) -> int:
    """Bytes that cross the link between host and card in one optimizer step, the busier way."""
    micro_batches = -(-plan.batch_size // plan.micro_batch_size)
    traffic: Mapping[str, int] = costs.traffic_bytes
    return traffic.get("micro-batch", 0) * micro_batches + traffic.get("update", 0)


def muon_flops(model: ModelConfig, table: OptimizerTable) -> float:
    """Operations of one update's orthogonalisations: per iteration the Gram matrix, its square and
    one product with the matrix (Jordan 2024). Zero for AdamW, whose update is memory traffic."""
    if table.name != "muon":
        return 0.0
    total = 0.0
    for spec in parameter_table(model):
        if spec.group == "matrix":
            short, long = sorted(spec.shape)
            total += 2.0 * (2 * short * short * long + short**3)
    return NEWTON_SCHULZ_STEPS * total
