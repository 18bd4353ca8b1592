"""How good the guard is: what it finds, what it takes for something else, and what it costs.

Measured on the held-out sentences of `sample_texts`, with the default settings and three rules as a
user may write them. A find counts if nothing of the value is shown, of a loop or a message if the
answer is ended; a false alarm is a harmless text that is changed or ended in any way. The time is
measured on texts of all classes but distress, and on some that are made to take long.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from solollm.guard import samples
from solollm.guard.guard import Guard
from solollm.guard.notices import Notices
from solollm.guard.sample_texts import HELD_OUT, Texts
from solollm.guard.samples import PERSONAL_KINDS, Sample, drawn
from solollm.guard.settings import GuardSettings, Rule
from solollm.serving.text_filter import FilterChain, FilterContext, TextFilter, let_through

ASKED_RECALL, ASKED_FALSE, ASKED_MS = 0.90, 0.02, 5.0
CHUNK_CHARS = 4  # about a token
_RULES = (
    Rule(name="project", words=("project bluebird",)),
    Rule(name="tickets", pattern=r"\bTICKET-\d{4,8}\b", max_chars=32),
    Rule(name="intranet", pattern=r"https?://intra\.corp/\S{1,60}", max_chars=80),
)
_BENIGN_MESSAGE = "Tell me about it."
_LATENCY_TEXTS = 20  # of each class but distress, with a find and without
_LATENCY_CHARS = 2000  # of each
_SLOWEST = 5
# No word ends in them, so that much is held back and then looked at at once.
_UNBROKEN = (
    "=", "-", "0", "a", "A1", "a@b.", "(1)", "1-", "00-1.", "a1/+-", "sk-a1b2c3d4e5-", "eyJ",
    "GB29", "\u4e2d", "bearer:", "-----BEGIN ",
)  # fmt: skip


@dataclass(frozen=True)
class ClassScore:
    """One class. `missed` and `alarms`: some of the texts that went wrong."""

    name: str
    num_finds: int
    found: int
    num_benign: int
    false_alarms: int
    missed: tuple[str, ...]
    alarms: tuple[str, ...]

    @property
    def recall(self) -> float:
        return self.found / self.num_finds

    @property
    def false_rate(self) -> float:
        return self.false_alarms / self.num_benign

    @property
    def holds(self) -> bool:
        return self.recall >= ASKED_RECALL and self.false_rate <= ASKED_FALSE


class ChunkTime(NamedTuple):
    """One chunk: milliseconds in all filters together, the filter that took most of them, and the
    end of the answer so far."""

    ms: float
    filter: str
    text: str


@dataclass(frozen=True)
class Latency:
    """Milliseconds of processor time that the guard adds to one chunk, all filters together."""

    num_chunks: int
    mean_ms: float
    p99_ms: float
    max_ms: float
    slowest: tuple[ChunkTime, ...]

    @property
    def holds(self) -> bool:
        return self.max_ms < ASKED_MS


@dataclass(frozen=True)
class GuardReport:
    classes: tuple[ClassScore, ...]
    latency: Latency
    count: int
    seed: int

    @property
    def holds(self) -> bool:
        return self.latency.holds and all(score.holds for score in self.classes)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        classes = [
            {**asdict(s), "recall": s.recall, "false_rate": s.false_rate, "holds": s.holds}
            for s in self.classes
        ]
        return {
            "count": self.count, "seed": self.seed, "classes": classes,
            "latency": {**asdict(self.latency), "holds": self.latency.holds},
            "asked": {"recall": ASKED_RECALL, "false_rate": ASKED_FALSE, "max_ms": ASKED_MS},
            "holds": self.holds,
        }  # fmt: skip


def measure_guard(
    count: int = 500, seed: int = 1, *,
    tell: Callable[[str], None] = lambda name: None,
) -> GuardReport:  # fmt: skip
    """`count` texts that hold something, and as many that do not, of every class."""
    guard = Guard(GuardSettings(rules=_RULES), notices=Notices(is_silent=True))
    scores, answers = [], list[str]()
    for name in (*PERSONAL_KINDS, "distress", "loop", "rules"):
        tell(name)
        finds, benign = texts_of(name, HELD_OUT, count, seed)
        scores.append(_score(name, guard, finds, benign))
        if name != "distress":
            some = (*finds[:_LATENCY_TEXTS], *benign[:_LATENCY_TEXTS])
            answers += [sample.text for sample in some]
    answers += [unit * (_LATENCY_CHARS // len(unit)) for unit in _UNBROKEN]
    tell("latency")
    return GuardReport(tuple(scores), _latency(guard, answers), count, seed)


def texts_of(
    name: str, texts: Texts, count: int, seed: int
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """A class's texts that hold something, and that do not."""

    def draw(make: Callable[[random.Random], Sample]) -> list[Sample]:
        return list(drawn(make, count, seed))

    if name == "distress":
        return draw(lambda r: samples.distress(texts, r)), draw(
            lambda r: samples.benign("distress", texts, r)
        )
    if name == "loop":
        return draw(samples.loop), draw(samples.ordinary)
    if name == "rules":
        return draw(lambda r: samples.ruled(r)[0]), draw(lambda r: samples.ruled(r)[1])
    return draw(lambda r: samples.personal(name, texts, r)), draw(
        lambda r: samples.benign(name, texts, r)
    )


def filtered(guard: Guard, text: str, message: str = _BENIGN_MESSAGE) -> tuple[str, bool]:
    """(what is shown of an answer to a message, whether the guard ended it)."""
    context = FilterContext([{"role": "user", "content": message}], True)
    shown, stopped = let_through(FilterChain(guard(context)), [text])
    return shown, stopped is not None


def _score(
    name: str, guard: Guard, finds: Sequence[Sample], benign: Sequence[Sample]
) -> ClassScore:
    def is_found(sample: Sample) -> bool:
        if name == "distress":
            return filtered(guard, "An answer.", sample.text)[1]
        shown, is_ended = filtered(guard, sample.text)
        return is_ended if name == "loop" else sample.value not in shown

    def is_alarm(sample: Sample) -> bool:
        if name == "distress":
            return filtered(guard, "An answer.", sample.text)[1]
        return filtered(guard, sample.text) != (sample.text, False)

    missed = [s.text for s in finds if not is_found(s)]
    alarms = [s.text for s in benign if is_alarm(s)]
    return ClassScore(
        name, len(finds), len(finds) - len(missed), len(benign), len(alarms),
        tuple(missed[:5]), tuple(alarms[:5]),
    )  # fmt: skip


class _Timed(TextFilter):
    """A filter, and the milliseconds of this thread on the processor in its last push."""

    def __init__(self, item: TextFilter) -> None:
        self._item = item
        self.name = type(item).__name__
        self.ms = 0.0

    def push(self, text: str) -> str:
        begun = time.thread_time_ns()
        shown = self._item.push(text)
        self.ms = (time.thread_time_ns() - begun) / 1e6
        self.stopped = self._item.stopped
        return shown

    def finish(self) -> str:
        return self._item.finish()


def _latency(guard: Guard, answers: Sequence[str]) -> Latency:
    """Each answer is filtered three times, and a chunk's least time counts: what others do on the
    machine meanwhile is not the guard's."""
    taken = [
        min(times)
        for text in answers
        for times in zip(*(_chunk_times(guard, text) for _ in range(3)), strict=True)
    ]
    taken.sort()
    return Latency(
        len(taken), sum(chunk.ms for chunk in taken) / len(taken),
        taken[int(len(taken) * 0.99)].ms, taken[-1].ms, tuple(reversed(taken[-_SLOWEST:])),
    )  # fmt: skip


def _chunk_times(guard: Guard, text: str) -> list[ChunkTime]:
    """The chunks of an answer, up to where the guard ends it."""
    context = FilterContext([{"role": "user", "content": _BENIGN_MESSAGE}], True)
    filters = [_Timed(item) for item in guard(context)]
    chain = FilterChain(filters)
    times = []
    for start in range(0, min(len(text), _LATENCY_CHARS), CHUNK_CHARS):
        end = start + CHUNK_CHARS
        for item in filters:
            item.ms = 0.0
        chain.push(text[start:end])
        slowest = max(filters, key=lambda item: item.ms)
        ms = sum(item.ms for item in filters)
        times.append(ChunkTime(ms, slowest.name, text[max(0, end - 40) : end]))
        if chain.stopped:
            break
    return times
