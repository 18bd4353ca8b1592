"""Every call of mlx-lm, in one place: it moves often, so each symbol has a contract test.

mlx-lm (0.32) is used for what it is good at, inference: its model classes, its continuous
`BatchGenerator`, its quantised layers. Training never touches it. It imports transformers and takes
seconds, so it is imported inside the functions.

Shapes: N rows, T positions, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from solollm.architecture import ModelConfig
from solollm.errors import BackendError, ConfigError
from solollm_mlx.quant import GROUP_SIZE

# float32 [N, V] log-probabilities to integer [N] tokens.
Sampler = Callable[[mx.array], mx.array]
# Looks at one row of raw logits, float32 [1, V], before they become log-probabilities.
Watcher = Callable[[mx.array], None]


class Generated(NamedTuple):
    """One token of one sequence, and its log-probability under the model itself."""

    uid: int
    token: int
    logprob: float


class Lora(NamedTuple):
    """Low-rank factors by the name of their matrix (`model.layers.0.self_attn.q_proj`): A [r, in]
    and B [out, r], and what their product is multiplied by."""

    factors: Mapping[str, tuple[mx.array, mx.array]]
    scale: float


def build_model(config: ModelConfig, weights: Mapping[str, mx.array]) -> nn.Module:
    """mlx-lm's own decoder over these arrays, without a copy; a matrix that has `<matrix>.scales`
    is quantised (see `quant`).

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
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config.to_hf()))
    if any(name.endswith(".scales") for name in weights):
        nn.quantize(model, class_predicate=lambda path, _: _coding(path, weights))
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    return model


def _coding(path: str, weights: Mapping[str, mx.array]) -> dict[str, int] | bool:
    """How a matrix is quantised, by its codes; False where it is not."""
    scales = weights.get(f"{path}.scales")
    if scales is None:
        return False
    bits = 32 * weights[f"{path}.weight"].shape[-1] // (GROUP_SIZE * scales.shape[-1])
    return {"group_size": GROUP_SIZE, "bits": bits}


def add_lora(model: nn.Module, lora: Lora) -> None:
    """Put factors beside the matrices of `model`, in place. They stay in their own dtype."""
    from mlx_lm.tuner.lora import LoRALinear

    modules, adapted = dict(model.named_modules()), []
    for name, (a, b) in lora.factors.items():
        layer = LoRALinear.from_base(modules[name], r=a.shape[0], scale=lora.scale)
        layer.lora_a, layer.lora_b = a.T, b.T
        adapted.append((name, layer))
    model.update_modules(tree_unflatten(adapted))
    model.eval()


def quantize(model: nn.Module, bits: int, group_size: int = 64) -> None:
    """Replace the linear layers and the embedding by affine-quantised ones, in place. A matrix
    whose rows are no multiple of the group stays as it is.

    Raises:
        ConfigError: bits other than 4 and 8, or no matrix that can be quantised.
    """
    if bits not in (4, 8):
        raise ConfigError(f"quantize_bits {bits} is not 4 or 8")
    fitting = 0

    def fits(_: str, module: nn.Module) -> bool:
        nonlocal fitting
        is_fitting = hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0
        fitting += is_fitting
        return is_fitting

    nn.quantize(model, group_size=group_size, bits=bits, class_predicate=fits)
    if not fitting:
        raise ConfigError(
            f"quantize_bits {bits} has no effect on this model",
            why=f"no matrix has rows of a multiple of {group_size} elements",
            fix="leave it out",
        )
    mx.eval(model.parameters())


def weights_of(model: nn.Module) -> dict[str, mx.array]:
    """The model's own arrays by name, codes where it is quantised."""
    return dict(tree_flatten(model.parameters()))


def hidden_states(model: nn.Module, input_ids: mx.array) -> mx.array:
    """Normalised hidden states [N, T, C] of integer rows [N, T], without a cache."""
    hidden: mx.array = model.model(input_ids)
    return hidden


def logits_of(model: nn.Module, hidden: mx.array) -> mx.array:
    """float32 [..., V] of hidden states [..., C]."""
    tied = model.args.tie_word_embeddings
    head = model.model.embed_tokens.as_linear if tied else model.lm_head
    logits: mx.array = head(hidden)
    return logits.astype(mx.float32)


class Generator:
    """mlx-lm's BatchGenerator, reduced to what a Decoder needs."""

    def __init__(self, model: nn.Module, *, max_batch_size: int, prefill_tokens: int) -> None:
        from mlx_lm.generate import BatchGenerator

        self._model = _Float32Logits(model)
        self._generator = BatchGenerator(
            self._model,
            completion_batch_size=max_batch_size,
            prefill_batch_size=max_batch_size,
            prefill_step_size=prefill_tokens,
        )
        # It has wired all of the memory that Metal recommends, which Macs have died of (mlx #3186,
        # #3346); closing gives only that limit back, and the generator works on.
        self._generator.close()

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

    def step(self, *, is_last: bool = False) -> list[Generated]:
        """One token for each running sequence; [] when nothing is left.

        It runs one token ahead: what it gives now was sampled in the step before. `is_last`: every
        sequence is running and ends with this token, so that nothing need be computed ahead.
        """
        self._model.is_idle = is_last
        try:
            responses = self._generator.next_generated()
        finally:
            self._model.is_idle = False
        generated = []
        for response in responses:
            # Computed already, and read where they lie: an index would be an operation more.
            token, logprobs = int(response.token), memoryview(response.logprobs)
            generated.append(Generated(response.uid, token, logprobs[token]))
        return generated

    def remove(self, uid: int) -> None:
        """Take a sequence out, wherever it stands; an ended one is ignored."""
        self._generator.remove([uid])


class _Float32Logits(nn.Module):
    """An mlx-lm model whose logits are float32 whatever it computes in: a log-probability in bf16
    has two digits. While it `is_idle`, nobody wants them: they are zeros."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.is_idle = False

    @property
    def layers(self) -> Any:
        """What mlx-lm makes a cache for."""
        return self.model.layers

    def __call__(self, input_ids: mx.array, cache: Any = None) -> mx.array:
        if self.is_idle:
            return mx.zeros((*input_ids.shape, self.model.args.vocab_size))
        logits: mx.array = self.model(input_ids, cache=_of_one_row(input_ids, cache))
        return logits.astype(mx.float32)


class _OneRow:
    """The batch cache of a single row, as a step of one token needs it: no mask, since nothing is
    padded, and a position that is a number. Both are arrays for a batch, and a few percent of a
    step of a small model."""

    def __init__(self, cache: Any, position: int, after: mx.array) -> None:
        self.offset = position
        self._cache, self._after = cache, after

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        fetched: tuple[mx.array, mx.array] = self._cache.update_and_fetch(keys, values)
        # Nobody reads the sum that it made: it would grow a term with every token.
        self._cache.offset = self._after
        return fetched


def _of_one_row(input_ids: mx.array, caches: Any) -> Any:
    """The caches themselves, unless one token of one row comes, which nothing is padded before."""
    if not caches or input_ids.size != 1 or caches[0].left_padding.item():
        return caches
    position = caches[0].size()
    after = mx.array([position + 1])
    return [_OneRow(cache, position, after) for cache in caches]
