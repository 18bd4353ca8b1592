"""`solollm engines`: what can serve models here, and vLLM's own environment."""

from __future__ import annotations

from pathlib import Path

import click

from solollm.commands import console, print_json


@click.group()
def command() -> None:
    """What can serve models here; install vLLM.

    \b
    Example:
      solollm engines list
      solollm engines install vllm
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def list_engines(as_json: bool) -> None:
    """Which engines are here, and which one `--engine auto` takes.

    \b
    Example:
      solollm engines list
    """
    from solollm.registry import find_backends
    from solollm.serving.engine_choice import EngineSettings, choose_engine
    from solollm.serving.vllm_environment import find_vllm

    backends = [f"{c.name} on {c.probe.device}" for c in find_backends() if c.probe.available]
    vllm = find_vllm()
    choice = choose_engine(EngineSettings())
    if as_json:
        python = None if vllm is None else vllm.python
        print_json({"builtin": backends, "vllm": python, "auto": choice.reason})
        return
    terminal = console()
    terminal.print(f"builtin  {', '.join(backends) or 'no backend can run here'}", markup=False)
    where = "not installed" if vllm is None else f"{vllm.python} ({vllm.origin})"
    terminal.print(f"vllm     {where}", markup=False, soft_wrap=True)
    terminal.print(f"auto     {choice.reason}", markup=False, soft_wrap=True)


@command.command()
@click.argument("engine", type=click.Choice(["vllm"]))
@click.option("--into", type=click.Path(path_type=Path), help="Folder of the environment.")
@click.option(
    "--cpu/--cuda", "is_cpu", default=None, help="Which build. Default: as there is a card."
)
@click.option("--torch-index", default="", metavar="URL", help="A further index to find torch on.")
def install(engine: str, into: Path | None, is_cpu: bool | None, torch_index: str) -> None:
    """Install vLLM in an environment of its own, from the versions that it was tested with.

    The build for CUDA cards takes about 12 GB of disk, the one for processors 5 GB. Run again, it
    leaves an environment that is whole as it is.

    \b
    Example:
      solollm engines install vllm
      solollm engines install vllm --cpu --into .venv-vllm
    """
    from solollm.hardware import nvidia_gpus
    from solollm.serving.vllm_environment import default_folder, install_vllm

    if is_cpu is None:
        is_cpu = not nvidia_gpus()
    terminal = console(stderr=True)
    python = install_vllm(
        into or default_folder(), "cpu" if is_cpu else "cuda", torch_index=torch_index,
        tell=lambda text: terminal.print(text, markup=False, soft_wrap=True),
    )  # fmt: skip
    click.echo(python)
