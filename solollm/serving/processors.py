"""What a job changes in its logits, and what it wants to know of them; runs in the worker.

One `JobLogits` per job, given to the engine as its logits processor. It must never raise, because
a step is everybody's; a constraint that fails is noted in `error`, and the worker ends that job.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from solollm.serving.constraints import ConstraintMask
from solollm.serving.token_engine import TokenJob


class JobLogits:
    """Records the likeliest tokens, then applies bias, penalties and the constraint, in this order.

    Logits: float32 [V], padding ids at -inf.
    """

    def __init__(self, job: TokenJob, mask: ConstraintMask | None) -> None:
        self._job = job
        self._mask = mask
        self._prompt_length = len(job.prompt_ids)
        self._bias_ids = np.array(list(job.logit_bias), np.int64)
        self._bias = np.array(list(job.logit_bias.values()), np.float32)
        self._rows: dict[int, np.ndarray] = {}  # by place; an engine may run ahead of its events
        self._num_told = 0

    @property
    def error(self) -> str:
        """Why the job cannot go on; empty while it can."""
        return self._mask.error if self._mask else ""

    def __call__(self, ids: Sequence[int], logits: np.ndarray) -> np.ndarray:
        if self._job.top_logprobs:
            self._rows[len(ids)] = logits
        if any(self._job.penalties) or len(self._bias_ids):
            logits = logits.copy()
            logits[self._bias_ids] += self._bias
            self._penalise(ids, logits)
        return self._mask(ids, logits) if self._mask else logits

    def alternatives(self, token: int, logprob: float) -> list[tuple[int, float]]:
        """The likeliest ids with log p under the model, likeliest first, at the place of the next
        token to be told, `token`, which was chosen with `logprob`."""
        row = self._rows.pop(self._prompt_length + self._num_told, None)
        self._num_told += 1
        if row is None or token < 0:
            return []
        count = min(self._job.top_logprobs, len(row))
        best = np.argpartition(row, len(row) - count)[len(row) - count :]
        best = best[np.lexsort((best, -row[best]))]
        # The engine's own log-probability of the chosen token gives the normaliser exactly.
        normaliser = float(row[token]) - logprob
        return [(int(i), float(row[i]) - normaliser) for i in best if np.isfinite(row[i])]

    def _penalise(self, ids: Sequence[int], logits: np.ndarray) -> None:
        """OpenAI's: logit - count * frequency - (count > 0) * presence, over the new tokens."""
        frequency, presence = self._job.penalties
        new = np.asarray(ids[self._prompt_length :], np.int64)
        if not len(new) or not (frequency or presence):
            return
        seen, counts = np.unique(new, return_counts=True)
        logits[seen] -= (counts * frequency + presence).astype(np.float32)


def processors_of(job: TokenJob, mask: ConstraintMask | None) -> tuple[JobLogits, ...]:
    """The logits processors of a job; none where the device may choose by itself."""
    is_plain = not (job.top_logprobs or job.logit_bias or any(job.penalties) or mask)
    return () if is_plain else (JobLogits(job, mask),)
