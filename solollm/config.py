"""Every setting of a run: one frozen tree, read from TOML or YAML, written as TOML.

`--set table.key=value` overrides any of them; an unknown key names the nearest valid one. What a
setting does is said beside it and nowhere else; `docs/reference/config.md` is made from here.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from solollm.adapters import MAX_RANK, TARGET_MODULES, TargetModule
from solollm.architecture import ModelConfig
from solollm.errors import ConfigError, nearest


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelTable(_Table):
    """Which model: exactly one of `preset`, `depth` and `config`; the rest are overrides."""

    preset: str | None = Field(None, description="15m, 125m, 350m, 1.3b, 2.7b or 7b")
    depth: int | None = Field(None, ge=1, le=64, description="the one-number dial")
    config: ModelConfig | None = Field(None, description="every field by hand")
    tie_word_embeddings: bool | None = None
    qk_norm: bool | None = None
    max_position_embeddings: int | None = Field(None, ge=1)
    rope_theta: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_dial(self) -> ModelTable:
        given = [n for n in ("preset", "depth", "config") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of preset, depth and config, not {' and '.join(given)}")
        return self


class DataTable(_Table):
    """What to train on."""

    corpus: str = Field("", description="folder of a built corpus")
    decay_corpus: str = Field("", description="corpus for the decay stage of `wsd`; empty: same")
    seq_len: int | None = Field(None, ge=2, description="tokens per row; default: the model's")
    mask_documents: bool = Field(True, description="attention never crosses a document border")


class OptimizerTable(_Table):
    """AdamW (Loshchilov & Hutter 2019) or Muon (Jordan 2024) with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "muon"
    lr: float | None = Field(None, gt=0, description="peak; default: the dial's")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="decoupled; block matrices only")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's, after its warm-up")
    momentum_start: float = Field(0.85, ge=0, lt=1, description="Muon's at step 0")
    momentum_warmup_steps: int = Field(200, ge=0)
    state_bits: Literal[8, 16, 32] = Field(
        32, description="8: block-wise codes; 16: bf16 rounded stochastically; see optim_codec"
    )
    paged: bool = Field(
        False, description="8-bit AdamW only: states leave an NVIDIA card when it is full"
    )
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm; 0: no clipping")
    clip: Literal["exact", "lagged"] = Field("exact", description="lagged: the norm of last step")


class ScheduleTable(_Table):
    """lr(step), a pure function; see solollm/schedule.py."""

    name: Literal["wsd", "cosine", "linear"] = "wsd"
    warmup_fraction: float = Field(0.03, ge=0, le=1)
    decay_fraction: float = Field(0.5, ge=0, le=1, description="wsd: share of steps that decay")
    final_fraction: float = Field(0.02, ge=0, le=1, description="last lr / peak lr")


class TrainTable(_Table):
    """How long, in what batches and precision. The horizon is the first given of `steps`,
    `tokens` and `hours`; none: the dial's."""

    steps: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    hours: float | None = Field(None, gt=0, description="measured speed decides the steps")
    batch_size: int | None = Field(None, ge=1, description="rows per step; default: the dial's")
    micro_batch_size: int | None = Field(None, ge=1, description="rows at once; default: planned")
    activation_checkpointing: bool | None = Field(None, description="default: planned")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(0, ge=0)
    init_from: str = Field("", description="checkpoint whose weights to start from")


class AdapterTable(_Table):
    """LoRA beside every layer's chosen matrices; the methods `lora` and `qlora` train nothing else.
    `alpha / rank` scales it, with `use_rslora` `alpha / sqrt(rank)`."""

    rank: int = Field(16, ge=1, le=MAX_RANK)
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False)
    use_rslora: bool = Field(False, description="the scale does not shrink with the rank")
    target_modules: tuple[TargetModule, ...] = Field(TARGET_MODULES, min_length=1)


class DpoTable(_Table):
    """The objective `dpo`: the sigmoid loss over pairs; see solollm/preference.py."""

    beta: float = Field(0.1, gt=0, description="how far the model may leave its reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs the wrong way")


class GrpoTable(_Table):
    """The objective `grpo`: answers drawn from the model itself and rewarded; see
    solollm/finetune/rollouts.py and solollm/finetune/rewards.py."""

    group_size: int = Field(8, ge=2, description="answers per prompt; divides train.batch_size")
    max_new_tokens: int = Field(256, ge=1, description="of an answer")
    beta: float = Field(0.0, ge=0, description="weight of the KL term; above 0: adapters only")
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = Field("dapo", description="TRL's names")
    scale_rewards: Literal["group", "batch", "none"] = Field("group", description="TRL's names")
    reward: str = Field("gsm8k", description="gsm8k, exact, regex, or FILE:FUNCTION")
    pattern: str = Field("", description="of the reward `regex`; {answer}: the right one")
    reward_seconds: float = Field(5.0, gt=0, description="for one answer; longer gives 0")
    rollout_batch_size: int = Field(32, ge=1, description="answers that are drawn at once")


class FinetuneTable(_Table):
    """What `solollm finetune` trains and on what; the base is `train.init_from`."""

    objective: Literal["sft", "dpo", "grpo"] = "sft"
    method: Literal["full", "lora", "qlora"] = Field("lora", description="qlora: 4-bit base")
    data: tuple[str, ...] = Field((), description="files, folders or hf://owner/name")
    held_out: tuple[str, ...] = Field((), description="the same; empty: a share of data")
    held_out_fraction: float = Field(0.05, ge=0, lt=1, description="by content; 0: none")
    shape: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "preference"] = (
        Field("auto", description="how a row is laid out; auto: detected and shown")
    )
    template: str = Field("", description="chat template file; empty: the base's own")
    system: str = Field("", description="system prompt of conversations that have none")
    over_length: Literal["refuse", "drop", "cut_start", "cut_end"] = Field(
        "refuse", description="samples longer than data.seq_len; refuse: at most 1% may be, dropped"
    )
    packing: bool = Field(True, description="several samples per row, attention apart")
    epochs: float = Field(1.0, gt=0, description="where train.steps and train.tokens are open")
    adapter: AdapterTable = AdapterTable()
    dpo: DpoTable = DpoTable()
    grpo: GrpoTable = GrpoTable()


class CheckpointTable(_Table):
    """When to save, what to keep."""

    every_steps: int = Field(1000, ge=0, description="0: not by steps")
    every_minutes: float = Field(15.0, ge=0, description="0: not by time")
    keep_latest: int = Field(2, ge=2, description="never 1: the newest may be the damaged one")
    keep_best: bool = True


class EvalTable(_Table):
    """Held-out loss and samples on the way."""

    every_steps: int = Field(250, ge=0, description="0: only at the end")
    batches: int = Field(20, ge=1, description="held-out batches per evaluation")
    sample_every_steps: int = Field(0, ge=0, description="0: a quarter, half and the end")
    sample_prompts: tuple[str, ...] = ("",)
    sample_tokens: int = Field(64, ge=1)


class LogTable(_Table):
    """What is written down while training."""

    every_steps: int = Field(10, ge=1, description="steps per line of metrics.jsonl")
    sinks: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()


class MachineTable(_Table):
    """What a run does about the machine it trains on; see solollm/watch.py."""

    keep_awake: bool = Field(True, description="no sleep while training")
    check_seconds: float = Field(30.0, ge=0, description="between looks; 0: never")
    heat: Literal["throttle", "warn"] = Field("throttle", description="pause between steps if hot")
    pressure: Literal["stop", "warn"] = Field("stop", description="save and stop if critical")
    min_battery_percent: int = Field(20, ge=0, le=100, description="save and stop below it")
    low_power: Literal["stop", "warn"] = Field("warn", description="in low-power mode")
    rank_silent_seconds: float = Field(
        120.0, gt=0, description="of several processes, one not heard of for so long is lost"
    )
    rank_stalled_seconds: float = Field(
        1800.0, gt=0, description="several processes that end no step for so long have failed"
    )


class RunConfig(_Table):
    """One run, whole. `finetune` makes it one of `solollm finetune`; `backend` is auto or a
    backend's name; `backend_options[name]` is that backend's own typed table."""

    model: ModelTable = ModelTable()
    data: DataTable = DataTable()
    optimizer: OptimizerTable = OptimizerTable()
    schedule: ScheduleTable = ScheduleTable()
    train: TrainTable = TrainTable()
    checkpoint: CheckpointTable = CheckpointTable()
    eval: EvalTable = EvalTable()
    log: LogTable = LogTable()
    finetune: FinetuneTable | None = None
    machine: MachineTable = MachineTable()
    backend: str = "auto"
    backend_options: dict[str, dict[str, bool | int | float | str]] = {}


def load_config(
    path: Path | None = None, overrides: Sequence[str] = (), *, defaults: Sequence[str] = ()
) -> RunConfig:
    """Read a config file (.toml, .yaml, .yml) and apply `--set` overrides, `table.key=value`, over
    it; `defaults` of the same form stand below both.

    Raises:
        ConfigError: no file, not parseable, an unknown key (names the nearest), a bad value.
    """
    raw: dict[str, Any] = {}
    for item in defaults:
        _apply(raw, item)
    _merge(raw, _read(path) if path is not None else {})
    for item in overrides:
        _apply(raw, item)
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """Validate a nested mapping. Raises ConfigError that lists every problem."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(item) for item in error.errors()]
        raise ConfigError(
            "the configuration cannot be used: " + "; ".join(problems),
            fix="`docs/reference/config.md` lists every key",
        ) from error


def dump_config(config: RunConfig) -> str:
    """The config as TOML text; `parse_config(tomllib.loads(text))` gives it back."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {path}", why=str(error)) from error
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix in (".yaml", ".yml"):
            import yaml

            loaded = yaml.safe_load(text)
            if loaded is None:
                return {}
            if isinstance(loaded, dict):
                return loaded
            raise ConfigError(f"{path} holds a {type(loaded).__name__}, not tables of settings")
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot parse config {path}", why=str(error)) from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"cannot parse config {path}", why=str(error)) from error
        raise
    raise ConfigError(f"{path} is neither .toml nor .yaml", fix="rename it")


def _merge(raw: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(raw.get(key), dict):
            _merge(raw[key], value)
        else:
            raw[key] = value


def _apply(raw: dict[str, Any], item: str) -> None:
    key, separator, text = item.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {item!r} has no `table.key=value` form")
    *tables, leaf = key.strip().split(".")
    target = raw
    for table in tables:
        target = target.setdefault(table, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {item!r}: {table} is a value, not a table")
    try:
        target[leaf] = json.loads(text)
    except json.JSONDecodeError:
        target[leaf] = text


def _explain(item: Any) -> str:
    place = [str(part) for part in item["loc"]]
    if item["type"] != "extra_forbidden":
        message = str(item["msg"]).removeprefix("Value error, ")
        return f"`{'.'.join(place)}` = {item['input']!r}: {message}"
    table: Any = RunConfig
    for part in place[:-1]:
        annotation = table.model_fields[part].annotation
        table = next((t for t in _models(annotation)), RunConfig)
    hint = nearest(place[-1], table.model_fields)
    return f"unknown key `{'.'.join(place)}`" + (f" ({hint})" if hint else "")


def _models(annotation: Any) -> list[type[BaseModel]]:
    from typing import get_args

    candidates = [annotation, *get_args(annotation)]
    return [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
