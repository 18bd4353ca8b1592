"""The `solollm` command: a group that loads each subcommand when it is used, and the exit codes.

A subcommand `x` is `solollm/commands/x.py` (a keyword's is `import_.py`) and its object `command`;
the table below holds the short helps, so that `solollm --help` imports none of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword

import click
from click.shell_completion import CompletionItem

from solollm import __version__
from solollm.errors import nearest

COMMANDS = {
    "quickstart": "The whole life of a small model in a few minutes, offline.",
    "doctor": "What this machine can do, and what to change.",
    "plan": "Whether a training fits, how long it takes, what it costs.",
    "data": "Build a corpus from files, folders and datasets.",
    "tokenizer": "Train a tokenizer, or look at one.",
    "pretrain": "Train a model from scratch, or from a checkpoint's weights.",
    "finetune": "Teach a model to answer, on rows of conversations.",
    "resume": "Continue an interrupted run.",
    "generate": "Complete a prompt.",
    "chat": "Talk to a model.",
    "serve": "Offer models to programs (OpenAI's API) and browsers.",
    "engines": "What can serve models here; install vLLM.",
    "import": "Make a model of others ready to train on.",
    "eval": "Measure a model: bits per byte, MMLU, GSM8K, any lm-eval task.",
    "export": "Write a model as a folder for transformers, vLLM or mlx-lm.",
    "runs": "List, show, verify and move runs.",
    "verify": "Prove that runs resume, move, and survive faults.",
    "bench": "Measure training and serving speed against other stacks.",
}


class LazyGroup(click.Group):
    """A group over `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
        command: click.Command = import_module(f"solollm.commands.{module}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = nearest(args[0], COMMANDS) or "`solollm --help` lists them"
            raise click.UsageError(f"unknown command {args[0]!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [
            CompletionItem(name, help=short_help)
            for name, short_help in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


_EPILOG = """\b
Example:
  solollm quickstart
\b
Shell completion:
  eval "$(_SOLOLLM_COMPLETE=bash_source solollm)"      (bash, in ~/.bashrc)
  eval "$(_SOLOLLM_COMPLETE=zsh_source solollm)"       (zsh, in ~/.zshrc)
  _SOLOLLM_COMPLETE=fish_source solollm | source       (fish)
"""


@click.group(
    cls=LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="solollm")
def command() -> None:
    """One developer, one machine, one language model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; every ending has its exit code (see `solollm.errors`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        outcome = command.main(args=words, prog_name="solollm", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # `solollm runs list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        from solollm.commands.errors_shown import show_error  # rich loads only now

        return show_error(error, as_json="--json" in words)
    return outcome if isinstance(outcome, int) else 0
