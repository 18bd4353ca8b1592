"""Conformance checks of what crosses the seam and comes back; see `solollm.testing.conformance`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping

import numpy as np

from solollm.architecture import parameter_table
from solollm.backend import BITS_DTYPE, DictSource, HostTensor, TrainSession
from solollm.errors import IntegrityError
from solollm.optim_codec import num_blocks, state_dtype
from solollm.testing.bench import (
    Bench,
    State,
    lively_parameters,
    make_batch,
    require,
    require_close,
    require_same,
    require_same_state,
    state_of,
    train,
)


def take_over(session: TrainSession, state: State) -> None:
    """Import all of a state."""
    session.import_parameters(DictSource(state.parameters))
    session.import_optimizer(DictSource(state.optimizer), state.session_state)


def specs_promise_what_is_yielded(bench: Bench) -> None:
    """A file's header is written from the specs: another order or shape spoils the file."""
    session = bench.session()
    train(session, range(1))
    snapshot = session.snapshot()
    for specs, tensors in (
        (snapshot.parameter_specs(), snapshot.parameters()),
        (snapshot.optimizer_specs(), snapshot.optimizer()),
    ):
        yielded = []
        for name, tensor in tensors:
            yielded.append((name, tensor.dtype, tuple(tensor.shape)))
            require(tensor.data.dtype == BITS_DTYPE[tensor.dtype], f"{name}: other bits")
            require(tensor.data.shape == tuple(tensor.shape), f"{name}: data of another shape")
            require(bool(tensor.data.flags.c_contiguous), f"{name}: not contiguous")
        promised = [(name, dtype, tuple(shape)) for name, dtype, shape in specs]
        require(promised == yielded, "specs and tensors differ")
    snapshot.close()


def states_have_canonical_names(bench: Bench) -> None:
    """A run moves between backends by these names, dtypes and shapes."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for spec in parameter_table(bench.model):
        muon = bench.table.name == "muon" and spec.group == "matrix"
        dtype = state_dtype(spec.shape, spec.group, bench.table.state_bits)
        for state in ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq"):
            expected[f"{state}.{spec.name}"] = (dtype, spec.shape)
            if dtype == "U8":
                expected[f"{state}.{spec.name}.absmax"] = ("F32", (num_blocks(spec.shape),))
    found = {n: (t.dtype, t.shape) for n, t in state_of(bench.session()).optimizer.items()}
    require(found == expected, f"other states: {sorted(found.items() ^ expected.items())[:4]}")


def export_import_export_is_bit_equal(bench: Bench) -> None:
    """A transposed, rounded, renamed or forgotten tensor; a counter that starts anew."""
    source = bench.session()
    train(source, range(3))
    state = state_of(source)
    target = bench.session(seed=99)
    take_over(target, state)
    require_same_state(state_of(target), state, "after export and import")


def import_takes_effect_after_a_step(bench: Bench) -> None:
    """The compiled-step trap: a step traced before the import goes on with the old arrays."""
    late, early = bench.session(), bench.session()  # one seed: it decides stochastic rounding
    train(late, range(2))
    late.eval_step(make_batch(70))
    donor = bench.session(seed=3)
    donor.import_parameters(DictSource(lively_parameters(bench.model)))
    train(donor, range(5, 8))
    state = state_of(donor)
    for session in (late, early):
        take_over(session, state)
    require(late.eval_step(make_batch(70)) == early.eval_step(make_batch(70)), "old weights used")
    require(train(late, [2]) == train(early, [2]), "the step after a late import differs")
    require_same_state(state_of(late), state_of(early), "a late import against an early one")


def resumed_equals_undisturbed(bench: Bench) -> None:
    """Anything that a checkpoint leaves out changes the bits of the next step."""
    straight, first = bench.session(), bench.session()
    losses = train(straight, range(6))
    train(first, range(3))
    state, settings = state_of(first), first.settings
    first.close()
    second = bench.session(settings=settings)  # a run keeps its seed; its weights are others yet
    second.import_parameters(DictSource(lively_parameters(bench.model)))
    take_over(second, state)
    require(train(second, range(3, 6)) == losses[3:], "metrics differ after a resume")
    require_same_state(state_of(second), state_of(straight), "resumed against undisturbed")


def snapshot_stays_while_training_goes_on(bench: Bench) -> None:
    """A snapshot that shows the live arrays: a checkpoint mixed from two steps."""
    session = bench.session()
    train(session, range(2))
    expected, snapshot = state_of(session), session.snapshot()
    collected: dict[str, dict[str, HostTensor]] = {}

    def collect() -> None:
        for label, pairs in (("p", snapshot.parameters()), ("o", snapshot.optimizer())):
            collected[label] = {n: t._replace(data=t.data.copy()) for n, t in pairs}

    train(session, [2])
    reader = threading.Thread(target=collect)
    reader.start()
    train(session, [3, 4])
    reader.join()
    require(len(collected) == 2, "the snapshot could not be read on another thread")
    require_same(collected["p"], expected.parameters, "a snapshot's parameters")
    require_same(collected["o"], expected.optimizer, "a snapshot's optimizer state")
    require(dict(snapshot.session_state) == expected.session_state, "a snapshot's session_state")
    snapshot.close()


def session_state_is_plain_and_counts_updates(bench: Bench) -> None:
    """A counter that is a tensor, or counts skipped steps: bias correction off after a resume."""
    session = bench.session()
    require(session.session_state["updates"] == 0, "a fresh session has applied updates")
    train(session, range(3))
    state = dict(session.session_state)
    require(state["updates"] == 3, f"updates {state['updates']} after 3 steps")
    kinds = {type(value) for value in state.values()}
    require(kinds <= {int, float}, f"session_state holds {kinds}")
    require(json.loads(json.dumps(state)) == state, "session_state does not survive JSON")


def wrong_parameters_are_named(bench: Bench) -> None:
    """A tensor silently left at its initial value, or read in another shape."""
    session = bench.session()
    tensors = dict(state_of(session).parameters)
    name = "model.layers.1.mlp.up_proj.weight"
    wrong_parameters_are_named_in(session.import_parameters, tensors, name)


def wrong_optimizer_states_are_named(bench: Bench) -> None:
    """A moment silently left at zero restarts the optimizer in the middle of a run."""
    session = bench.session()
    state = state_of(session)

    def take(source: DictSource) -> None:
        session.import_optimizer(source, state.session_state)

    wrong_parameters_are_named_in(take, dict(state.optimizer), "exp_avg_sq.model.norm.weight")


def wrong_parameters_are_named_in(
    take: Callable[[DictSource], None], tensors: Mapping[str, HostTensor], name: str
) -> None:
    """`take` refuses `tensors` without `name`, with one too many, and with `name` in another
    shape, each by the name; then it takes them."""
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    extra = HostTensor.of(np.zeros(3, np.float32))
    faults = {
        "missing": (missing, name),
        "unexpected": ({**tensors, "model.nothing.weight": extra}, "model.nothing.weight"),
        "misshapen": ({**tensors, name: extra}, name),
    }
    for fault, (faulty, expected) in faults.items():
        try:
            take(DictSource(faulty))
        except IntegrityError as error:
            require(expected in str(error), f"{fault}: {expected} is not named in: {error}")
        else:
            raise AssertionError(f"a source with a {fault} tensor was taken")
    take(DictSource(tensors))


def half_precision_parameters_are_widened(bench: Bench) -> None:
    """Foreign checkpoints are bf16: read as fp32 bits, or refused, none could be continued."""
    session = bench.session()
    tensors = {}
    for name, tensor in state_of(session).parameters.items():
        bits = (tensor.float32().view(np.uint32) >> 16).astype(np.uint16)
        tensors[name] = HostTensor("BF16", tensor.shape, bits)
    session.import_parameters(DictSource(tensors))
    for name, tensor in state_of(session).parameters.items():
        same = np.array_equal(tensor.float32(), tensors[name].float32())
        require(same, f"{name} is not the widened bf16 tensor")
    loss = session.probe_step(make_batch()).loss
    require_close(loss, float(np.log(bench.model.vocab_size)), 0.2, "loss of rounded weights")


CHECKS = (
    specs_promise_what_is_yielded,
    states_have_canonical_names,
    export_import_export_is_bit_equal,
    import_takes_effect_after_a_step,
    resumed_equals_undisturbed,
    snapshot_stays_while_training_goes_on,
    session_state_is_plain_and_counts_updates,
    wrong_parameters_are_named,
    wrong_optimizer_states_are_named,
    half_precision_parameters_are_widened,
)
