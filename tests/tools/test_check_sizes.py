"""The size check counts what it says it counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).resolve().parents[2] / "tools" / "check_sizes.py"
_SPEC = importlib.util.spec_from_file_location("tools_check_sizes", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
sizes = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sizes)

_DEEP = """def f(a):
    for x in a:
        if x:
            while x:
                try:
                    pass
                finally:
                    pass
"""
_FLAT = """def f(a):
    for x in a:
        if x == 1:
            pass
        elif x == 2:
            with x:
                pass
        elif x == 3:
            with x:
                pass
        else:
            with x:
                pass
"""
_INNER = """def f(a):
    for x in a:
        if x:
            def g():
                for y in x:
                    if y:
                        pass
"""


def _found(source: str, path: str = "solollm/x.py") -> list[str]:
    return list(sizes.check(path, source))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x = 1\n" * 401, "401 lines; a file has at most 400"),
        ("def f():\n" + "    x = 1\n" * 60, "`f` has 61 lines"),
        (_DEEP, "`f` nests 4 deep"),
        ("def f(a, b, c, d, e): pass", "`f` takes 5 positional"),
        ("class C:\n    async def f(self, a, b, c, /, d, e): pass", "`f` takes 5 positional"),
    ],
)
def test_too_big_is_found(source: str, problem: str) -> None:
    """A limit that is off by one, or does not look at methods and async functions."""
    (found,) = _found(source)
    assert problem in found


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\n" * 400,
        "def f():\n" + "    x = 1\n" * 59,
        _FLAT,
        _INNER,
        "class C:\n    def f(self, a, b, c, d, *, e, f): pass",
        "@click.command('x')\ndef f(a, b, c, d, e): pass",
    ],
)
def test_just_small_enough_passes(source: str) -> None:
    """`elif` counted as nesting, `self` as a parameter, an inner function's blocks twice."""
    assert _found(source) == []


def test_an_excuse_needs_a_reason() -> None:
    """`# sizes:` as a switch instead of an explanation."""
    assert _found("def f(a, b, c, d, e): pass  # sizes: mirrors the C function") == []
    assert len(_found("def f(a, b, c, d, e): pass  # sizes:")) == 1


def test_a_file_may_excuse_itself_and_tests_may_be_longer() -> None:
    """Two files that only make sense together, torn apart for a number."""
    assert _found("# sizes: one table\n" + "x = 1\n" * 400) == []
    assert _found("x = 1\n" * 700, "tests/test_x.py") == []
    assert len(_found("x = 1\n" * 701, "tests/test_x.py")) == 1


def test_fixtures_are_not_counted() -> None:
    """A test that asks for five fixtures."""
    assert _found("def test_f(a, b, c, d, e): pass", "tests/test_x.py") == []
