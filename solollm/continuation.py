"""What comes next: measured where a run stops, and measured again where it goes on.

A checkpoint's digests prove that its bytes arrived; they cannot prove that another machine or
backend computes the same with them. So a stopped or packed run says what the next two batches are,
what its weights make of them, and how large the next gradient is (`solollm.certificate`); who goes
on with it computes the same first, and refuses where the numbers part. Where the same machine goes
on with the same settings they must be equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from solollm.backend import Batch, TrainSession
from solollm.certificate import Continuation
from solollm.checkpoint import Environment, add_continuation
from solollm.data.stream import StepStream, batch_digest
from solollm.errors import BackendError, IntegrityError, SoloLLMError

# Largest relative deviation of two backends or machines, by the coarser compute dtype of both.
# float32 is the numerics contract's (docs/design.md, section 4). The others are some times what
# `tools/measure_bands.py` found on CPUs (docs/results/migration.md: 8e-5 and 2.5e-3); on cards and
# Apple GPUs they are still to be measured.
BANDS: Mapping[str, float] = {"float32": 2e-4, "float16": 1e-3, "bfloat16": 1e-2}
# Of losses where a frozen base is quantised by another codec than before (NF4, affine codes): what
# docs/results/migration.md found, with a margin. The gradient's norm is not compared then: near a
# minimum it is little more than the difference of the two bases' roundings.
REQUANTISED_BAND = 0.1
_SMALLEST = 1e-2  # a loss or norm below this counts as this: rounding does not shrink with it


class Comparison(NamedTuple):
    """How far a continuation is from the promised one. `deviation` is relative, the largest of
    all; `place` says where it is; 0 of `tolerance` means equal bits."""

    deviation: float
    tolerance: float
    place: str

    @property
    def holds(self) -> bool:
        return self.deviation <= self.tolerance

    def __str__(self) -> str:
        if self.deviation == 0:
            return "equal to the bit"
        return f"{self.place} deviates by {self.deviation:.1e}, {self.tolerance:.0e} is allowed"


def dry_run(session: TrainSession, batch: Batch, step: int) -> None:
    """One step that changes nothing, so that running out of memory or broken numbers show in
    seconds and not after an hour. Raises BackendError."""
    metrics = session.probe_step(batch)
    _require_finite(step, metrics.loss, metrics.grad_norm)


def look_ahead(session: TrainSession, stream: StepStream, step: int) -> Continuation:
    """What comes after `step` steps, at the session's weights; changes nothing.

    Raises:
        BackendError: a loss or the gradient norm is not finite.
    """
    first, second = stream.batch(step), stream.batch(step + 1)
    metrics = session.probe_step(first)
    nll, targets = session.eval_step(second)
    losses = (metrics.loss, nll / max(1, targets))
    _require_finite(step, *losses, metrics.grad_norm)
    return Continuation(
        batches=(batch_digest(first), batch_digest(second)),
        losses=losses,
        grad_norm=metrics.grad_norm,
    )


def promise(checkpoint: Path | None, session: TrainSession, stream: StepStream, step: int) -> str:
    """Say in the certificate of a finished checkpoint what comes next. Returns the problem where
    that cannot be done, and leaves the checkpoint as it is: it can be resumed all the same.
    None: another rank writes it, with this one's help."""
    try:
        found = look_ahead(session, stream, step)
        if checkpoint is not None:
            add_continuation(checkpoint, found)
    except SoloLLMError as error:
        return str(error)
    return ""


def tolerance_between(before: Environment, now: Environment, *, same_machine: bool) -> float:
    """How far a continuation in `now` may be from one in `before`: not at all on the same machine
    with the same settings, unless the session says that its kernels are not repeatable."""
    is_repeatable = before.settings.get("deterministic", True)
    if same_machine and before == now and is_repeatable:
        return 0.0
    widest = max(BANDS.values())
    return max(BANDS.get(e.compute_dtype, widest) for e in (before, now))


def compare(
    promised: Continuation,
    found: Continuation,
    *,
    step: int,
    tolerance: float,
    is_requantised: bool = False,
) -> Comparison:
    """How far `found` is from what was `promised` after `step` steps. `is_requantised`: a frozen
    base is held in other codes than then.

    Raises:
        IntegrityError: the batches are not the promised ones.
    """
    for number, (here, there) in enumerate(zip(found.batches, promised.batches, strict=True), 1):
        if here != there:
            raise IntegrityError(
                f"batch {step + number} is not the one that this run stopped before",
                why=f"its digest is {here}, the certificate says {there}",
                fix="resume with the run's own corpus",
            )
    deviations = {
        f"the loss of step {step + 1}": _deviation(found.losses[0], promised.losses[0]),
        f"the loss of batch {step + 2}": _deviation(found.losses[1], promised.losses[1]),
    }
    if is_requantised:
        tolerance = max(tolerance, REQUANTISED_BAND)
    else:
        norm = _deviation(found.grad_norm, promised.grad_norm)
        deviations[f"the gradient norm of step {step + 1}"] = norm
    place = max(deviations, key=lambda name: deviations[name])
    return Comparison(deviations[place], tolerance, place)


def require_continuation(comparison: Comparison, checkpoint: str) -> None:
    """Raise IntegrityError unless the comparison holds."""
    if comparison.holds:
        return
    allowed = f"{comparison.tolerance:.0e} is" if comparison.tolerance else "nothing is"
    raise IntegrityError(
        f"{checkpoint} does not go on here as it would have where it was made",
        why=f"{comparison.place} deviates by {comparison.deviation:.1e} (relative), {allowed}"
        " allowed",
        fix="go on where it was made, or with another --backend; `solollm verify migration` tells"
        " which backends of this machine agree",
    )


def _deviation(found: float, promised: float) -> float:
    return abs(found - promised) / max(abs(promised), _SMALLEST)


def _require_finite(step: int, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        shown = ", ".join(f"{value:.6g}" for value in values)
        raise BackendError(
            f"the dry run of step {step + 1} is not finite: loss and gradient norm {shown}",
            why="the weights or the numerics are broken before any training",
            fix="check --init-from, or train with --set train.compute_dtype=float32",
        )
