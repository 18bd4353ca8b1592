"""Steps of a run that has not begun, so that they can be timed: what `train.hours` needs to know.

A step is taken as the run will take it: from the weights that it starts with, and with what its
objective does besides training. DPO's reference is measured with every step, as in a run's first
epoch; GRPO's answers are drawn and rewarded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from solollm.backend import Backend, TrainSession
from solollm.config import RunConfig
from solollm.finetune.objectives import give_what_needs_weights
from solollm.finetune.preference import PairStream
from solollm.horizon import Rehearse, session_options
from solollm.run_streams import open_streams
from solollm.starting_weights import StartingWeights, bring_base


def rehearsal(config: RunConfig, backend: Backend, weights: StartingWeights | None) -> Rehearse:
    """How a run of `config`, which starts from `weights`, takes its steps."""

    @contextmanager
    def begin(
        session: TrainSession, rows: int, seq_len: int
    ) -> Iterator[Callable[[float], object]]:
        streams = open_streams(config, batch_size=rows, seq_len=seq_len)
        _bring_weights(session, config, backend, weights)
        rollouts = None
        if not isinstance(streams.first, PairStream):
            rollouts = give_what_needs_weights(config, streams, session, at_start=True)
        counter = itertools.count()

        def step(lr: float) -> None:
            number = next(counter)
            batch = streams.first.batch(number)
            if isinstance(streams.first, PairStream):
                reference = session.token_logprobs(batch, adapter=False)
                batch = replace(batch, reference_logprobs=reference)
            if rollouts is not None:
                batch = rollouts.batch(number, batch)
            session.train_step(batch, lr=lr).result()

        try:
            yield step
        finally:
            if rollouts is not None:
                rollouts.close()

    return begin


def _bring_weights(
    session: TrainSession, config: RunConfig, backend: Backend, weights: StartingWeights | None
) -> None:
    adapter = session_options(config, backend).adapter
    if adapter is not None:
        assert weights is not None, "an adapter has a base"
        bring_base(session, weights, adapter, backend)
    elif weights is not None:
        session.import_parameters(weights.parameters())
