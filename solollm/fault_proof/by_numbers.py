"""Steps whose numbers are none: skipped, undone, or too many of them.

Such a run does not end in the bits of the undisturbed one: a batch is left out. It is compared with
what leaving out that one batch gives.
"""

from __future__ import annotations

import math
import signal
from functools import partial

from solollm.checkpoint import open_checkpoint
from solollm.fault_proof.arming import break_step_and_kill, break_steps, half_apply_step
from solollm.fault_proof.ground import (
    BEFORE,
    SAVED,
    STEPS,
    Ends,
    Fault,
    Ground,
    ends_of,
    events,
    require,
    require_intact,
    require_said,
    saved,
    the_only,
)

_BAD = SAVED + 3


def _skipped(ground: Ground) -> str:
    run = ground.run(checkpoint={"every_steps": 1, "keep_latest": STEPS})
    bad = partial(break_steps, _BAD, _BAD)
    ground.resume(run, arm=bad)
    skipped = [row["step"] for row in events(run, "step_skipped")]
    require(skipped == [_BAD], f"skipped were {skipped}, not {_BAD} alone")
    digests = [open_checkpoint(saved(run, s)).certificate.digest for s in range(_BAD - 2, _BAD + 2)]
    require(digests[1] == digests[2], "the bad step has changed weights or optimizer")
    require(len(set(digests)) == 3, "the steps around it have changed nothing")
    ends = ends_of(run)
    require(ends.losses[_BAD] is None, f"the loss of the bad step is logged as {ends.losses[_BAD]}")
    _require_otherwise_finite(ends)
    killed = ground.run()
    kill = partial(break_step_and_kill, _BAD, _BAD + 1)
    ground.resume(killed, arm=kill, code=-signal.SIGKILL)
    ground.resume(killed, arm=bad)
    ground.same_end(killed, other=ends)
    return f"step {_BAD} changed no bit; killed and resumed, the same end"


def _undone(ground: Ground) -> str:
    run = ground.run()
    ground.resume(run, arm=partial(break_steps, _BAD, _BAD))
    around = ends_of(run)
    run = ground.run()
    ground.resume(run, arm=partial(half_apply_step, _BAD))
    back = the_only(events(run, "rolled_back"), "event rolled_back")
    require((back["step"], back["to_step"]) == (_BAD, SAVED), f"it went back so: {back}")
    losses = {step: loss for step, loss in around.losses.items() if step != _BAD}
    ground.same_end(run, other=around._replace(losses=losses))
    return f"back to step {SAVED}, around step {_BAD}, as if it had been skipped whole"


def _for_ever(ground: Ground) -> str:
    run = ground.run(checkpoint={"every_steps": STEPS})
    ended = ground.resume(run, arm=partial(break_steps, SAVED + 2, STEPS), code=1)
    require_said(ended, "10 steps in a row", "lower optimizer.lr")
    require_intact(run, BEFORE, SAVED)
    ground.goes_on(run)
    return f"exit code 1 after 10 of them; without the cause, went on from step {SAVED}"


def _require_otherwise_finite(ends: Ends) -> None:
    others = [loss for step, loss in ends.losses.items() if step != _BAD]
    finite = all(loss is not None and math.isfinite(loss) for loss in others)
    require(finite, f"other losses are broken too: {ends.losses}")


FAULTS = (
    Fault(
        "nan-step", "loss and gradients of one step are NaN",
        "the step is skipped whole and said; no bit of the state moves", _skipped,
    ),
    Fault(
        "half-applied-step", "a step is half applied before it proves to be NaN",
        "back to the last checkpoint, and around that batch", _undone,
    ),
    Fault(
        "nan-for-ever", "every step is NaN from one on",
        "exit code 1 after ten in a row, with the last good checkpoint; nothing broken is saved",
        _for_ever,
    ),
)  # fmt: skip
