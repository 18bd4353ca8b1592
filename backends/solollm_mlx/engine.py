"""An engine of MLX: weights ready to generate, from a checkpoint or of a live session.

How requests run is in `decoding`, the model and its decoding are mlx-lm's (`mlx_lm_adapter`), the
choice of a token is in `solollm.sampling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from solollm.adapted import AdapterFolder, MergedSource
from solollm.architecture import ModelConfig
from solollm.backend import Engine, EngineOptions
from solollm.engine_input import complete_options, only_adapter, read_model_config
from solollm.tensorfile import open_weights
from solollm_mlx import mlx_lm_adapter as mlx_lm
from solollm_mlx.adapter import lora_of, read_base
from solollm_mlx.decoding import MlxDecoder
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
    ) -> None:
        """`lora`: factors beside these weights. Raises ConfigError for an option that the model
        cannot serve."""
        self.model = model
        self.options = complete_options(options, model, known=_OPTIONS)
        given, dtype = options.backend_options, _dtype(options)
        self._prefill_tokens = max(1, int(given.get("prefill_tokens", 2048)))
        arrays = {n: w if w.dtype == mx.uint32 else w.astype(dtype) for n, w in weights.items()}
        self._module = mlx_lm.build_model(model, arrays)
        if lora is not None:
            mlx_lm.add_lora(self._module, lora)
        bits = int(given.get("quantize_bits", 0))
        if bits:
            mlx_lm.quantize(self._module, bits)

    @classmethod
    def load(cls, checkpoint: Path, options: EngineOptions) -> MlxEngine:
        """The engine of a checkpoint directory (`config.json` and safetensors weights). The factors
        of an adapter stay beside the base, which is held as it was in training: in affine codes
        again, or with the values of NF4's.

        Raises:
            ConfigError: no checkpoint there, or a model that is not computed here.
            IntegrityError: weights that are damaged, missing, unexpected or misshapen.
        """
        model = read_model_config(checkpoint)
        dtype = _dtype(options)
        folder = only_adapter(options)
        adapter = AdapterFolder(folder, model) if folder else None
        weights = open_weights(checkpoint)
        try:
            if adapter is None:
                arrays = read_base(weights, model, dtype)
            elif adapter.codec == "nf4":
                held = MergedSource(weights, adapter, model)
                return cls(read_base(held, model, dtype), model, options)
            else:
                arrays = read_base(weights, model, dtype, bits=BITS if adapter.codec else None)
        finally:
            weights.close()
        return cls(arrays, model, options, lora=None if adapter is None else _lora(adapter, model))

    def open(self) -> MlxDecoder:
        return MlxDecoder(self._module, self.options, prefill_tokens=self._prefill_tokens)

    def close(self) -> None:
        self._module = nn.Module()
        mx.clear_cache()


def _lora(adapter: AdapterFolder, model: ModelConfig) -> Lora:
    arrays = {name: mx.array(factor) for name, factor in adapter.factors.items()}
    return lora_of(arrays, model, adapter.options)


def _dtype(options: EngineOptions) -> mx.Dtype:
    asked = options.compute_dtype
    return mx.float32 if asked == "auto" else DTYPES[asked]
