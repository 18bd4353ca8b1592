"""Rules of the user's own: words and patterns that are masked, end an answer, or are noted.

Words are compared as words, whatever stands between them (`one  two`, `one-two`) and in any case.
Patterns run in RE2, whose time grows with the text and with nothing else, so that no pattern can
hang the server; they see `max_chars` at a time, and that much text is held back for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from solollm.errors import ConfigError
from solollm.guard.notices import Notices
from solollm.guard.settings import Rule
from solollm.serving.text_filter import HeldFilter, TextFilter

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # a word each: written without spaces
_WORD = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])[\w'\u2019]){{1,256}}")
_MAX_GAP = 8  # characters between two words of a phrase
_GAP = re.compile(rf"[\s\-]{{0,{_MAX_GAP}}}")
_BLOCK = 8  # characters whose matches are looked for at once
_PATTERN_MEMORY = 1 << 23
_END = ""  # in the tree of phrases: one ends here

_Tree = dict[str, Any]  # word -> tree of what may follow


class _RuleFilter(HeldFilter):
    """What both kinds of rules do with a find."""

    def __init__(self, rule: Rule, notices: Notices) -> None:
        self._rule = rule
        self._notices = notices

    def _act(self, found: str) -> str:
        """What is shown in place of a find."""
        self._notices.note("rules", self._rule.name, self._rule.action)
        if self._rule.action == "warn":
            return found
        if self._rule.action == "block":
            self.stopped = "content_filter"
            return self._rule.message
        return self._rule.replacement


class WordFilter(_RuleFilter):
    """Finds the words and phrases of a list; holds back what may be the beginning of one."""

    def __init__(self, rule: Rule, tree: _Tree, notices: Notices) -> None:
        super().__init__(rule, notices)
        self._tree = tree

    def _advance(self, *, is_last: bool) -> str:
        shown: list[str] = []
        at = 0
        while at < len(self._held) and not self.stopped:
            word = _WORD.search(self._held, at)
            if word is None:
                shown.append(self._held[at:])
                at = len(self._held)
                break
            shown.append(self._held[at : word.start()])
            at = word.start()
            end = self._phrase_end(word, is_last)
            if end is None:
                break
            found = end > 0
            end = end or word.end()
            shown.append(self._act(self._held[at:end]) if found else self._held[at:end])
            at = end
        self._held = self._held[at:]
        return "".join(shown)

    def _phrase_end(self, word: re.Match[str] | None, is_last: bool) -> int | None:
        """Where the longest phrase that begins with a word ends: 0 if none does, None while more
        text may decide."""
        tree, longest = self._tree, 0
        while word is not None:
            if not is_last and _is_open(word, self._held):
                return None
            following = tree.get(_plain(word[0]))
            if following is None:
                return longest
            tree = following
            if _END in tree:
                longest = word.end()
            if len(tree) == (_END in tree):
                return longest
            gap = _GAP.match(self._held, word.end())
            assert gap is not None  # it may be empty
            if gap.end() == len(self._held) and not is_last and len(gap[0]) < _MAX_GAP:
                return None
            word = _WORD.match(self._held, gap.end())
        return longest


def _is_open(word: re.Match[str], held: str) -> bool:
    """Whether more text could make it another word."""
    return word.end() == len(held) and not re.match(f"[{_CJK}]", word[0])


def _plain(word: str) -> str:
    return word.casefold().replace("\u2019", "'")


def phrase_tree(phrases: Iterable[str]) -> _Tree:
    """The phrases as a tree of words."""
    tree: _Tree = {}
    for phrase in phrases:
        at = tree
        for word in _WORD.findall(phrase):
            at = at.setdefault(_plain(word), {})
        if at is not tree:
            at[_END] = {}
    return tree


class PatternFilter(_RuleFilter):
    """Replaces what a pattern matches.

    The text is cut into blocks of a few characters by their place in the answer alone. A block's
    matches are looked for when `max_chars` after it are there, and in exactly these characters, so
    that the pieces in which the text came change nothing.
    """

    def __init__(self, rule: Rule, pattern: Any, notices: Notices) -> None:
        super().__init__(rule, notices)
        self._pattern = pattern
        self._first = 0  # the place in the answer where what is held begins
        self._next = 0  # of the next block
        self._done = 0  # of the first character that was not shown or replaced

    def _advance(self, *, is_last: bool) -> str:
        shown: list[str] = []
        reach = _BLOCK + self._rule.max_chars
        total = self._first + len(self._held)
        while self._next < total and (is_last or total >= self._next + reach) and not self.stopped:
            window = self._held[: self._next + reach - self._first]
            self._search(window, min(self._next + _BLOCK, total), shown)
            self._next += _BLOCK
            # A pattern may look at one character before the next block.
            self._held = self._held[self._next - 1 - self._first :]
            self._first = self._next - 1
        return "".join(shown)

    def _search(self, window: str, block_end: int, shown: list[str]) -> None:
        """Deal with the matches that begin in the block."""
        at = max(self._done, self._next)
        while at < block_end:
            found = self._pattern.search(window, at - self._first)
            if found is None or found.start() + self._first >= block_end:
                break
            start, end = found.start() + self._first, found.end() + self._first
            if start == end:  # an empty match says nothing
                at = start + 1
                continue
            shown.append(window[self._done - self._first : start - self._first])
            shown.append(self._act(found[0]))
            self._done = at = end
            if self.stopped:
                return
        if self._done < block_end:
            shown.append(window[self._done - self._first : block_end - self._first])
            self._done = block_end


def _pattern(rule: Rule) -> Any:  # google-re2 has no types
    """Raises ConfigError for a pattern that RE2 does not take."""
    import re2

    options = re2.Options()
    options.max_mem = _PATTERN_MEMORY
    options.log_errors = False
    options.case_sensitive = not rule.ignore_case
    try:
        return re2.compile(rule.pattern, options)
    except re2.error as error:
        reason = error.args[0]
        raise ConfigError(
            f"the pattern of the rule {rule.name!r} is no RE2 pattern: {rule.pattern}",
            why=reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason),
            fix="RE2 knows no look-around and no back-references; see its wiki page Syntax",
        ) from error  # fmt: skip


def compiled(rule: Rule) -> Any:
    """What all filters of a rule share. Raises ConfigError."""
    return phrase_tree(rule.words) if rule.words else _pattern(rule)


def rule_filter(rule: Rule, made: Any, notices: Notices) -> TextFilter:
    """A filter for one text; `made` is `compiled(rule)`."""
    kind = WordFilter if rule.words else PatternFilter
    return kind(rule, made, notices)


def is_found(rule: Rule, made: Any, text: str) -> bool:
    """Whether a text holds what a rule looks for."""
    found = Notices(is_silent=True)
    judge = rule_filter(rule, made, found)
    judge.push(text)
    if judge.stopped is None:
        judge.finish()
    return bool(found.counts)
