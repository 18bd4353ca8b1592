"""What is left out of the spool once all texts are known: near duplicates, and what is unlike the
texts that are wanted. Each that goes leaves a line with what it was compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from solollm.data.dedup import Spool, Spooled, SpooledTexts
from solollm.data.items import excerpt
from solollm.data.likeness import UNLIKE_NAME, Counts, Like, choose, score
from solollm.data.near_duplicates import NearDuplicate, find_near_duplicates
from solollm.data.records import Records
from solollm.data.report import NEAR_DUPLICATES_NAME, Tally

_HEAD_BYTES = 400  # from which an excerpt is made


class Selection:
    """The second stage of a build. `tell` is given the bytes of text done, and of all."""

    def __init__(
        self, spool: Spool, tally: Tally, staging: Path, tell: Callable[[int, int], None]
    ) -> None:
        self._spool, self._tally, self._staging, self._tell = spool, tally, staging, tell

    def leave_out_near(self, threshold: float) -> None:
        """Near duplicates out of the spool, each with a line that says of what it is one."""
        with self._spool.texts() as texts:
            total, count = texts.text_bytes, len(texts)
            found = find_near_duplicates(
                _Texts(texts), threshold, self._staging / "spool",
                tell=lambda done: self._tell(total * done // count, total),
            )  # fmt: skip
            with Records(self._staging / NEAR_DUPLICATES_NAME) as records:
                for pair in found:
                    records.add(self._near_duplicate(texts, pair))
        self._spool.leave_out(pair.text for pair in found)

    def leave_out_unlike(self, like: Like) -> str:
        """All but the texts that are most like the wanted ones; what it came to, in a sentence.
        Raises as `Like.counts`."""
        wanted, everything = like.counts(), Counts()
        with self._spool.texts() as texts:
            numbers = texts.left
            sizes = texts.sizes[numbers]
            total, done = 2 * int(sizes.sum()), 0
            for number in map(int, numbers):
                content = texts[number].text
                everything.add(content.decode())
                done += len(content)
                self._tell(done, total)
            ratios, scores = wanted.beside(everything), np.empty(len(numbers))
            for place, number in enumerate(map(int, numbers)):
                content = texts[number].text
                scores[place] = score(content.decode(), ratios)
                done += len(content)
                self._tell(done, total)
            stays = choose(scores, sizes, like.share)
            with Records(self._staging / UNLIKE_NAME) as records:
                for place in map(int, np.nonzero(~stays)[0]):
                    records.add(self._unlike(texts[int(numbers[place])], float(scores[place])))
        self._spool.leave_out(numbers[~stays])
        return (
            f"of {len(numbers):,} texts the {stays.sum():,} that are most like the given ones were"
            f" kept, {sizes[stays].sum() / sizes.sum():.0%} of the text: those of a likeness of"
            f" {scores[stays].min():+.2f} and more"
        )

    def _near_duplicate(self, texts: SpooledTexts, pair: NearDuplicate) -> dict[str, Any]:
        sources = self._tally.sources
        text, like = texts[pair.text], texts[pair.like]
        detail = f"{pair.similarity:.2f} like one of {sources[like.source]}"
        source, beginning = sources[text.source], _beginning(text)
        self._tally.dropped(source, "", "near duplicate", detail=detail, excerpt=beginning)
        return {
            "similarity": round(pair.similarity, 4),
            "source": source, "digest": text.digest.hex(), "beginning": beginning,
            "like": {
                "source": sources[like.source], "digest": like.digest.hex(),
                "beginning": _beginning(like),
            },
        }  # fmt: skip

    def _unlike(self, text: Spooled, likeness: float) -> dict[str, Any]:
        source, beginning = self._tally.sources[text.source], _beginning(text)
        reason, detail = "unlike the given texts", f"{likeness:+.2f}:"
        self._tally.dropped(source, "", reason, detail=detail, excerpt=beginning)
        return {
            "likeness": round(likeness, 4), "source": source, "digest": text.digest.hex(),
            "beginning": beginning,
        }  # fmt: skip


class _Texts:
    """The texts alone."""

    def __init__(self, spooled: SpooledTexts) -> None:
        self._spooled = spooled

    def __len__(self) -> int:
        return len(self._spooled)

    def __getitem__(self, number: int) -> str:
        return self._spooled[number].text.decode()


def _beginning(text: Spooled) -> str:
    return excerpt(text.text[:_HEAD_BYTES].decode("utf-8", "ignore"))
