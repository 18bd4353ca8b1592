"""Backends with one planted fault each: the conformance suite must catch every one of them.

Every check has at least one mutant that it alone is asked to catch, so no check can rot into one
that always passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import (
    IGNORED,
    Batch,
    Capabilities,
    DictSource,
    Engine,
    EngineOptions,
    HostTensor,
    MemoryStats,
    PendingMetrics,
    Plan,
    Request,
    SessionOptions,
    Snapshot,
    StepMetrics,
    TensorSource,
    TokenEvent,
)
from solollm.errors import SoloLLMError
from solollm.preference import Scored
from solollm.testing.conformance import Case, cases
from solollm.testing.toy import ToyBackend, ToySession, ToySnapshot, _Done, _Forward
from solollm.testing.toy_engine import Running, ToyDecoder, ToyEngine

KILLS: list[tuple[str, ToyBackend]] = []


class Mutant(ToyBackend):
    """The toy backend with another session."""

    def __init__(self, session: type[ToySession]) -> None:
        self._session = session

    def train_session(self, model: ModelConfig, options: SessionOptions, plan: Plan) -> ToySession:
        return self._session(model, options, plan)


def caught_by(check: str) -> Callable[[type[ToySession]], type[ToySession]]:
    def register(session: type[ToySession]) -> type[ToySession]:
        KILLS.append((check, Mutant(session)))
        return session

    return register


def decoder_caught_by(check: str) -> Callable[[type[ToyDecoder]], type[ToyDecoder]]:
    """Register a session whose engines use this decoder."""

    def register(decoder: type[ToyDecoder]) -> type[ToyDecoder]:
        class WithDecoder(ToyEngine):
            def open(self) -> ToyDecoder:
                return decoder(self)

        class Session(ToySession):
            def engine(self, options: EngineOptions) -> ToyEngine:
                return WithDecoder(self.model, self.weights, options)

        Session.__name__ = decoder.__name__
        KILLS.append((check, Mutant(Session)))
        return decoder

    return register


def engine_caught_by(check: str) -> Callable[[type[ToyEngine]], type[ToyEngine]]:
    """Register a session that makes these engines."""

    def register(engine: type[ToyEngine]) -> type[ToyEngine]:
        class Session(ToySession):
            def engine(self, options: EngineOptions) -> ToyEngine:
                return engine(self.model, self.weights, options)

        Session.__name__ = engine.__name__
        KILLS.append((check, Mutant(Session)))
        return engine

    return register


# Loss, gradients, updates.


@caught_by("capabilities_are_plain_data")
class NoMemory(ToySession):
    def memory(self) -> MemoryStats:
        return MemoryStats(0, 0)


class NoDtype(ToyBackend):
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), train_dtypes=("bfloat16",))


KILLS.append(("capabilities_are_plain_data", NoDtype()))


@caught_by("initial_weights_are_the_cores")
class SeedIgnored(ToySession):
    def __init__(self, model: ModelConfig, options: SessionOptions, plan: Plan) -> None:
        super().__init__(model, replace(options, seed=0), plan)


@caught_by("loss_is_sum_over_denominator")
class MeanOverOwnTargets(ToySession):
    def loss_and_gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        return super().loss_and_gradients(replace(batch, denominator=float(batch.num_targets)))


@caught_by("loss_does_not_depend_on_micro_batch")
class MeanOfMeans(ToySession):
    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        parts = list(super().micro_batches(batch))
        for part in parts:
            yield replace(part, denominator=float(len(parts) * max(1, part.num_targets)))


@caught_by("token_logprobs_agree_with_eval")
class EvalIsAMean(ToySession):
    def eval_step(self, batch: Batch) -> tuple[float, int]:
        nll, targets = super().eval_step(batch)
        return nll / targets, targets


@caught_by("ignored_labels_count_nothing")
class IgnoredIsTokenZero(ToySession):
    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        for part in super().micro_batches(batch):
            yield replace(part, labels=np.where(part.labels == IGNORED, 0, part.labels))


@caught_by("token_weights_scale_targets")
class WeightsDropped(ToySession):
    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        return super().micro_batches(replace(batch, token_weights=None))


@caught_by("later_tokens_change_nothing_before")
class SeesTheNextToken(ToySession):
    def _forward(self, batch: Batch) -> _Forward:
        shifted = np.roll(batch.input_ids, -1, axis=1)
        return super()._forward(replace(batch, input_ids=shifted))


@caught_by("documents_do_not_see_each_other")
class SegmentsDropped(ToySession):
    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        return super().micro_batches(replace(batch, segment_ids=None))


@caught_by("context_within_a_document_counts")
class SeesOnlyItself(ToySession):
    def _forward(self, batch: Batch) -> _Forward:
        alone = np.broadcast_to(np.arange(batch.input_ids.shape[1]), batch.input_ids.shape)
        return super()._forward(replace(batch, segment_ids=alone))


@caught_by("batches_are_only_read")
class WritesToTheBatch(ToySession):
    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        batch.labels.flags.writeable = True
        batch.labels[batch.labels == IGNORED] = 0
        return super().train_step(batch, lr=lr)


@caught_by("training_lowers_the_loss")
class Ascends(ToySession):
    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        return super().train_step(batch, lr=-lr)


@caught_by("probe_and_eval_change_nothing")
class ProbeMovesMoments(ToySession):
    def probe_step(self, batch: Batch) -> StepMetrics:
        return self.train_step(batch, lr=0.0).result()


@caught_by("non_finite_batches_are_skipped_whole")
class NothingSkipped(ToySession):
    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        loss, gradients = self.loss_and_gradients(batch)
        self.optimizer.step(self.weights, gradients, lr=lr, updates=self.updates)
        self.updates += 1
        return _Done(StepMetrics(loss, 0.0, batch.num_targets, not np.isfinite(loss)))


@caught_by("non_finite_batches_are_skipped_whole")
class SkippedStepsCount(ToySession):
    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        pending = super().train_step(batch, lr=lr)
        self.updates += pending.result().skipped
        return pending


@caught_by("clipping_bounds_the_gradient_and_not_the_metric")
class NormAfterClipping(ToySession):
    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        metrics = super().train_step(batch, lr=lr).result()
        limit = self.table.clip_norm or metrics.grad_norm
        return _Done(metrics._replace(grad_norm=min(metrics.grad_norm, limit)))


@caught_by("updates_follow_the_formulas")
class NoBiasCorrection(ToySession):
    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        self.updates += 1000
        pending = super().train_step(batch, lr=lr)
        self.updates -= 1000
        return pending


@caught_by("updates_follow_the_formulas")
class DecaysNorms(ToySession):
    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        self.weights["model.norm.weight"] *= np.float32(1 - lr * self.table.weight_decay)
        return super().train_step(batch, lr=lr)


# What crosses and comes back.


@caught_by("specs_promise_what_is_yielded")
class SpecsInAnotherOrder(ToySession):
    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        specs = list(snapshot.parameter_specs())
        snapshot.parameter_specs = lambda: specs[::-1]  # type: ignore[method-assign]
        return snapshot


@caught_by("states_have_canonical_names")
class OwnNames(ToySession):
    def __init__(self, model: ModelConfig, options: SessionOptions, plan: Plan) -> None:
        super().__init__(model, options, plan)
        states = self.optimizer.states
        states["adam_step"] = np.zeros(1, np.float32)


@caught_by("export_import_export_is_bit_equal")
class UpdatesForgotten(ToySession):
    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        super().import_optimizer(source, {"updates": 0})


@caught_by("export_import_export_is_bit_equal")
class RoundsOnImport(ToySession):
    def import_parameters(self, source: TensorSource) -> None:
        super().import_parameters(source)
        for array in self.weights.values():
            array[...] = array.astype(np.float16)


@caught_by("import_takes_effect_after_a_step")
class TracedStep(ToySession):
    """The first step binds the arrays of that moment, as a compiled step does."""

    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        current = self.weights
        self.weights = self.__dict__.setdefault("traced", current)
        try:
            return super().train_step(batch, lr=lr)
        finally:
            self.weights = current

    def import_parameters(self, source: TensorSource) -> None:
        self.weights = {name: array.copy() for name, array in self.weights.items()}
        super().import_parameters(source)


@caught_by("resumed_equals_undisturbed")
class HiddenState(ToySession):
    """A warm-up of its own that no checkpoint knows."""

    steps_here = 0

    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        self.steps_here += 1
        return super().train_step(batch, lr=lr * min(1.0, self.steps_here / 4))


@caught_by("snapshot_stays_while_training_goes_on")
class LiveSnapshot(ToySession):
    def snapshot(self) -> Snapshot:
        return ToySnapshot(self.weights, dict(self.optimizer.states), self.session_state)


@caught_by("session_state_is_plain_and_counts_updates")
class NumpyCounter(ToySession):
    @property
    def session_state(self) -> Mapping[str, int | float]:
        return {"updates": np.int64(self.updates)}  # type: ignore[dict-item]


def lenient(source: TensorSource, known: Mapping[str, np.ndarray]) -> DictSource:
    """What is missing keeps its value, what is unexpected is passed over."""
    given = {name: source.read(name) for name in source.names() if name in known}
    kept = {name: HostTensor.of(array) for name, array in known.items()}
    return DictSource({**kept, **given})


@caught_by("wrong_parameters_are_named")
class LenientParameters(ToySession):
    def import_parameters(self, source: TensorSource) -> None:
        super().import_parameters(lenient(source, self.weights))


@caught_by("wrong_optimizer_states_are_named")
class LenientStates(ToySession):
    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        super().import_optimizer(lenient(source, self.optimizer.states), state)


@caught_by("half_precision_parameters_are_widened")
class HalfBitsAsIntegers(ToySession):
    def import_parameters(self, source: TensorSource) -> None:
        tensors = {name: source.read(name) for name in source.names()}
        super().import_parameters(
            DictSource({n: HostTensor.of(t.data.astype(np.float32)) for n, t in tensors.items()})
        )


# Generation.


@engine_caught_by("greedy_decode_follows_the_training_model")
class ForgetsContext(ToyEngine):
    def logprobs(self, ids: list[int]) -> np.ndarray:
        return super().logprobs(ids[-1:])


@caught_by("training_distribution_is_normalised")
class PartialSoftmax(ToySession):
    def token_logprobs(self, batch: Batch, *, adapter: bool = True) -> np.ndarray:
        logprobs = super().token_logprobs(batch)
        return np.where(batch.labels != IGNORED, logprobs + np.float32(0.05), logprobs)


@decoder_caught_by("batched_equals_one_by_one")
class SharedContext(ToyDecoder):
    """Every request after the first sees the first one's last token as its context."""

    def advance(self, entry: Running) -> TokenEvent:
        first = self.running[0]
        if entry is not first:
            entry.ids[-2:-1] = first.ids[-1:]
        return super().advance(entry)


@decoder_caught_by("requests_may_join_between_steps")
class JoiningRestarts(ToyDecoder):
    def step(self) -> list[TokenEvent]:
        if self._waiting:
            for entry in self.running:
                entry.ids.append(entry.ids[0])
        return super().step()


@decoder_caught_by("cancelled_requests_end_and_disturb_nobody")
class CancelDoesNothing(ToyDecoder):
    def cancel(self, request_id: int) -> None:
        pass


@decoder_caught_by("cancelled_requests_end_and_disturb_nobody")
class CancelTakesTheNeighbour(ToyDecoder):
    def cancel(self, request_id: int) -> None:
        super().cancel(request_id)
        super().cancel(request_id + 1)


@caught_by("padding_ids_are_never_sampled")
class PaddingSampled(ToySession):
    def engine(self, options: EngineOptions) -> ToyEngine:
        return super().engine(replace(options, vocab_size=0))


@decoder_caught_by("seeds_decide_and_neighbours_do_not")
class OneStreamForAll(ToyDecoder):
    def advance(self, entry: Running) -> TokenEvent:
        sampling = entry.request.sampling
        mixed = replace(sampling, seed=sampling.seed + len(self.running))
        entry.request = replace(entry.request, sampling=mixed)
        return super().advance(entry)


@decoder_caught_by("seeds_decide_and_neighbours_do_not")
class SeedIgnoredInSampling(ToyDecoder):
    def add(self, request: Request) -> int:
        return super().add(replace(request, sampling=replace(request.sampling, seed=0)))


@decoder_caught_by("requests_end_as_asked")
class StopIgnored(ToyDecoder):
    def add(self, request: Request) -> int:
        return super().add(replace(request, stop_ids=frozenset()))


@decoder_caught_by("requests_end_as_asked")
class OneTokenTooMany(ToyDecoder):
    def add(self, request: Request) -> int:
        return super().add(replace(request, max_new_tokens=request.max_new_tokens + 1))


@caught_by("generation_ends_at_the_engines_length")
class EndlessEngine(ToySession):
    def engine(self, options: EngineOptions) -> ToyEngine:
        return super().engine(replace(options, max_seq_len=10_000))


@decoder_caught_by("prompt_scores_equal_token_logprobs")
class ScoresShifted(ToyDecoder):
    def advance(self, entry: Running) -> TokenEvent:
        event = super().advance(entry)
        scores = event.prompt_scores
        if scores is not None:
            event = event._replace(
                prompt_scores=scores._replace(logprobs=np.roll(scores.logprobs, 1))
            )
        return event


@decoder_caught_by("logits_processors_are_obeyed")
class ProcessorsDropped(ToyDecoder):
    def add(self, request: Request) -> int:
        return super().add(replace(request, logits_processors=()))


@decoder_caught_by("impossible_requests_are_refused")
class TakesAnything(ToyDecoder):
    def _check(self, request: Request) -> None:
        pass


@caught_by("engine_reads_the_sessions_own_weights")
class StaleEngine(ToySession):
    def engine(self, options: EngineOptions) -> ToyEngine:
        copies = {name: array.copy() for name, array in self.weights.items()}
        return ToyEngine(self.model, self.__dict__.setdefault("first", copies), options)


class UntrainedEngine(ToyBackend):
    def engine(self, checkpoint: Path, options: EngineOptions) -> Engine:
        engine = super().engine(checkpoint, options)
        weights = dict(initial_parameters(engine.model, 1))
        return ToyEngine(engine.model, weights, options)


KILLS.append(("engine_of_a_checkpoint_equals_the_sessions", UntrainedEngine()))


# DPO and GRPO.


@caught_by("preference_losses_are_the_references")
class PairsTheOtherWayRound(ToySession):
    def _objective(self, batch: Batch, logprobs: np.ndarray) -> Scored:
        loss, slopes = super()._objective(batch, logprobs)
        return Scored(-loss, slopes)


@caught_by("preference_gradients_are_the_references")
class LossIsOnlyReported(ToySession):
    def _objective(self, batch: Batch, logprobs: np.ndarray) -> Scored:
        scored = super()._objective(batch, logprobs)
        return scored if batch.reference_logprobs is None else scored._replace(slopes=-logprobs)


@caught_by("preference_does_not_depend_on_micro_batch")
class PairsSplit(ToySession):
    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        parts = list(super().micro_batches(batch))
        for part in parts:
            yield replace(part, denominator=batch.denominator * len(parts))


@caught_by("preference_padding_counts_nothing")
class PaddingIsAPair(ToySession):
    def _objective(self, batch: Batch, logprobs: np.ndarray) -> Scored:
        loss, slopes = super()._objective(batch, logprobs)
        empty = (batch.labels == IGNORED).all(axis=1).sum()
        return Scored(loss + float(np.log(2) * empty / 2), slopes)


@caught_by("incomplete_preference_batches_are_refused")
class ReferenceIsZero(ToySession):
    def probe_step(self, batch: Batch) -> StepMetrics:
        if batch.reference_logprobs is None:
            zeros = np.zeros(batch.labels.shape, np.float32)
            batch = replace(batch, reference_logprobs=zeros)
        return super().probe_step(batch)


@caught_by("non_finite_preferences_are_skipped_whole")
class NansAreZeros(ToySession):
    def _objective(self, batch: Batch, logprobs: np.ndarray) -> Scored:
        loss, slopes = super()._objective(batch, logprobs)
        return Scored(float(np.nan_to_num(loss)), np.nan_to_num(slopes))


@caught_by("preference_training_lowers_the_loss")
class Uphill(ToySession):
    def _objective(self, batch: Batch, logprobs: np.ndarray) -> Scored:
        loss, slopes = super()._objective(batch, logprobs)
        return Scored(loss, slopes if batch.reference_logprobs is None else -slopes)


def fails(case: Case) -> bool:
    try:
        case.run()
    except (AssertionError, SoloLLMError, ValueError, IndexError):
        return True
    return False


def describe(value: object) -> str:
    if isinstance(value, Mutant):
        return value._session.__name__
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mutant may well divide by zero
@pytest.mark.parametrize(("check", "mutant"), KILLS, ids=describe)
def test_planted_fault_is_caught(check: str, mutant: ToyBackend) -> None:
    """A conformance check that lets the very fault through that it was written for."""
    of_check = [case for case in cases(mutant) if case.check.__name__ == check]
    assert any(fails(case) for case in of_check)


def test_every_check_has_a_mutant() -> None:
    """A new check that was never seen to fail."""
    checks = {case.check.__name__ for case in cases(ToyBackend())}
    assert checks == {check for check, _ in KILLS}


def test_every_check_says_what_it_guards() -> None:
    """A case that fails on a third party's machine, with no word of what is at stake."""
    for case in cases(ToyBackend()):
        assert (case.check.__doc__ or "").strip(), case.check.__name__
