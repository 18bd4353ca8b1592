"""The quickstart's questions, and what it says of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from solollm import quickstart_tuning
from solollm.data.sources import standard_library_sources
from solollm.quickstart_tuning import docstring_pairs, tune

SOURCE = '''
def public():
    """Give back what was taken from somebody else. And more.

    Details.
    """

class Kept:
    """A thing that is kept for as long as it is needed"""

def _private():
    """Not to be asked about by anybody at all."""

def short():
    """Tiny."""
'''


def test_questions_are_about_public_names_and_answers_are_sentences(tmp_path: Path) -> None:
    """Guards: answers that are whole pages, private names, files that do not parse."""
    (tmp_path / "mine.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    assert [(pair.question, pair.answer) for pair in docstring_pairs(paths)] == [
        ("What does mine.public do?", "Give back what was taken from somebody else."),
        ("What does mine.Kept stand for?", "A thing that is kept for as long as it is needed."),
    ]


@pytest.mark.slow
def test_base_and_tuned_model_are_asked_the_same(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: questions that were learnt from among those that are asked; scores of one model
    only. A model that cannot tell answers apart is right by chance."""
    told: list[str] = []

    class Silent:
        def stage(self, title: str, why: str) -> None: ...
        def say(self, text: str) -> None:
            told.append(text)

        def command(self, arguments: Sequence[str], program: str = "solollm") -> None: ...
        def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None: ...
        def text(self, prompt: str, continuation: str) -> None: ...

    monkeypatch.setattr(quickstart_tuning, "_STEPS", 12)
    monkeypatch.setattr(quickstart_tuning, "_MAX_FILES", 60)
    monkeypatch.setattr(quickstart_tuning, "_ASKED", 6)
    tuned = tune(Silent(), tmp_path, base, "torch")
    pairs = list(docstring_pairs(standard_library_sources()[:60]))
    held_out = {pair.question for pair in pairs if pair.is_held_out}
    learnt = (tmp_path / "questions.jsonl").read_text(encoding="utf-8")
    assert len(held_out) > 6
    assert not any(question in learnt for question in held_out)
    assert tuned.pairs == len(pairs) - len(held_out)
    assert tuned.after.bits_per_byte < tuned.before.bits_per_byte
    assert any("told from three others: base" in line for line in told)
