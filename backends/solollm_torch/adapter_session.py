"""Training an adapter over a frozen base: the step of `session` over what `adapter` makes."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from solollm.adapters import adapter_table, require_base, require_trainable
from solollm.backend import Batch, Engine, EngineOptions, SessionOptions, TensorSource
from solollm.errors import ConfigError
from solollm_torch.adapter import adapted_decoder
from solollm_torch.gradients import DTYPES, attach_gradients, gradient_of, padded_size
from solollm_torch.masters import Masters
from solollm_torch.optim import Optimizer
from solollm_torch.session import TorchSession
from solollm_torch.state_specs import zero_states
from solollm_torch.units import LaggedStep


class AdapterSession(TorchSession):
    """See `solollm.backend.TrainSession`; `options.adapter` is set."""

    def _set_up(self, options: SessionOptions) -> None:
        assert options.adapter is not None
        _refuse_unsupported(options)
        model, device, table = self._model, self._device, options.optimizer
        self._decoder, self._adapter = adapted_decoder(
            model, options.adapter, device, DTYPES[self._plan.compute_dtype]
        )
        self._has_base = False
        self._switches = self._switch(self._decoder.layers, options.backend_options, compiled=False)
        self._decoder.checkpointing = self._switches.recomputes_blocks
        self._masters = Masters(self._adapter.masters())
        self._settings["compile"] = False
        self._use_kernels(options.backend_options)
        self._adapter.use(self._decoder.kernels)
        parameters = list(self._adapter.parameters())
        self._flat_gradient = torch.zeros(padded_size(parameters), device=device)
        attach_gradients(parameters, self._flat_gradient)
        self._gradients = self._adapter.canonical_views(gradient_of)
        self._unit_gradients = [
            [gradient_of(matrix.a) for matrix in self._adapter.matrices],
            [gradient_of(b) for matrix in self._adapter.matrices for b in matrix.b],
        ]
        specs = adapter_table(model, options.adapter)
        self._states = zero_states(specs, table, {spec.name: device for spec in specs})
        whole = Optimizer(
            self._masters.weights, model=model, table=table, adapter=options.adapter,
            states=self._states, seed=options.seed,
        )  # fmt: skip
        self._optimizers = [whole]

    def import_base(self, source: TensorSource) -> None:
        self._adapter.import_base(source)
        self._has_base = True

    def _loss_and_norm(self, batch: Batch, lagged: LaggedStep | None = None) -> Tensor:
        require_base(self._has_base)
        return super()._loss_and_norm(batch, lagged)

    def token_logprobs(self, batch: Batch, *, adapter: bool = True) -> np.ndarray:
        require_base(self._has_base)
        with nullcontext() if adapter else self._adapter.switched_off():
            return super().token_logprobs(batch)

    def engine(self, options: EngineOptions) -> Engine:
        require_base(self._has_base)
        return super().engine(options)

    def close(self) -> None:
        super().close()
        del self._adapter


def _refuse_unsupported(options: SessionOptions) -> None:
    require_trainable(options.optimizer.name, options.optimizer.clip)
    for key in ("master", "gradients"):
        if options.backend_options.get(key, "float32") not in ("float32", "auto"):
            raise ConfigError(
                f"{key} = {options.backend_options[key]!r} does not go with an adapter",
                why="its factors and their gradients are few, and float32",
                fix=f"leave {key} out",
            )
