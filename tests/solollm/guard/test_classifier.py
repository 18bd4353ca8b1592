"""A classifier of the user's: asked at sentences' ends, within its time, whatever it does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from solollm.errors import ConfigError
from solollm.guard.classifier import Classifier, ClassifierFilter
from solollm.guard.notices import Notices
from solollm.guard.settings import ClassifierTable
from solollm.serving.text_filter import let_through

SOURCE = """\
import time

def judge(text):
    print("noise on standard output")
    if "hang" in text:
        time.sleep(60)
    if "crash" in text:
        raise SystemExit(3)
    return 0.9 if "bad" in text else 0.1
"""


@pytest.fixture
def classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Classifier]:
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    made = Classifier(ClassifierTable(function="mine:judge", timeout_seconds=5))
    yield made
    made.close()


def filtered(classifier: Classifier, pieces: list[str]) -> tuple[str, str | None]:
    judge = ClassifierFilter(classifier.is_bad, Notices(is_silent=True), late_is_bad=False)
    return let_through(judge, pieces)


def test_a_bad_sentence_is_never_shown(classifier: Classifier) -> None:
    """A verdict that comes when the sentence has been read already."""
    text = "All is well. This is bad! No more"
    assert filtered(classifier, [text]) == ("All is well. ", "content_filter")
    assert filtered(classifier, list(text)) == ("All is well. ", "content_filter")
    assert filtered(classifier, ["Good. Fine"]) == ("Good. Fine", None)


@pytest.mark.parametrize("trouble", ["hang", "crash"])
def test_one_that_hangs_or_dies_comes_back(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that waits for ever, or whose classifier is gone after one bad text."""
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    made = Classifier(ClassifierTable(function="mine:judge", timeout_seconds=2))
    try:
        assert made.is_bad(trouble) is None
        deadline = time.monotonic() + 60
        while (verdict := made.is_bad("bad")) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert verdict is True
    finally:
        made.close()


def test_one_that_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt name that silently guards nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Classifier(ClassifierTable(function="nowhere_at_all:judge"))
