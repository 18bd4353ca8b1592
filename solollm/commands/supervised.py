"""`--supervised` of `pretrain` and `resume`: the skin of `solollm.supervisor`."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from solollm.commands import console, print_json

_LAUNCHED = ("WORLD_SIZE", "MLX_RANK", "MLX_HOSTFILE")  # set by torchrun and mlx.launch

supervised_option: Callable[[Any], Any] = click.option(
    "--supervised/--unsupervised", default=None,
    help="Train in a child process that is started again after a fault of the machine."
    " Default: on Apple silicon.",
)  # fmt: skip


def is_supervised(asked: bool | None) -> bool:
    """The flag, else whether this is a Mac with MLX, whose GPU can end a process at any time. One
    of several processes that train together cannot be started again alone."""
    if asked is not None:
        return asked
    if any(name in os.environ for name in _LAUNCHED):
        return False
    return sys.platform == "darwin" and platform.machine() == "arm64"


def supervise(run: Path, first: Sequence[str], resume: Sequence[str]) -> None:
    """Run `solollm` with the words of `first`, later of `resume`; ends with the trainer's code."""
    from solollm.supervisor import Supervisor

    def again(memory: Mapping[str, int | bool]) -> list[str]:
        return _command([*resume, *memory_flags(memory)])

    tell = print_json if "--json" in first else _show
    code = Supervisor(run, _command(first), again, tell=tell).supervise()
    click.get_current_context().exit(code)


def _show(event: Mapping[str, Any]) -> None:
    if event["kind"] != "restarted":
        return  # giving up is an error, with a message of its own
    rows = event.get("micro_batch_size")
    smaller = f", with micro-batches of {rows}" if rows else ""
    cause = str(event["cause"]).replace("_", " ")
    text = f"it ended ({cause}, {event['ending']}): again from its last checkpoint{smaller}"
    console().print(text, markup=False, soft_wrap=True)


def memory_flags(memory: Mapping[str, int | bool]) -> list[str]:
    """`resume`'s flags for these settings."""
    flags = []
    if "micro_batch_size" in memory:
        flags += ["--micro-batch-size", str(memory["micro_batch_size"])]
    if memory.get("activation_checkpointing"):
        flags.append("--activation-checkpointing")
    return flags


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "solollm", *words, "--unsupervised"]
