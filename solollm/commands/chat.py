"""`solollm chat`: the terminal around `solollm.dialogue`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from solollm.commands import console
from solollm.commands.generate import read_sampling, sampling_options, show

if TYPE_CHECKING:
    from rich.console import Console

    from solollm.dialogue import ChatSession

_EPILOG = """\b
Examples:
  solollm chat runs/first
  solollm chat my-tuned-model --system "Answer in one sentence."
  echo "def main(" | solollm chat runs/first --completion
"""
_HELP = """\
/reset          forget the conversation
/system TEXT    begin anew under this system prompt (no TEXT: none)
/help           this list
/quit           leave (also Ctrl-D); Ctrl-C stops an answer"""
_COMMANDS = ("/reset", "/system", "/help", "/quit")


@click.command("chat", epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path), metavar="RUN_OR_CHECKPOINT")
@sampling_options
@click.option("--system", default="", help="System prompt of a chat-tuned model.")
@click.option("--chat", "mode", flag_value="chat", help="Use the chat template in any case.")
@click.option("--completion", "mode", flag_value="completion", help="Plain continuation of text.")
def command(model: Path, system: str, mode: str | None, **values: Any) -> None:
    """Talk to a model.

    A chat-tuned model answers; a base model continues the text that you type. From a pipe, each
    line is one turn. In the conversation, /help lists what can be done.
    """
    from solollm.completion import open_model
    from solollm.dialogue import ChatSession

    sampling = read_sampling(values)
    opened = open_model(model, backend=values["backend"])
    session = ChatSession(
        opened, mode=mode or "auto", system=system, sampling=sampling,  # type: ignore[arg-type]
        max_new_tokens=values["max_new_tokens"],
    )  # fmt: skip
    notices = console(stderr=True)
    for note in (str(opened.checkpoint), *opened.notes):
        notices.print(note, style="dim", markup=False, soft_wrap=True)
    notices.print(_introduction(session, opened.is_chat), soft_wrap=True)
    converse(session, notices)


def converse(session: ChatSession, notices: Console) -> None:
    """Read turns from standard input until it ends or /quit."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = _read_line("> " if is_terminal else "")
        except KeyboardInterrupt:
            notices.print("\n/quit or Ctrl-D leaves", style="dim")
            continue
        if line is None or line.strip() == "/quit":
            return
        if line.startswith("/"):
            notices.print(_obey(session, line), markup=False, soft_wrap=True)
        elif line.strip():
            _show_answer(session, line, notices)


def _show_answer(session: ChatSession, line: str, notices: Console) -> None:
    from solollm.errors import ConfigError

    try:
        answer = session.ask(line)
        with _stop_on_interrupt() as is_stopped, closing(answer):
            for piece in answer:
                show(piece)
                if is_stopped():
                    break
    except ConfigError as error:  # this turn cannot be asked; the conversation goes on
        notices.print(str(error), markup=False, soft_wrap=True)
        return
    show("\n")


def _obey(session: ChatSession, line: str) -> str:
    """Run a slash command; what to tell the user."""
    from solollm.errors import ConfigError, nearest

    name, _, text = line.strip().partition(" ")
    if name == "/help":
        return _HELP
    if name == "/reset":
        session.reset()
        return "forgotten"
    if name == "/system":
        try:
            session.set_system(text.strip())
        except ConfigError as error:
            return str(error)
        return "a new conversation begins"
    return f"unknown command {name}: {nearest(name, _COMMANDS) or '/help lists them'}"


def _introduction(session: ChatSession, is_chat: bool) -> str:
    if session.mode == "completion":
        reason = "completion was asked for" if is_chat else "this is a base model"
        return f"{reason}: it continues your text rather than answering it. /help lists commands."
    if not is_chat:
        return "this model was not tuned for chat: expect it to ramble. /help lists commands."
    return "/help lists commands."


def _read_line(prompt: str) -> str | None:
    """The next line without its end; None at the end of the input."""
    if not prompt:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    with suppress(ImportError):  # arrow keys and history, where the platform has it
        import readline  # noqa: F401
    try:
        return input(prompt)
    except EOFError:
        sys.stdout.write("\n")
        return None


@contextmanager
def _stop_on_interrupt() -> Iterator[Any]:
    """Within, the first Ctrl-C only sets a mark, which the yielded function reads, so that no step
    of the engine is torn apart; a second one interrupts as usual."""
    marks: list[int] = []

    def mark(number: int, frame: FrameType | None) -> None:
        marks.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, mark)
    try:
        yield lambda: bool(marks)
    finally:
        signal.signal(signal.SIGINT, previous)
