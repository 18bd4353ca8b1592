"""`solollm chat`: the terminal around `solollm.dialogue` and `solollm.remote_dialogue`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from solollm.commands import console
from solollm.commands.generate import read_sampling, sampling_options, show

if TYPE_CHECKING:
    from rich.console import Console

    from solollm.dialogue import Dialogue

_EPILOG = """\b
Examples:
  solollm chat runs/first
  solollm chat my-tuned-model --system "Answer in one sentence."
  echo "def main(" | solollm chat runs/first --completion
  solollm chat --url http://127.0.0.1:8000
  solollm chat pirate --url https://my-machine.local:8000 --key-file key.txt
"""
_HELP = """\
/reset          forget the conversation
/system TEXT    begin anew under this system prompt (no TEXT: none)
/help           this list
/quit           leave (also Ctrl-D); Ctrl-C stops an answer"""
_COMMANDS = ("/reset", "/system", "/help", "/quit")


@click.command("chat", epilog=_EPILOG)
@click.argument("model", required=False, metavar="[RUN_OR_CHECKPOINT]")
@click.option("--url", help="A running server that speaks OpenAI's API; MODEL is a name there.")
@click.option(
    "--key-file", type=click.Path(path_type=Path), help="The server's key; else $SOLOLLM_API_KEY."
)
@sampling_options
@click.option("--system", default="", help="System prompt of a chat-tuned model.")
@click.option("--chat", "mode", flag_value="chat", help="Use the chat template in any case.")
@click.option("--completion", "mode", flag_value="completion", help="Plain continuation of text.")
def command(
    model: str | None, url: str | None, key_file: Path | None, system: str, mode: str | None,
    **values: Any,
) -> None:  # fmt: skip
    """Talk to a model: of a run or checkpoint, or of a running server (--url).

    A chat-tuned model answers; a base model continues the text that you type. From a pipe, each
    line is one turn. In the conversation, /help lists what can be done.
    """
    sampling = read_sampling(values)
    options = {
        "mode": mode or "auto", "system": system, "sampling": sampling,
        "max_new_tokens": values["max_new_tokens"],
    }  # fmt: skip
    if url is not None and values["backend"] != "auto":
        raise click.UsageError("--backend has no effect with --url: the server has its own")
    if url is not None:
        opened = _open_remote(url, model or "", key_file, options)
    elif model is None:
        raise click.UsageError("give a run or checkpoint folder, or --url of a running server")
    elif key_file is not None:
        raise click.UsageError("--key-file has no effect without --url")
    else:
        opened = _open_here(Path(model), values["backend"], options)
    notices = console(stderr=True)
    for note in opened.notes:
        notices.print(note, style="dim", markup=False, soft_wrap=True)
    notices.print(_introduction(opened.session, opened.is_chat), soft_wrap=True)
    try:
        converse(opened.session, notices)
    finally:
        opened.close()


class _Opened(NamedTuple):
    """A conversation that can begin."""

    session: Dialogue
    is_chat: bool
    notes: tuple[str, ...]
    close: Callable[[], None]


def _open_here(model: Path, backend: str, options: dict[str, Any]) -> _Opened:
    from solollm.completion import open_model
    from solollm.dialogue import ChatSession

    opened = open_model(model, backend=backend)
    notes = (str(opened.checkpoint), *opened.notes)
    session = ChatSession(opened, **options)
    return _Opened(session, opened.is_chat, notes, opened.engine.close)


def _open_remote(url: str, name: str, key_file: Path | None, options: dict[str, Any]) -> _Opened:
    from solollm.commands.serve import read_key
    from solollm.remote_dialogue import RemoteModel, RemoteSession

    model = RemoteModel(url, name=name, key=read_key(key_file))
    session = RemoteSession(model, **options)
    return _Opened(session, model.is_chat, (f"{model.name} at {url}",), model.close)


def converse(session: Dialogue, notices: Console) -> None:
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


def _show_answer(session: Dialogue, line: str, notices: Console) -> None:
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


def _obey(session: Dialogue, line: str) -> str:
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


def _introduction(session: Dialogue, is_chat: bool) -> str:
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
