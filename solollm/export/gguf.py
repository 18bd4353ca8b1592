"""From a model to a folder for llama.cpp and Ollama.

    NAME.gguf    weights, settings, tokenizer and chat template in one file
    Modelfile    `ollama create NAME -f Modelfile`
    README.md    the model card

llama.cpp's `llama` rotates neighbours where Hugging Face's layout rotates the halves of a head, so
the rows of query and key projections change places; its `qwen3` rotates halves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solollm.architecture import ModelConfig, ParameterSpec, RopeScaling, parameter_table
from solollm.backend import DType, TensorSource
from solollm.errors import ConfigError
from solollm.export.card import file_stem
from solollm.export.gguf_vocabulary import vocabulary_metadata
from solollm.export.source import Source
from solollm.gguf_codec import BLOCK, BLOCK_BYTES, quantize
from solollm.gguf_file import GgufTensor, Kind, Value, gguf_bytes, write_gguf
from solollm.model_folder import folder_bytes, new_folder
from solollm.rounding import DTYPE_NAMES, rounded
from solollm.tokenizer import Tokenizer

_CODES: Mapping[int, Kind] = {8: "Q8_0", 4: "Q4_0"}
_BITS: Mapping[Kind, int] = {"Q8_0": 8, "Q4_0": 4}
_PLAIN: Mapping[str, Kind] = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
# What a kind's bits are made of.
_STORED_FROM: Mapping[Kind, DType] = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "F32", "Q4_0": "F32",
}  # fmt: skip
_ITEM_BYTES: Mapping[Kind, int] = {"F32": 4, "F16": 2, "BF16": 2}
_FILE_TYPES: Mapping[Kind, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_ROPE = "rope_freqs.weight"
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MODELFILE = """\
# ollama create {name} -f Modelfile
FROM ./{name}.gguf
{template}PARAMETER num_ctx {context}
{stops}"""
# SoloLLM's own chat template in Ollama's language; the first token is llama.cpp's to add.
_OWN_TEMPLATE = '''\
TEMPLATE """{{- range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"""
'''
_NO_TEMPLATE = "# Ollama takes the chat template from the file, where it knows it.\n"


class GgufLayout(NamedTuple):
    """The tensors of the file. `bits`: 8 or 4, the codes of matrices; None: all in `dtype`."""

    model: ModelConfig
    dtype: DType
    bits: int | None

    @property
    def kind(self) -> Kind:
        """Of most weights."""
        return _CODES[self.bits] if self.bits else _PLAIN[self.dtype]

    def tensors(self) -> list[GgufTensor]:
        """What the file holds, in order."""
        own = [] if self.model.rope_scaling is None else [_described(_ROPE, self._turns, "F32")]
        specs = parameter_table(self.model)
        return own + [_described(_name(s.name), s.shape, self._kind_of(s)) for s in specs]

    def data(self, source: TensorSource) -> Iterator[np.ndarray]:
        """The bits of `tensors`; one of them is in memory at a time."""
        if self.model.rope_scaling is not None:
            yield rope_factors(self.model, self.model.rope_scaling)
        for spec in parameter_table(self.model):
            kind = self._kind_of(spec)
            tensor = rounded(spec.name, source.read(spec.name), _STORED_FROM[kind])
            bits = self._in_its_order(spec.name, tensor.data)
            yield bits if kind in _ITEM_BYTES else quantize(bits, bits=_BITS[kind])

    def words(self) -> str:
        """What weights are stored as, for the model card."""
        dtype = DTYPE_NAMES[self.dtype]
        if self.bits is None:
            return dtype
        head = ", the head Q8_0" if self.bits == 4 else ""
        return f"{self.bits}-bit codes in blocks of {BLOCK} ({self.kind}{head}); norms float32"

    def plain_matrices(self) -> tuple[str, ...]:
        """The matrices that are no codes although codes were asked for."""
        matrices = [s for s in parameter_table(self.model) if self.bits and len(s.shape) == 2]
        return tuple(s.name for s in matrices if self._kind_of(s) in _ITEM_BYTES)

    @property
    def _turns(self) -> tuple[int, ...]:
        return (self.model.head_dim // 2,)

    def _kind_of(self, spec: ParameterSpec) -> Kind:
        if len(spec.shape) == 1:
            return "F32"  # all that llama.cpp's kernels take for norms
        if self.bits is None or spec.shape[1] % BLOCK:
            return _PLAIN[self.dtype]
        head = "model.embed_tokens" if self.model.tie_word_embeddings else "lm_head"
        return "Q8_0" if spec.name == f"{head}.weight" else _CODES[self.bits]

    def _in_its_order(self, name: str, weight: np.ndarray) -> np.ndarray:
        """llama.cpp's `llama` rotates neighbours, so that halves of a head become pairs."""
        if self.model.qk_norm or not name.endswith(("q_proj.weight", "k_proj.weight")):
            return weight
        rows, columns = weight.shape
        halves = weight.reshape(-1, 2, self.model.head_dim // 2, columns)
        return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf_folder(
    source: Source, out: Path, layout: GgufLayout, files: Mapping[str, bytes]
) -> int:
    """Write the folder `out` with `files` beside; gives its size. Raises as `export_model`."""
    if layout.model.qk_norm and layout.model.rope_scaling is not None:
        raise ConfigError(
            "llama.cpp computes no llama3 rope scaling in models with QK-norm",
            why="its `qwen3` has no place for the factors, and would compute another model",
            fix="export --to hf or mlx",
        )
    name, tensors = out.resolve().name, layout.tensors()
    stem = file_stem(name)
    metadata = _metadata(name, layout) | vocabulary_metadata(
        source.tokenizer, layout.model.vocab_size
    )
    files = {**files, "Modelfile": _modelfile(stem, source.tokenizer, layout.model).encode()}
    with new_folder(out, files, expected_bytes=gguf_bytes(metadata, tensors)) as folder:
        data = layout.data(source.tensors)
        write_gguf(folder / f"{stem}.gguf", metadata, tensors, data)
        return folder_bytes(folder)


def rope_factors(model: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """By what each frequency is divided, float32 [D / 2]: Llama 3's scaling, as transformers'."""
    exponent = np.arange(0, model.head_dim, 2) / model.head_dim
    wavelength = 2 * math.pi * model.rope_theta**exponent
    turns = scaling.original_max_position_embeddings / wavelength
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0, 1)
    factors: np.ndarray = (1 / (keep + (1 - keep) / scaling.factor)).astype(np.float32)
    return factors


def _metadata(name: str, layout: GgufLayout) -> dict[str, Value]:
    """The keys `general.*` and those of the architecture."""
    model = layout.model
    architecture = "qwen3" if model.qk_norm else "llama"
    own: dict[str, Value] = {
        "block_count": model.num_hidden_layers,
        "context_length": model.max_position_embeddings,
        "embedding_length": model.hidden_size,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_attention_heads,
        "attention.head_count_kv": model.num_key_value_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": float(model.rms_norm_eps),
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": float(model.rope_theta),
        "vocab_size": model.vocab_size,
    }
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[layout.kind],
        "general.quantization_version": 2,
        **{f"{architecture}.{key}": value for key, value in own.items()},
    }


def _modelfile(stem: str, tokenizer: Tokenizer, model: ModelConfig) -> str:
    own = tokenizer.has_chat_template and tokenizer.chat_template.is_own
    texts = sorted(tokenizer.token_bytes(i).decode() for i in tokenizer.stop_ids)
    return _MODELFILE.format(
        name=stem,
        template=_OWN_TEMPLATE if own else _NO_TEMPLATE,
        context=model.max_position_embeddings,
        stops="".join(f'PARAMETER stop "{text}"\n' for text in texts),
    )


def _name(canonical: str) -> str:
    """llama.cpp's name of a tensor of the table."""
    stem = canonical.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_IN_BLOCK[part]}.weight"


def _described(name: str, shape: tuple[int, ...], kind: Kind) -> GgufTensor:
    elements = math.prod(shape)
    if kind in _ITEM_BYTES:
        return GgufTensor(name, shape, kind, elements * _ITEM_BYTES[kind])
    return GgufTensor(name, shape, kind, elements // BLOCK * BLOCK_BYTES[_BITS[kind]])
