"""TensorBoard, trackio and Weights & Biases as optional watchers of a run.

Nothing is sent anywhere: TensorBoard writes event files into the run's folder, trackio keeps a
database on this machine, and wandb is opened in offline mode. A package that is missing is said
before training starts, with the line that installs it. Importing this module imports none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from solollm.errors import ConfigError, nearest

Row = Mapping[str, Any]
_NOT_CURVES = {"kind", "step", "prompt", "text"}


class _Tracker(Protocol):
    """What a tracker has to offer: numbers and texts at a step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def close(self) -> None: ...


class TrackerSink:
    """A `Sink` (see `solollm.run_log`) over any tracker: `train/...` and `eval/...` curves."""

    def __init__(self, open_tracker: Callable[[Row], _Tracker]) -> None:
        self._open = open_tracker
        self._tracker: _Tracker | None = None

    def start(self, facts: Row) -> None:
        self._tracker = self._open(facts)

    def metrics(self, row: Row) -> None:
        self._scalars("train", row)

    def evaluation(self, row: Row) -> None:
        self._scalars("eval", row)

    def sample(self, row: Row) -> None:
        if self._tracker is not None:
            text = f"{row.get('prompt', '')}{row.get('text', '')}"
            self._tracker.text("sample", text, int(row["step"]))

    def event(self, row: Row) -> None:
        """Events stay in the run's own files."""

    def finish(self, summary: Row) -> None:
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    def _scalars(self, group: str, row: Row) -> None:
        if self._tracker is None:
            return
        values = {
            f"{group}/{key}": float(value)
            for key, value in row.items()
            if key not in _NOT_CURVES and isinstance(value, (int, float))
        }
        self._tracker.scalars(values, int(row["step"]))


def open_sinks(names: Sequence[str], run: Path) -> list[TrackerSink]:
    """The sinks of a run, ready to start.

    Raises:
        ConfigError: an unknown name, or its package is missing; the message has the pip line.
    """
    return [_SINKS[_known(name)](run) for name in names]


def _known(name: str) -> str:
    if name not in _SINKS:
        raise ConfigError(
            f"unknown sink {name!r}",
            why=f"there are {', '.join(_SINKS)}",
            fix=nearest(name, _SINKS),
        )
    return name


def _need(sink: str, modules: Sequence[str], package: str) -> Any:
    """The first module that imports; Any, because none of them is a dependency."""
    for module in modules:
        try:
            return import_module(module)
        except ImportError:
            continue
    raise ConfigError(
        f"the sink `{sink}` needs a package that is not installed",
        why=f"none of {', '.join(modules)} can be imported" if len(modules) > 1 else "",
        fix=f"pip install {package}, or leave `{sink}` out of log.sinks",
    )


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, f"```\n{text}\n```", step)

    def close(self) -> None:
        self._writer.close()


class _WandbLike:
    """trackio has wandb's interface."""

    def __init__(self, module: Any, is_wandb: bool) -> None:
        self._module = module
        self._is_wandb = is_wandb

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        if self._is_wandb:
            self._module.log({name: self._module.Html(f"<pre>{_escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self._module.finish()


def _escape(text: str) -> str:
    import html

    return html.escape(text)


def _tensorboard(run: Path) -> TrackerSink:
    module = _need("tensorboard", ("tensorboardX", "torch.utils.tensorboard"), "tensorboardX")
    return TrackerSink(lambda facts: _TensorBoard(module.SummaryWriter(str(run / "tensorboard"))))


def _trackio(run: Path) -> TrackerSink:
    module = _need("trackio", ("trackio",), "'trackio>=0.40'")

    def start(facts: Row) -> _Tracker:
        module.init(project="solollm", name=run.name, config=dict(facts), resume="allow")
        return _WandbLike(module, is_wandb=False)

    return TrackerSink(start)


def _wandb(run: Path) -> TrackerSink:
    module = _need("wandb", ("wandb",), "wandb")

    def start(facts: Row) -> _Tracker:
        mode = os.environ.get("WANDB_MODE", "offline")  # online only if the user says so
        module.init(project="solollm", name=run.name, dir=str(run), config=dict(facts), mode=mode)
        return _WandbLike(module, is_wandb=True)

    return TrackerSink(start)


_SINKS: Mapping[str, Callable[[Path], TrackerSink]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}
