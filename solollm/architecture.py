"""What a model is: its configuration, THE name table, its initial weights, its counts.

Every other place that needs a parameter's name, shape, optimizer group or decay asks
`parameter_table`. No framework is imported here; the decoders that compute with these names live
in `backends/solollm_torch/model.py` and `backends/solollm_mlx/model.py`. The depth dial and the
presets are in `solollm.dial`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from solollm.errors import ConfigError

Init = Literal["normal", "zeros", "ones"]


class RopeScaling(BaseModel):
    """Llama 3 frequency scaling (as in `transformers`, `rope_type="llama3"`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    factor: float = Field(8.0, ge=1.0)
    low_freq_factor: float = Field(1.0, gt=0.0)
    high_freq_factor: float = Field(4.0, gt=0.0)
    original_max_position_embeddings: int = Field(8192, ge=1)


class ModelConfig(BaseModel):
    """A Llama-style decoder; field names are Hugging Face's `LlamaConfig` keys.

    `qk_norm=True` adds an RMSNorm on each query and key head (exported as `Qwen3ForCausalLM`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(ge=2, le=2**24)
    hidden_size: int = Field(ge=2, le=2**17)
    intermediate_size: int = Field(ge=2, le=2**19)
    num_hidden_layers: int = Field(ge=1, le=1024)
    num_attention_heads: int = Field(ge=1, le=1024)
    num_key_value_heads: int = Field(ge=1, le=1024)
    head_dim: int = Field(ge=2, le=1024, multiple_of=2)
    max_position_embeddings: int = Field(2048, ge=1, le=2**24)
    rope_theta: float = Field(10_000.0, gt=0.0, allow_inf_nan=False)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(1e-5, gt=0.0, lt=1.0, allow_inf_nan=False)
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    initializer_range: float = Field(0.02, gt=0.0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _fill_head_dim(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("head_dim") is None:
            hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
            if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
                if hidden % heads:
                    raise ValueError(
                        f"hidden_size {hidden} is not divisible by num_attention_heads {heads};"
                        " give head_dim, or change one of them"
                    )
                values = {**values, "head_dim": hidden // heads}
        return values

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}"
            )
        return self

    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return sum(math.prod(spec.shape) for spec in parameter_table(self))

    def num_matrix_parameters(self) -> int:
        """Parameters that take part in a matrix product per token: all but embedding and norms.

        The head counts also when it is tied (it multiplies), the embedding look-up never does.
        """
        blocks = sum(
            math.prod(spec.shape) for spec in parameter_table(self) if spec.group == "matrix"
        )
        return blocks + self.vocab_size * self.hidden_size

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs (forward and backward) per token at `seq_len`, causal attention halved.

        6 N + 6 L T (H x D): PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
        """
        attention = 6 * self.num_hidden_layers * seq_len * self.num_attention_heads * self.head_dim
        return 6.0 * self.num_matrix_parameters() + attention

    def to_hf(self, *, torch_dtype: str = "float32", **token_ids: int | None) -> dict[str, Any]:
        """The `config.json` that transformers, mlx-lm, vLLM and llama.cpp all read the same way.

        Both spellings of the rope settings are written: transformers 5 writes only
        `rope_parameters`, which mlx-lm's llama ignores and silently falls back to theta 10000.
        """
        rope_type: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope_type = {"rope_type": "llama3", **self.rope_scaling.model_dump()}
        config = self.model_dump(exclude={"rope_scaling", "qk_norm"})
        config |= {
            "architectures": ["Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"],
            "model_type": "qwen3" if self.qk_norm else "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_scaling": None if self.rope_scaling is None else rope_type,
            "rope_parameters": {"rope_theta": self.rope_theta, **rope_type},
            "torch_dtype": torch_dtype,
            "dtype": torch_dtype,
            "use_cache": True,
        }
        if not self.qk_norm:
            config["mlp_bias"] = False
        return config | {key: value for key, value in token_ids.items() if value is not None}

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`; refuses what this decoder does not compute.

        Raises:
            ConfigError: another architecture, biases, another activation, an unknown rope type.
        """
        model_type = raw.get("model_type", "llama")
        if model_type not in ("llama", "qwen3"):
            raise ConfigError(
                f"config.json has model_type {model_type!r}",
                why="only `llama` and `qwen3` layouts are computed here",
                fix="convert the checkpoint to one of them first",
            )
        _refuse_unsupported(raw)
        rope = dict(raw.get("rope_parameters") or {})
        scaling = dict(raw.get("rope_scaling") or rope)
        theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
        fields = {name: raw[name] for name in cls.model_fields if name in raw}
        fields |= {
            "qk_norm": model_type == "qwen3",
            "rope_theta": theta,
            "rope_scaling": _read_rope_scaling(scaling),
            "num_key_value_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        }
        try:
            return cls.model_validate(fields)
        except ValueError as error:
            raise ConfigError(
                "config.json describes no usable model", why=str(error), fix="check the file"
            ) from error


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    expected = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_traditional": False,
        "partial_rotary_factor": 1.0,
    }
    rope = raw.get("rope_parameters")
    settings = {**(rope if isinstance(rope, Mapping) else {}), **raw}
    for key, value in expected.items():
        if settings.get(key, value) not in (value, None):
            raise ConfigError(
                f"config.json sets {key} = {settings[key]!r}",
                why=f"this decoder computes only {key} = {value!r}",
                fix="use a checkpoint without it",
            )
    kinds = set(raw.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ConfigError(
            f"config.json has layers of {min(kinds)!r}",
            why="this decoder computes full causal attention in every layer",
            fix="use a checkpoint without them",
        )


def _read_rope_scaling(scaling: Mapping[str, Any]) -> RopeScaling | None:
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type in (None, "default"):
        return None
    if rope_type != "llama3":
        raise ConfigError(
            f"config.json asks for rope scaling {rope_type!r}",
            why="`default` and `llama3` are computed here",
            fix="use a checkpoint with one of them",
        )
    known = {name: scaling[name] for name in RopeScaling.model_fields if name in scaling}
    return RopeScaling(**known)


class ParameterSpec(NamedTuple):
    """One row of the name table.

    `group` is "matrix" for the block matrices (Muon's, if it is chosen) and "other" for embedding,
    head and norms (always AdamW's). `std` is the initial standard deviation of `init="normal"`.
    """

    name: str
    shape: tuple[int, ...]
    group: Literal["matrix", "other"]
    decay: bool
    init: Init
    std: float


def parameter_table(config: ModelConfig) -> list[ParameterSpec]:
    """The canonical tensors in file order: Hugging Face Llama names, shapes [out, in].

    With a tied head there is no `lm_head.weight`. Output and down projections start at zero
    (GPT-NeoX-style residual start, as in nanochat); other block matrices at 1/sqrt(fan_in).
    """
    hidden, inter, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    rows = [
        ParameterSpec(
            "model.embed_tokens.weight",
            (config.vocab_size, hidden), "other", False, "normal", config.initializer_range,
        )
    ]  # fmt: skip

    def matrix(name: str, shape: tuple[int, int], *, zero: bool = False) -> ParameterSpec:
        init: Init = "zeros" if zero else "normal"
        return ParameterSpec(name, shape, "matrix", True, init, 0.0 if zero else shape[1] ** -0.5)

    def norm(name: str, size: int) -> ParameterSpec:
        return ParameterSpec(name, (size,), "other", False, "ones", 0.0)

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        rows.append(norm(prefix + "input_layernorm.weight", hidden))
        rows.append(matrix(prefix + "self_attn.q_proj.weight", (queries, hidden)))
        rows.append(matrix(prefix + "self_attn.k_proj.weight", (keys, hidden)))
        rows.append(matrix(prefix + "self_attn.v_proj.weight", (keys, hidden)))
        rows.append(matrix(prefix + "self_attn.o_proj.weight", (hidden, queries), zero=True))
        if config.qk_norm:
            rows.append(norm(prefix + "self_attn.q_norm.weight", dim))
            rows.append(norm(prefix + "self_attn.k_norm.weight", dim))
        rows.append(norm(prefix + "post_attention_layernorm.weight", hidden))
        rows.append(matrix(prefix + "mlp.gate_proj.weight", (inter, hidden)))
        rows.append(matrix(prefix + "mlp.up_proj.weight", (inter, hidden)))
        rows.append(matrix(prefix + "mlp.down_proj.weight", (hidden, inter), zero=True))
    rows.append(norm("model.norm.weight", hidden))
    if not config.tie_word_embeddings:
        rows.append(
            ParameterSpec(
                "lm_head.weight",
                (config.vocab_size, hidden), "other", False, "normal", config.initializer_range,
            )
        )  # fmt: skip
    return rows


def initial_parameters(config: ModelConfig, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Initial weights, float32, one at a time in table order.

    One generator per (seed, name), so that every backend, device count and order of construction
    starts from the same bits.
    """
    for spec in parameter_table(config):
        yield spec.name, initial_parameter(spec, seed)


def initial_parameter(spec: ParameterSpec, seed: int) -> np.ndarray:
    """The initial float32 value of one row of the table."""
    if spec.init == "zeros":
        return np.zeros(spec.shape, np.float32)
    if spec.init == "ones":
        return np.ones(spec.shape, np.float32)
    digest = hashlib.blake2b(f"{seed}/{spec.name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    return generator.standard_normal(spec.shape, np.float32) * np.float32(spec.std)
