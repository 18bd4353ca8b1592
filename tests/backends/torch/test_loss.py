"""The chunked cross-entropy against PyTorch's own over full logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from solollm_torch import loss as loss_module
from solollm_torch.loss import Targets, chunk_rows, loss_and_gradient, token_nll
from torch.nn import functional

CPU = torch.device("cpu")
ROWS, LENGTH, HIDDEN, VOCAB = 5, 33, 24, 301


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and a ragged last one, at a size that a test can afford."""
    monkeypatch.setattr(loss_module, "chunk_rows", lambda vocab_size, device, logit_bytes=4: 48)


def inputs() -> tuple[torch.Tensor, torch.nn.Parameter, np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, HIDDEN, generator=generator)
    head = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator) * 0.5)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    weights = rng.random((ROWS, LENGTH)).astype(np.float32)
    return hidden, head, labels, weights


def full_loss(
    hidden: torch.Tensor, head: torch.Tensor, labels: np.ndarray, weights: np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss over denominator 100 and its gradients, from full logits in float64."""
    hidden, head = hidden.double().requires_grad_(), head.detach().double().requires_grad_()
    flat = torch.from_numpy(labels.reshape(-1).astype(np.int64))
    nll = functional.cross_entropy((hidden @ head.T).flatten(0, 1), flat, reduction="none")
    if weights is not None:
        nll = nll * torch.from_numpy(weights.reshape(-1))
    total = nll.sum() / 100
    total.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return total.detach(), hidden.grad, head.grad


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_chunked_loss_equals_full_loss(ignored: str, weighted: bool) -> None:
    """Values, both gradients, -100 labels and token weights, over chunk borders."""
    hidden, head, labels, weights = inputs()
    if ignored == "some":
        labels[1:3, 5:20], labels[:, -1] = -100, -100
    if ignored == "all":
        labels[:] = -100
    given = weights if weighted else None
    expected, expected_hidden, expected_head = full_loss(hidden, head, labels, given)
    head.grad = torch.zeros_like(head)
    actual, gradient = loss_and_gradient(hidden, head, Targets.of(labels, given, CPU), 100.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=0)
    np.testing.assert_allclose(gradient, expected_hidden, rtol=0, atol=2e-7)
    np.testing.assert_allclose(head.grad, expected_head, rtol=0, atol=2e-6)


def test_gradient_of_the_head_is_added_to() -> None:
    """Micro-batches, and the embedding of a tied head, put theirs into the same tensor."""
    hidden, head, labels, _ = inputs()
    targets = Targets.of(labels, None, CPU)
    head.grad = torch.zeros_like(head)
    loss_and_gradient(hidden, head, targets, 100.0)
    once = head.grad.clone()
    loss_and_gradient(hidden, head, targets, 100.0)
    np.testing.assert_allclose(head.grad, 2 * once, rtol=1e-5, atol=1e-7)


def test_frozen_head_gets_no_gradient() -> None:
    """An adapter run must not pay for it, nor find one in its norm."""
    hidden, head, labels, _ = inputs()
    head.requires_grad_(False)
    loss_and_gradient(hidden, head, Targets.of(labels, None, CPU), 100.0)
    assert head.grad is None


def test_token_nll_equals_log_softmax() -> None:
    """Likelihoods of evaluation and of preference training come from here."""
    hidden, head, labels, _ = inputs()
    expected = -torch.log_softmax(hidden.double() @ head.detach().double().T, -1).flatten(0, 1)
    chosen = expected[torch.arange(labels.size), torch.from_numpy(labels.reshape(-1)).long()]
    actual = token_nll(hidden, head, Targets.of(labels, None, CPU))
    np.testing.assert_allclose(actual, chosen, rtol=1e-5, atol=2e-6)


def test_improbable_label_has_a_finite_loss() -> None:
    """log(softmax) would be -inf here: its probability underflows float32."""
    hidden, head = torch.full((1, 1), 1.0), torch.nn.Parameter(torch.tensor([[0.0], [500.0]]))
    targets = Targets.of(np.zeros((1, 1), np.int32), None, CPU)
    assert token_nll(hidden, head, targets).item() == 500.0


def test_bf16_loss_is_computed_in_float32() -> None:
    """PyTorch's own chunked loss returns bf16 (9.25 instead of 9.36): the log would lie."""
    hidden, head, labels, _ = inputs()
    narrow, narrow_head = hidden.bfloat16(), head.detach().bfloat16()
    expected, _, _ = full_loss(narrow.float(), narrow_head.float(), labels, None)
    head.grad = torch.zeros_like(head)
    actual, gradient = loss_and_gradient(narrow, head, Targets.of(labels, None, CPU), 100.0)
    assert actual.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    np.testing.assert_allclose(actual, expected, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_compiled_equals_the_single_operations(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its formula: sums over all columns in place of look-ups, and logits that become gradients."""
    monkeypatch.setattr(loss_module, "_compiled", lambda: loss_module._gradient_in_place)
    hidden, head, labels, weights = inputs()
    labels[1:3, 5:20] = -100
    targets, found = Targets.of(labels, weights, CPU), []
    for compiled in (False, True):
        head.grad = torch.zeros_like(head)
        result = loss_and_gradient(hidden.to(dtype), head, targets, 100.0, compiled=compiled)
        found.append((*result, head.grad))
    wanted = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for plain, ours in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=wanted, atol=wanted * plain.abs().max().item())


def test_what_is_compiled_is_finite_where_the_label_is_improbable() -> None:
    """log(softmax) would be -inf here; and only the label's own number is in its loss."""
    logits = torch.tensor([[0.0, 500.0], [float("nan"), 0.0]])
    nll = loss_module._gradient_in_place(logits, torch.tensor([0, 1]))
    assert nll[0].item() == 500.0
    assert torch.equal(logits[0], torch.tensor([-1.0, 1.0]))
    assert nll[1].isnan(), "a row with a number that is none has no loss"


def test_full_logits_are_never_held() -> None:
    """Memory is bounded by one chunk however long the batch: the reason for this file."""
    wide = 4096
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and wide in out.shape and HIDDEN not in out.shape:
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(8, 64, HIDDEN)
    head = torch.nn.Parameter(torch.randn(wide, HIDDEN))
    head.grad = torch.zeros_like(head)
    labels = np.zeros((8, 64), np.int32)
    with Watch():
        loss_and_gradient(hidden, head, Targets.of(labels, None, CPU), 1.0)
    assert largest == 48 * wide


def test_chunks_shrink_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 128k vocabulary must not bring chunks of a gigabyte, a tiny one no chunk of everything, and
    a usual one chunks that read the head for a few positions at a time."""
    monkeypatch.undo()
    assert chunk_rows(2**24, CPU) == 64
    assert chunk_rows(32_000, CPU) == chunk_rows(256, CPU) == 256
    assert 4 * 262_144 * chunk_rows(262_144, CPU) <= 2**27
