"""What a build kept and what it did not, and why: `report.json`, and the same in words.

`Tally` counts while a build runs; `CorpusReport` is what it comes to. Every item that went in is
accounted for: items = kept + duplicates + dropped + broken.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from solollm.data.canaries import CANARIES_NAME
from solollm.data.decontamination import CONTAMINATION_NAME, Decontaminated
from solollm.data.items import Broken, Item, PassedOver, excerpt
from solollm.data.private import PRIVATE_NAME
from solollm.errors import ConfigError, IntegrityError, printable
from solollm.personal import LABELS

REPORT_NAME = "report.json"
QUARANTINE_NAME = "quarantine.jsonl"
NEAR_DUPLICATES_NAME = "near_duplicates.jsonl"
_MAX_EXAMPLES = 5
_MAX_SOURCES = 20
_MAX_LONGEST = 5
_SHOWN_CAUSES = 12  # of a kind, in words; the file has all of them


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(_Record):
    """One item that was not kept."""

    source: str
    place: str = ""
    detail: str = ""
    excerpt: str = ""


class Cause(_Record):
    """How many items left for one reason, with the first few of them."""

    count: int
    examples: tuple[Example, ...]


class SourceReport(_Record):
    """What one source gave: documents kept (of duplicates, the first source's counts)."""

    source: str
    documents: int
    text_bytes: int


class SplitReport(_Record):
    """One split, as stored. `tokens` counts bos and eos too."""

    documents: int
    tokens: int
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens if self.tokens else 0.0


class LongDocument(_Record):
    """One of the longest documents."""

    source: str
    text_bytes: int
    beginning: str


class PartReport(_Record):
    """What one corpus gave to a mixture's training split: `weight` is its share as asked for, of 1;
    `passes` counts how often what it holds went in."""

    name: str
    fingerprint: str
    weight: float
    documents: int
    tokens: int
    passes: float


class CorpusReport(_Record):
    """One build. `passed_over` counts files and folders, `planted` documents that hold canaries
    and came from no item, `private` finds of each kind in `private_texts` items; all else counts
    items. Those of a mixture of `parts` are their documents; kept are those it holds at all."""

    fingerprint: str
    items: int
    kept: int
    duplicates: int
    dropped: Mapping[str, Cause]
    broken: Mapping[str, Cause]
    passed_over: Mapping[str, Cause]
    splits: Mapping[str, SplitReport]
    sources: tuple[SourceReport, ...]
    longest: tuple[LongDocument, ...]
    vocab_size: int
    tokenizer_digest: str
    planted: int = 0
    private: dict[str, int] = {}
    private_texts: int = 0
    decontaminated: tuple[Decontaminated, ...] = ()
    notes: tuple[str, ...] = ()
    parts: tuple[PartReport, ...] = ()

    @property
    def unaccounted(self) -> int:
        """Items that left no trace. Zero, or the build has a bug."""
        lost = sum(cause.count for cause in (*self.dropped.values(), *self.broken.values()))
        return self.items - self.kept - self.duplicates - lost


def read_report(corpus: Path) -> CorpusReport:
    """The report of a built corpus. Raises ConfigError or IntegrityError."""
    path = corpus / REPORT_NAME
    try:
        return CorpusReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{corpus} has no {REPORT_NAME}", why=str(error.strerror), fix="is it a built corpus?"
        ) from error
    except ValidationError as error:
        raise IntegrityError(
            f"{path} is damaged", why=str(error.errors()[0]["msg"]), fix="build the corpus again"
        ) from error


class Tally:
    """Counts and examples, gathered item by item."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.items = 0
        self.text_bytes = 0
        self.sources = sources
        self._by_source = [[0, 0] for _ in sources]
        self._causes: dict[str, dict[str, tuple[int, list[Example]]]] = {
            "dropped": {}, "broken": {}, "passed_over": {},
        }  # fmt: skip
        self._longest: list[tuple[int, str, str]] = []

    def count_in(self, item: Item) -> None:
        """Note what a source gave, before anything is decided about it."""
        if isinstance(item, PassedOver):
            self._leave("passed_over", item.reason, Example(source=item.source))
            return
        self.items += 1

    def broken(self, item: Broken) -> None:
        example = Example(
            source=item.source, place=item.place, detail=item.detail, excerpt=item.excerpt
        )
        self._leave("broken", item.reason, example)

    def dropped(
        self, source: str, place: str, reason: str, *, detail: str = "", excerpt: str = ""
    ) -> None:
        example = Example(source=source, place=place, detail=detail, excerpt=excerpt)
        self._leave("dropped", reason, example)

    def kept(self, text: bytes, source: int) -> None:
        counts = self._by_source[source]
        counts[0] += 1
        counts[1] += len(text)
        self.text_bytes += len(text)
        entry = (len(text), excerpt(text[:400].decode("utf-8", "ignore")), self.sources[source])
        if len(self._longest) < _MAX_LONGEST:
            heapq.heappush(self._longest, entry)
        elif entry > self._longest[0]:
            heapq.heapreplace(self._longest, entry)

    @property
    def num_kept(self) -> int:
        return sum(documents for documents, _ in self._by_source)

    def causes(self, kind: str) -> dict[str, Cause]:
        """Reason -> count and examples, most frequent first; `kind` is one of the three."""
        found = self._causes[kind].items()
        ordered = sorted(found, key=lambda entry: (-entry[1][0], entry[0]))
        return {
            reason: Cause(count=count, examples=tuple(examples))
            for reason, (count, examples) in ordered
        }

    def finish(self, **rest: Any) -> CorpusReport:
        """The report; `rest` gives the fields that the tally does not know."""
        by_source = [
            SourceReport(source=source, documents=documents, text_bytes=text_bytes)
            for source, (documents, text_bytes) in zip(self.sources, self._by_source, strict=True)
        ]
        by_source.sort(key=lambda entry: (-entry.text_bytes, entry.source))
        return CorpusReport(
            items=self.items, kept=self.num_kept, dropped=self.causes("dropped"),
            broken=self.causes("broken"), passed_over=self.causes("passed_over"),
            sources=tuple(by_source[:_MAX_SOURCES]),
            longest=tuple(
                LongDocument(source=source, text_bytes=size, beginning=beginning)
                for size, beginning, source in sorted(self._longest, reverse=True)
            ),
            **rest,
        )  # fmt: skip

    def _leave(self, kind: str, reason: str, example: Example) -> None:
        count, examples = self._causes[kind].get(reason, (0, []))
        if len(examples) < _MAX_EXAMPLES:
            examples.append(example)
        self._causes[kind][reason] = (count + 1, examples)


def render_report(report: CorpusReport, *, examples: int = 2) -> str:
    """The report in words, a few dozen lines."""
    lost = {
        kind: sum(cause.count for cause in causes.values())
        for kind, causes in (("dropped", report.dropped), ("broken", report.broken))
    }
    unread = sum(cause.count for cause in report.passed_over.values())
    lines = [
        f"{report.items:,} items in: {report.kept:,} kept, {report.duplicates:,} duplicates,"
        f" {lost['dropped']:,} dropped, {lost['broken']:,} broken",
        *([f"{unread:,} files and folders passed over"] if unread else []),
        "",
        f"{'split':<12}{'documents':>12}{'tokens':>16}{'bytes':>16}{'bytes/token':>13}",
    ]
    for name, split in report.splits.items():
        lines.append(
            f"{name:<12}{split.documents:>12,}{split.tokens:>16,}{split.text_bytes:>16,}"
            f"{split.bytes_per_token:>13.2f}"
        )
    lines += _render_parts(report.parts)
    if report.private_texts:
        kinds = ", ".join(
            f"{count:,} {LABELS.get(kind, kind).strip('[]')}"
            for kind, count in sorted(report.private.items(), key=lambda entry: -entry[1])
        )
        lines += ["", f"private data in {report.private_texts:,} items ({PRIVATE_NAME}): {kinds}"]
    if report.decontaminated:
        lines += ["", f"benchmarks that were looked for ({CONTAMINATION_NAME})"]
        lines += map(_render_decontaminated, report.decontaminated)
    if report.planted:
        lines += [
            "", f"{report.planted:,} of the training documents are planted canaries, which are no"
            f" items ({CANARIES_NAME})",
        ]  # fmt: skip
    lines += ["", f"vocabulary {report.vocab_size:,}, fingerprint {report.fingerprint}"]
    lines += _render_causes("dropped", report.dropped, examples)
    lines += _render_causes(f"broken (all in {QUARANTINE_NAME})", report.broken, examples)
    lines += _render_causes("passed over (unless named one by one)", report.passed_over, examples)
    lines += ["", "longest documents"]
    for document in report.longest:
        beginning = " ".join(document.beginning.split())[:60]
        lines.append(f"  {document.text_bytes:>12,} bytes  {document.source}  {beginning}")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


def _render_decontaminated(benchmark: Decontaminated) -> str:
    told = (
        f"  {benchmark.source}: {benchmark.found:,} of {benchmark.items:,} items found; texts left"
        f" out: {benchmark.texts:,}"
    )
    if benchmark.too_short:
        told += f"; items too short to be looked for: {benchmark.too_short:,}"
    if benchmark.too_common:
        told += f"; of words alone that many items share: {benchmark.too_common:,}"
    return told


def _render_parts(parts: Sequence[PartReport]) -> list[str]:
    if not parts:
        return []
    total = sum(part.tokens for part in parts)
    wide = max(12, *(len(part.name) + 2 for part in parts))
    head = f"{'part':<{wide}}{'asked':>8}{'given':>8}{'documents':>12}{'tokens':>16}{'passes':>8}"
    return ["", head] + [
        f"{part.name:<{wide}}{part.weight:>8.1%}{part.tokens / total:>8.1%}{part.documents:>12,}"
        f"{part.tokens:>16,}{part.passes:>8.2f}"
        for part in parts
    ]


def _render_causes(title: str, causes: Mapping[str, Cause], examples: int) -> list[str]:
    if not causes:
        return []
    lines = ["", title]
    shown = list(causes.items())[:_SHOWN_CAUSES]
    for reason, cause in shown:
        lines.append(f"  {cause.count:>8,}  {reason}")
        for example in cause.examples[:examples]:
            parts = (example.source, example.place, example.detail, example.excerpt[:60])
            told = "  ".join(" ".join(part.split()) for part in parts if part)
            lines.append(f"            {printable(told)}")
    rest = [cause.count for cause in causes.values()][_SHOWN_CAUSES:]
    if rest:
        lines.append(f"  {sum(rest):>8,}  for {len(rest)} other reasons, see {REPORT_NAME}")
    return lines
