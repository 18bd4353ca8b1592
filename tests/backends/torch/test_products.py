"""Which library multiplies, and that all of them give the same product."""

from __future__ import annotations

import pytest
import torch
from solollm_torch import optim, products
from solollm_torch.products import Rule, add_outer, add_products, product, rule_for

MKL, ONEDNN = Rule(False, False), Rule(True, True)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=[MKL, ONEDNN], ids=["mkl", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rule:
    """Every test runs with each library, whatever processor it runs on."""
    if request.param.forward and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "rule", lambda: request.param)
    return request.param  # type: ignore[no-any-return]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "expected"),
    [
        ("AuthenticAMD", 26, "avx2 avx512f", Rule(True, True)),  # Zen 5
        ("AuthenticAMD", 27, "avx2 avx512f", Rule(True, True)),
        ("AuthenticAMD", 25, "avx2 avx512f", Rule(True, False)),  # Zen 4
        ("AuthenticAMD", 25, "avx2", Rule(False, False)),  # Zen 3
        ("AuthenticAMD", 26, "avx2", Rule(False, False)),  # the system hides the wide units
        ("GenuineIntel", 26, "avx2 avx512f", Rule(False, False)),
    ],
)
def test_the_library_follows_the_processor(
    vendor: str, family: int, flags: str, expected: Rule
) -> None:
    """oneDNN on a processor without AVX-512 takes up to 60% longer, so a guess costs."""
    text = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\nflags\t\t: {flags}\n"
    assert rule_for(text) == expected


def test_a_processor_that_says_nothing_keeps_pytorchs_choice() -> None:
    """Some containers and all ARM machines give no vendor and no family."""
    assert rule_for("") == MKL
    assert rule_for("vendor_id\t: AuthenticAMD\nflags\t: avx512f\n") == Rule(True, False)


def test_products_of_strided_factors(library: Rule) -> None:
    """oneDNN's operator reads strides by itself; a wrong one would give another product."""
    x, weight = drawn(2, 5, 48)[:, :, 8:40], drawn(32, 24, seed=1).t()
    torch.testing.assert_close(product(x, weight), x @ weight.t(), **CLOSE)


@pytest.mark.parametrize("at_once", [1, 100, 1 << 22])
def test_gradients_of_weights_are_added(
    library: Rule, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are multiplied one after the other must tile the matrix: with 100 elements the
    last part is shorter, with 1 each row is one."""
    monkeypatch.setattr(products, "OUTER_ELEMENTS", at_once)
    weight, grad, rows = torch.nn.Parameter(drawn(50, 24)), drawn(64, 50, seed=1), drawn(64, 24)
    expected = grad.t() @ rows
    returned = add_outer(weight, grad, rows)
    assert returned is not None
    torch.testing.assert_close(returned, expected, **CLOSE)
    weight.grad = torch.ones_like(weight)
    assert add_outer(weight, grad, rows) is None
    torch.testing.assert_close(weight.grad, 1 + expected, **CLOSE)


def test_narrow_rows_are_added_to_wide_gradients(library: Rule) -> None:
    """bf16 activations over fp32 gradients are multiplied by another kernel and widened."""
    weight, grad, rows = torch.nn.Parameter(drawn(8, 4)), drawn(16, 8).bfloat16(), drawn(16, 4)
    weight.grad = torch.zeros_like(weight)
    assert add_outer(weight, grad, rows.bfloat16()) is None
    exact = grad.float().t() @ rows
    assert (weight.grad - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_a_batch_of_products_is_scaled_and_added(library: Rule, beta: float) -> None:
    """`baddbmm` and a loop over the batch must agree on which factor scales what; what is not
    read may hold NaN."""
    base, left, right = drawn(3, 6, 5), drawn(3, 6, 7, seed=1), drawn(3, 7, 5, seed=2)
    out = torch.full((3, 6, 5), torch.nan)
    add_products(out if beta == 0 else base, left, right, beta=beta, alpha=-2.0, out=out)
    torch.testing.assert_close(out, beta * base - 2 * (left @ right), **CLOSE)


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (2, 24, 24)])
def test_muon_takes_the_same_direction(
    library: Rule, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newton-Schulz multiplies transposed views when a matrix is tall."""
    matrices = drawn(*shape)
    directions = optim.orthogonalize(matrices)
    monkeypatch.setattr(products, "rule", lambda: MKL)
    torch.testing.assert_close(directions, optim.orthogonalize(matrices), **CLOSE)
