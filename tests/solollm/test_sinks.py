"""Optional trackers: what they are told, and how a missing package is said."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from solollm.errors import ConfigError
from solollm.report.sinks import TrackerSink, open_sinks


class _Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.calls.append(("scalars", dict(values), step))

    def text(self, name: str, text: str, step: int) -> None:
        self.calls.append(("text", name, text, step))

    def close(self) -> None:
        self.calls.append(("close",))


def _play(sink: TrackerSink) -> None:
    sink.start({"run": "a", "total_steps": 3})
    sink.metrics({"kind": "train", "step": 1, "loss": 3.0, "grad_norm": None})
    sink.evaluation({"kind": "eval", "step": 1, "bits_per_byte": 1.5})
    sink.sample({"kind": "sample", "step": 1, "prompt": "a", "text": "b"})
    sink.event({"kind": "checkpoint_saved", "step": 1})
    sink.finish({"status": "finished"})


def test_a_tracker_gets_numbers_by_group_and_step() -> None:
    """A missing number sent as zero, `step` drawn as a curve, train and eval mixed."""
    recorder = _Recorder()
    _play(TrackerSink(lambda facts: recorder))
    assert recorder.calls == [
        ("scalars", {"train/loss": 3.0}, 1),
        ("scalars", {"eval/bits_per_byte": 1.5}, 1),
        ("text", "sample", "ab", 1),
        ("close",),
    ]


def test_tensorboard_writes_events_into_the_run(tmp_path: Path) -> None:
    """The adapter broken by the real package, or files put next to the run."""
    pytest.importorskip("tensorboardX")
    (sink,) = open_sinks(["tensorboard"], tmp_path / "run")
    _play(sink)
    (written,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = written.read_bytes()
    assert b"train/loss" in content
    assert b"eval/bits_per_byte" in content


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_missing_package_is_said_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ImportError after an hour of compiling, without the line that installs it."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        open_sinks([name], tmp_path)
    assert f"pip install {'wandb' if name == 'wandb' else ''}" in caught.value.fix
    assert name in caught.value.what


def test_an_unknown_sink_names_the_nearest(tmp_path: Path) -> None:
    """`tensorbord` taken for something else, or met with a KeyError."""
    with pytest.raises(ConfigError, match="tensorboard"):
        open_sinks(["tensorbord"], tmp_path)


def test_a_sink_that_never_started_is_quiet() -> None:
    """Training that fails in the dry run must not fail a second time in its sinks."""
    TrackerSink(lambda facts: _Recorder()).finish({"status": "failed"})
