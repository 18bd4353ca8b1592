"""The compiled loops: PyTorch's own results, the same bits every time, and a session that can do
without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from solollm_torch import kernels as module
from solollm_torch.kernels import Kernels, Places, Turns, choose, load
from solollm_torch.offload import StreamingSession
from solollm_torch.ops import Rotary, rotate
from solollm_torch.session import TorchSession
from torch import Tensor
from torch.nn import functional

from solollm.architecture import ModelConfig
from solollm.backend import Batch
from solollm.errors import ConfigError

LENGTHS = (1, 5, 6, 7, 16, 47, 48, 49, 97, 4)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found, reason = load()
    if found is None:
        pytest.skip(f"no compiled kernels: {reason}")
    return found


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    """Within `tolerance` of the largest value of the float64 reference."""
    scale = float(expected.detach().abs().max())
    np.testing.assert_allclose(
        actual.numpy(), expected.detach().numpy(), rtol=0, atol=tolerance * scale
    )


def turned(length: int, dim: int, places: list[tuple[int, int]]) -> Turns:
    """Random angles for rows of `length` positions, and documents at `places`."""
    angle = 3 * randn(length, dim // 2, seed=7)
    longest = max(size for _, size in places)
    return Turns(angle.cos(), angle.sin(), Places(torch.tensor(places), longest))


@pytest.mark.parametrize("shape", [(1, 16), (3, 7, 33), (50, 384)])
def test_rms_norm_equals_pytorch(kernels: Kernels, shape: tuple[int, ...]) -> None:
    """Guards both directions, at sizes that fill no vector too."""
    x, weight, grad = randn(*shape), randn(shape[-1], seed=1), randn(*shape, seed=2)
    wide, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = functional.rms_norm(wide, shape[-1:], wide_weight, 1e-5)
    expected.backward(grad.double())
    out, inverse = kernels.rms_norm(x, weight, 1e-5)
    grad_x, grad_weight = kernels.rms_norm_backward(grad, x, weight, inverse)
    assert wide.grad is not None
    assert wide_weight.grad is not None
    assert_close(out, expected)
    assert_close(grad_x, wide.grad)
    assert_close(grad_weight, wide_weight.grad)


def test_swiglu_equals_pytorch(kernels: Kernels) -> None:
    """Guards the exponential over its whole range, where it is 0, 1 and beyond float32."""
    gate_up, grad = 3 * randn(20, 74), randn(20, 37, seed=1)
    gate_up[0, :8] = torch.tensor([-200.0, -88.5, -87.0, -1e-8, 0.0, 1e-8, 88.5, 200.0])
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    expected = functional.silu(gate) * up
    expected.backward(grad.double())
    assert wide.grad is not None
    assert_close(kernels.swiglu(gate_up), expected)
    assert_close(kernels.swiglu_backward(grad, gate_up), wide.grad)


def test_cross_entropy_equals_pytorch(kernels: Kernels) -> None:
    """Guards loss and gradient, of logits far from zero and far apart as well."""
    logits, labels = 5 * randn(9, 203), torch.arange(9) * 20
    logits[1] += 1e4
    logits[2, 7] = 300.0
    scale = randn(9, 1, seed=1).abs()
    wide = logits.double().requires_grad_()
    expected = functional.cross_entropy(wide, labels, reduction="none")
    (expected * scale.squeeze(1)).sum().backward()
    nll = kernels.cross_entropy_(logits, labels, scale)
    assert wide.grad is not None
    assert_close(nll, expected)
    assert_close(logits, wide.grad)


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize("dim", [16, 64])
def test_attention_equals_pytorch(kernels: Kernels, heads: tuple[int, int], dim: int) -> None:
    """Guards every length around the sizes of its blocks, shared keys, the borders between
    documents, and that each position is turned by its place in its row, in both directions."""
    num_heads, kv_heads = heads
    length = sum(LENGTHS)
    qkv = randn(2, length, num_heads + 2 * kv_heads, dim)
    grad = randn(2, length, num_heads, dim, seed=1)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    places = [(int(start), size) for start, size in zip(starts, LENGTHS, strict=True)]
    places.append((length, length))  # the second row is one document
    turns = turned(length, dim, places)
    wide = qkv.double().requires_grad_()
    rotated = rotate(
        wide[:, :, : num_heads + kv_heads], Rotary(turns.cos.double(), turns.sin.double())
    )
    flat, parts = torch.cat((rotated, wide[:, :, num_heads + kv_heads :]), 2).flatten(0, 1), []
    for start, size in places:
        q, k, v = (
            part.transpose(0, 1)
            for part in torch.split(flat[start : start + size], [num_heads, kv_heads, kv_heads], 1)
        )
        attended = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, enable_gqa=True
        )
        parts.append(attended[0].transpose(0, 1))
    expected = torch.cat(parts).view(grad.shape)
    expected.backward(grad.double())
    out, log_sum = kernels.attention(qkv, num_heads, turns)
    grad_qkv = kernels.attention_backward(grad, qkv, log_sum, turns)
    assert wide.grad is not None
    assert_close(out, expected)
    assert_close(grad_qkv, wide.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(kernels: Kernels, bad: float) -> None:
    """Guards the skip of a diverged step: a clamp inside an exponential could hide it."""
    gate_up = torch.ones(1, 32)
    gate_up[0, 3] = bad
    assert not torch.isfinite(kernels.swiglu(gate_up)[0, 3])
    logits = torch.zeros(1, 32)
    logits[0, 5] = bad
    assert not torch.isfinite(kernels.cross_entropy_(logits, torch.tensor([5]), torch.ones(1, 1)))
    qkv = torch.ones(1, 20, 3, 16)
    qkv[0, 10, 0, 2] = bad
    out, _ = kernels.attention(qkv, 1, turned(20, 16, [(0, 20)]))
    assert not torch.isfinite(out[0, 10]).all()
    x = torch.ones(1, 32)
    x[0, 9] = bad
    assert not torch.isfinite(kernels.rms_norm(x, torch.ones(32), 1e-5)[0]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_reach_earlier_positions(kernels: Kernels, bad: float) -> None:
    """Guards the lanes of a vector that lie after a query: their garbage is left out, not
    multiplied by 0. Only the few queries that are computed together see each other's."""
    qkv, turns = randn(1, 40, 3, 16), turned(40, 16, [(0, 20), (20, 20)])
    expected, _ = kernels.attention(qkv, 1, turns)
    qkv[0, 36, 1:] = bad
    out, log_sum = kernels.attention(qkv, 1, turns)
    assert torch.equal(out[0, :32], expected[0, :32])
    grad = torch.zeros_like(out)
    grad[0, :32] = 1
    grad_qkv = kernels.attention_backward(grad, qkv, log_sum, turns)
    assert torch.isfinite(grad_qkv[0, :32, 0]).all()
    assert torch.isfinite(grad_qkv[0, :20]).all()


def test_bits_do_not_depend_on_threads_that_share_no_sum(kernels: Kernels) -> None:
    """Guards repeatable training: tasks are handed out in any order, results are not."""
    qkv, grad = randn(3, 90, 6, 32), randn(3, 90, 4, 32, seed=1)
    turns = turned(90, 32, [(0, 90), (90, 40), (130, 50), (180, 90)])
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out, log_sum = kernels.attention(qkv, 4, turns)
        results.append((out, kernels.attention_backward(grad, qkv, log_sum, turns)))
    torch.set_num_threads(before)
    for out, grad_qkv in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad_qkv, results[0][1])


def random_batch(config: ModelConfig) -> Batch:
    generator = np.random.default_rng(3)
    ids = generator.integers(0, config.vocab_size, (4, 49)).astype(np.int32)
    segments = np.sort(generator.integers(0, 4, (4, 48)), axis=1).astype(np.int32)
    labels = ids[:, 1:].copy()
    labels[0, :5] = -100
    weights = generator.random((4, 48)).astype(np.float32)
    return Batch(ids[:, :-1], labels, 150.0, segment_ids=segments, token_weights=weights)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "master"),
    [(TorchSession, "float32"), (TorchSession, "split"), (StreamingSession, "split")],
)
def test_a_session_gives_the_gradients_it_gives_without_them(
    kernels: Kernels,
    tiny_config: ModelConfig,
    make_session: Callable[..., TorchSession],
    kind: type[TorchSession],
    master: str,
    checkpointing: bool,
) -> None:
    """Guards the way they are put together, with documents, weights and ignored positions, and with
    weights in bfloat16, which the loops do not know."""
    config = tiny_config.model_copy(update={"head_dim": 16})
    batch = random_batch(config)
    found = []
    for setting in (True, False):
        session = make_session(
            config, kind=kind, micro_batch_size=2, activation_checkpointing=checkpointing,
            backend_options={"kernels": setting, "master": master},
        )  # fmt: skip
        assert session.settings["kernels"] == (kernels.digest if setting else "off")
        found.append((session.probe_step(batch), session.gradients(batch)))
    (metrics, gradients), (expected, expected_gradients) = found
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-6)
    assert metrics.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], 1e-5)


def test_choices(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards resume: what a session records is a choice that gives the same again."""
    assert choose(kernels.digest) is choose("auto") is choose(True) is kernels
    assert choose("off") is choose(False) is None
    with pytest.raises(ConfigError, match="kernels = 'fast'"):
        choose("fast")
    monkeypatch.setattr(module, "load", lambda: (None, "there is no C compiler `cc`"))
    assert choose("auto") is None
    with pytest.warns(UserWarning, match="no C compiler"):
        choose(kernels.digest)


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no C compiler"), ("false", "did not build")]
)
def test_without_a_working_compiler_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str
) -> None:
    """Guards machines without one: training goes on with PyTorch's operations."""
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found, why = load.__wrapped__()
    assert found is None
    assert reason in why
    assert not list(tmp_path.rglob("*.so"))
