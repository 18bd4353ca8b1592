"""Generation on MLX: mlx-lm's batched decoder behind the seam's Decoder.

mlx-lm's calls are in `mlx_lm_adapter`, the choice of a token in `solollm.sampling`; the greedy
choice stays on the device, so that a step is computed while the one before is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import (
    Decoder,
    Engine,
    EngineOptions,
    FinishReason,
    PromptScores,
    Request,
    TokenEvent,
)
from solollm.errors import BackendError, ConfigError, IntegrityError
from solollm.sampling import check_sampling, choose, is_plain_greedy
from solollm.tensorfile import open_weights
from solollm_mlx import mlx_lm_adapter as mlx_lm
from solollm_mlx.state import read_all

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_SCORE_PADDING = 32  # scored prompts are padded to a multiple, so that few shapes are met


class MlxEngine(Engine):
    """An engine over canonical weights. `options.backend_options`: `quantize_bits` (4 or 8, affine
    in groups of 64) and `prefill_tokens` (prompt tokens read at once)."""

    def __init__(
        self, weights: Mapping[str, mx.array], model: ModelConfig, options: EngineOptions
    ) -> None:
        self.model = model
        self.options = _complete(options, model)
        dtype = _DTYPES[str(self.options.compute_dtype)]
        self.module = mlx_lm.build_model(model, {n: w.astype(dtype) for n, w in weights.items()})
        bits = int(options.backend_options.get("quantize_bits", 0))
        if bits:
            mlx_lm.quantize(self.module, bits)

    @classmethod
    def over_weights(
        cls, weights: Mapping[str, mx.array], model: ModelConfig, options: EngineOptions
    ) -> MlxEngine:
        """Over a session's own arrays; they are immutable, so training on does not disturb it."""
        return cls(weights, model, options)

    @classmethod
    def from_checkpoint(cls, checkpoint: Path, options: EngineOptions) -> MlxEngine:
        """The engine of a checkpoint directory.

        Raises:
            ConfigError: no checkpoint there, or a model that is not computed here.
            IntegrityError: weights that are damaged, missing, unexpected or misshapen.
        """
        model = _read_model_config(checkpoint)
        shapes = {s.name: (mx.float32, s.shape) for s in parameter_table(model)}
        weights = open_weights(checkpoint)
        try:
            arrays = read_all(weights, shapes, what=f"weights of {checkpoint}")
        finally:
            weights.close()
        return cls(arrays, model, options)

    def open(self) -> MlxDecoder:
        return MlxDecoder(self.module, self.options)

    def close(self) -> None:
        self.module = nn.Module()
        mx.clear_cache()


@dataclass(eq=False)
class _Sequence:
    """A request under way. `left`: tokens it may still get."""

    id: int
    request: Request
    prompt: np.ndarray
    left: int
    scores: PromptScores | None = None


class MlxDecoder(Decoder):
    """The requests of one engine. Not to be used from two threads at once."""

    def __init__(self, module: nn.Module, options: EngineOptions) -> None:
        self._module = module
        self._options = options
        self._generator = mlx_lm.Generator(
            module,
            max_batch_size=options.max_batch_size,
            prefill_tokens=int(options.backend_options.get("prefill_tokens", 2048)),
        )
        self._greedy = _greedy(options.vocab_size)
        self._next_id = 0
        self._running: dict[int, _Sequence] = {}  # by the generator's uid
        self._to_score: list[_Sequence] = []
        self._ended: list[TokenEvent] = []

    def add(self, request: Request) -> int:
        prompt = self._checked_prompt(request)
        self._next_id += 1
        left = min(request.max_new_tokens, self._options.max_seq_len + 1 - len(prompt))
        sequence = _Sequence(self._next_id, request, prompt, left)
        if request.score_prompt or left == 0:
            self._to_score.append(sequence)
        else:
            self._start(sequence)
        return sequence.id

    def step(self) -> list[TokenEvent]:
        self._score_prompts()
        events, self._ended = self._ended, []
        events += [
            self._accept(generated)
            for generated in self._generator.step()
            if generated.uid in self._running
        ]
        return events

    def cancel(self, request_id: int) -> None:
        for uid, sequence in self._running.items():
            if sequence.id == request_id:
                self._generator.remove(uid)
                del self._running[uid]
                self._ended.append(TokenEvent(request_id, -1, 0.0, "cancelled"))
                return
        for sequence in self._to_score:
            if sequence.id == request_id:
                self._to_score.remove(sequence)
                self._ended.append(TokenEvent(request_id, -1, 0.0, "cancelled"))
                return

    def _start(self, sequence: _Sequence) -> None:
        request = sequence.request
        sampler, watcher = self._greedy, None
        if not is_plain_greedy(request.sampling, request.logits_processors):
            host = _HostSampler(request, sequence.prompt, self._options.vocab_size)
            sampler, watcher = host.pick, host.watch
        uid = self._generator.insert(
            sequence.prompt.tolist(), max_tokens=sequence.left, sampler=sampler, watcher=watcher
        )
        self._running[uid] = sequence

    def _accept(self, generated: mlx_lm.Generated) -> TokenEvent:
        sequence = self._running[generated.uid]
        logprob = float(generated.logprobs[generated.token].item())
        if not math.isfinite(logprob):
            raise BackendError(
                "the model gives no finite logits",
                why="its weights hold NaN or infinity",
                fix="go back to a checkpoint from before training diverged",
            )
        sequence.left -= 1
        reason: FinishReason | None = None
        if generated.token in sequence.request.stop_ids:
            reason = "stop"
        elif sequence.left == 0:
            reason = "length"
        if reason is not None:
            del self._running[generated.uid]
            self._generator.remove(generated.uid)
        scores, sequence.scores = sequence.scores, None
        return TokenEvent(sequence.id, generated.token, logprob, reason, scores)

    def _score_prompts(self) -> None:
        """Score what waits for it, some rows at once; then start or end those requests."""
        waiting, self._to_score = self._to_score, []
        size = self._options.max_batch_size
        for start in range(0, len(waiting), size):
            rows = waiting[start : start + size]
            scores = self._score([sequence.prompt for sequence in rows])
            for sequence, scored in zip(rows, scores, strict=True):
                wanted = scored if sequence.request.score_prompt else None
                if sequence.left == 0:
                    event = TokenEvent(sequence.id, -1, 0.0, "length", wanted)
                    self._ended.append(event)
                    continue
                sequence.scores = wanted
                self._start(sequence)

    def _score(self, prompts: list[np.ndarray]) -> list[PromptScores]:
        """Log-probabilities of prompt tokens 1 to n - 1, and whether each was the argmax.

        Rows are padded on the right, which causal attention does not see.
        """
        longest = max(len(prompt) for prompt in prompts)
        length = -(-longest // _SCORE_PADDING) * _SCORE_PADDING
        ids = np.zeros((len(prompts), length), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        logits = mlx_lm.hidden_to_logits(self._module, mx.array(ids)).astype(mx.float32)
        targets = mx.array(np.roll(ids, -1, axis=1))
        taken = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        logprobs = taken - mx.logsumexp(logits, axis=-1)
        best = mx.argmax(logits[..., : self._options.vocab_size], axis=-1)
        mx.eval(logprobs, best)
        scores, choices = np.array(logprobs), np.array(best)
        return [
            PromptScores(
                scores[row, : len(prompt) - 1].copy(),
                choices[row, : len(prompt) - 1] == prompt[1:],
            )
            for row, prompt in enumerate(prompts)
        ]

    def _checked_prompt(self, request: Request) -> np.ndarray:
        check_sampling(request.sampling)
        options = self._options
        if request.adapter is not None:
            raise ConfigError(f"this engine holds no adapter {request.adapter!r}")
        if request.max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens {request.max_new_tokens} is negative")
        prompt = np.asarray(request.prompt_ids, np.int64)
        if prompt.ndim != 1 or not len(prompt):
            raise ConfigError("the prompt is empty", fix="begin it with the tokenizer's bos id")
        if len(prompt) > options.max_seq_len + (request.max_new_tokens == 0):
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens is too long",
                why=f"the engine holds {options.max_seq_len} positions",
                fix="shorten it from the left, or give a larger max_seq_len",
            )
        if prompt.min() < 0 or prompt.max() >= options.vocab_size:
            bad = prompt[(prompt < 0) | (prompt >= options.vocab_size)][0]
            raise ConfigError(
                f"token id {bad} is outside the vocabulary of {options.vocab_size}",
                fix="use the tokenizer that belongs to the checkpoint",
            )
        return prompt


def _greedy(vocab_size: int) -> mlx_lm.Sampler:
    """The argmax below the padding ids; one function for a whole batch."""

    def pick(logprobs: mx.array) -> mx.array:
        return mx.argmax(logprobs[:, :vocab_size], axis=-1)

    return pick


class _HostSampler:
    """The reference of sampling for one request. It made every token after the prompt itself, so
    it knows the history without asking; it needs the raw logits, because a repetition penalty
    depends on their sign."""

    def __init__(self, request: Request, prompt: np.ndarray, vocab_size: int) -> None:
        self._request, self._vocab_size = request, vocab_size
        self._history: list[int] = prompt.tolist()
        self._logits = mx.array(0.0)

    def watch(self, logits: mx.array) -> None:
        self._logits = logits

    def pick(self, _: mx.array) -> mx.array:
        token = choose(
            np.array(self._logits.astype(mx.float32))[0],
            self._request.sampling,
            np.array(self._history),
            vocab_size=self._vocab_size,
            processors=self._request.logits_processors,
        )
        self._history.append(token)
        return mx.array([token], mx.uint32)


def _complete(options: EngineOptions, model: ModelConfig) -> EngineOptions:
    length = options.max_seq_len or model.max_position_embeddings
    if length > model.max_position_embeddings:
        raise ConfigError(
            f"max_seq_len {length} is beyond the model's {model.max_position_embeddings} positions",
            fix="give a smaller max_seq_len",
        )
    dtype = options.compute_dtype
    return replace(
        options,
        max_seq_len=length,
        vocab_size=options.vocab_size or model.vocab_size,
        compute_dtype="float32" if dtype == "auto" else dtype,
    )


def _read_model_config(checkpoint: Path) -> ModelConfig:
    path = checkpoint / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{checkpoint} is no checkpoint", why=str(error), fix="name a folder with config.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON", why=str(error)) from error
    return ModelConfig.from_hf(raw)
