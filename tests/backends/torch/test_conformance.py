"""The torch backend against the executable definition of a backend."""

from __future__ import annotations

import pytest
from solollm_torch.backend import TorchBackend

from solollm.testing.conformance import Case, cases

# Compiling takes a minute and has tests of its own.
CASES = cases(TorchBackend(), backend_options={"compile": False})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case) -> None:
    """See the docstring of the check that the case names."""
    case.run()
