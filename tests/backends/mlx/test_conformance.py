"""The MLX backend against the executable definition of a backend."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("mlx_lm", reason="these tests need mlx-lm")
from solollm_mlx.backend import MlxBackend

from solollm.testing.conformance import Case, cases

# That compiled equals eager bitwise is shown once, in test_session.py.
CASES = cases(MlxBackend(), backend_options={"compile": False})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case) -> None:
    """See the docstring of the check that the case names."""
    case.run()
