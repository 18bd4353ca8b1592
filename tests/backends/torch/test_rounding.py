"""Stochastic rounding in torch: the core's bits, the core's rounding, one stream per tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from solollm_torch.rounding import counter_bits, round_stochastically
from solollm_torch.storage import Rounded

from solollm import optim_codec
from solollm.optim_codec import counter_key

CPU = torch.device("cpu")


@pytest.mark.parametrize("offset", [0, 7, 2**31 - 3, 2**32 - 2])
def test_bits_equal_the_cores(offset: int) -> None:
    """A sign dragged along by a shift, or a counter that stops at 2^31, draws other bits."""
    drawn = counter_bits(counter_key(5, 6, "w"), 1000, offset=offset, device=CPU)
    expected = optim_codec.counter_bits(5, 6, "w", 1000, offset=offset)
    np.testing.assert_array_equal(drawn.numpy().view(np.uint32), expected)


def test_rounding_equals_the_cores() -> None:
    """Both halves of the bits, or a rounding of the magnitude the other way, would drift apart."""
    generator = np.random.default_rng(3)
    exponents = generator.integers(-38, 38, 5000)
    values = (generator.normal(size=5000) * 10.0**exponents).astype(np.float32)
    bits = optim_codec.counter_bits(1, 2, "w", 5000)
    target = torch.zeros(5000, dtype=torch.bfloat16)
    round_stochastically(
        torch.from_numpy(values.copy()), target, torch.from_numpy(bits.view(np.int32))
    )
    expected = optim_codec.round_stochastically(values, optim_codec.counter_bits(1, 2, "w", 5000))
    np.testing.assert_array_equal(target.view(torch.int16).numpy().view(np.uint16), expected)


def test_chunks_and_shards_draw_what_the_whole_tensor_does() -> None:
    """Another chunk size, or another number of ranks, would train another model."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole, parts, shard = (torch.zeros(1000, dtype=torch.bfloat16) for _ in range(3))
    Rounded(whole, 9, "w").encode(slice(0, 1000), values.clone(), 4)
    for start in range(0, 1000, 300):
        chunk = slice(start, min(start + 300, 1000))
        Rounded(parts, 9, "w").encode(chunk, values[chunk].clone(), 4)
    Rounded(shard[600:], 9, "w", first=600).encode(slice(0, 400), values[600:].clone(), 4)
    assert torch.equal(whole, parts)
    assert torch.equal(whole[600:], shard[600:])
    assert not torch.equal(whole, values.to(torch.bfloat16)), "nothing was rounded up against odds"
