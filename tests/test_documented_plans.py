"""The plans that documents show are those that `solollm plan` makes today."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from solollm.cli import command

pytest.importorskip("torch", reason="plans for cards come from the torch backend")
ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/results/claims.md", "docs/guides/recipes-for-benchmarks.md")
_BLOCK = re.compile(r"^```console\n(\$ solollm plan .*?)^```$", re.MULTILINE | re.DOTALL)


def _shown(pages: tuple[str, ...] = PAGES) -> list[tuple[str, list[str]]]:
    """(command, the lines of its output that are shown), of every page."""
    found = []
    for page in pages:
        for block in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
            first, *lines = block.strip().splitlines()
            found.append((first.removeprefix("$ "), [line for line in lines if line.strip()]))
    return found


def test_each_page_shows_plans() -> None:
    """The search below silently finding nothing."""
    assert len(_shown()) >= 8
    for page in PAGES:
        assert _shown((page,)), page
    assert all(shown for _, shown in _shown())


@pytest.mark.parametrize(("line", "shown"), _shown(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_shown_plan_is_todays(
    line: str, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure of a page that the planner no longer gives."""
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(command, shlex.split(line)[1:])
    printed = [" ".join(text.split()) for text in result.output.splitlines()]
    for text in shown:
        assert " ".join(text.split()) in printed, f"{line}:\n{result.output}"
