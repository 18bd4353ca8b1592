"""`--quality`: the published rules, each at its limit, and against plain counting."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from solollm.data.build import build_corpus
from solollm.data.intake import Screening
from solollm.data.quality import LEAST_WORDS, RULES, QualityRules, TextMeasures, judge
from solollm.data.report import render_report
from solollm.errors import ConfigError

_NAMES = [
    "the", "harbour", "and", "of", "that", "river", "have", "with", "be", "to", "mountain",
    "cathedral", "orchard", "lantern", "winter", "sailor", "bridge", "market", "evening", "stone",
    "garden", "music", "letter", "window", "forest", "candle", "island",
]  # fmt: skip


def prose(words: int, seed: int = 1) -> str:
    """Sentences without a repetition that anybody would mind."""
    generator = random.Random(seed)
    chosen = [
        f"{generator.choice(_NAMES)}{generator.choice(['', 's', 'ly'])}" for _ in range(words)
    ]
    lines = [" ".join(chosen[at : at + 12]) + "." for at in range(0, words, 12)]
    return "The point of it: it is to be read, and to be kept.\n" + "\n".join(lines)


def _with(phrase: str) -> str:
    """Prose that says it in every line of a dozen words."""
    return "\n".join(f"{line} {phrase}" for line in prose(96).splitlines())


def _reason(text: str, rules: QualityRules) -> str:
    failed = judge(text, RULES[rules])
    return failed.reason if failed else ""


@pytest.mark.parametrize("seed", range(8))
def test_prose_is_kept(seed: int) -> None:
    """Guards against rules that drop what they are meant for."""
    for rules in RULES:
        assert _reason(prose(400, seed), rules) == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the " * 3, "fewer than 50 words"),
        (prose(100_001), "more than 100,000 words"),
        (" ".join("abcdefghijklmnopqrstuvwxyz" * 4), "words too short on average"),
        (" ".join(f"{n:0>9}abcdef" for n in range(99)), "words too long on average"),
        ("# " * 30 + prose(99), "too many #"),
        ("... " * 30 + prose(99), "too many ellipses"),
        ("\n".join(f"- {line}" for line in prose(200).splitlines()),
         "nearly all lines are bullet points"),
        ("\n".join(f"{line} so on…" for line in prose(200).splitlines()),
         "too many lines end in an ellipsis"),
        (prose(99) + " 1234" * 99, "too many words without a letter"),
        ("Die Katze saß auf dem Dach, " + " ".join(f"wort{n}" for n in range(90)),
         "no English prose: common words missing"),
        ("\n".join([*prose(200).splitlines(), *["Home"] * 12]), "repeated lines"),
        ("\n".join([*prose(200).splitlines(), *[prose(200).splitlines()[3]] * 5]),
         "text in repeated lines"),
        ("\n\n".join([*prose(96).splitlines(), *["A\nB.", "C\nD."] * 4]), "repeated lines"),
        (_with("extraordinarily cheaper"), "the same 2 words again and again"),
        (_with("better cheaper faster"), "the same 3 words again and again"),
        (_with("only three left now"), "the same 4 words again and again"),
        (_with("now you may see it too"), "text in repeated runs of 5 words"),
    ],
)  # fmt: skip
def test_each_rule_of_gopher(text: str, reason: str) -> None:
    """Guards every rule by a text that keeps the ones before it."""
    assert _reason(text, "gopher") == reason


def test_what_the_other_sets_add() -> None:
    """Guards web pages and code, and that repetition alone asks for no language."""
    menu = prose(99) + "\n" + "\n".join(f"entry{n} of it" for n in range(300))
    assert _reason(menu, "fineweb") == "too few lines end as sentences do"
    short = "\n".join(" ".join(pair) + "." for pair in pairwise(prose(400).split()))
    assert _reason(short, "fineweb") == "too many short lines"
    code = "def f(x):\n    return x\n" * 9
    assert _reason(code, "code") == ""
    assert _reason(code + "x = '" + "a" * 1000 + "'", "code") == "a line of over 1,000 characters"
    assert _reason("a" * 101 + "\n" + "b" * 102, "code") == "lines too long on average"
    assert _reason("{}();" * 9 + "\n" + "}" * 9, "code") == "too few letters and digits"
    german = "Die Katze saß auf dem Dach, " + " ".join(f"wort{n}" for n in range(90))
    assert _reason(german, "repetition") == ""
    assert _reason("日本語のテスト" * 20, "repetition") == "the same 2 words again and again"


@pytest.mark.parametrize("width", [2, 3, 4, 5, 7, 10])
@pytest.mark.parametrize("seed", range(4))
def test_runs_against_plain_counting(width: int, seed: int) -> None:
    """Guards the vectors of hashes by lists of words."""
    generator = random.Random(seed)
    words = generator.choices(["ab", "cde", "f", "ghij", "é2"], k=200)
    words[40:60] = words[10:30]
    runs = [tuple(words[at : at + width]) for at in range(len(words) - width + 1)]
    most = max(map(runs.count, runs))
    top = 0 if most == 1 else most * max(
        len("".join(run)) for run in runs if runs.count(run) == most
    )  # fmt: skip
    covered: set[int] = set()
    for at, run in enumerate(runs):
        if run in runs[:at]:
            covered.update(range(at, at + width))
    total = len("".join(words))
    measures = TextMeasures(" ".join(words).replace("cde ab", "CDE, ab!"))
    assert measures.top_run(width) == pytest.approx(top / total)
    repeated = sum(len(words[at]) for at in covered)
    assert measures.repeated_runs(width) == pytest.approx(repeated / total)


def test_short_texts_are_not_judged_by_runs() -> None:
    """Guards short questions: two equal runs in thirty words are chance."""
    short = "He has three apples and she has three apples"
    assert len(short.split()) < LEAST_WORDS
    assert _reason(short, "repetition") == ""
    assert _reason("apple\n" * 9, "repetition") == "repeated lines"


@pytest.mark.parametrize("text", ["x", "!!!", "\n\n", "…", "#" * 99, "  \t", "\u200b" * 60])
def test_odd_texts_end_no_build(text: str) -> None:
    """Guards divisions by nothing."""
    for rules in RULES.values():
        for rule in rules:
            assert rule.measure(TextMeasures(text)) >= 0


def test_hostile_text_takes_linear_time() -> None:
    """Guards against patterns that try everything: a megabyte each, in seconds."""
    for piece in ("1", "\n \n", "\n" + " " * 999, "a ", "...", "é", "語", "- \n"):
        judge(piece * (2**20 // len(piece)), RULES["fineweb"])
        for rule in (*RULES["gopher"], *RULES["code"]):
            rule.measure(TextMeasures(piece * (2**20 // len(piece))))


def test_a_build_says_what_it_left_out(tmp_path: Path) -> None:
    """Guards the record, the count and the words."""
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(6):
        (notes / f"{number}.txt").write_text(prose(300, number))
    (notes / "menu.txt").write_text("Home\nAbout\nContact")
    screening = Screening(quality="gopher")
    report = build_corpus([notes], tmp_path / "c", vocab_size=512, screening=screening)
    assert (report.items, report.kept) == (7, 6)
    assert report.dropped["fewer than 50 words"].count == 1
    (line,) = (tmp_path / "c" / "quality.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "source": "notes/menu.txt", "place": "", "reason": "fewer than 50 words", "value": 3,
        "limit": 50, "beginning": "Home\nAbout\nContact",
    }  # fmt: skip
    told = (
        "fewer than 50 words\n            notes/menu.txt  3, the limit is 50:  Home About Contact"
    )
    assert told in render_report(report)


def test_records_show_masked_text(tmp_path: Path) -> None:
    """Guards a leak beside the corpus: what is left out was masked before."""
    (tmp_path / "a.txt").write_text(prose(300))
    (tmp_path / "b.txt").write_text("Write to ada@engine.org.")
    sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
    screening = Screening(private="mask", quality="gopher")
    build_corpus(sources, tmp_path / "c", vocab_size=512, screening=screening)
    assert "Write to [email]." in (tmp_path / "c" / "quality.jsonl").read_text()
    assert "ada@" not in (tmp_path / "c" / "report.json").read_text()


def test_unknown_rules_are_refused(tmp_path: Path) -> None:
    """Guards a slip from Python."""
    (tmp_path / "a.txt").write_text(prose(300))
    with pytest.raises(ConfigError, match="no quality rules 'gofer'"):
        build_corpus(
            [tmp_path / "a.txt"], tmp_path / "c",
            screening=Screening(quality="gofer"),  # type: ignore[arg-type]
        )  # fmt: skip
    assert not (tmp_path / "c").exists()
