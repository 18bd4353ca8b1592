"""Training an adapter over a frozen base: the step of `session` with the projections of `adapter`.

The base goes into the compiled step as an argument beside the factors, in the compute dtype or in
codes. It has no masters, no gradients and no states.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

from solollm.adapters import AdapterOptions, adapter_table, require_base, require_trainable
from solollm.architecture import ModelConfig, initial_parameter
from solollm.backend import Batch, Engine, EngineOptions, Plan, SessionOptions, TensorSource
from solollm_mlx import loss
from solollm_mlx.adapter import adapted_project, beside_base, lora_of, read_base
from solollm_mlx.model import Weights
from solollm_mlx.optim import Arrays
from solollm_mlx.session import MlxSession


class AdapterSession(MlxSession):
    """See `solollm.backend.TrainSession`; `options.adapter` is set."""

    def __init__(
        self, model: ModelConfig, options: SessionOptions, plan: Plan, group: mx.distributed.Group
    ) -> None:
        """A session with the adapter's first values and without a base.

        Raises:
            BackendError, ConfigError: as `MlxSession`, and for an optimizer that trains no adapter.
        """
        assert options.adapter is not None
        require_trainable(options.optimizer.name, options.optimizer.clip)
        self._adapter: AdapterOptions = options.adapter
        super().__init__(model, options, plan, group)
        self._project = partial(adapted_project, scale=self._adapter.scale)
        self._summed_loss = loss.summed_loss_under

    def _initial_weights(self, options: SessionOptions) -> Weights:
        return {
            spec.name: mx.array(initial_parameter(spec, self._adapter.seed))
            for spec in adapter_table(self._model, self._adapter)
        }

    def import_base(self, source: TensorSource) -> None:
        self._frozen = read_base(source, self._model, self._dtype, bits=self._adapter.base_bits)

    def _whole(self, weights: Weights, frozen: Weights) -> Weights:
        return frozen | beside_base(weights)

    def _gradients(self, batch: Batch) -> tuple[mx.array, Arrays]:
        require_base(bool(self._frozen))
        return super()._gradients(batch)

    def token_logprobs(self, batch: Batch, *, adapter: bool = True) -> np.ndarray:
        require_base(bool(self._frozen))
        return self._logprobs_under(self._weights if adapter else {}, batch)

    def engine(self, options: EngineOptions) -> Engine:
        from solollm_mlx.engine import MlxEngine

        require_base(bool(self._frozen))
        if options.compute_dtype == "auto":
            options = replace(options, compute_dtype=self._plan.compute_dtype)
        lora = lora_of(self._weights, self._model, self._adapter)
        return MlxEngine(self._frozen, self._model, options, lora=lora)
