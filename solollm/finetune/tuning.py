"""`solollm finetune`: from a base and rows of conversations to a run like any other.

What is trained on is written into the run before it starts (`samples`); the rest is
`solollm.pretraining`'s, so that resume, moving, watching and reports are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from solollm import durable
from solollm.architecture import ModelConfig
from solollm.completion import find_checkpoint
from solollm.config import FinetuneTable, RunConfig, load_config
from solollm.errors import ConfigError, quoted
from solollm.finetune.check import Findings, examine
from solollm.finetune.dataset import (
    Reading,
    read_conversations,
    row_length,
    sample_set,
    tokenizer_for,
)
from solollm.finetune.packing import SampleStream
from solollm.finetune.rewards import require_reward
from solollm.finetune.samples import SampleSet
from solollm.horizon import updated
from solollm.pretraining import pretrain
from solollm.run_log import Sink
from solollm.starting_weights import read_starting_weights
from solollm.workload import TrainResult

# Below what a file or --set says: fine-tuning's own habits, where they are not pretraining's.
DEFAULTS = (
    'optimizer.name="adamw"', "optimizer.weight_decay=0.0", "optimizer.beta2=0.999",
    'schedule.name="cosine"', "schedule.final_fraction=0.1", "eval.every_steps=100",
    "checkpoint.every_steps=200", "finetune.method=lora",
)  # fmt: skip
_TOKENS_PER_STEP = 8192
_STEPS_PER_EPOCH = 50  # at least, where there is that much data
_ADAPTER_LR, _FULL_LR = 2e-4, 2e-5  # at a width of 4096
_NUM_PROMPTS = 2


@dataclass(frozen=True)
class Prepared:
    """A fine-tuning as it will be, before anything is written. `config` is resolved but for what a
    backend decides; `findings` say what was found in the data."""

    config: RunConfig
    base: Path
    reading: Reading
    samples: SampleSet
    findings: Findings


def finetune_config(path: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """`load_config` with fine-tuning's own defaults below the file and the overrides."""
    return load_config(path, overrides, defaults=DEFAULTS)


def finetune(
    config: RunConfig, run: Path, *, backend: str = "auto", sinks: Sequence[Sink] = ()
) -> TrainResult:
    """Tune `train.init_from` on `finetune.data` into the folder `run`, which must hold no run yet.

    Raises:
        ConfigError, DataError, BackendError, PlanError, IntegrityError: before training.
        StoppedBySignal, StorageError, SoloLLMError: as `Trainer.fit`.
    """
    return start(prepare_tuning(config), run, backend=backend, sinks=sinks)


def start(
    prepared: Prepared, run: Path, *, backend: str = "auto", sinks: Sequence[Sink] = ()
) -> TrainResult:
    """Write the samples into `run`, and train; raises as `finetune`."""
    prepared.findings.require_sound()
    if (run / "run.toml").exists():
        raise ConfigError(
            f"{run} holds a run already",
            why="a new run never writes over another",
            fix=f"`solollm resume {quoted(run)}` goes on with it; or choose another name",
        )
    durable.make_directory(run)
    prepared.samples.save(run / "data")
    try:
        config = updated(_named(prepared.config), "data", corpus=str(run / "data"))
        return pretrain(config, run, backend=backend, sinks=sinks)
    finally:
        if not (run / "run.toml").exists():  # refused before it began
            durable.remove_tree(run / "data")


def _named(config: RunConfig) -> RunConfig:
    """The config as the run keeps it: its samples are its own now, and sources only names."""
    table = config.finetune or FinetuneTable()

    def name_of(source: str) -> str:
        return source if "://" in source else Path(source).name

    kept = table.model_copy(
        update={
            "data": tuple(map(name_of, table.data)),
            "held_out": tuple(map(name_of, table.held_out)),
            "template": name_of(table.template),
        }
    )
    return config.model_copy(update={"finetune": kept})


def prepare_tuning(config: RunConfig) -> Prepared:
    """Read and look at the data, and fill in what the config leaves open; writes nothing.

    Raises:
        ConfigError: no base, no data, no template; settings that do not go together.
        DataError: rows that cannot be trained on, or too many that are longer than a row.
    """
    table, base, model, reading, findings = _read(config)
    seq_len = findings.seq_len
    samples = sample_set(reading, table, seq_len)
    config = updated(config, "train", init_from=str(base))
    config = _resolved(updated(config, "data", seq_len=seq_len), table, model, samples)
    return Prepared(_with_prompts(config, reading), base, reading, samples, findings)


def look(config: RunConfig) -> tuple[Reading, Findings]:
    """What `--check` shows: the data as it would be trained on, good or bad; writes nothing.

    Raises:
        ConfigError: no base, no data, no template.
    """
    _, _, _, reading, findings = _read(config)
    return reading, findings


def _read(
    config: RunConfig,
) -> tuple[FinetuneTable, Path, ModelConfig, Reading, Findings]:
    """The settings, the base and its model, and the rows as they would be trained on."""
    table = _table_of(config)
    base, _ = find_checkpoint(Path(config.train.init_from))
    tokenizer = tokenizer_for(base, table)
    model = read_starting_weights(base, tokenizer).model
    reading = read_conversations(table, tokenizer)
    seq_len = row_length(
        reading, table, asked=config.data.seq_len, max_positions=model.max_position_embeddings
    )
    return table, base, model, reading, examine(reading, table, base, seq_len=seq_len)


def _table_of(config: RunConfig) -> FinetuneTable:
    table = config.finetune or FinetuneTable()
    if not config.train.init_from:
        raise ConfigError("no base is given", fix="solollm finetune BASE --data FILE --run RUN")
    if not table.data:
        raise ConfigError("no data is given", fix="give --data FILE, once or several times")
    if table.objective == "grpo":  # before anything is written: it is needed to resume, too
        require_reward(table.grpo)
    if table.objective == "grpo" and table.grpo.beta and table.method == "full":
        raise ConfigError(
            f"finetune.grpo.beta = {table.grpo.beta} needs a reference that stays as it is",
            why="with finetune.method = full every weight moves, and a copy would cost as much",
            fix="train an adapter (--method lora), or set finetune.grpo.beta=0",
        )
    return table


def _resolved(
    config: RunConfig, table: FinetuneTable, model: ModelConfig, samples: SampleSet
) -> RunConfig:
    """Rows per step, steps and learning rate where they are open."""
    seq_len = config.data.seq_len
    assert seq_len is not None
    rows, lr = config.train.batch_size, config.optimizer.lr

    # Rows of one sample, or of as many as belong together; GRPO's prompts become a group each.
    together = {"sft": 1, "dpo": 2, "grpo": table.grpo.group_size}[table.objective]
    drawn = together if table.objective == "grpo" else 1

    def stream(batch_size: int) -> SampleStream:
        return SampleStream(
            samples, "train", seq_len=seq_len, batch_size=batch_size // drawn,
            seed=config.train.seed, packing=table.packing and table.objective == "sft",
        )  # fmt: skip

    if rows is None:
        most = max(1, stream(together).num_rows * drawn // _STEPS_PER_EPOCH)
        rows = max(1, min(_TOKENS_PER_STEP // seq_len, most) // together) * together
    if rows % together:
        what = "pairs" if table.objective == "dpo" else "groups"
        raise ConfigError(
            f"train.batch_size {rows} splits {what}",
            fix=f"make it a multiple of {together}",
        )
    if lr is None:
        # Wider models want smaller steps; adapters ten times those of the whole model.
        lr = (_FULL_LR if table.method == "full" else _ADAPTER_LR) * math.sqrt(
            4096 / model.hidden_size
        )
    config = updated(config, "train", batch_size=rows)
    horizon = (config.train.steps, config.train.tokens, config.train.hours)
    if horizon == (None, None, None):
        steps = max(1, round(table.epochs * stream(rows).steps_per_epoch))
        config = updated(config, "train", steps=steps)
    return updated(config, "optimizer", lr=lr).model_copy(update={"finetune": table})


def _with_prompts(config: RunConfig, reading: Reading) -> RunConfig:
    """Samples on the way answer the first questions, where the config asks nothing itself."""
    if config.eval.sample_prompts != ("",):
        return config
    laid = [*reading.held_out, *reading.train][:_NUM_PROMPTS]
    prompts = (next(m["content"] for m in one.conversation.messages if m["role"] == "user")
               for one in laid)  # fmt: skip
    return updated(config, "eval", sample_prompts=tuple(prompts))
