"""The run's page, its charts, and training in the terminal."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from solollm.config import parse_config
from solollm.report.charts import (
    MAX_POINTS,
    Chart,
    Series,
    count_text,
    line_chart,
    smooth,
    thin,
    ticks,
)
from solollm.report.console import ConsoleSink, JsonSink, sparkline
from solollm.report.html import RunFacts, duration_text, render, write_report
from solollm.runs import Run

HOSTILE = '"><script>alert(1)</script>\x1b[2J'


def _rows(count: int, every: int = 1) -> list[dict[str, Any]]:
    """A plausible run of `count` train rows, evaluated every hundredth."""
    rows: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        step, loss = number * every, 2 + 6 * math.exp(-number / 50)
        rows.append(
            {
                "kind": "train", "step": step, "loss": loss, "bits_per_byte": loss / 2,
                "lr": 6e-3, "grad_norm": 0.5, "tokens_per_second": 13_000.0 + number % 7,
                "tokens_seen": step * 2048, "memory_bytes": 600 << 20,
                "peak_memory_bytes": 700 << 20, "elapsed_seconds": step / 5,
            }
        )  # fmt: skip
        if number % 100 == 0:
            rows.append(
                {
                    "kind": "eval", "step": step, "loss": loss, "bits_per_byte": loss / 2,
                    "targets": 1000, "seconds": 1.5,
                }
            )  # fmt: skip
            rows.append({"kind": "sample", "step": step, "prompt": "a", "text": HOSTILE})
    return rows


def _facts(count: int = 300, **changes: Any) -> RunFacts:
    values: dict[str, Any] = {
        "name": HOSTILE,
        "total_steps": count,
        "config_text": f'corpus = "{HOSTILE}"',
        "metrics": _rows(count),
        "events": [{"kind": "resumed", "step": count // 2, "note": HOSTILE}],
        "lineage": [{"first_step": 0, "environment": {"backend": "torch", "device": HOSTILE}}],
        "plan": {"micro_batch_size": 8, "memory_bytes": {"activations": 1 << 20}},
    }
    return RunFacts(**(values | changes))


class _Reader(HTMLParser):
    """Collects tags, and fails on an element that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "line", "circle", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_is_self_contained_and_small() -> None:
    """A font, a script or a picture fetched from somewhere; a page that grows with the run."""
    page = render(_facts(50_000))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.replace("// ", ""))
    assert len(page.encode()) < 300_000
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    assert not {"link", "img", "iframe"} & set(reader.tags)
    assert not {"src", "href"} & {name for name, _ in reader.attributes}


def test_nothing_from_outside_is_markup() -> None:
    """A sample, a run's name or a setting that runs in the reader's browser."""
    page = render(_facts())
    reader = _Reader()
    reader.feed(page)
    assert reader.tags.count("script") == 1
    assert page.count("&lt;script&gt;alert(1)") >= 5


def test_the_page_shows_what_it_promises() -> None:
    """A chart, the samples, the configuration or the lineage lost."""
    page = render(_facts())
    for words in (
        "Loss, nats per token", "Bits per byte", "Learning rate", "Gradient norm",
        "Tokens per second", "Memory, MiB", "held-out", "Samples", "Configuration",
        "Evaluations", "Where it ran", "Events", "finished", "700 MiB",
    ):  # fmt: skip
        assert words in page, words
    assert page.count("<figure>") == 6


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_young_run_has_a_page_too(count: int) -> None:
    """Dividing by the number of rows before there are any."""
    page = render(_facts(0, metrics=_rows(count), total_steps=None, plan={}, lineage=[]))
    assert "</html>" in page
    assert "NaN" not in page


def test_the_report_is_written_from_the_runs_files(tmp_path: Path) -> None:
    """A field renamed on one side only: the run's files and the page drift apart."""
    run = Run.create(tmp_path / "tiny", parse_config({"train": {"steps": 300}}))
    for row in _rows(300):
        run.append_metrics(row)
    run.append_event("resumed", step=150)
    run.record_lineage(0, {"backend": "torch", "device": "cpu"})
    run.write_plan({"micro_batch_size": 8, "memory_limit_bytes": 1 << 30})
    page = write_report(run).read_text(encoding="utf-8")
    for words in ("finished", "backend: torch; device: cpu", "1 GiB", "steps = 300", "resumed"):
        assert words in page, words
    assert page.count('class="mark"') == 6


@pytest.mark.parametrize(
    ("objective", "facts", "shown", "hidden"),
    [
        ("grpo", {"reward": 0.25}, ["held-out reward", "0.2500", "<th>prompts</th>"], ["loss"]),
        ("dpo", {"margin": 2.5, "accuracy": 0.75}, ["nats per pair", "held-out preferred", "75%"],
         ["bits per byte", "nats per token"]),
    ],
)  # fmt: skip
def test_preferences_and_rewards_are_shown_in_their_own_unit(
    objective: str, facts: dict[str, float], shown: list[str], hidden: list[str]
) -> None:
    """The loss of a pair as one per token, and 1 - reward as a held-out loss."""
    row = {"step": 1, "loss": 0.75, "bits_per_byte": None, "targets": 3, **facts}
    rows = [{**row, "kind": "train"}, {**row, "kind": "train", "step": 2}, {**row, "kind": "eval"}]
    page = render(_facts(2, metrics=rows, config_text="", events=(), plan={}, objective=objective))
    assert [words for words in shown if words not in page] == []
    visible = page.partition("<body>")[2].lower()
    assert [words for words in hidden if words in visible] == []


def test_missing_numbers_break_the_curve() -> None:
    """A skipped step drawn as zero, or joined by a line that was never measured."""
    series = Series("a", [1, 2, 3, 4, 5], [1.0, 2.0, None, 2.0, 1.0], "train")
    chart = line_chart(Chart("t", [series], count_text))
    (path,) = re.findall(r'<path class="train" d="([^"]+)"', chart)
    assert path.count("M") == 2
    assert path.count("L") == 2
    (data,) = re.findall(r"data-series='([^']+)'", chart)
    assert json.loads(data.replace("&quot;", '"')) == [
        ["a", [1, 2, 3, 4, 5], [1.0, 2.0, None, 2.0, 1.0]]
    ]


def test_thinning_keeps_spikes_and_ends() -> None:
    """The one loss spike of a long run averaged away."""
    values: list[float | None] = [1.0] * 10_000
    values[5_432] = 9.0
    kept = thin(Series("a", list(range(10_000)), values, "train"))
    assert len(kept.x) <= MAX_POINTS
    assert (kept.x[0], kept.x[-1]) == (0, 9_999)
    assert dict(zip(kept.x, kept.y, strict=True))[5_432] == 9.0


def test_smoothing_neither_shifts_nor_invents() -> None:
    """A smoothed loss that lags behind the real one, or bridges a gap."""
    line = [float(n) for n in range(20)]
    assert smooth(line, 5) == pytest.approx(line, abs=1e-9)
    assert smooth([1.0, None, 3.0], 3) == [1.0, None, 3.0]
    assert smooth([0.0, 3.0, 0.0, 3.0, 0.0], 3)[2] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.93, 1.87, [1.0, 1.2, 1.4, 1.6, 1.8]),
        (3, 3, [3]),
        (-1, 1, None),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float] | None) -> None:
    """A grid at 0.3333 steps, or outside the picture."""
    found = ticks(low, high)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert expected is None or found == expected


def test_durations_and_counts_read_well() -> None:
    """A step of 13 ms shown as 0.0 s; 3661 s as 61 min 1 s; 59.7 s as 60 s but no minute."""
    shown = [duration_text(s) for s in (0.0135, 0.42, 41.2, 59.7, 725, 12_000, 180_000, 1e9)]
    assert shown == [
        "13.5 ms",
        "0.4 s",
        "41 s",
        "1 min",
        "12 min 5 s",
        "3 h 20 min",
        "2 d 2 h",
        "32 years",
    ]
    assert [count_text(n) for n in (7, 950, 13_243, 1_070_000, 7e9)] == [
        "7", "950", "13.2k", "1.07M", "7B",
    ]  # fmt: skip


def _console_output(*, is_terminal: bool, seconds_per_row: float) -> str:
    now = [0.0]
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80, color_system=None)
    sink = ConsoleSink(console, clock=lambda: now[0])
    sink.start({"run": "tiny", "total_steps": 300, "start_step": 0, "num_parameters": 1_070_000})
    for row in _rows(300):
        now[0] += seconds_per_row
        {"train": sink.metrics, "eval": sink.evaluation, "sample": sink.sample}[row["kind"]](row)
    sink.event({"kind": "checkpoint_saved", "step": 300, "path": "step-00000300", "seconds": 0.1})
    sink.event({"kind": "something_new"})
    sink.finish({"status": "finished"})
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_file_gets_a_line_now_and_then() -> None:
    """A log of a million lines, or without its last step; a bar drawn into a file."""
    lines = _console_output(is_terminal=False, seconds_per_row=0.01).splitlines()
    steps = [line for line in lines if re.match(r"step [\d,]+/300  loss", line)]
    assert 2 <= len(steps) <= 4
    assert steps[-1].startswith("step 300/300")
    assert any("held-out" in line for line in lines)
    assert any("saved step-00000300" in line for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_a_run_with_rewards_shows_them_instead_of_its_loss() -> None:
    """GRPO's lines saying `loss -0.001, -0.001 bits/byte`, and nothing of the reward."""
    console = Console(file=io.StringIO(), width=120, color_system=None)
    sink = ConsoleSink(console)
    sink.start({"run": "solver", "total_steps": 2})
    facts = {"reward": 0.25, "groups_alike": 0.5, "answer_tokens": 19.4, "answers_cut": 0.125}
    sink.metrics({"step": 1, "loss": -1e-4, "bits_per_byte": -1e-4, **facts})
    sink.evaluation({"step": 1, "loss": 0.6, "bits_per_byte": None, "reward": 0.4})
    sink.finish({})
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "reward 0.250, 50% of groups alike, 19 tokens an answer, 12% cut" in shown
    assert "held-out reward 0.400" in shown
    assert "loss" not in shown


def test_a_terminal_gets_a_block_that_a_model_cannot_steer() -> None:
    """A generated escape sequence clearing the user's screen."""
    shown = _console_output(is_terminal=True, seconds_per_row=0.2)
    assert "step 300 of 300" in shown
    assert "\x1b[2J" not in shown
    assert "alert(1)" in shown


def test_weeks_of_rows_are_not_kept_for_the_small_curve() -> None:
    """A terminal that slows the training down, the more the longer it lasts."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    sink = ConsoleSink(console, clock=lambda: 0.0)
    for number in range(50_000):
        sink.metrics({"kind": "train", "step": number, "loss": float(-number), "lr": 1.0})
    assert len(sink._curve) <= 1024
    assert sink._curve == sorted(sink._curve, reverse=True)
    gaps = {a - b for a, b in itertools.pairwise(sink._curve)}
    assert len(gaps) == 1
    assert min(sink._curve) < -49_900


def test_an_event_is_told_with_its_cause() -> None:
    """A run that stopped by itself, and a terminal that does not say why."""
    console = Console(file=io.StringIO(), width=80, color_system=None)
    sink = ConsoleSink(console)
    sink.event({"kind": "stopped", "step": 7, "cause": "memory_pressure"})
    sink.event({"kind": "stopped", "step": 8, "signal": "SIGINT"})
    sink.event({"kind": "rolled_back", "step": 9, "to_step": 5})
    assert isinstance(console.file, io.StringIO)
    first, second, third = console.file.getvalue().splitlines()
    assert first.strip() == "stopped by memory pressure after step 7"
    assert second.strip() == "stopped by SIGINT after step 8"
    assert "back to step 5" in third


def test_json_lines_are_all_json() -> None:
    """Prose between the lines that a machine reads."""
    lines: list[str] = []
    sink = JsonSink(lines.append)
    sink.start({"run": "a"})
    sink.metrics({"kind": "train", "step": 1, "loss": None})
    sink.finish({"status": "finished"})
    assert [json.loads(line)["kind"] for line in lines] == ["start", "train", "finish"]


def test_sparkline_falls_and_fits() -> None:
    """A curve upside down, or wider than its place."""
    shown = sparkline([10.0 - n / 100 for n in range(1000)])
    assert len(shown) <= 24
    assert (shown[0], shown[-1]) == ("█", "▁")
    assert sparkline([1.0]) == ""


def test_the_page_says_which_steps_ran_where() -> None:
    """A run that moved, shown as if it had stayed."""
    lineage = [
        {"first_step": 0, "environment": {"backend": "mlx", "cpu": "Apple M4"}},
        {"first_step": 100, "environment": {"backend": "torch", "cpu": "EPYC"}},
    ]
    page = render(_facts(300, lineage=lineage))
    assert "<td>1 to 100</td><td>backend: mlx; cpu: Apple M4</td>" in page
    assert "<td>101 to 300</td><td>backend: torch; cpu: EPYC</td>" in page
