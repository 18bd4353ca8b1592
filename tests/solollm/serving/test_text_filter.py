"""Stop strings and chains of filters: the same end however the text is cut."""

from __future__ import annotations

import random

import pytest

from solollm.serving.text_filter import FilterChain, StopStrings, TextFilter, let_through


class Upper(TextFilter):
    """Holds one character back and capitalises; stops before a `!`."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        text = self._held + text
        if "!" in text:
            self.stopped = "content_filter"
            return text[: text.index("!")].upper()
        self._held = text[-1:]
        return text[:-1].upper()

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held.upper()


def _cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.sample(range(len(text) + 1), rng.randint(0, len(text))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("text", ["abcabd", "xxabxabc", "aaab!ab", "ab", "", "b!aabc", "aabab"])
def test_the_end_does_not_depend_on_the_pieces(text: str) -> None:
    """A stop string seen only when it comes in one piece, or text lost in a held-back tail."""
    rng = random.Random(0)
    for stops in (["abc", "b"], ["aab"], ["abd", "ab!"], []):
        whole = let_through(FilterChain([StopStrings(stops), Upper()]), [text])
        for _ in range(100):
            pieces = _cut(text, rng)
            assert let_through(FilterChain([StopStrings(stops), Upper()]), pieces) == whole, pieces


def test_the_stop_that_is_complete_first_ends_the_text() -> None:
    """Of two stops that overlap, the one that began first although it ended later."""
    assert let_through(FilterChain([StopStrings(["abc", "b"])]), ["xabc"]) == ("xa", "stop")
    assert let_through(FilterChain([StopStrings(["abc"])]), ["xab"]) == ("xab", None)


def test_a_later_filter_still_sees_the_last_text() -> None:
    """A filter behind the one that stopped, whose tail is thrown away."""
    assert let_through(FilterChain([StopStrings(["."]), Upper()]), ["ab.c"]) == ("AB", "stop")
    assert let_through(FilterChain([StopStrings(["."]), Upper()]), ["a!b."]) == (
        "A",
        "content_filter",
    )
