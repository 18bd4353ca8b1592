"""What is relied on of mlx-lm and of MLX's layers, symbol by symbol: a new release that moves one
of them fails here by name, and not in somebody's chat."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("mlx_lm", reason="these tests need mlx-lm")
import mlx.core as mx
import mlx.nn as nn
from solollm_mlx import mlx_lm_adapter
from solollm_mlx import model as mlx_model
from solollm_mlx.state import from_host

from solollm.architecture import ModelConfig
from solollm.errors import ConfigError
from solollm.testing.bench import lively_parameters

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [11, 12, 13]]


@pytest.fixture(scope="module")
def wide(tiny_config: ModelConfig) -> ModelConfig:
    """Rows of whole groups of 64, so that every matrix can be quantised."""
    return tiny_config.model_copy(
        update={"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    )


def weights_of(model: ModelConfig) -> dict[str, mx.array]:
    return {name: from_host(host) for name, host in lively_parameters(model).items()}


@pytest.fixture(scope="module")
def module(wide: ModelConfig) -> nn.Module:
    return mlx_lm_adapter.build_model(wide, weights_of(wide))


def greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


def batch_generator(module: nn.Module, **options: Any) -> Any:
    from mlx_lm.generate import BatchGenerator

    return BatchGenerator(module, **options)


def drain(generator: Any) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    while responses := generator.next_generated():
        for response in responses:
            tokens.setdefault(response.uid, []).append(int(response.token))
    return tokens


def test_models_take_our_config_names_and_arrays(variant: ModelConfig) -> None:
    """llama.Model, qwen3.Model, ModelArgs.from_dict, load_weights(strict=True), eval, and the
    arrays themselves: renamed, transposed or copied weights."""
    weights = weights_of(variant)
    module = mlx_lm_adapter.build_model(variant, weights)
    ids = mx.array(np.random.default_rng(0).integers(0, 192, (2, 20)))
    expected = np.array(mlx_model.logits(weights, ids, None, config=variant))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.array(module(ids)), expected, rtol=0, atol=1e-5 * scale)
    held = module.model.embed_tokens.weight
    assert held is weights["model.embed_tokens.weight"], "the weights were copied"


def test_a_missing_weight_is_an_error(wide: ModelConfig) -> None:
    """load_weights(strict=True): a matrix that silently keeps its random start."""
    weights = weights_of(wide)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        mlx_lm_adapter.build_model(wide, weights)


def test_hidden_states_and_head_are_reached_apart(variant: ModelConfig) -> None:
    """Model.model, Model.lm_head, Model.args.tie_word_embeddings, embed_tokens.as_linear."""
    module = mlx_lm_adapter.build_model(variant, weights_of(variant))
    ids = mx.array([[3, 1, 4, 1, 5]])
    hidden = mlx_lm_adapter.hidden_states(module, ids)
    assert hidden.shape == (1, 5, variant.hidden_size)
    logits = mlx_lm_adapter.logits_of(module, hidden)
    assert logits.dtype == mx.float32
    np.testing.assert_array_equal(np.array(logits), np.array(module(ids)))


def test_layers_are_what_a_cache_is_made_for(module: nn.Module, wide: ModelConfig) -> None:
    """Model.layers and make_prompt_cache, which our wrapper of a model passes on."""
    from mlx_lm.models.cache import make_prompt_cache

    assert len(module.layers) == wide.num_hidden_layers
    assert len(make_prompt_cache(mlx_lm_adapter._Float32Logits(module))) == len(module.layers)


def test_the_generator_takes_what_we_pass() -> None:
    """BatchGenerator's parameters by name, and those of insert: it has renamed them before."""
    from mlx_lm.generate import BatchGenerator

    made = inspect.signature(BatchGenerator).parameters
    assert {"completion_batch_size", "prefill_batch_size", "prefill_step_size"} <= set(made)
    inserted = list(inspect.signature(BatchGenerator.insert).parameters)
    assert inserted[:3] == ["self", "prompts", "max_tokens"]
    assert {"samplers", "logits_processors"} <= set(inserted)


def test_insert_gives_uids_and_next_generated_tokens(module: nn.Module) -> None:
    """BatchGenerator.insert and next_generated: at most one token for each sequence per call, the
    whole row of log-probabilities with it, as many tokens as asked for, [] at the end."""
    generator = batch_generator(module, completion_batch_size=4, prefill_batch_size=4)
    uids = generator.insert(PROMPTS, [3, 4, 5])
    assert len(set(uids)) == 3
    tokens: dict[int, int] = dict.fromkeys(uids, 0)
    while responses := generator.next_generated():
        assert len({response.uid for response in responses}) == len(responses)
        for response in responses:
            tokens[response.uid] += 1
            assert response.logprobs.shape == (192,)
            assert abs(float(mx.logsumexp(response.logprobs).item())) < 1e-4
    assert list(tokens.values()) == [3, 4, 5]
    assert generator.next_generated() == []


def test_samplers_and_processors_see_their_own_rows(module: nn.Module) -> None:
    """The sampler's log-probabilities [N, V]; the processor's (tokens, logits [1, V]), raw and
    before the sampler; one step ahead of what is given out."""
    generator = batch_generator(module, completion_batch_size=2, prefill_batch_size=2)
    seen: list[tuple[str, Any]] = []

    def sampler(logprobs: mx.array) -> mx.array:
        seen.append(("sampler", logprobs.shape))
        return greedy(logprobs)

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(("processor", np.array(logits)))
        return logits

    generator.insert([PROMPTS[0]], [2], samplers=[sampler], logits_processors=[[processor]])
    response = generator.next_generated()[0]
    kinds = [kind for kind, _ in seen]
    assert kinds == ["processor", "sampler"] * 2, "not one token ahead"
    assert seen[1][1] == (1, 192)
    raw = seen[0][1][0]
    expected = np.array(module(mx.array([PROMPTS[0]])))[0, -1]
    np.testing.assert_allclose(raw, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        np.array(response.logprobs), raw - np.log(np.exp(raw).sum()), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_remove_takes_out_one_sequence_wherever_it_stands(module: nn.Module, steps: int) -> None:
    """BatchGenerator.remove of a waiting, reading, running, ended and unknown sequence."""
    alone = batch_generator(module)
    (uid,) = alone.insert([PROMPTS[0]], [6])
    expected = drain(alone)[uid]
    generator = batch_generator(
        module, completion_batch_size=2, prefill_batch_size=2, prefill_step_size=2
    )
    kept, removed, waiting = generator.insert([PROMPTS[0], PROMPTS[2], PROMPTS[0]], [6, 6, 6])
    tokens: list[int] = []
    for _ in range(steps):
        tokens += [int(r.token) for r in generator.next_generated() if r.uid == kept]
    generator.remove([removed])
    generator.remove([waiting])
    rest = drain(generator)
    assert set(rest) <= {kept}
    assert tokens + rest.get(kept, []) == expected
    generator.remove([kept, 12345])


def test_close_gives_back_the_wired_limit_and_nothing_else(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchGenerator.close: we call it at once, so that mlx-lm wires no more than we chose."""
    limits: list[int] = []
    generate = importlib.import_module("mlx_lm.generate")  # the package has a function of that name
    monkeypatch.setattr(generate, "maybe_set_recommended_wired_limit", lambda: 123)
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    generator = mlx_lm_adapter.Generator(module, max_batch_size=2, prefill_tokens=16)
    assert limits == [123]
    uid = generator.insert(PROMPTS[0], max_tokens=2, sampler=greedy)
    assert [token.uid for token in generator.step()] == [uid]


def test_a_row_alone_is_the_row_of_a_batch(module: nn.Module) -> None:
    """BatchKVCache's size, offset, left_padding and update_and_fetch: a position that is wrong once
    the row is alone, once another joins it, or once that has left again."""

    def run(*joining: tuple[int, Sequence[int], int]) -> dict[int, list[int]]:
        generator = mlx_lm_adapter.Generator(module, max_batch_size=4, prefill_tokens=16)
        found: dict[int, list[int]] = {}
        for step in range(60):
            for when, prompt, count in joining:
                if when == step:
                    generator.insert(prompt, max_tokens=count, sampler=greedy)
            for token in generator.step():
                found.setdefault(token.uid, []).append(token.token)
        return found

    from mlx_lm.generate import generate_step

    (alone,) = run((0, PROMPTS[0], 40)).values()
    (other,) = run((0, PROMPTS[2], 9)).values()
    plain = generate_step(mx.array(PROMPTS[0]), module, max_tokens=40)
    assert alone == [int(token) for token, _ in plain]
    assert list(run((0, PROMPTS[0], 40), (7, PROMPTS[2], 9)).values()) == [alone, other]


def test_nothing_is_computed_after_the_last_token(module: nn.Module) -> None:
    """A pass through the model whose token nobody asked for, in every request; or one left out
    that somebody waits for."""
    calls: list[tuple[int, ...]] = []

    class Counted(nn.Module):
        args, layers = module.args, module.layers

        def __call__(self, input_ids: mx.array, cache: Any = None) -> mx.array:
            calls.append(input_ids.shape)
            return module(input_ids, cache=cache)

    generator = mlx_lm_adapter.Generator(Counted(), max_batch_size=2, prefill_tokens=16)
    generator.insert(PROMPTS[0], max_tokens=3, sampler=greedy)
    generator.insert(PROMPTS[2], max_tokens=3, sampler=greedy)
    ahead = [generator.step(), generator.step()]
    last = generator.step(is_last=True)
    assert [len(tokens) for tokens in (*ahead, last)] == [2, 2, 2]
    assert [shape[1] for shape in calls].count(1) == 3
    assert generator.step() == []
    generator.insert(PROMPTS[0], max_tokens=1, sampler=greedy)
    (again,) = generator.step()
    assert again.token == ahead[0][0].token


def test_quantize_replaces_what_fits(wide: ModelConfig) -> None:
    """nn.quantize with a class_predicate, Module.to_quantized: layers left as they were."""
    for bits, error in ((8, 0.02), (4, 0.3)):
        module = mlx_lm_adapter.build_model(wide, weights_of(wide))
        ids = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
        exact = np.array(module(ids))
        mlx_lm_adapter.quantize(module, bits)
        assert isinstance(module.model.embed_tokens, nn.QuantizedEmbedding)
        assert isinstance(module.model.layers[0].mlp.down_proj, nn.QuantizedLinear)
        assert module.model.layers[0].mlp.down_proj.bits == bits
        assert module.model.embed_tokens.weight.nbytes == 192 * 64 * bits // 8
        deviation = np.abs(np.array(module(ids)) - exact).max() / np.abs(exact).max()
        assert 0 < deviation < error


def test_quantizing_nothing_is_refused(tiny_config: ModelConfig, wide: ModelConfig) -> None:
    """A flag without effect: MLX leaves matrices whose rows are no multiple of the group."""
    narrow = tiny_config.model_copy(update={"intermediate_size": 96})
    module = mlx_lm_adapter.build_model(narrow, weights_of(narrow))
    with pytest.raises(ConfigError, match="no effect"):
        mlx_lm_adapter.quantize(module, 4)
    with pytest.raises(ConfigError, match="not 4 or 8"):
        mlx_lm_adapter.quantize(mlx_lm_adapter.build_model(wide, weights_of(wide)), 5)
