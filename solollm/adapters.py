"""What a low-rank adapter is: its settings, THE adapter name table, first values, PEFT's layout.

An adapter adds `scale * B A` to frozen weight matrices (LoRA, Hu et al. 2021, arXiv:2106.09685;
with `use_rslora` the scale does not shrink with the rank, Kalajdzievski 2023, arXiv:2312.03732).
Names, shapes and orientation are PEFT's, so that a checkpoint's adapter loads there as it is; the
backends keep to these names for weights and moments alike. The frozen base is named in
`solollm.checkpoint`'s `base.json`; how it is quantised is each backend's own.

Shapes: r rank, A [r, in], B [out, r] beside a weight [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from solollm.architecture import ModelConfig, ParameterSpec, parameter_table
from solollm.errors import BackendError, ConfigError

PEFT_PREFIX = "base_model.model."
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.json"  # of a run's adapter: which base it belongs to
TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGET_MODULES: tuple[TargetModule, ...] = get_args(TargetModule)
MAX_RANK = 4096


class AdapterOptions(BaseModel):
    """An adapter of every layer's `target_modules`. `base_bits` 4: the frozen base is held in
    4-bit codes of the backend's own codec (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(16, ge=1, le=MAX_RANK)
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False)
    use_rslora: bool = False
    target_modules: tuple[TargetModule, ...] = TARGET_MODULES
    base_bits: Literal[4] | None = None
    seed: int = Field(0, ge=0)

    @field_validator("target_modules")
    @classmethod
    def _in_table_order(cls, modules: tuple[TargetModule, ...]) -> tuple[TargetModule, ...]:
        if not modules:
            raise ValueError("an adapter needs at least one target module")
        return tuple(name for name in TARGET_MODULES if name in modules)

    @property
    def scale(self) -> float:
        """What `B A` is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def method(self) -> str:
        """`lora` or `qlora`."""
        return "lora" if self.base_bits is None else "qlora"


class AdapterPair(NamedTuple):
    """The two factors beside one base weight, as rows of the name table."""

    base: ParameterSpec
    a: ParameterSpec
    b: ParameterSpec


def adapter_pairs(model: ModelConfig, options: AdapterOptions) -> list[AdapterPair]:
    """Every adapted base weight in the order of the base's name table, with its factors."""
    pairs = []
    for spec in parameter_table(model):
        stem = spec.name.removesuffix(".weight")
        if stem.rpartition(".")[2] not in options.target_modules:
            continue
        out, into = spec.shape
        name, rank = f"{PEFT_PREFIX}{stem}", options.rank
        # PEFT and mlx-lm draw A uniformly within 1/sqrt(in); this is a normal of that variance.
        std = (3 * into) ** -0.5
        a = ParameterSpec(f"{name}.lora_A.weight", (rank, into), "matrix", True, "normal", std)
        b = ParameterSpec(f"{name}.lora_B.weight", (out, rank), "matrix", True, "zeros", 0.0)
        pairs.append(AdapterPair(spec, a, b))
    return pairs


def adapter_table(model: ModelConfig, options: AdapterOptions) -> list[ParameterSpec]:
    """The adapter's tensors in file order. First values: `architecture.initial_parameter` with
    `options.seed`, so that `B A` is zero and the first step starts from the base."""
    return [spec for pair in adapter_pairs(model, options) for spec in (pair.a, pair.b)]


def trained_table(model: ModelConfig, options: AdapterOptions | None) -> list[ParameterSpec]:
    """What a session trains, saves and loads: the adapter's tensors, or all of the model's."""
    return parameter_table(model) if options is None else adapter_table(model, options)


def require_trainable(optimizer: str, clip: str) -> None:
    """What a session needs to train an adapter: names of `solollm.config.OptimizerTable`.

    Raises:
        BackendError, ConfigError: an optimizer, or a way to clip, that trains no adapter.
    """
    if optimizer != "adamw":
        raise BackendError(
            f"an adapter is not trained with {optimizer}",
            why="it orthogonalises whole weight matrices, and an adapter's factors are none",
            fix='set optimizer.name = "adamw"',
        )
    if clip != "exact":
        raise ConfigError(
            f"an adapter is not trained with {clip} clipping",
            why="its gradients are small and all held at once, so that the exact norm is free",
            fix='set optimizer.clip = "exact"',
        )


def require_base(is_there: bool) -> None:
    """Raises BackendError where a session that trains an adapter was given no base yet."""
    if not is_there:
        raise BackendError(
            "this session trains an adapter and has no base yet",
            fix="call import_base with the tensors of the model that the adapter is for",
        )


def codec_of(adapters: Sequence[str]) -> str:
    """The codec of a quantised base among a backend's `capabilities().adapters`, or ""."""
    return next((kind.partition("-")[2] for kind in adapters if kind.startswith("qlora-")), "")


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """`weight + scale * B A`, float32 [out, in]."""
    product: np.ndarray = b.astype(np.float32) @ a.astype(np.float32)
    product *= np.float32(scale)
    product += weight
    return product


def peft_config(options: AdapterOptions, *, base_name: str = "") -> dict[str, Any]:
    """`adapter_config.json`. `base_name`: where PEFT finds the base, a hub id; "" says nothing."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "use_rslora": options.use_rslora,
        "target_modules": list(options.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


# What `peft_config` does not write: settings that change what an adapter computes. A foreign file
# may name them with a value that changes nothing.
_INERT: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


def read_peft_config(raw: Mapping[str, Any]) -> AdapterOptions:
    """The options of a foreign or own `adapter_config.json`.

    Raises:
        ConfigError: an adapter that is not computed here (another kind, DoRA, ranks that differ
            by layer, targets outside the seven projections), or values out of range.
    """
    for key, harmless in _INERT.items():
        if key in raw and raw[key] not in harmless:
            raise ConfigError(
                f"adapter_config.json sets {key} = {raw[key]!r:.80}",
                why="an adapter here is plain LoRA with one rank for all layers",
                fix="merge it into its base with PEFT and import the result",
            )
    fields = {"rank": raw.get("r"), "alpha": raw.get("lora_alpha")}
    fields |= {"use_rslora": raw.get("use_rslora") or False}
    modules = raw.get("target_modules")
    fields["target_modules"] = sorted(modules) if isinstance(modules, list | tuple) else modules
    try:
        return AdapterOptions.model_validate(fields)
    except ValueError as error:
        raise ConfigError(
            "adapter_config.json describes no adapter that is computed here",
            why=str(error),
            fix=f"target_modules are some of {', '.join(TARGET_MODULES)}",
        ) from error
