"""`report.html`: one run on one page, readable offline, on a phone, by day and by night.

The page is one file: styles, curves and the few lines of script are inside, and it names no
address. It is made from the run's own files, so that it can be written at any time, also of a run
that is still going.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from solollm import __version__
from solollm.config import dump_config
from solollm.durable import replace_file
from solollm.planner import format_bytes
from solollm.reality import Line, compare
from solollm.report.charts import Chart, Series, Style, count_text, line_chart, smooth
from solollm.report.page import SCRIPT, STYLE
from solollm.runs import Run, stretches

Row = Mapping[str, Any]

MAX_SAMPLES = 24
MAX_EVENTS = 100
MAX_EVALUATIONS = 40
_YEAR = 365.25 * 86400
MAX_TEXT = 1200  # characters of one sample


class _Measure(NamedTuple):
    """How good a run is: the key of a row, what it is called, its form, the title of its curve."""

    key: str
    name: str
    form: str
    title: str = ""


# By objective. A pair's loss is no loss per token, and the loss of GRPO's rows says nothing.
_MEASURES = {
    "": (
        _Measure("loss", "loss", "{:.4f}", "Loss, nats per token"),
        _Measure("bits_per_byte", "bits per byte", "{:.4f}", "Bits per byte"),
        _Measure("targets", "targets", "{:,}"),
    ),
    "dpo": (
        _Measure("loss", "loss", "{:.4f}", "Loss, nats per pair"),
        _Measure("accuracy", "preferred", "{:.0%}", "Share preferred the right way round"),
        _Measure("margin", "margin", "{:.3f}", "Margin"),
        _Measure("targets", "pairs", "{:,}"),
    ),
    "grpo": (
        _Measure("reward", "reward", "{:.4f}", "Reward"),
        _Measure("targets", "prompts", "{:,}"),
    ),
}


def _measures(facts: RunFacts) -> Sequence[_Measure]:
    return _MEASURES.get(facts.objective, _MEASURES[""])


@dataclass(frozen=True)
class RunFacts:
    """What the page is made of. `metrics` and `events` are the rows of the run's files, oldest
    first; see `solollm.run_log` for their fields."""

    name: str
    total_steps: int | None
    config_text: str
    metrics: Sequence[Row] = ()
    events: Sequence[Row] = ()
    lineage: Sequence[Row] = ()
    plan: Row = field(default_factory=dict)
    objective: str = ""  # of a fine-tuning

    def rows(self, kind: str) -> list[Row]:
        return [row for row in self.metrics if row.get("kind") == kind]


def write_report(run: Run) -> Path:
    """Write `report.html` into a run's folder; returns its path. Raises StorageError."""
    facts = RunFacts(
        name=run.path.name,
        total_steps=run.config.train.steps,
        config_text=dump_config(run.config),
        metrics=run.read_metrics(),
        events=run.read_events(),
        lineage=run.read_lineage(),
        plan=run.read_plan(),
        objective=run.config.finetune.objective if run.config.finetune else "",
    )
    path = run.path / "report.html"
    replace_file(path, render(facts).encode("utf-8", "replace"))
    return path


def render(facts: RunFacts) -> str:
    """The page as text. Everything that came from outside is escaped."""
    sections = [
        ("", _tiles(facts)),
        ("", _charts(facts)),
        ("Samples", _samples(facts.rows("sample"))),
        ("Evaluations on what was held out", _evaluations(facts)),
        ("Where it ran", _lineage(facts)),
        ("The plan and what became of it", _reality(facts.plan)),
        ("", _folded("Configuration", f"<pre>{html.escape(facts.config_text)}</pre>")),
        ("", _folded("Plan", _plan(facts.plan))),
        ("", _folded("Events", _events(facts.events))),
    ]
    body = "".join(
        (f"<h2>{title}</h2>" if title else "") + content for title, content in sections if content
    )
    name = html.escape(facts.name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{name}</h1><span class="state">{_state(facts)}</span></header>'
        f"{body}<footer>Written by SoloLLM {__version__} from this run's own files.</footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _state(facts: RunFacts) -> str:
    trained = facts.rows("train")
    step = int(_number(trained[-1], "step") or 0) if trained else 0
    if facts.total_steps and step >= facts.total_steps:
        return "finished"
    total = f" of {facts.total_steps:,}" if facts.total_steps else ""
    stopped = bool(facts.events) and facts.events[-1].get("kind") == "stopped"
    return f"step {step:,}{total}{', stopped: can be resumed' if stopped else ''}"


def _tiles(facts: RunFacts) -> str:
    trained, evaluated = facts.rows("train"), facts.rows("eval")
    last = trained[-1] if trained else {}
    held_out = evaluated[-1] if evaluated else {}
    speeds = sorted(y for row in trained if (y := _number(row, "tokens_per_second")) is not None)
    drawn = [one for one in _measures(facts) if one.title]
    first = drawn[0]
    tiles = [
        *((f"held-out {m.name}", _figure(held_out, m.key, m.form)) for m in reversed(drawn)),
        (f"training {first.name}", _figure(last, first.key, first.form)),
        ("steps", _figure(last, "step", "{:,}")),
        ("tokens seen", count_text(seen) if (seen := _number(last, "tokens_seen")) else ""),
        ("tokens/s, median", count_text(speeds[len(speeds) // 2]) if speeds else ""),
        ("training time", duration_text(_number(last, "elapsed_seconds"))),
        ("peak memory", _peak(trained)),
    ]
    cells = [
        f'<div class="tile"><b>{value}</b><span>{name}</span></div>'
        for name, value in tiles
        if value
    ]
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def _charts(facts: RunFacts) -> str:
    trained, evaluated = facts.rows("train"), facts.rows("eval")
    resumed = [_number(event, "step") for event in facts.events if event.get("kind") == "resumed"]
    marks = [step for step in resumed if step is not None]
    if not trained:
        return '<p class="soft">Nothing has been trained yet.</p>'
    window = max(3, len(trained) // 40)
    measured = {one.key: one.title for one in _measures(facts) if one.title}

    def chart(title: str, key: str, format_value: Any = count_text) -> str:
        raw = _series("train", key, trained, "train")
        curves = [raw]
        if key in (*measured, "grad_norm", "tokens_per_second"):
            averaged = raw._replace(y=smooth(raw.y, window))
            curves = [raw._replace(style="faint"), averaged]
        if key in measured:
            curves.append(_series("held-out", key, evaluated, "eval"))
        is_amount = key == "tokens_per_second"
        return line_chart(Chart(title, curves, format_value, marks, from_zero=is_amount))

    drawn = [
        *(chart(title, key) for key, title in measured.items()),
        chart("Learning rate", "lr", lambda value: f"{value:.2g}"),
        chart("Gradient norm", "grad_norm"),
        chart("Tokens per second", "tokens_per_second"),
        line_chart(_memory_chart(trained, marks)),
    ]
    note = '<p class="soft">Dashed: the run was resumed there.</p>' if marks else ""
    return f'<h2>Curves</h2><div class="charts">{"".join(drawn)}</div>{note}'


def _memory_chart(trained: Sequence[Row], marks: Sequence[float]) -> Chart:
    """In the unit that its largest value reads best in, so that the grid has round numbers."""
    curve = _series("memory", "memory_bytes", trained, "train")
    largest = max((y for y in curve.y if y is not None), default=0.0)
    unit, size = ("GiB", 1 << 30) if largest >= 1 << 30 else ("MiB", 1 << 20)
    scaled = curve._replace(y=[None if y is None else y / size for y in curve.y])
    return Chart(f"Memory, {unit}", [scaled], count_text, marks, from_zero=True)


def _series(name: str, key: str, rows: Iterable[Row], style: Style) -> Series:
    points = [
        (step, _number(row, key)) for row in rows if (step := _number(row, "step")) is not None
    ]
    return Series(name, [x for x, _ in points], [y for _, y in points], style)


def _samples(rows: Sequence[Row]) -> str:
    cards = []
    for row in list(reversed(rows))[:MAX_SAMPLES]:
        prompt = html.escape(str(row.get("prompt", ""))[-MAX_TEXT:])
        text = html.escape(str(row.get("text", ""))[:MAX_TEXT])
        cards.append(
            f'<article class="sample"><header>step {_figure(row, "step", "{:,}")}</header>'
            f"<p><mark>{prompt}</mark>{text}</p></article>"
        )
    return "".join(cards)


def _evaluations(facts: RunFacts) -> str:
    rows, measures = facts.rows("eval"), _measures(facts)
    if not rows:
        return ""
    best = min(rows, key=lambda row: _number(row, "loss") or float("inf"))
    kept = [row for row in rows[:-MAX_EVALUATIONS] if row is best] + list(rows[-MAX_EVALUATIONS:])
    cells = [
        [
            _figure(row, "step", "{:,}") + (" (best)" if row is best else ""),
            *(_figure(row, measure.key, measure.form) for measure in measures),
            duration_text(_number(row, "seconds")),
        ]
        for row in reversed(kept)
    ]
    return table(["step", *(measure.name for measure in measures), "time"], cells)


def _lineage(facts: RunFacts) -> str:
    """One line per machine or session, with every field that says what it ran on."""
    steps = [int(step) for row in facts.rows("train") if (step := _number(row, "step"))]
    rows = []
    for part in stretches(facts.lineage, max(steps, default=0)):
        shown = [
            f"{k}: {_plain(v)}" for k, v in part.environment.items() if v not in (None, "", {}, [])
        ]
        place = html.escape("; ".join(shown))
        rows.append([f"{part.first_step:,} to {part.last_step:,}", place])
    return table(["steps", "on"], rows) if rows else ""


def _reality(plan: Row) -> str:
    rows = [
        [line.name.replace("_", " "), *quantities_text(line), f"{line.ratio:.2f}"]
        for line in compare(plan)
    ]
    return table(["", "planned", "measured", "ratio"], rows) if rows else ""


def quantities_text(line: Line) -> tuple[str, str]:
    """A line's two quantities, in the unit that its name says."""

    def text(value: float) -> str:
        if line.name.endswith("_bytes"):
            return format_bytes(int(value))
        return duration_text(value) if line.name == "seconds" else count_text(value)

    return text(line.expected), text(line.measured)


def _plan(plan: Row) -> str:
    plan = {name: value for name, value in plan.items() if name not in ("expected", "measured")}
    rows = []
    for key, value in plan.items():
        if isinstance(value, Mapping):
            rows += [[html.escape(f"{key}: {k}"), _plan_value(key, v)] for k, v in value.items()]
        else:
            rows.append([html.escape(key), _plan_value(key, value)])
    return table(["", ""], rows) if rows else ""


def _plan_value(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return format_bytes(value)
    return html.escape(_plain(value))


def _events(events: Sequence[Row]) -> str:
    rows = []
    for event in list(reversed(events))[:MAX_EVENTS]:
        rest = {k: v for k, v in event.items() if k not in ("kind", "step", "time")}
        shown = ", ".join(f"{key}: {_plain(value)}" for key, value in rest.items())
        cells = [event.get("time", ""), event.get("step", ""), event.get("kind", ""), shown]
        rows.append([html.escape(_plain(cell)) for cell in cells])
    return table(["time", "step", "event", ""], rows) if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table. Cells must already be escaped."""
    top = "".join(f"<th>{name}</th>" for name in head)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def duration_text(seconds: float | None) -> str:
    """`13 ms`, `41 s`, `12 min 5 s`, `3 h 20 min`, `5 d 2 h`, `3 years`; empty for None."""
    if seconds is None:
        return ""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds >= 2 * _YEAR:
        return f"{seconds / _YEAR:,.0f} years"
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in (
        (86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"),
    ):  # fmt: skip
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {smaller_unit}" if rest else "")
    return f"{whole} s"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>" if content else ""


def _number(row: Row, key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else None


def _figure(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    return form.format(value) if isinstance(value, (int, float)) else ""


def _peak(rows: Sequence[Row]) -> str:
    peaks = [n for row in rows if (n := _number(row, "peak_memory_bytes"))]
    return format_bytes(int(max(peaks))) if peaks else ""


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
