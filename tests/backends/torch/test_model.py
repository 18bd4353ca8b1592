"""The decoder against transformers, its storage against the name table, documents kept apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch.attention import Segments
from solollm_torch.model import Decoder
from solollm_torch.ops import linear
from solollm_torch.session import TorchSession
from torch.nn import functional

from solollm.architecture import ModelConfig, RopeScaling, parameter_table
from solollm.backend import Batch

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-untied": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 4},
    "wide-head": {"head_dim": 24},
    "llama3-rope": {
        "rope_theta": 500_000.0,
        "rope_scaling": RopeScaling(original_max_position_embeddings=32),
    },
    "qwen3": {"qk_norm": True, "head_dim": 16},
}
CPU = torch.device("cpu")


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Large enough that every term matters: an all-zero output projection would hide attention."""
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: torch.randn(spec.shape, generator=generator) * 0.2 + float(len(spec.shape) == 1)
        for spec in parameter_table(config)
    }


def decoder_of(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Decoder:
    decoder = Decoder(config)
    decoder.load(weights.items())
    return decoder


def transformers_model(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Any:
    import transformers

    raw = config.to_hf()
    if config.qk_norm:
        model: Any = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**raw))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw))
    unused = model.load_state_dict(weights, strict=False)
    assert not unused.unexpected_keys
    assert set(unused.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


@pytest.fixture(params=VARIANTS, ids=list(VARIANTS))
def variant(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> ModelConfig:
    fields = tiny_config.model_dump() | VARIANTS[request.param]
    return ModelConfig.model_validate(fields)


def tokens(config: ModelConfig, rows: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (rows, length), generator=generator)


def test_logits_equal_transformers(variant: ModelConfig) -> None:
    """Guards rotary tables, head order, norms: a wrong theta or pairing is off by whole logits."""
    weights = random_weights(variant)
    input_ids = tokens(variant, 2, 100)
    with torch.no_grad():
        expected = transformers_model(variant, weights)(input_ids, use_cache=False).logits
        actual = decoder_of(variant, weights).logits(input_ids)
    tolerance = 1e-5 * expected.abs().max().item()
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("allocated", [False, True], ids=["returned", "in-place"])
def test_gradients_equal_transformers(variant: ModelConfig, allocated: bool) -> None:
    """Guards every hand-written backward, and adding to gradients that are already allocated."""
    weights = random_weights(variant)
    input_ids = tokens(variant, 2, 64)
    decoder, reference = decoder_of(variant, weights), transformers_model(variant, weights)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter) if allocated else None
    for logits in (decoder.logits(input_ids), reference(input_ids, use_cache=False).logits):
        functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
        ).backward()
    actual = decoder.canonical_views(lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    expected = {name: p.grad for name, p in reference.named_parameters()}
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name} is off by {error:.2e} relative"


def test_compiled_formula_equals_the_hand_written_one(variant: ModelConfig) -> None:
    """Without gradients (and under the compiler) the plain formulas run: they must agree."""
    decoder = decoder_of(variant, random_weights(variant))
    input_ids = tokens(variant, 2, 50)
    by_hand = decoder(input_ids).detach()
    with torch.no_grad():
        plain = decoder(input_ids)
    np.testing.assert_allclose(by_hand.numpy(), plain.numpy(), rtol=0, atol=2e-5)


def test_canonical_views_are_the_name_table(variant: ModelConfig) -> None:
    """A view in another order or shape would be saved under the wrong name."""
    masters = Decoder(variant).masters()
    table = parameter_table(variant)
    assert [(n, tuple(m.shape)) for n, m in masters.items()] == [(s.name, s.shape) for s in table]
    assert all(master.is_contiguous() for master in masters.values())


def test_canonical_views_share_the_models_memory(tiny_config: ModelConfig) -> None:
    """An optimizer that updated copies would train nothing."""
    decoder = Decoder(tiny_config)
    for index, master in enumerate(decoder.masters().values()):
        master.fill_(float(index))
    assert sum(p.double().sum().item() for p in decoder.parameters()) == sum(
        index * master.numel() for index, master in enumerate(decoder.masters().values())
    )


def test_rotary_table_grows_and_keeps_its_values(tiny_config: ModelConfig) -> None:
    """A longer row must not move the angles of earlier positions."""
    decoder = Decoder(tiny_config)
    short = decoder.rotary(5).cos.clone()
    assert torch.equal(decoder.rotary(1000).cos[:5], short)
    assert not [name for name, _ in decoder.named_buffers()]


SEGMENTS = np.array([[0] * 50 + [1] * 14, [0] * 64, [0] * 20 + [3] * 30 + [7] * 14], np.int32)


def test_packed_documents_equal_separate_ones(variant: ModelConfig) -> None:
    """Guards the mask: a token that sees its neighbour document shifts logits by whole units."""
    decoder = decoder_of(variant, random_weights(variant))
    input_ids = tokens(variant, 3, 64)
    packed = decoder.logits(input_ids, Segments.of(SEGMENTS, CPU))
    for row, start, stop in [(0, 0, 50), (0, 50, 64), (1, 0, 64), (2, 20, 50), (2, 50, 64)]:
        alone = decoder.logits(input_ids[row : row + 1, start:stop])[0]
        part = packed[row, start:stop]
        tolerance = 2e-5 * alone.abs().max().item()
        np.testing.assert_allclose(part.detach(), alone.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_changing_a_document_moves_no_bit_of_another(
    tiny_config: ModelConfig, with_gradients: bool, masked: bool
) -> None:
    """Not even a rounding may leak from one document to the next, in either form."""
    decoder = decoder_of(tiny_config, random_weights(tiny_config))
    segments = Segments.of(SEGMENTS, CPU, way="mask" if masked else "documents")
    before, changed = tokens(tiny_config, 3, 64), tokens(tiny_config, 3, 64)
    changed[0, :50] = tokens(tiny_config, 1, 50, seed=9)[0]
    with torch.set_grad_enabled(with_gradients):
        first, second = decoder.logits(before, segments), decoder.logits(changed, segments)
    assert not torch.equal(first[0, :50], second[0, :50])
    assert torch.equal(first[0, 50:], second[0, 50:])
    assert torch.equal(first[1:], second[1:])


def test_boolean_mask_equals_the_loop_over_documents(tiny_config: ModelConfig) -> None:
    """The form used on cards and under the compiler, checked here against the loop."""
    decoder = decoder_of(tiny_config, random_weights(tiny_config))
    input_ids = tokens(tiny_config, 3, 64)
    loop, mask = Segments.of(SEGMENTS, CPU), Segments.of(SEGMENTS, CPU, way="mask")
    assert mask is not None
    assert mask.mask is not None
    expected, actual = (decoder.logits(input_ids, segments).detach() for segments in (loop, mask))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_rows_of_one_document_need_no_segments() -> None:
    """The common case must take the fast path, whatever the ids are."""
    assert Segments.of(np.array([[4, 4, 4], [9, 9, 9]]), CPU) is None


def test_linear_gives_the_weights_gradient_for_an_input_without_one() -> None:
    """The fast product is invisible to autograd: it must never run where a gradient is wanted."""
    weight = torch.nn.Parameter(torch.randn(3, 5))
    x = torch.randn(7, 5)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad, x.sum(0).expand(3, 5), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch warns of its own code while it traces
def test_compiled_blocks_equal_eager_ones(
    make_session: Callable[..., TorchSession], make_batch: Callable[..., Batch]
) -> None:
    """The compiler traces other formulas than eager runs: packed rows and accumulation included."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    eager = make_session(micro_batch_size=4)
    compiled = make_session(micro_batch_size=4, backend_options={"compile": True})
    assert compiled.settings["compile"] is True
    for packed in (False, True, False):
        batch = make_batch(8, 64, packed=packed)
        expected = eager.train_step(batch, lr=1e-3).result()
        actual = compiled.train_step(batch, lr=1e-3).result()
        np.testing.assert_allclose(actual.loss, expected.loss, rtol=1e-5)
        np.testing.assert_allclose(actual.grad_norm, expected.grad_norm, rtol=1e-4)
