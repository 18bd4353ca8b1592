"""The split of a float32 weight into bf16 and a residual: exact, and bf16 as one would round it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from solollm_torch.split_master import join, split
from torch import Tensor


def halves(weights: Tensor) -> tuple[Tensor, Tensor]:
    high = torch.empty(weights.shape, dtype=torch.bfloat16)
    low = torch.empty(weights.shape, dtype=torch.int16)
    split(weights, high, low)
    return high, low


def of_bits(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())


UPPER = np.array(
    [0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7F, 0x8000, 0x8001, 0xBF80, 0xFF7F], np.uint32
)
CASES = {
    "every low half": (UPPER[:, None] << 16 | np.arange(1 << 16, dtype=np.uint32)).reshape(-1),
    "every high half": np.arange(1 << 16, dtype=np.uint32) << 16 | 0x7FFF,
    "ties": np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000,
    "denormals": np.arange(1 << 16, dtype=np.uint32) * 127 | 1,
    "anything": np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, dtype=np.uint32),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case: str) -> None:
    """A borrow lost at a tie or a sign would move a weight by a whole bf16 step at each update."""
    weights = of_bits(CASES[case])
    back = join(*halves(weights))
    np.testing.assert_array_equal(back.view(torch.int32), weights.view(torch.int32))


def test_high_half_is_the_nearest_bf16() -> None:
    """Truncation would bias every weight towards zero; only exact ties may differ from rounding to
    even, and they go away from zero."""
    generator = np.random.default_rng(1)
    weights = torch.from_numpy(generator.normal(size=200_000).astype(np.float32))
    high, low = halves(weights)
    ties = low == -0x8000
    assert torch.equal(high[~ties], weights.to(torch.bfloat16)[~ties])
    tie = torch.tensor([1.0 + 2**-8, -1.0 - 2**-8])
    assert halves(tie)[0].tolist() == [1.0 + 2**-7, -1.0 - 2**-7]


def test_slices_of_larger_tensors_are_split_in_place() -> None:
    """Weights are views into one buffer; a copy would leave the buffer as it was."""
    buffer, residual = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(3, 8, dtype=torch.int16)
    weights = torch.randn(8, generator=torch.Generator().manual_seed(0))
    split(weights, buffer[1], residual[1])
    assert torch.equal(join(buffer, residual)[1], weights)
    assert not buffer[[0, 2]].any()
