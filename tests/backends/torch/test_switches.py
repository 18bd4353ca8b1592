"""Switches that are off: what they compute where a CPU can tell, what they say where it cannot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch import attention, fused_loss
from solollm_torch.attention import Segments, attend
from solollm_torch.compiling import compile_blocks, kernel_cache
from solollm_torch.fp8 import fp8_linear
from solollm_torch.fused_loss import choose_loss
from solollm_torch.loss import Targets, loss_and_gradient
from solollm_torch.offload import StreamingSession
from solollm_torch.ops import linear
from solollm_torch.optim import orthogonalize
from solollm_torch.packed_attention import varlen_agrees
from solollm_torch.session import TorchSession
from solollm_torch.switches import Switches
from torch import Tensor
from torch.nn import functional

from solollm.architecture import ModelConfig
from solollm.backend import Batch, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.errors import BackendError, ConfigError

CPU = torch.device("cpu")
MakeSession = Callable[..., TorchSession]
MakeBatch = Callable[..., Batch]
IDS = np.array([[0] * 3 + [1] * 9 + [2] * 4, [5] * 16, [0] * 15 + [1]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_packed_lengths_are_where_documents_begin() -> None:
    """A border off by one shows a token the next document; a missing row border, the next row."""
    segments = Segments.of(IDS, CPU, way="varlen")
    assert segments is not None
    assert segments.borders is not None
    assert segments.borders.dtype == torch.int32
    assert segments.borders.tolist() == [0, 3, 12, 16, 32, 47, 48]


def flash_in_numpy(
    q: Any, k: Any, v: Any, begins: Any, ends: Any, *sizes: int, **how: Any
) -> Tensor:
    """What the packed kernel computes, one document after the other."""
    assert begins is ends
    assert max(np.diff(begins)) <= sizes[0] == sizes[1]
    assert how in ({"window_size": (-1, 0)}, {"is_causal": True})
    parts = []
    for begin, end in itertools.pairwise(begins):
        document = [x[begin:end].transpose(0, 1) for x in (q, k, v)]  # [H, T, D]
        parts.append(functional.scaled_dot_product_attention(*document, is_causal=True))
    return torch.cat(parts, dim=1).transpose(0, 1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("way", ["varlen", "flex"])
def test_ways_to_attend_agree(monkeypatch: pytest.MonkeyPatch, way: Any) -> None:
    """Heads and positions swapped on the way into a kernel give numbers, and no error. The packed
    kernel itself is a card's; here a loop stands in its place."""
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", flash_in_numpy)
    q, k, v = drawn(3, 4, 16, 8), drawn(3, 2, 16, 8, seed=1), drawn(3, 2, 16, 8, seed=2)
    expected = attend(q, k, v, Segments.of(IDS, CPU))
    with torch.no_grad():
        actual = attend(q, k, v, Segments.of(IDS, CPU, way=way))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """kernel(function): the packed kernel of this build; nobody has asked yet what it gives."""
    import torch.nn.attention.varlen as varlen

    varlen_agrees.cache_clear()
    yield lambda function: monkeypatch.setattr(varlen, "varlen_attn", function)
    varlen_agrees.cache_clear()


def test_a_packed_kernel_is_taken_where_it_gives_what_a_mask_gives(kernel: Any) -> None:
    """Guards cards: another PyTorch's kernel that read its lengths otherwise would train a model
    whose documents see each other, without an error."""
    kernel(flash_in_numpy)
    assert varlen_agrees(CPU, torch.float32, 8)


def _see_all(q: Any, k: Any, v: Any, *lengths: Any, **how: Any) -> Tensor:
    rows = (x.transpose(0, 1) for x in (q, k, v))
    return functional.scaled_dot_product_attention(*rows, is_causal=True).transpose(0, 1)


def _not_built(*arguments: Any, **how: Any) -> Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize("other", [_see_all, _not_built])
def test_another_packed_kernel_is_not_taken(kernel: Any, other: Any) -> None:
    """The mask serves all."""
    kernel(other)
    assert not varlen_agrees(CPU, torch.float32, 8)


@pytest.mark.parametrize(
    ("dtype", "agrees", "way"),
    [("bfloat16", True, "varlen"), ("bfloat16", False, "mask"), ("float32", True, "mask")],
)
def test_a_card_attends_by_packed_lengths_where_that_is_right(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig, dtype: str, agrees: bool, way: str
) -> None:
    """Guards the default of every training on a card."""
    monkeypatch.setattr("solollm_torch.switches.varlen_agrees", lambda *_: agrees)
    switches = Switches.of(
        {}, tiny_config, torch.device("cuda"), compute=getattr(torch, dtype), compiled=True,
        plan=False,
    )  # fmt: skip
    assert switches.attention == way


def test_a_mask_on_a_processor_trains_as_documents_do(
    make_session: MakeSession, make_batch: MakeBatch, tiny_config: ModelConfig
) -> None:
    """The compiled loops know documents alone: given a mask they failed on an empty list."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model, batch = tiny_config.model_copy(update=sizes), make_batch(8, 64, packed=True)
    by_way = [
        make_session(model, backend_options=options).train_step(batch, lr=1e-3).result().loss
        for options in ({}, {"attention": "mask"})
    ]
    assert by_way[0] == pytest.approx(by_way[1], rel=1e-5)


def test_the_packed_kernel_gets_the_keyword_that_it_knows() -> None:
    """torch 2.11 says `is_causal`, 2.13 `window_size`; the other one's is an error on a card."""
    from solollm_torch.packed_attention import _causal

    assert _causal(lambda q, *, is_causal=False: q) == {"is_causal": True}
    assert _causal(lambda q, *, window_size=(-1, -1): q) == {"window_size": (-1, 0)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("part", ["attention", "feed_forward", "parts", "block"])
def test_recomputing_a_part_changes_no_bit(
    make_session: MakeSession, make_batch: MakeBatch, part: str, packed: bool
) -> None:
    """A part computed again from another input, or twice into the gradients."""
    batch = make_batch(8, 64, packed=packed)
    plain, frugal = make_session(), make_session(backend_options={"recompute": part})
    for _ in range(3):
        assert (
            frugal.train_step(batch, lr=3e-3).result() == plain.train_step(batch, lr=3e-3).result()
        )
    for name, gradient in plain.gradients(batch).items():
        assert torch.equal(gradient, frugal.gradients(batch)[name]), name


def test_the_more_is_recomputed_the_less_is_kept(
    make_session: MakeSession, make_batch: MakeBatch, tiny_config: ModelConfig, live_bytes: Any
) -> None:
    """A switch that computes twice and keeps everything all the same."""
    deep, batch = tiny_config.model_copy(update={"num_hidden_layers": 6}), make_batch(8, 64)
    peaks = []
    for part in ("none", "feed_forward", "parts", "block"):
        session = make_session(deep, backend_options={"recompute": part})
        session.probe_step(batch)
        with live_bytes() as watch:
            session.probe_step(batch)
        peaks.append(watch.peak)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < 0.7 * peaks[0]


def test_fp8_products_are_near_the_exact_ones() -> None:
    """A scale on the wrong side, or a gradient of the transposed weight, is off by far more."""
    x, weight = drawn(4, 32, 64).requires_grad_(), drawn(48, 64, seed=1).requires_grad_()
    up = drawn(4, 32, 48, seed=2)
    results = []
    for product in (linear, fp8_linear):
        y = product(x, weight)
        grad_x, grad_weight = torch.autograd.grad(y, (x, weight), up)
        results.append((y.detach(), grad_x, grad_weight))
    for exact, narrow, limit in zip(*results, (0.05, 0.08, 1e-6), strict=True):
        assert (narrow - exact).norm() < limit * exact.norm()


def test_fp8_trains(make_session: MakeSession, make_batch: MakeBatch) -> None:
    """The loss must fall as it does in fp32, not only be finite."""
    batch, losses = make_batch(8, 64), []
    for options in ({}, {"fp8": True}):
        session = make_session(backend_options=options)
        losses.append([session.train_step(batch, lr=3e-3).result().loss for _ in range(12)])
    assert losses[1] != losses[0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


def test_another_loss_behind_our_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of hidden states and head, the ignored targets and the denominator must be ours;
    PyTorch's own cross-entropy stands in for the package."""

    def summed(rows: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(rows @ head.t(), labels, reduction="sum")

    loss = fused_loss._with(summed)
    labels = np.array([[3, -100, 5], [0, 1, -100]])
    hidden, heads = drawn(2, 3, 8), [torch.nn.Parameter(drawn(16, 8, seed=1)) for _ in range(2)]
    for weights in (None, np.full((2, 3), 0.5, np.float32)):
        targets, found = Targets.of(labels, weights, CPU), []
        for head, function in zip(heads, (loss, loss_and_gradient), strict=True):
            head.grad = torch.ones(16, 8)
            value, gradient = function(hidden, head, targets, 7.0)
            found.append((value, gradient, head.grad.clone()))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"attention": "varlen"}, BackendError, "NVIDIA"),
        ({"attention": "flex"}, BackendError, "NVIDIA"),
        ({"attention": "ring"}, ConfigError, "varlen"),
        ({"loss": "liger"}, BackendError, "pip install liger-kernel"),
        ({"loss": "cce"}, BackendError, "pip install cut-cross-entropy"),
        ({"loss": "hinge"}, ConfigError, "liger"),
        ({"cuda_graphs": True}, BackendError, "compiled"),
        ({"recompute": "some"}, ConfigError, "feed_forward"),
    ],
)
def test_a_switch_that_cannot_be_on_says_why(
    make_session: MakeSession, options: Any, error: type[Exception], says: str
) -> None:
    """Trained without its effect, a switch would be measured as worth nothing."""
    with pytest.raises(error, match=says):
        make_session(backend_options=options)


def test_updates_without_a_compiler_are_refused(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler's own error comes from deep inside the first step."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="compiled_updates needs a compiler") as refused:
        make_session(backend_options={"compiled_updates": True})
    assert "no-such-compiler" in str(refused.value.why)


def test_a_package_without_its_card_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package may be installed where no card is."""
    monkeypatch.setattr(fused_loss, "find_spec", lambda name: object())
    with pytest.raises(BackendError, match="NVIDIA"):
        choose_loss("cce", CPU, compiled=False)


def test_odd_sizes_have_no_fp8(make_session: MakeSession, tiny_config: ModelConfig) -> None:
    """The operator would refuse in the middle of the first step."""
    odd = tiny_config.model_copy(update={"intermediate_size": 72})
    with pytest.raises(ConfigError, match="intermediate_size is 72"):
        make_session(odd, backend_options={"fp8": True})


def test_switches_are_settings(make_session: MakeSession) -> None:
    """They decide bits: a resume must find them again."""
    session = make_session(backend_options={"recompute": "parts", "fp8": True})
    assert session.settings["recompute"] == "parts"
    assert make_session(backend_options=dict(session.settings)).settings == session.settings
    assert attention.WAYS == ("documents", "mask", "varlen", "flex")


def test_compiled_kernels_outlive_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyTorch keeps them under /tmp, which a restart empties: minutes of compiling each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compile_blocks([])
    import os

    assert (
        os.environ["TORCHINDUCTOR_CACHE_DIR"]
        == str(kernel_cache())
        == str(tmp_path / "solollm" / "kernels")
    )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compile_blocks([])
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere", "the user's own choice"


@pytest.mark.parametrize("shape", [(3, 24, 64), (2, 64, 24), (1, 48, 48)])
def test_products_in_bfloat16_end_where_float32_does(shape: tuple[int, ...]) -> None:
    """Iterations that diverge, or a direction that is another one, for the sake of speed."""
    matrices = drawn(*shape)
    exact, rough = orthogonalize(matrices), orthogonalize(matrices, torch.bfloat16)
    assert rough.dtype == torch.float32
    along = functional.cosine_similarity(exact.flatten(1), rough.flatten(1))
    assert along.min() > 0.999
    values = torch.linalg.svdvals(rough)
    assert 0.6 < values.min() <= values.max() < 1.3  # as Jordan's coefficients have it


def test_the_switch_reaches_every_optimizer(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """A switch that a session accepts, and that changes nothing."""
    batch, bits = make_batch(8, 64), {}
    for products in ("float32", "bfloat16"):
        session = make_session(name="muon", backend_options={"newton_schulz": products})
        session.train_step(batch, lr=0.01).result()
        bits[products] = dict(session.snapshot().parameters())
        assert session.settings["newton_schulz"] == products
    name = "model.layers.1.self_attn.o_proj.weight"  # the others have no gradient yet
    assert (bits["float32"][name].data != bits["bfloat16"][name].data).any()
    unchanged = "model.embed_tokens.weight"  # AdamW's
    assert (bits["float32"][unchanged].data == bits["bfloat16"][unchanged].data).all()
    with pytest.raises(ConfigError, match="newton_schulz = 'float64'"):
        make_session(name="muon", backend_options={"newton_schulz": "float64"})


def test_a_streamed_update_multiplies_as_a_resident_one(
    make_batch: MakeBatch, tiny_config: ModelConfig
) -> None:
    """Guards streaming's equality with the resident session where the switch is on."""
    table = OptimizerTable(name="muon")
    given = {"newton_schulz": "bfloat16", "master": "split"}
    plan = Plan(8, True, "float32", 64, 8)
    states = []
    for kind in (TorchSession, StreamingSession):
        session = kind(tiny_config, SessionOptions(table, backend_options=given), plan, CPU)
        session.train_step(make_batch(8, 64), lr=0.01).result()
        states.append({n: t.data.copy() for n, t in session.snapshot().parameters()})
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], err_msg=name)
