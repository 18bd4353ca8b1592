"""What the streams of DPO and GRPO need of a session before they can be trained on."""

from __future__ import annotations

from pathlib import Path

from solollm.backend import TrainSession
from solollm.config import RunConfig
from solollm.finetune.preference import PairStream, bring_reference
from solollm.finetune.rewards import require_same_reward
from solollm.finetune.rollouts import PromptStream, Rollouts
from solollm.finetune.samples import tokenizer_of_samples
from solollm.run_streams import RunStreams

_AHEAD = 2  # batches past the last step that a certificate may look at


def give_references(
    config: RunConfig, streams: RunStreams, session: TrainSession, *, at_start: bool
) -> None:
    """Bring the reference of pairs; nothing for other runs. `at_start`: the session's weights are
    those that the run begins with. Raises IntegrityError for a reference that is gone."""
    splits = (streams.train, streams.validation)
    pairs = [stream for stream in splits if isinstance(stream, PairStream)]
    if pairs:
        steps = ((config.train.steps or 0) + _AHEAD, config.eval.batches)[: len(pairs)]
        bring_reference(Path(config.data.corpus), pairs, session, steps=steps, may_measure=at_start)


def give_what_needs_weights(
    config: RunConfig, streams: RunStreams, session: TrainSession, *, at_start: bool
) -> Rollouts | None:
    """Bring the reference of pairs, or make the rollouts of prompts; nothing for other runs.
    `at_start`: the session's weights are those that the run begins with.

    Raises:
        IntegrityError: a reference that is gone, or a reward other than the run began with.
        ConfigError: a reward that cannot be had.
    """
    give_references(config, streams, session, at_start=at_start)
    table, splits = config.finetune, (streams.train, streams.validation)
    if table is None or table.objective != "grpo":
        return None
    assert config.data.seq_len is not None, "the config is resolved"
    tokenizer = tokenizer_of_samples(Path(config.data.corpus))
    require_same_reward(table.grpo, Path(config.data.corpus), may_write=session.rank == 0)
    rollouts = Rollouts(
        session, tokenizer, table.grpo, seed=config.train.seed, seq_len=config.data.seq_len
    )
    for stream in splits:
        if isinstance(stream, PromptStream):
            stream.scorer = rollouts
    return rollouts
