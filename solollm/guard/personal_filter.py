"""Masks personal data in a text as it streams, and holds back only what may still become some.

The text falls into words, and numbers written in several words into groups (`030 1234 56`); each
group is looked at once, when it is whole. Where groups begin and end depends on the text alone, so
the pieces it came in change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cached_property

from solollm.guard.notices import Action, Notices
from solollm.personal import CONTEXT_CHARS, KINDS, LABELS, bare, find_personal
from solollm.serving.text_filter import HeldFilter

_MAX_WORD, _MAX_GROUP = 512, 160  # characters; what is longer is looked at in parts
# Scripts without spaces: a reader does not wait for their end, and values stand right beside them.
_SPACELESS = (  # Thai and Lao, Burmese, Khmer, Chinese and Japanese with their signs
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff01-\uff0f"
)
_DELIMITERS = rf"\s,;\"'<>{{}}\[\]|`*\\{_SPACELESS}"
_GAP = re.compile(rf"[{_DELIMITERS}]+")
_WORD = re.compile(rf"[^{_DELIMITERS}]+")
# A word that may go on with a number in the word before: digits, signs, capitals of an account.
_NUMBER_LIKE = re.compile(r"[\d(+\-/.)]|[A-Z]{1,4}\d|[A-Z]{1,4}[.)]?$")
_NUMBER_START = re.compile(r"[\d(+A-Z]")
_KEY_BEGINS = "-----BEGIN"
_KEY_HEADER = re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----")
_KEY_FOOTER = re.compile(r"-----END [A-Z ]{0,30}PRIVATE KEY-----")
_HEADER_CHARS = 64


class PersonalData(HeldFilter):
    """Replaces finds by what they were (`mask`), ends the answer before them (`block`), or only
    notes them (`warn`).

    Args:
        conversation: what was said before; data that stands in it is no news to the reader.
    """

    def __init__(
        self,
        notices: Notices,
        *,
        action: Action = "mask",
        kinds: Collection[str] = KINDS,
        conversation: Sequence[str] = (),
    ) -> None:
        self._notices = notices
        self._action = action
        self._kinds = frozenset(kinds)
        self._conversation = conversation
        self._before = ""  # the end of what was looked at
        self._in_key = False
        self._in_value = False  # a find goes on where its word was cut

    @cached_property
    def _known(self) -> str:
        """The conversation, made comparable when first needed."""
        return bare("\n".join(self._conversation))

    def _advance(self, *, is_last: bool) -> str:
        shown: list[str] = []
        while self._held and not self.stopped:
            if self._in_key:
                if not self._skip_key(is_last):
                    break
                continue
            if self._in_value:
                self._skip_word()
                continue
            gap = _GAP.match(self._held)
            if gap is not None:
                shown.append(self._take(gap.end()))
                continue
            if _KEY_BEGINS.startswith(self._held[: len(_KEY_BEGINS)]):
                taken = self._key_header(is_last)
            else:
                end = self._group_end(is_last)
                taken = None if end is None else self._judged(self._before, self._take(end))
            if taken is None:
                break
            shown.append(taken)
        return "".join(shown)

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self._before = (self._before + taken)[-CONTEXT_CHARS:]
        return taken

    def _group_end(self, is_last: bool) -> int | None:
        """Where the group at the beginning of what is held ends; None while that is open."""
        end = self._word_end(0, is_last)
        if end is None or not _NUMBER_LIKE.match(self._held[:end]):
            return end
        while True:
            if end == len(self._held):
                return end if is_last else None
            start = end + 1
            if self._held[end] not in " \u00a0\u202f":
                return end
            if start == len(self._held):
                return end if is_last else None
            if not _NUMBER_START.match(self._held, start):
                return end
            next_end = self._word_end(start, is_last)
            if next_end is None:
                return None if len(self._held) <= _MAX_GROUP else end
            if next_end == start or next_end > _MAX_GROUP:
                return end
            if not _NUMBER_LIKE.match(self._held[start:next_end]):
                return end
            end = next_end

    def _word_end(self, start: int, is_last: bool) -> int | None:
        """Where a word ends; None while it may go on. Looks no further than a word may reach."""
        found = _WORD.match(self._held, start, start + _MAX_WORD)
        end = start if found is None else found.end()
        if end == len(self._held) and end - start < _MAX_WORD and not is_last:
            return None
        return end

    def _judged(self, before: str, group: str) -> str:
        """A group as it may be shown."""
        shown, at = [], 0
        for kind, start, end in find_personal(group, before):
            if kind not in self._kinds or bare(group[start:end]) in self._known:
                continue
            self._notices.note("personal data", kind, self._action)
            if self._action == "warn":
                continue
            shown.append(group[at:start])
            if self._action == "block":
                self.stopped = "content_filter"
                return "".join(shown)
            shown.append(LABELS[kind])
            at = end
        self._in_value = at == len(group) and at >= _MAX_WORD
        return "".join([*shown, group[at:]])

    def _key_header(self, is_last: bool) -> str | None:
        """A private key's first line, if that is what stands here; None while it may become one."""
        header = _KEY_HEADER.match(self._held)
        if header is None or "key" not in self._kinds:
            is_open = len(self._held) < _HEADER_CHARS and "\n" not in self._held
            if is_open and not is_last:
                return None
            end = self._word_end(0, is_last)
            return None if end is None else self._take(end)
        self._notices.note("personal data", "key", self._action)
        if self._action == "warn":
            return self._take(header.end())
        self._take(header.end())
        if self._action == "block":
            self.stopped = "content_filter"
            return ""
        self._in_key = True
        return "[private key]"

    def _skip_word(self) -> None:
        """Drop what is left of a word whose beginning was a find."""
        rest = _WORD.match(self._held)
        self._take(0 if rest is None else rest.end())
        self._in_value = not self._held

    def _skip_key(self, is_last: bool) -> bool:
        """Drop a private key's text up to its last line; whether that was reached."""
        footer = _KEY_FOOTER.search(self._held)
        if footer is not None:
            self._in_key = False
            self._take(footer.end())
            return True
        keep = 0 if is_last else _HEADER_CHARS
        self._take(max(0, len(self._held) - keep))
        return False
