"""An engine of MLX: weights ready to generate, from a checkpoint or of a live session.

How requests run is in `decoding`, the model and its decoding are mlx-lm's (`mlx_lm_adapter`), the
choice of a token is in `solollm.sampling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn

from solollm.adapted import AdapterFolder, HeldSource, common_codec, open_adapters
from solollm.architecture import ModelConfig
from solollm.backend import Engine, EngineOptions
from solollm.engine_input import complete_options, read_model_config
from solollm.tensorfile import open_weights
from solollm_mlx import mlx_lm_adapter as mlx_lm
from solollm_mlx.adapter import lora_of, read_base
from solollm_mlx.decoding import MlxDecoder
from solollm_mlx.memory_rollouts import PREFILL_TOKENS
from solollm_mlx.mlx_lm_adapter import Lora
from solollm_mlx.quant import BITS

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_OPTIONS = ("prefill_tokens", "quantize_bits")


class MlxEngine(Engine):
    """An engine over canonical weights, without a copy where the dtype is their own.

    `options.backend_options`: `quantize_bits` (4 or 8: affine, in groups of 64) and
    `prefill_tokens` (int: prompt tokens read per step). The compute dtype "auto" is float32.
    """

    def __init__(
        self,
        weights: Mapping[str, mx.array],
        model: ModelConfig,
        options: EngineOptions,
        *,
        lora: Lora | None = None,
        adapters: Mapping[str, Lora] = MappingProxyType({}),
    ) -> None:
        """`lora`: factors beside these weights for every request; `adapters`: for those that name
        them. Raises ConfigError for an option that the model cannot serve."""
        self.model = model
        self.options = complete_options(options, model, known=_OPTIONS)
        given, dtype = options.backend_options, _dtype(options)
        self._prefill_tokens = max(1, int(given.get("prefill_tokens", PREFILL_TOKENS)))
        arrays = {n: w if w.dtype == mx.uint32 else w.astype(dtype) for n, w in weights.items()}
        base = mlx_lm.build_model(model, arrays)
        bits = int(given.get("quantize_bits", 0))
        if bits:
            mlx_lm.quantize(base, bits)
        self._modules: dict[str | None, nn.Module] = {}
        held = mlx_lm.weights_of(base)
        for name, factors in adapters.items():  # models of one base's arrays
            self._modules[name] = mlx_lm.build_model(model, held)
            mlx_lm.add_lora(self._modules[name], factors)
        if lora is not None:
            mlx_lm.add_lora(base, lora)
        self._modules[None] = base

    @classmethod
    def load(cls, checkpoint: Path, options: EngineOptions) -> MlxEngine:
        """The engine of a checkpoint directory (`config.json` and safetensors weights). The factors
        of adapters stay beside the base, which is held as it was in training: in affine codes
        again, or with the values of NF4's.

        Raises:
            ConfigError: no checkpoint there, or a model or adapter that is not computed here.
            IntegrityError: weights that are damaged, missing, unexpected or misshapen.
        """
        model = read_model_config(checkpoint)
        dtype = _dtype(options)
        adapters = open_adapters(options, model)
        codec = common_codec(adapters.values())
        weights = open_weights(checkpoint)
        try:
            if codec == "affine4":
                arrays = read_base(weights, model, dtype, bits=BITS)
            else:
                arrays = read_base(HeldSource(weights, codec), model, dtype)
        finally:
            weights.close()
        loras = {name: _lora(adapter, model) for name, adapter in adapters.items()}
        return cls(arrays, model, options, adapters=loras)

    def open(self) -> MlxDecoder:
        return MlxDecoder(self._modules, self.options, prefill_tokens=self._prefill_tokens)

    def close(self) -> None:
        self._modules = {}
        mx.clear_cache()


def _lora(adapter: AdapterFolder, model: ModelConfig) -> Lora:
    arrays = {name: mx.array(factor) for name, factor in adapter.factors.items()}
    return lora_of(arrays, model, adapter.options)


def _dtype(options: EngineOptions) -> mx.Dtype:
    asked = options.compute_dtype
    return mx.float32 if asked == "auto" else DTYPES[asked]
