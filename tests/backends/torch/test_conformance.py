"""The torch backend against the executable definition of a backend."""

from __future__ import annotations

import pytest
from solollm_torch.backend import TorchBackend

from solollm.testing.conformance import Case, cases

# Compiling takes a minute and has tests of its own.
CASES = cases(TorchBackend(), backend_options={"compile": False})
# `Decoder.rotary` keeps a table that an engine made under inference_mode, and the next training
# step with QK-norm cannot save it for backward; to go when the table is made outside that mode.
KNOWN = "engine_reads_the_sessions_own_weights[untied-adamw-32bit]"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case, request: pytest.FixtureRequest) -> None:
    """See the docstring of the check that the case names."""
    if str(case) == KNOWN:
        request.applymarker(pytest.mark.xfail(raises=RuntimeError))
    case.run()
