"""Training as a terminal shows it, live; as lines where there is none; as JSON for machines.

`ConsoleSink` watches a run by the `Sink` protocol of `solollm.run_log`. It draws only when a row
arrives (no thread), at most ten times a second.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from solollm.errors import printable
from solollm.planner import format_bytes
from solollm.report.charts import count_text, smooth
from solollm.report.html import duration_text

Row = Mapping[str, Any]

_BARS = "▁▂▃▄▅▆▇█"
_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 2.0  # between plain lines; the first and the last always appear
_SAMPLE_CHARACTERS = 400
_PACE_ROWS = 64  # the latest ones, from which the time left is told
_MOST_POINTS = 1024  # behind the small curve: weeks of rows must not slow the training down
_NOTES = {
    "step_skipped": "step {step} was not finite and was skipped",
    "rolled_back": "step {step} was undone: back to step {to_step}, and around its batch",
    "checkpoint_saved": "saved {path}",
    "checkpoint_not_deleted": "an old checkpoint could not be deleted: {detail}",
    "checkpoint_damaged": "a damaged checkpoint was passed over: {detail}",
    "resumed": "resumed after step {step}",
    "stopped": "stopped by {cause} after step {step}",
    "memory_pressure": "memory pressure is {level}",
    "heat": "heat is {level}: training {duty:.0%} of the time",
    "power": "power: on battery {on_battery}, low-power mode {low_power_mode}",
    "continuation_proven": "what comes next is what was promised: {result}",
    "continuation_missing": "what comes next could not be written down: {detail}",
    "environment_changed": "this is not the environment of before: {detail}",
    "sink_failed": "{sink} failed and is off: {error}",
    "keep_awake": "the machine cannot be kept awake: it may fall asleep",
    "tidied": "what a crash had left behind was tidied",
    "metrics_mended": "torn rows of a crash were dropped: {lines_dropped}",
    "fault": "a fault of the {fault}: {error}",
    "restarted": "its supervisor starts it again: {cause}, {ending}",
    "given_up": "its supervisor has given up: {cause}, {ending}",
    "failed": "failed: {detail}",
    "continuation_refused": "what comes next is not what was promised: {result}",
    "report_failed": "report.html could not be written: {detail}",
}


class JsonSink:
    """Every row as one line of JSON on standard output; `kind` says what it is."""

    def __init__(self, write: Callable[[str], object] = print) -> None:
        self._write = write

    def start(self, facts: Row) -> None:
        self._line({"kind": "start", **facts})

    def recall(self, rows: Sequence[Row]) -> None:
        """Rows of before are in the run's files; here come those that are new."""

    def metrics(self, row: Row) -> None:
        self._line(row)

    def evaluation(self, row: Row) -> None:
        self._line(row)

    def sample(self, row: Row) -> None:
        self._line(row)

    def event(self, row: Row) -> None:
        self._line(row)

    def finish(self, summary: Row) -> None:
        self._line({"kind": "finish", **summary})

    def _line(self, row: Row) -> None:
        self._write(json.dumps(dict(row), ensure_ascii=False, default=str))


class ConsoleSink:
    """A run on a rich console: live where it is a terminal, a line every `line_seconds` where
    not."""

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.monotonic, *,
        line_seconds: float = _LINE_SECONDS,
    ) -> None:  # fmt: skip
        self._console = console
        self._clock = clock
        self._line_seconds = line_seconds
        self._live: Live | None = None
        self._total_steps = 0
        self._start_step = 0
        self._row: dict[str, Any] = {}
        self._held_out: dict[str, Any] = {}
        self._sample: dict[str, Any] = {}
        self._curve: list[float | None] = []
        self._num_rows, self._stride = 0, 1
        self._pace: deque[tuple[float, float]] = deque(maxlen=_PACE_ROWS)  # step, seconds of it
        self._began = self._shown = clock()
        self._shown_step: object = None

    def start(self, facts: Row) -> None:
        self._total_steps = int(facts.get("total_steps") or 0)
        self._start_step = int(facts.get("start_step") or 0)
        self._began = self._clock()
        self._shown = self._began - self._line_seconds
        self._print(Text(_headline(facts), style="bold"))
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self._block(), console=self._console, auto_refresh=False)
            self._live.start()
            self._console.show_cursor(True)  # a second Ctrl-C ends without any clean-up

    def recall(self, rows: Sequence[Row]) -> None:
        """The rows of before, in the place of all that was told: of a run that is watched, and
        began earlier or went back."""
        self._row, self._held_out, self._sample, self._curve = {}, {}, {}, []
        self._num_rows, self._stride = 0, 1
        self._pace.clear()
        for row in rows:
            if row.get("kind") == "eval":
                self._held_out = dict(row)
            elif row.get("kind") == "sample":
                self._sample = dict(row)
            else:
                self._note(row)
        if self._live is not None:
            self._live.update(self._block(), refresh=True)
        elif self._row and self._shown_step is None:
            self._show(self._line)

    def metrics(self, row: Row) -> None:
        self._note(row)
        self._show(self._line)

    def _note(self, row: Row) -> None:
        self._row = dict(row)
        step, seconds = _number(row, "step"), _number(row, "elapsed_seconds")
        if step is not None and seconds is not None:
            self._pace.append((step, seconds))
        if self._num_rows % self._stride == 0:
            self._curve.append(_number(row, "reward" if "reward" in row else "loss"))
        self._num_rows += 1
        if len(self._curve) > _MOST_POINTS:  # every other one draws the same curve
            del self._curve[1::2]
            self._stride *= 2

    def evaluation(self, row: Row) -> None:
        self._held_out = dict(row)
        self._show(lambda: f"step {row['step']:,}  held-out {_quality_text(row)}", now=True)

    def sample(self, row: Row) -> None:
        self._sample = dict(row)
        text = f"{row.get('prompt', '')}{row.get('text', '')}"[:_SAMPLE_CHARACTERS]
        self._show(lambda: f"step {row['step']:,}  sample: {text!r}", now=True)

    def event(self, row: Row) -> None:
        form = _NOTES.get(str(row.get("kind")), "{kind}")
        cause = str(row.get("signal") or row.get("cause") or "").replace("_", " ")
        values = {"detail": row.get("reason") or row.get("changes") or "", **row, "cause": cause}
        try:
            note = form.format(**values)
        except (KeyError, ValueError, TypeError):  # one of another version, or of another hand
            note = str(row.get("kind"))
        self._print(Text(f"  {note}", style="dim"))

    def finish(self, summary: Row) -> None:
        if self._live is not None:
            self._live.update(self._block(), refresh=True)
            self._live.stop()
            self._live = None
        elif self._row and self._shown_step != self._row.get("step"):
            self._print(Text(self._line()))

    def _show(self, line: Callable[[], str], *, now: bool = False) -> None:
        """Redraw the block, or print the line, unless that happened just before."""
        moment = self._clock()
        pause = _REDRAW_SECONDS if self._live is not None else self._line_seconds
        if not now and moment - self._shown < pause:
            return
        if self._live is not None:
            self._live.update(self._block(), refresh=True)
        else:
            self._print(Text(line()))
        if not now:
            self._shown, self._shown_step = moment, self._row.get("step")

    def _print(self, text: Text) -> None:
        text.plain = printable(text.plain)
        self._console.print(text, soft_wrap=True)

    def _line(self) -> str:
        row = self._row
        parts = [
            f"step {row['step']:,}/{self._total_steps:,}",
            _quality_text(row),
            f"lr {lr:.2g}" if (lr := _number(row, "lr")) is not None else "",
            _with_unit(row, "tokens_per_second", "tok/s"),
            f"ETA {eta}" if (eta := self._eta()) else "",
        ]
        return "  ".join(part for part in parts if part)

    def _eta(self) -> str:
        done = int(self._row.get("step") or 0) - self._start_step
        left = self._total_steps - self._start_step - done
        if len(self._pace) > 1 and left > 0:
            (first, began), (last, ended) = self._pace[0], self._pace[-1]
            if last > first and ended > began:
                return duration_text((ended - began) / (last - first) * left)
        if done <= 0 or left <= 0:
            return ""
        return duration_text((self._clock() - self._began) / done * left)

    def _block(self) -> RenderableType:
        row, step = self._row, int(self._row.get("step") or self._start_step)
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        eta = self._eta()
        place = f"step {step:,} of {self._total_steps:,}" + (f", {eta} left" if eta else "")
        drawn = ProgressBar(self._total_steps or 1, step, complete_style="cyan")
        bar.add_row(drawn, place)
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", justify="right")
        facts.add_column()
        name, _, quality = _quality_text(row).partition(" ")
        facts.add_row(name or "loss", f"{quality or 'first step ...'}  {sparkline(self._curve)}")
        if self._held_out:
            where = f"at step {self._held_out['step']:,}"
            facts.add_row("held-out", f"{_quality_text(self._held_out)}, {where}")
        speed = [
            _with_unit(row, "tokens_per_second", "tokens/s"),
            _with_unit(row, "tokens_seen", "tokens seen"),
            f"{format_bytes(int(held))} memory" if (held := _number(row, "memory_bytes")) else "",
        ]
        if any(speed):
            facts.add_row("speed", ", ".join(part for part in speed if part))
        if self._sample:
            facts.add_row("sample", self._sample_text())
        return Group(bar, facts)

    def _sample_text(self) -> Text:
        text = Text(printable(self._sample.get("prompt")), style="dim")
        text.append(printable(self._sample.get("text")), style="italic")
        kept = text[:_SAMPLE_CHARACTERS].split("\n", allow_blank=True)[:6]
        return Text("\n", no_wrap=True, overflow="ellipsis").join(kept)


def sparkline(values: list[float | None], width: int = 24) -> str:
    """A curve in one line of block characters, the latest value at the right. The first tenth is
    left out once there is enough: it would press the rest flat."""
    known = [value for value in values if value is not None]
    known = known[len(known) // 10 :] if len(known) > width else known
    if len(known) < 2:
        return ""
    size = max(1, len(known) // width)
    smoothed = [value for value in smooth(known, size) if value is not None]
    points = smoothed[:: -max(1, -(-len(known) // width))][::-1]
    low, high = min(points), max(points)
    top = len(_BARS) - 1
    return "".join(_BARS[round((p - low) / ((high - low) or 1.0) * top)] for p in points)


def _headline(facts: Row) -> str:
    parts = [
        f"{facts.get('doing', 'training')} {facts.get('run', '')}".strip(),
        _with_unit(facts, "num_parameters", "parameters"),
        _with_unit(facts, "tokens_per_step", "tokens a step"),
        f"on {facts['backend']} ({facts.get('device', '')})" if facts.get("backend") else "",
    ]
    return ", ".join(part for part in parts if part)


# What GRPO and DPO measure beside a loss: key, how it is written.
_FACTS = (
    ("groups_alike", "{:.0%} of groups alike"), ("answer_tokens", "{:.0f} tokens an answer"),
    ("answers_cut", "{:.0%} cut"), ("margin", "margin {:.3f}"), ("accuracy", "{:.0%} preferred"),
)  # fmt: skip


def _quality_text(row: Row) -> str:
    """How good a row says it is: the loss, or the reward where there is one (GRPO's loss is about
    zero at every step, and says nothing)."""
    reward, loss, bits = (_number(row, key) for key in ("reward", "loss", "bits_per_byte"))
    if reward is not None:
        parts = [f"reward {reward:.3f}"]
    else:
        parts = [f"loss {loss:.3f}"] if loss is not None else []
        parts += [f"{bits:.3f} bits/byte"] if bits is not None else []
    parts += [form.format(v) for key, form in _FACTS if (v := _number(row, key)) is not None]
    return ", ".join(parts)


def _with_unit(row: Row, key: str, unit: str) -> str:
    value = _number(row, key)
    return f"{count_text(value)} {unit}" if value is not None else ""


def _number(row: Row, key: str) -> float | None:
    value = row.get(key)
    if not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        return None  # the latter: of a file that another hand has written
    return float(value) if math.isfinite(value) else None
