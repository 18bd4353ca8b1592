"""What may stand between a model's text and its reader: filters that see the text as it streams.

A filter may hold text back until it knows enough (its tail), change it, or stop the answer. The
server runs each answer through the filters of a `FilterFactory`, so that streamed and whole answers
pass the same code. Stop strings are the first of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

StopReason = Literal["stop", "content_filter"]


class TextFilter(ABC):
    """One answer's filter. The concatenation of all that `push` and `finish` return must not
    depend on how the text was cut into pieces."""

    stopped: StopReason | None = None  # set: the answer ends with what was returned
    is_slow = False  # it waits for something, and is not asked on the server's loop

    @abstractmethod
    def push(self, text: str) -> str:
        """The text that may be shown now."""

    @abstractmethod
    def finish(self) -> str:
        """What was still held back, once no more text comes."""


class HeldFilter(TextFilter):
    """A filter that lets go of what it holds as far as it can judge, each time more is there."""

    _held = ""

    def push(self, text: str) -> str:
        self._held += text
        return self._advance(is_last=False)

    def finish(self) -> str:
        return self._advance(is_last=True)

    @abstractmethod
    def _advance(self, *, is_last: bool) -> str:
        """What of `_held` may be shown, taken from it; `is_last`: no more text comes."""


@dataclass(frozen=True)
class FilterContext:
    """What a filter may know of the request: the conversation (in a completion: one user message
    that holds the prompt), and whether it was asked as a chat."""

    messages: Sequence[dict[str, str]]
    is_chat: bool


FilterFactory = Callable[[FilterContext], Sequence[TextFilter]]


class StopStrings(TextFilter):
    """Ends the text before the stop string that is complete first; holds back what may be the
    beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(place + len(stop), place) for place, stop in found if place >= 0]
        if ends:  # the earliest end, whatever came in one piece
            self.stopped = "stop"
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def finish(self) -> str:
        shown, self._held = self._held, ""
        return shown


class FilterChain(TextFilter):
    """Several filters as one; `stopped` says why the shown text ends where it does."""

    def __init__(self, filters: Sequence[TextFilter]) -> None:
        self._filters = tuple(filters)

    def push(self, text: str) -> str:
        for place, item in enumerate(self._filters):
            text = item.push(text)
            if item.stopped:
                self.stopped = item.stopped
                return self._through(text, place + 1)
        return text

    def finish(self) -> str:
        return self._through("", 0)

    def _through(self, text: str, first: int) -> str:
        """`text` pushed through the filters from `first` on, each of them finished."""
        for item in self._filters[first:]:
            text = item.push(text) if text else ""
            if not item.stopped:
                text += item.finish()
            if item.stopped:  # it cut what the ones before let through
                self.stopped = item.stopped
        return text


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def let_through(item: TextFilter, pieces: Iterable[str]) -> tuple[str, StopReason | None]:
    """(what is shown of an answer that comes in these pieces, why it was ended)."""
    shown = ""
    for piece in pieces:
        shown += item.push(piece)
        if item.stopped:
            return shown, item.stopped
    return shown + item.finish(), item.stopped
