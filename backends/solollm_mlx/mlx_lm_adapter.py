"""Every call of mlx-lm, in one place: it moves often, so each symbol has a contract test.

mlx-lm (0.32) is used for what it is good at, inference: its model classes, its continuous
`BatchGenerator`, its quantised layers. Training never touches it. It imports transformers and takes
seconds, so it is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from solollm.architecture import ModelConfig
from solollm.errors import BackendError, ConfigError

# float [N, V] log-probabilities to int32 [N] tokens.
Sampler = Callable[[mx.array], mx.array]
# Looks at one row of raw logits [1, V] before they become log-probabilities.
Watcher = Callable[[mx.array], None]


class Generated(NamedTuple):
    """One token of one sequence; `logprobs` float32 [V] is the whole row it was taken from."""

    uid: int
    token: int
    logprobs: mx.array


def build_model(config: ModelConfig, weights: Mapping[str, mx.array]) -> nn.Module:
    """mlx-lm's own decoder over these arrays, without a copy.

    The rope settings are handed over in the old spelling as well: its llama reads no other, and
    falls back to theta 10000 without a word.
    """
    try:
        from mlx_lm.models import llama, qwen3
    except ImportError as error:
        raise BackendError(
            "mlx-lm is not installed",
            why="the MLX engine decodes with it",
            fix="pip install 'mlx-lm>=0.32.2,<0.33'",
        ) from error
    module: Any = qwen3 if config.qk_norm else llama
    raw = config.to_hf()
    model: nn.Module = module.Model(module.ModelArgs.from_dict(raw))
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    return model


def quantize(model: nn.Module, bits: int, group_size: int = 64) -> None:
    """Replace the linear layers and the embedding by affine-quantised ones, in place."""
    if bits not in (4, 8):
        raise ConfigError(f"quantize_bits {bits} is not 4 or 8")

    def fits(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    nn.quantize(model, group_size=group_size, bits=bits, class_predicate=fits)
    mx.eval(model.parameters())


def hidden_to_logits(model: nn.Module, input_ids: mx.array) -> mx.array:
    """All logits [N, T, V] of rows without a cache."""
    logits: mx.array = model(input_ids)
    return logits


class Generator:
    """mlx-lm's BatchGenerator, reduced to what a Decoder needs."""

    def __init__(self, model: nn.Module, *, max_batch_size: int, prefill_tokens: int) -> None:
        from mlx_lm.generate import BatchGenerator

        self._generator = BatchGenerator(
            model,
            completion_batch_size=max_batch_size,
            prefill_batch_size=max_batch_size,
            prefill_step_size=prefill_tokens,
        )

    def insert(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        sampler: Sampler,
        watcher: Watcher | None = None,
    ) -> int:
        """Queue a prompt; gives its uid. `watcher` sees each row before `sampler` does."""

        def watch(_: mx.array, logits: mx.array) -> mx.array:
            assert watcher is not None
            watcher(logits)
            return logits

        uids = self._generator.insert(
            [list(prompt)],
            [max_tokens],
            samplers=[sampler],
            logits_processors=[[watch] if watcher else []],
        )
        return int(uids[0])

    def step(self) -> list[Generated]:
        """One token for each running sequence; [] when nothing is left."""
        responses = self._generator.next_generated()
        return [Generated(r.uid, int(r.token), r.logprobs) for r in responses]

    def remove(self, uid: int) -> None:
        """Take a sequence out, wherever it stands; an ended one is ignored."""
        self._generator.remove([uid])

    def close(self) -> None:
        self._generator.close()
