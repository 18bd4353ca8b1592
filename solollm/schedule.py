"""lr(step): a pure function, so that a resumed run needs no scheduler state.

`step` counts from 0 and is the step about to be taken. Warm-up rises linearly and reaches the peak
on its last step; a decay ends on the last step at `final_fraction` of the peak.

- `wsd`: warm-up, flat, linear decay over the last `decay_fraction` (Hu et al. 2024, MiniCPM,
  arXiv:2404.06395). The decay stage may read a second corpus: see `decay_start`.
- `cosine`, `linear`: warm-up, then decay over all that is left.
"""

from __future__ import annotations

import math

from solollm.config import ScheduleTable


def warmup_steps(total_steps: int, table: ScheduleTable) -> int:
    """How many of the first steps warm up."""
    return round(table.warmup_fraction * total_steps)


def decay_start(total_steps: int, table: ScheduleTable) -> int:
    """The first step of the decay; `total_steps` if there is none. Warm-up wins where they meet."""
    warmup = warmup_steps(total_steps, table)
    if table.name != "wsd":
        return warmup
    return max(warmup, total_steps - round(table.decay_fraction * total_steps))


def lr_at(step: int, *, total_steps: int, peak_lr: float, table: ScheduleTable) -> float:
    """The learning rate of `step`; a step past the end gets the last one's."""
    if total_steps <= 1:  # a single step would be all decay and learn next to nothing
        return peak_lr
    step = min(step, total_steps - 1)
    warmup, start = warmup_steps(total_steps, table), decay_start(total_steps, table)
    if step < warmup:
        return peak_lr * (step + 1) / warmup
    if step < start:
        return peak_lr
    progress = (step + 1 - start) / (total_steps - start)
    if table.name == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    return peak_lr * (1.0 - progress * (1.0 - table.final_fraction))
