"""How an exception looks to the user, and the exit code it ends with."""

from __future__ import annotations

import errno
import os
import tempfile
import traceback
from typing import NamedTuple

import click

from solollm.commands import console, print_json
from solollm.errors import SoloLLMError, printable

DEBUG_VARIABLE = "SOLOLLM_DEBUG"
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


class Message(NamedTuple):
    """The three parts, the exit code, and the class to name in JSON."""

    what: str
    why: str
    fix: str
    exit_code: int
    kind: str


def show_error(error: BaseException, *, as_json: bool = False) -> int:
    """Print an error on standard error (as JSON: on standard output); returns the exit code."""
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    message = explain(error)
    if as_json:
        print_json({"error": message._asdict()})
        return message.exit_code
    terminal = console(stderr=True)
    lines = [(message.what, "bold"), (message.why, ""), (message.fix, "green")]
    for label, (text, style) in zip(("", "  why: ", "  fix: "), lines, strict=True):
        if text:  # soft_wrap: a pipe gets one part per line
            terminal.print(
                label + printable(text), style=style, markup=False, emoji=False, soft_wrap=True
            )
    return message.exit_code


def explain(error: BaseException) -> Message:
    """What, why and fix of any exception that reached the command line."""
    kind = type(error).__name__
    if isinstance(error, SoloLLMError):
        return Message(error.what, error.why, error.fix, error.exit_code, kind)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return Message("stopped by Ctrl-C", "", "", 130, "KeyboardInterrupt")
    if isinstance(error, click.ClickException):
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        fix = f"`{path} --help` shows how" if path else ""
        return Message(error.format_message(), "", fix, error.exit_code, kind)
    if isinstance(error, MemoryError):
        fix = "train with --set train.micro_batch_size=1, or a smaller --preset or --depth"
        return Message("this machine ran out of memory", str(error), fix, 1, kind)
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        fix = "free some space; what was saved before is still there"
        return Message(f"cannot write: {error}", "the disk is full or failing", fix, 74, kind)
    where = _write_traceback(error)
    return Message(
        f"a bug in SoloLLM, or in something it uses: {kind}: {error}",
        f"the traceback is in {where}" if where else "the traceback could not be written",
        f"{DEBUG_VARIABLE}=1 shows it here; please report it with that file", 1, kind,
    )  # fmt: skip


def _write_traceback(error: BaseException) -> str:
    """The file that holds the traceback; empty where none can be written."""
    try:
        handle, path = tempfile.mkstemp(prefix="solollm-", suffix=".traceback.txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return ""
    return path
