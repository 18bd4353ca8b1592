"""`solollm resume`: the skin of `solollm.pretraining.resume`."""

from __future__ import annotations

from pathlib import Path

import click

from solollm.commands import print_json
from solollm.commands.pretrain import say, say_reading, show_result, sink_for
from solollm.commands.supervised import is_supervised, memory_flags, supervise, supervised_option

_EPILOG = """\b
Examples:
  solollm resume runs/first
  solollm resume runs/first --corpus /mnt/moved/corpora/mine
  solollm resume moved/runs/first --backend mlx
"""


@click.command("resume", epilog=_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--corpus", type=click.Path(path_type=Path), help="Where its corpus lies now, if it was moved."
)
@click.option("--base", type=click.Path(path_type=Path), help="Where an adapter's base lies now.")
@click.option("--backend", default="auto", show_default=True, help="auto, or the name of one.")
@click.option(
    "--micro-batch-size", type=click.IntRange(1), help="Rows at once from here on; same batch."
)
@click.option("--activation-checkpointing", is_flag=True, help="From here on, to save memory.")
@supervised_option
@click.option("--json", "as_json", is_flag=True, help="One line of JSON per row instead.")
def command(
    run: Path, corpus: Path | None, base: Path | None, backend: str,
    micro_batch_size: int | None, activation_checkpointing: bool, supervised: bool | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Continue an interrupted run from its newest intact checkpoint.

    On the same machine the result is what an undisturbed run would have given, bit for bit. On
    another machine or backend, micro-batch and precision are planned anew. A run that was stopped
    has said what comes next: that is computed first, and if it is not so here, nothing is changed
    and this ends with 3.
    """
    from solollm.pretraining import resume
    from solollm.run_paths import with_paths_to
    from solollm.runs import Run

    memory: dict[str, int | bool] = {}
    if micro_batch_size:
        memory["micro_batch_size"] = micro_batch_size
    if activation_checkpointing:
        memory["activation_checkpointing"] = True
    if is_supervised(supervised):
        words = ["resume", str(run), "--backend", backend, *(["--json"] if as_json else [])]
        words += ["--corpus", str(corpus)] if corpus else []
        words += ["--base", str(base)] if base else []
        supervise(run, [*words, *memory_flags(memory)], words)
        return
    config = with_paths_to(Run.open(run).config, run)
    say_reading(config, as_json=as_json, corpus=corpus)
    result = resume(
        run, backend=backend, sinks=[sink_for(as_json=as_json)], corpus=corpus, base=base,
        memory=memory,
    )  # fmt: skip
    if result.rank > 0:
        return
    is_over = result.start_step == result.step
    if as_json and is_over:
        print_json({"kind": "finish", "status": "finished", "step": result.step})
    elif is_over:
        say(f"{run} is finished already: nothing was done")
    if not as_json:
        show_result(result)
