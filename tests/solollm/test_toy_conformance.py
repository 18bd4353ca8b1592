"""The toy backend passes the conformance suite."""

from __future__ import annotations

import pytest

from solollm.testing.conformance import Case, cases
from solollm.testing.toy import ToyBackend


@pytest.mark.parametrize("case", cases(ToyBackend()), ids=str)
def test_conformance(case: Case) -> None:
    """See the docstring of the check that the case names."""
    case.run()
