"""The first stage of a build: every item of the sources through the screens and into the spool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from solollm.data.canaries import Canaries
from solollm.data.cleaning import Defect, normalise
from solollm.data.decontamination import CONTAMINATION_NAME, LOOKED_FOR_NAME, Decontamination
from solollm.data.dedup import Spool, text_digest
from solollm.data.items import Broken, Document, Limits, excerpt
from solollm.data.languages import LANGUAGES_NAME, Languages
from solollm.data.private import PRIVATE_NAME, PrivateAction, PrivateData
from solollm.data.quality import QUALITY_NAME, Quality, QualityRules
from solollm.data.records import Records
from solollm.data.report import QUARANTINE_NAME, Tally
from solollm.data.screening import LeftOut, Screen
from solollm.data.sources import read_source
from solollm.data.splits import HeldOut
from solollm.durable import create_file


@dataclass(frozen=True)
class Screening:
    """What is looked for in every text; nothing by default.

    Attributes:
        decontaminate: benchmarks whose items no text may hold (`solollm.data.decontamination`).
        languages: ISO 639 codes; texts in others are left out (`solollm.data.languages`).
        private: mask personal data and keys, or drop texts that hold any (`solollm.data.private`).
        quality: leave out texts that do not keep these rules (`solollm.data.quality`).
    """

    decontaminate: Sequence[str] = ()
    languages: Sequence[str] = ()
    private: PrivateAction | None = None
    quality: QualityRules | None = None


class Intake:
    """Reads sources into a spool."""

    def __init__(
        self, staging: Path, screening: Screening, *, limits: Limits, held_out: HeldOut,
        canaries: Canaries | None,
    ) -> None:  # fmt: skip
        """Raises as `Decontamination` does: benchmarks are read before the sources."""
        self._staging, self._limits = staging, limits
        self._held_out, self._canaries = held_out, canaries
        self._decontamination: Decontamination | None = None
        self._private: PrivateData | None = None
        self._screens: list[Screen] = []
        if screening.decontaminate:
            records = Records(staging / CONTAMINATION_NAME)
            self._decontamination = Decontamination(screening.decontaminate, records)
            self._screens.append(self._decontamination)
        if screening.private is not None:
            self._private = PrivateData(screening.private, Records(staging / PRIVATE_NAME))
            self._screens.append(self._private)
        if screening.languages:
            records = Records(staging / LANGUAGES_NAME)
            self._screens.append(Languages(screening.languages, records))
        if screening.quality is not None:
            self._screens.append(Quality(screening.quality, Records(staging / QUALITY_NAME)))

    def read(
        self, sources: Sequence[str], spool: Spool, tally: Tally, tell: Callable[[int], None]
    ) -> None:
        """Every item of every source; `tell` is given the bytes of text that were kept so far."""
        kept = 0
        with ExitStack() as stack:
            for screen in self._screens:
                stack.enter_context(screen.records)
            quarantine = stack.enter_context(Records(self._staging / QUARANTINE_NAME))
            stack.enter_context(spool)
            for number, source in enumerate(sources):
                for item in read_source(source, self._limits):
                    tally.count_in(item)
                    found = self._prepared(item, tally) if isinstance(item, Document) else item
                    if isinstance(found, Broken):
                        # Nobody has looked for private data in what is broken.
                        shown = replace(found, excerpt="") if self._private else found
                        tally.broken(shown)
                        quarantine.add(vars(shown))
                    elif isinstance(found, bytes):
                        self._keep(found, number, spool)
                        kept += len(found)
                        tell(kept)

    def finish(self) -> dict[str, Any]:
        """What the screens have for the corpus's report. Raises StorageError."""
        found: dict[str, Any] = {}
        if self._private is not None:
            found["private"] = dict(self._private.counts)
            found["private_texts"] = self._private.num_texts
        if self._decontamination is not None:
            found["decontaminated"] = self._decontamination.report()
            digests = self._decontamination.looked_for()
            with create_file(self._staging / LOOKED_FOR_NAME, expected_bytes=len(digests)) as file:
                file.write(digests)
        return found

    def _prepared(self, document: Document, tally: Tally) -> bytes | Broken | None:
        """The text that is kept, or what is broken about it; None: it was left out."""
        source, place = document.source, document.place
        try:
            text = normalise(document.text)
        except Defect as defect:
            return Broken(source, place, str(defect), excerpt=excerpt(document.text))
        if not text.strip():
            tally.dropped(source, place, "empty")
            return None
        for screen in self._screens:
            found = screen.take(text, source, place)
            if isinstance(found, LeftOut):
                tally.dropped(
                    source, place, found.reason, detail=found.detail, excerpt=found.beginning
                )
                return None
            text = found
        content = text.encode()
        if self._canaries is not None:
            self._canaries.refuse(content, f"{source} {place}".strip())
        return content

    def _keep(self, text: bytes, source: int, spool: Spool) -> None:
        digest = text_digest(text)
        is_validation = self._held_out.takes(text, digest)
        spool.add(text, digest, source=source, is_validation=is_validation)
