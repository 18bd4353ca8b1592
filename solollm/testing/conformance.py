"""What a backend is, as checks that anybody's backend can run.

    import pytest
    from solollm.testing.conformance import cases

    @pytest.mark.parametrize("case", cases(MyBackend()), ids=str)
    def test_conformance(case):
        case.run()

A case is one check of one variant: tied and untied heads, every optimizer and state width that
`capabilities` names. Its check's docstring says which bug it guards. A failed case raises
AssertionError with the values. Nothing here needs pytest or a framework; a whole run takes seconds
on a CPU. The checks themselves are in `conformance_training` (loss, gradients, updates),
`conformance_state` (what crosses and comes back), `conformance_engine` (generation) and, where
`capabilities` names them, `conformance_adapters` (a frozen base with an adapter) and
`conformance_preference` (DPO and GRPO).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from solollm.adapters import AdapterOptions
from solollm.architecture import ModelConfig
from solollm.backend import Backend, Objective
from solollm.config import OptimizerTable
from solollm.testing import (
    conformance_adapters,
    conformance_engine,
    conformance_preference,
    conformance_state,
    conformance_training,
)
from solollm.testing.bench import QUANTISABLE, TIED, UNTIED, Bench

Check = Callable[[Bench], None]
_PREFERENCES: tuple[tuple[Objective, float, float], ...] = (("dpo", 0.2, 0.1), ("grpo", 0.05, 0.0))


@dataclass(frozen=True)
class Case:
    """One check of one variant of one backend."""

    check: Check
    bench: Bench

    def __str__(self) -> str:
        return f"{self.check.__name__}[{self.bench}]"

    def run(self) -> None:
        """Raises AssertionError, or whatever the backend raised, if the check fails."""
        self.check(self.bench)


def cases(
    backend: Backend, *, backend_options: Mapping[str, bool | int | float | str] | None = None
) -> list[Case]:
    """Every case of a backend. `backend_options` go into each session (such as `compile`).

    What concerns the model is checked with both heads, what concerns optimizer state with every
    optimizer, and adapters with every kind of base.
    """
    capabilities = backend.capabilities()
    variants = [(n, b) for n in capabilities.optimizers for b in capabilities.state_bits]
    options = dict(backend_options or {})

    def bench(model: ModelConfig, variant: tuple[str, int]) -> Bench:
        name, bits = variant
        table = OptimizerTable.model_validate(
            {"name": name, "state_bits": bits, "momentum_warmup_steps": 4}
        )
        return Bench(backend, model, table, options)

    of_model = (*conformance_training.MODEL_CHECKS, *conformance_engine.CHECKS)
    of_state = (*conformance_training.OPTIMIZER_CHECKS, *conformance_state.CHECKS)
    result = [Case(c, bench(model, variants[0])) for model in (TIED, UNTIED) for c in of_model]
    for index, variant in enumerate(variants):
        model = (UNTIED, TIED)[index % 2]
        result += [Case(check, bench(model, variant)) for check in of_state]
    adamw = OptimizerTable(name="adamw")
    preferences = [
        Bench(
            backend, UNTIED, adamw, options, objective=objective, beta=beta,
            label_smoothing=smoothing,
        )
        for objective, beta, smoothing in _PREFERENCES
        if objective in capabilities.objectives
    ]  # fmt: skip
    result += [Case(c, b) for b in preferences for c in conformance_preference.CHECKS]
    for kind in capabilities.adapters:
        quantised = kind.startswith("qlora")
        adapter = AdapterOptions(rank=4, alpha=8.0, base_bits=4 if quantised else None)
        tuned = Bench(backend, QUANTISABLE if quantised else UNTIED, adamw, options, adapter)
        result += [Case(check, tuned) for check in conformance_adapters.CHECKS]
        if not quantised:
            of_adapter = [replace(one, adapter=adapter) for one in preferences]
            result += [Case(c, b) for b in of_adapter for c in conformance_preference.CHECKS]
    return result
