"""`solollm serve`: the terminal around `solollm.serving.server`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from solollm.commands import console, print_json

if TYPE_CHECKING:
    from solollm.guard.guard import Guard
    from solollm.serving.server import Listening, ModelSource

KEY_VARIABLE = "SOLOLLM_API_KEY"
_EPILOG = """\b
Examples:
  solollm serve runs/first
  solollm serve runs/first --guard-config guard.toml
  solollm serve models/base --adapter pirate=runs/pirate --adapter poet=adapters/poet
  solollm serve old=runs/first/checkpoints/step-00001000 new=runs/first --port 9000
  solollm serve runs/first --host 0.0.0.0 --key-file key.txt --allow-host my-machine.local
"""


@click.command("serve", epilog=_EPILOG)
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]RUN_OR_CHECKPOINT...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="auto, builtin, vllm, or the address of a running vLLM.",
)
@click.option("--backend", default="auto", show_default=True, help="Of the built-in engine.")
@click.option(
    "--vllm-python", type=click.Path(path_type=Path), help="An interpreter that has vLLM."
)
@click.option("--vllm-eager", is_flag=True, help="vLLM without compiling: slower, up sooner.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="A LoRA adapter (a run or a folder) to offer under a name of its own.",
)
@click.option(
    "--key-file", type=click.Path(path_type=Path), help=f"Its first line; else ${KEY_VARIABLE}."
)
@click.option("--allow-host", "hosts", multiple=True, help="A name this machine is called by.")
@click.option("--allow-origin", "origins", multiple=True, help="A web page's origin to let in.")
@click.option("--max-batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--max-seq-len", type=click.IntRange(0), default=0, help="0: the model's.")
@click.option(
    "--guard",
    type=click.Choice(["on", "off"]),
    default="on",
    show_default=True,
    help="Filter personal data, loops and more out of answers.",
)
@click.option(
    "--guard-config", type=click.Path(path_type=Path), help="TOML; see the guide on guardrails."
)
@click.option("--json", "as_json", is_flag=True, help="Say in JSON where it listens.")
def command(
    models: tuple[str, ...], host: str, port: int, key_file: Path | None,
    hosts: tuple[str, ...], origins: tuple[str, ...], adapters: tuple[str, ...],
    guard: str, guard_config: Path | None, as_json: bool, **engines: Any,
) -> None:  # fmt: skip
    """Serve models to programs that speak OpenAI's API, and to people in a browser.

    Only this machine can reach the server unless --host says otherwise, and then a key of at least
    32 characters is needed. Ctrl-C lets answers under way end.
    """
    from solollm.serving.access import AccessRules
    from solollm.serving.engine_choice import EngineSettings
    from solollm.serving.server import ServeOptions, serve

    rules = AccessRules(host=host, key=read_key(key_file), hosts=hosts, origins=origins)
    settings = EngineSettings(adapters=dict(map(read_adapter, adapters)), **engines)
    filters = open_guard(guard == "on", guard_config)
    options = ServeOptions(
        access=rules, port=port, engines=settings, filters=filters,
        interventions=filters.notices.counts if filters is not None else {},
    )  # fmt: skip
    notices = console(stderr=True)
    notices.print(f"loading {', '.join(models)}", style="dim", markup=False, soft_wrap=True)
    try:
        serve(
            [read_source(model) for model in models],
            options,
            on_ready=lambda listening: _show(listening, as_json, bool(rules.key)),
        )
    finally:
        if filters is not None:
            filters.close()


def open_guard(is_on: bool, config: Path | None) -> Guard | None:
    """The guard of the settings in a file, or of the defaults; None where it is off.

    Raises UsageError for settings of a guard that is off, ConfigError for bad ones.
    """
    from solollm.guard.guard import Guard
    from solollm.guard.settings import read_settings

    if not is_on and config is not None:
        raise click.UsageError("--guard-config has no effect with --guard off")
    if not is_on:
        return None
    return Guard(read_settings(config) if config is not None else None)


def read_source(text: str) -> ModelSource:
    """NAME=PATH, or a path; a path that exists wins."""
    from solollm.serving.server import ModelSource

    name, equals, path = text.partition("=")
    if equals and name and not Path(text).exists():
        return ModelSource(Path(path), name)
    return ModelSource(Path(text))


def read_adapter(text: str) -> tuple[str, Path]:
    """NAME=FOLDER. Raises UsageError for anything else."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise click.UsageError(f"--adapter {text!r} is not NAME=FOLDER")
    return name, Path(path)


def read_key(file: Path | None) -> str:
    """The key of a file's first line, else of the environment; empty: none.

    Raises ConfigError for a file without one.
    """
    from solollm.errors import ConfigError

    if file is None:
        return os.environ.get(KEY_VARIABLE, "")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {file} cannot be read", why=str(error)) from error
    key = lines[0].strip() if lines else ""
    if not key:
        raise ConfigError(f"the key file {file} is empty", fix="write the key into its first line")
    return key


def _show(listening: Listening, as_json: bool, has_key: bool) -> None:
    if as_json:
        print_json(
            {"url": listening.url, "models": listening.models, "notes": listening.notes}
        )  # fmt: skip
        return
    terminal = console(stderr=True)
    for note in listening.notes:
        terminal.print(note, style="dim", markup=False, soft_wrap=True)
    key = " -H 'Authorization: Bearer KEY'" if has_key else ""
    route, asked = "completions", '"prompt": "Once", "max_tokens": 64'
    if listening.is_chat:
        route, asked = "chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
    example = (
        f"curl {listening.url}/v1/{route} -H 'Content-Type: application/json'{key} -d"
        f' \'{{"model": "{listening.models[0]}", {asked}}}\''
    )
    terminal.print(f"serving {', '.join(listening.models)} at {listening.url}", markup=False)
    terminal.print(example, style="dim", markup=False, soft_wrap=True)
