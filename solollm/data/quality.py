"""Rules of thumb for text that is worth training on: published ones, each text measured by them.

    gopher      Rae et al. 2021, arXiv:2112.11446, table A1 and appendix A.1.1: for English prose
    repetition  the part of it that looks for repetition alone: for any language
    fineweb     gopher, and the rules that Penedo et al. 2024, arXiv:2406.17557, add for web pages
    code        Chen et al. 2021, arXiv:2107.03374, with the limits of later corpora of code

The rules know nothing of what a text says. Words are what blanks part, but for runs of words, which
are counted without punctuation and case (`solollm.data.shingles`), so that scripts without blanks
have them too. In a text of fewer than 50 words two equal runs are much of it: they are not counted
there, and what is left of such a text is judged by its lines and paragraphs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Literal, NamedTuple, get_args

import numpy as np

from solollm.data.items import excerpt
from solollm.data.records import Records
from solollm.data.screening import LeftOut
from solollm.data.shingles import Runs, split_words
from solollm.errors import ConfigError

QUALITY_NAME = "quality.jsonl"
QualityRules = Literal["gopher", "repetition", "fineweb", "code"]
_COMMON_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "‣", "▪", "●", "◦", "-", "*")
_ELLIPSES = ("...", "…")
_CLOSING = (".", "!", "?", '"', "'", "”", "’", "。", "！", "？")  # noqa: RUF001 - of lines
_PUNCTUATION = ".,;:!?\"'()[]{}“”‘’"  # noqa: RUF001 - around words
_SHORT_LINE = 30
LEAST_WORDS = 50  # of a text whose runs of words are counted
_PARAGRAPHS = re.compile(r"\n\s*\n")


class TextMeasures:
    """What the rules ask of a text, each computed when it is asked for, and shares from 0 to 1."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._distinct_from = 1 << 62  # the width from which on no run of words is there twice

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Those that are not blank, without the blanks around them."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in _PARAGRAPHS.split(self.text) if part.strip()]

    def num_words(self) -> float:
        return len(self.words)

    def mean_word_length(self) -> float:
        return _share(sum(map(len, self.words)), len(self.words))

    def hashes_per_word(self) -> float:
        return _share(self.text.count("#"), len(self.words))

    def ellipses_per_word(self) -> float:
        return _share(sum(map(self.text.count, _ELLIPSES)), len(self.words))

    def bullet_lines(self) -> float:
        return _share(sum(line.startswith(_BULLETS) for line in self.lines), len(self.lines))

    def ellipsis_lines(self) -> float:
        return _share(sum(line.endswith(_ELLIPSES) for line in self.lines), len(self.lines))

    def closed_lines(self) -> float:
        """Lines that end as sentences do."""
        return _share(sum(line.endswith(_CLOSING) for line in self.lines), len(self.lines))

    def short_lines(self) -> float:
        return _share(sum(len(line) < _SHORT_LINE for line in self.lines), len(self.lines))

    def lettered_words(self) -> float:
        """Words with a letter in them."""
        return _share(
            sum(word.isalpha() or any(map(str.isalpha, word)) for word in self.words),
            len(self.words),
        )

    def common_words(self) -> float:
        """How many of eight English words are there."""
        found: set[str] = set()
        for word in self.words:
            bare = word.strip(_PUNCTUATION).lower()
            if bare in _COMMON_WORDS:
                found.add(bare)
                if len(found) == len(_COMMON_WORDS):
                    break
        return len(found)

    def mean_line_length(self) -> float:
        lines = self.text.splitlines()
        return _share(sum(map(len, lines)), len(lines))

    def longest_line(self) -> float:
        return max(map(len, self.text.splitlines()), default=0)

    def letters_and_digits(self) -> float:
        return _share(sum(map(str.isalnum, self.text)), len(self.text))

    def repeated_lines(self) -> float:
        return _repeated(self.lines).share

    def repeated_line_characters(self) -> float:
        return _repeated(self.lines).characters

    def repeated_paragraphs(self) -> float:
        return _repeated(self.paragraphs).share

    def repeated_paragraph_characters(self) -> float:
        return _repeated(self.paragraphs).characters

    def top_run(self, width: int) -> float:
        """The share of all letters and digits that the most frequent run of words makes up."""
        found = self._repeats(width)
        if found is None:
            return 0.0
        counts = np.bincount(found.which)
        starts = found.first[counts == counts.max()]
        longest = int((self._ends[starts + width] - self._ends[starts]).max())
        return _share(int(counts.max()) * longest, int(self._ends[-1]))

    def repeated_runs(self, width: int) -> float:
        """The share of all letters and digits in runs of words that stood there before."""
        found = self._repeats(width)
        if found is None:
            return 0.0
        (again,) = np.nonzero(found.first[found.which] < np.arange(len(found.which)))
        # Runs overlap; a word counts once.
        edges = np.zeros(len(self._ends), np.int64)
        edges[again] += 1
        edges[again + width] -= 1
        is_repeated = np.cumsum(edges)[:-1] > 0
        return _share(int(np.diff(self._ends)[is_repeated].sum()), int(self._ends[-1]))

    def _repeats(self, width: int) -> _Repeats | None:
        """None: no run of words is there twice, or the text is too short to make much of one."""
        runs = self._runs.of(width)
        if len(runs) + width - 1 < LEAST_WORDS or width >= self._distinct_from:
            return None
        _, first, which = np.unique(runs, return_index=True, return_inverse=True)
        if len(first) == len(runs):
            self._distinct_from = width  # and so are wider ones
            return None
        return _Repeats(first, which)

    @cached_property
    def _split(self) -> tuple[Runs, np.ndarray]:
        hashes, lengths = split_words(self.text)
        ends = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=ends[1:])
        return Runs(hashes), ends

    @property
    def _runs(self) -> Runs:
        return self._split[0]

    @property
    def _ends(self) -> np.ndarray:
        """int64 [words + 1]: letters and digits before each word, and all of them."""
        return self._split[1]


class _Repeats(NamedTuple):
    """Distinct runs of words: where each first stands, and which of them each run is."""

    first: np.ndarray
    which: np.ndarray


class Rule(NamedTuple):
    """A text is left out for `reason` if `measure` gives less than `least` or more than `most`."""

    reason: str
    measure: Callable[[TextMeasures], float]
    least: float = -np.inf
    most: float = np.inf


class Failed(NamedTuple):
    """The first rule that a text does not keep, and what was measured."""

    reason: str
    value: float
    limit: float


_PROSE = (
    Rule(f"fewer than {LEAST_WORDS} words", TextMeasures.num_words, least=LEAST_WORDS),
    Rule("more than 100,000 words", TextMeasures.num_words, most=100_000),
    Rule("words too short on average", TextMeasures.mean_word_length, least=3),
    Rule("words too long on average", TextMeasures.mean_word_length, most=10),
    Rule("too many #", TextMeasures.hashes_per_word, most=0.1),
    Rule("too many ellipses", TextMeasures.ellipses_per_word, most=0.1),
    Rule("nearly all lines are bullet points", TextMeasures.bullet_lines, most=0.9),
    Rule("too many lines end in an ellipsis", TextMeasures.ellipsis_lines, most=0.3),
    Rule("too many words without a letter", TextMeasures.lettered_words, least=0.8),
    Rule("no English prose: common words missing", TextMeasures.common_words, least=2),
)
_REPETITION = (
    Rule("repeated lines", TextMeasures.repeated_lines, most=0.30),
    Rule("repeated paragraphs", TextMeasures.repeated_paragraphs, most=0.30),
    Rule("text in repeated lines", TextMeasures.repeated_line_characters, most=0.20),
    Rule("text in repeated paragraphs", TextMeasures.repeated_paragraph_characters, most=0.20),
    *(
        Rule(
            f"the same {width} words again and again",
            partial(TextMeasures.top_run, width=width), most=most,
        )
        for width, most in ((2, 0.20), (3, 0.18), (4, 0.16))
    ),
    *(
        Rule(
            f"text in repeated runs of {width} words",
            partial(TextMeasures.repeated_runs, width=width), most=most,
        )
        for width, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    ),
)  # fmt: skip
_PAGES = (
    Rule("too few lines end as sentences do", TextMeasures.closed_lines, least=0.12),
    Rule("too many short lines", TextMeasures.short_lines, most=0.67),
    Rule("text in repeated lines", TextMeasures.repeated_line_characters, most=0.10),
)
_CODE = (
    Rule("lines too long on average", TextMeasures.mean_line_length, most=100),
    Rule("a line of over 1,000 characters", TextMeasures.longest_line, most=1000),
    Rule("too few letters and digits", TextMeasures.letters_and_digits, least=0.25),
)
RULES: dict[QualityRules, tuple[Rule, ...]] = {
    "gopher": (*_PROSE, *_REPETITION),
    "repetition": _REPETITION,
    "fineweb": (*_PROSE, *_PAGES, *_REPETITION),
    "code": _CODE,
}


def judge(text: str, rules: Iterable[Rule]) -> Failed | None:
    """The first rule that the text does not keep; None: it keeps them all."""
    measures = TextMeasures(text)
    for rule in rules:
        value = rule.measure(measures)
        if value < rule.least:
            return Failed(rule.reason, value, rule.least)
        if value > rule.most:
            return Failed(rule.reason, value, rule.most)
    return None


class Quality:
    """The screen of one build, and its record."""

    def __init__(self, rules: QualityRules, records: Records) -> None:
        if rules not in RULES:
            raise ConfigError(
                f"there are no quality rules {rules!r}",
                fix=f"choose among {', '.join(get_args(QualityRules))}",
            )
        self._rules, self.records = RULES[rules], records

    def take(self, text: str, source: str, place: str) -> str | LeftOut:
        failed = judge(text, self._rules)
        if failed is None:
            return text
        beginning = excerpt(text)
        self.records.add(
            {
                "source": source, "place": place, "reason": failed.reason,
                "value": round(failed.value, 4), "limit": failed.limit, "beginning": beginning,
            }
        )  # fmt: skip
        detail = f"{failed.value:,.4g}, the limit is {failed.limit:,.4g}:"
        return LeftOut(failed.reason, detail, beginning)


class _Repeated(NamedTuple):
    share: float  # of the parts
    characters: float  # of their characters


def _repeated(parts: list[str]) -> _Repeated:
    """What of `parts` stood there before."""
    seen: set[str] = set()
    again = characters = 0
    for part in parts:
        if part in seen:
            again += 1
            characters += len(part)
        seen.add(part)
    return _Repeated(_share(again, len(parts)), _share(characters, sum(map(len, parts))))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
