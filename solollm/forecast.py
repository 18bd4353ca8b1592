"""How long a training takes on a device, and what it uses: seconds, kilowatt-hours, money.

Plain arithmetic on a plan: operations over the rate that the device reaches, bytes over its link,
the slower of the two where copies run beside the computation. The rates are a calibration's where
there is one, else the device table's, and then the result is a projection. Memory is the planner's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import MemoryCosts, Plan
from solollm.config import OptimizerTable
from solollm.devices import Device

NEWTON_SCHULZ_STEPS = 5  # of Muon, as both backends take them
_RECOMPUTED = 1 / 3  # of a step's operations: the forward pass, once more
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Forecast:
    """One training on one device. Seconds are wall seconds; `rate_source` says where the rate of
    the device comes from, and `is_measured` whether it was measured there."""

    tokens: int
    tokens_per_second: float
    step_seconds: float
    compute_seconds: float
    copy_seconds: float
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
    table: OptimizerTable,
    steps: int,
    price_per_kwh: float,
    step_seconds: float = 0.0,
) -> Forecast:
    """What `steps` steps of a plan take. `step_seconds`, where measured, replaces the estimate."""
    tokens = plan.batch_size * plan.seq_len
    operations = model.flops_per_token(plan.seq_len) * tokens
    recomputing = 1 + _RECOMPUTED * plan.activation_checkpointing
    rate = device.training_flops
    compute = operations * recomputing / rate + muon_flops(model, table) / rate
    copies = copied_bytes_per_step(costs, plan) / device.link if device.link else 0.0
    estimated = max(compute, copies) if costs.overlaps_copies else compute + copies
    step = step_seconds or estimated
    seconds = step * steps
    energy = device.watts * seconds / _SECONDS_PER_HOUR / 1000
    return Forecast(
        tokens=tokens * steps,
        tokens_per_second=tokens / step,
        step_seconds=step,
        compute_seconds=compute,
        copy_seconds=copies,
        seconds=seconds,
        kilowatt_hours=energy,
        money=energy * price_per_kwh,
        rate_source="steps of this shape on this machine" if step_seconds else device.share.source,
        is_measured=bool(step_seconds or device.measured_flops),
    )


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
