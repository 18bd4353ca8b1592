"""GRPO's batches: answers that the session's own weights give, rewarded and laid out in rows.

Which prompts a step takes is a pure function of the step; what is made of them depends on the
weights, and on random bits that are counted by (seed, step, prompt, sample). So a resumed run draws
the same answers again, and nothing of them is kept. Every answer is trained on once, right after it
was drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from solollm.backend import (
    IGNORED,
    Batch,
    EngineOptions,
    Request,
    SamplingParams,
    TrainSession,
)
from solollm.config import GrpoTable
from solollm.finetune.packing import SampleStream
from solollm.finetune.rewards import Answered, Scorer
from solollm.generation import Completion, generate
from solollm.held_out import Score
from solollm.tokenizer import Tokenizer

_WIDTH_STEP = 64  # rows are as long as their longest answer, in steps of this
_SMALLEST_DEVIATION = 1e-4  # as TRL adds it


class Prompt(NamedTuple):
    """`ids` up to where the last answer begins; `answer`: the right one, as text."""

    ids: tuple[int, ...]
    answer: str


class PromptStream(SampleStream):
    """Prompts with their right answers, in rows that a session could train on as they are: what a
    certificate measures, since two machines may draw different answers."""

    scorer: Rollouts | None = None

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        ones, zeros = (np.full(batch.labels.shape, value, np.float32) for value in (1, 0))
        return replace(batch, advantages=ones, reference_logprobs=zeros)

    def score(self, session: TrainSession, batch: Batch) -> Score:
        """The reward of one greedy answer per held-out prompt; as a loss it is 1 - reward."""
        assert self.scorer is not None, "held-out prompts are answered by the run's own rollouts"
        rewards = self.scorer.greedy_rewards(batch)
        total = float(sum(rewards))
        return Score(len(rewards) - total, len(rewards), {"reward": total})


class Rollouts:
    """Turns the prompts of a step into its batch. `facts`: of the last one, for the run's log."""

    def __init__(
        self, session: TrainSession, tokenizer: Tokenizer, table: GrpoTable, *, seed: int,
        seq_len: int,
    ) -> None:  # fmt: skip
        self.facts: dict[str, float] = {}
        self._session, self._tokenizer, self._table = session, tokenizer, table
        self._seed, self._seq_len = seed, seq_len
        self._scorer = Scorer(table)

    def batch(self, step: int, prompts: Batch) -> Batch:
        """`group_size` answers to each prompt, one a row."""
        asked = prompts_of(prompts, self._tokenizer)
        size = self._table.group_size
        requests = [
            self._request(prompt, request_seed(self._seed, step, number, sample))
            for number, prompt in enumerate(asked)
            for sample in range(size)
        ]
        answers = self._generated(requests)
        rewards = self._rewards(asked, answers, size)
        self._note(rewards, answers)
        advantages = group_advantages(rewards, size, self._table.scale_rewards).ravel()
        rows = [(r.prompt_ids, a.ids, float(v)) for r, a, v in zip(requests, answers, advantages,
                                                                   strict=True)]  # fmt: skip
        batch = laid_out(rows, len(prompts.labels) * size, self._table)
        if self._table.beta:
            reference = self._session.token_logprobs(batch, adapter=False)
            batch = replace(batch, reference_logprobs=reference)
        return batch

    def greedy_rewards(self, prompts: Batch) -> list[float]:
        """The reward of the most likely answer to each prompt."""
        asked = prompts_of(prompts, self._tokenizer)
        answers = self._generated([self._request(prompt, None) for prompt in asked])
        return [float(reward) for reward in self._rewards(asked, answers, 1)]

    def close(self) -> None:
        self._scorer.close()

    def _request(self, prompt: Prompt, seed: int | None) -> Request:
        sampling = SamplingParams() if seed is None else SamplingParams(temperature=1.0, seed=seed)
        room = self._seq_len + 1 - len(prompt.ids)
        return Request(
            prompt.ids, min(self._table.max_new_tokens, room), sampling, self._tokenizer.stop_ids
        )

    def _generated(self, requests: Sequence[Request]) -> list[Completion]:
        options = EngineOptions(
            max_batch_size=self._table.rollout_batch_size, vocab_size=self._tokenizer.vocab_size
        )
        engine = self._session.engine(options)
        try:
            return generate(engine, requests)
        finally:
            engine.close()

    def _rewards(
        self, asked: Sequence[Prompt], answers: Sequence[Completion], size: int
    ) -> np.ndarray:
        decode = self._tokenizer.decode
        return np.array(
            self._scorer.rewards(
                [
                    Answered(
                        decode(asked[k // size].ids), decode(a.text_ids), asked[k // size].answer
                    )
                    for k, a in enumerate(answers)
                ]
            )
        )

    def _note(self, rewards: np.ndarray, answers: Sequence[Completion]) -> None:
        groups = rewards.reshape(-1, self._table.group_size)
        self.facts = {
            "reward": float(rewards.mean()),
            "reward_std": float(groups.std(axis=1).mean()),
            "groups_alike": float((groups == groups[:, :1]).all(axis=1).mean()),
            "answer_tokens": float(np.mean([len(a.ids) for a in answers])),
            "answers_cut": float(np.mean([a.finish_reason == "length" for a in answers])),
            "reward_timeouts": float(self._scorer.timeouts),
        }


def request_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """The random bits of one answer, the same at every time it is drawn; below 2^32."""
    counted = f"{seed}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(counted, digest_size=4).digest(), "little")


def prompts_of(batch: Batch, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompt of every row that has a target: all that stands before its last answer."""
    found = []
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        targets = np.flatnonzero(labels != IGNORED)
        if not len(targets):
            continue
        breaks = np.flatnonzero(np.diff(targets) > 1)
        first = int(targets[breaks[-1] + 1]) if len(breaks) else int(targets[0])
        answer = tokenizer.decode(labels[first : int(targets[-1]) + 1].tolist())
        found.append(Prompt(tuple(ids[: first + 1].tolist()), answer))
    return found


def group_advantages(rewards: np.ndarray, size: int, scale: str) -> np.ndarray:
    """float64 [groups, size]: how much better than its group each answer is; `scale` as TRL's
    `scale_rewards`: by the deviation of the group, of the batch, or not at all."""
    groups = rewards.reshape(-1, size).astype(np.float64)
    better: np.ndarray = groups - groups.mean(axis=1, keepdims=True)
    deviation: np.ndarray | float = 1.0
    if scale == "group":
        deviation = groups.std(axis=1, ddof=1, keepdims=True) + _SMALLEST_DEVIATION
    elif scale == "batch":
        deviation = float(groups.std(ddof=1)) + _SMALLEST_DEVIATION
    scaled: np.ndarray = better / deviation
    return scaled


def laid_out(
    rows: Sequence[tuple[Sequence[int], Sequence[int], float]], num_rows: int, table: GrpoTable
) -> Batch:
    """(prompt ids, answer ids, advantage) in rows; the weights and the denominator are those of the
    table's `loss_type`. Rows that nobody fills have no target."""
    longest = max(len(prompt) + len(answer) - 1 for prompt, answer, _ in rows)
    shape = (num_rows, -(-longest // _WIDTH_STEP) * _WIDTH_STEP)
    input_ids, labels = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
    advantages, weights = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    segment_ids = np.zeros(shape, np.int32)
    for place, (prompt, answer, advantage) in enumerate(rows):
        first, stop = len(prompt) - 1, len(prompt) + len(answer) - 1
        input_ids[place, :stop] = [*prompt, *answer][:-1]
        labels[place, first:stop] = answer
        advantages[place, first:stop] = advantage
        weights[place, first:stop] = 1 / len(answer) if table.loss_type == "grpo" else 1
        segment_ids[place, stop:] = 1
    denominators = {
        "dapo": float((labels != IGNORED).sum()),
        "grpo": float(len(rows)),
        "dr_grpo": float(len(rows) * table.max_new_tokens),
    }
    return Batch(
        input_ids=input_ids, labels=labels, denominator=denominators[table.loss_type],
        segment_ids=segment_ids, token_weights=weights, advantages=advantages,
    )  # fmt: skip
