"""Weights in a narrower dtype: the bits of torch's own rounding, and overflow by name."""

from __future__ import annotations

import numpy as np
import pytest

from solollm.backend import DType, HostTensor
from solollm.errors import ConfigError
from solollm.rounding import rounded


def patterns(largest: float) -> np.ndarray:
    """Float32 of every exponent and sign up to `largest`: ties, neighbours of ties, subnormals."""
    rng = np.random.default_rng(0)
    high = np.arange(2**16, dtype=np.uint32) << 16
    lows = (0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0x3000, 0xFFFF)
    every = np.concatenate(
        [(high | np.uint32(low)).view(np.float32) for low in lows]
        + [rng.integers(0, 2**32, 200_000, np.uint32).view(np.float32)]
    )
    with np.errstate(invalid="ignore"):
        return every[np.abs(every) <= np.float32(largest)]


@pytest.mark.parametrize(("dtype", "largest"), [("BF16", 3.3895e38), ("F16", 65519.0)])
def test_narrowing_equals_torch(dtype: DType, largest: float) -> None:
    """Truncation, or ties rounded up, shifts a whole model by half a step in one direction."""
    torch = pytest.importorskip("torch")
    values = patterns(largest)
    theirs = torch.from_numpy(values).to({"BF16": torch.bfloat16, "F16": torch.float16}[dtype])
    ours = rounded("w", HostTensor.of(values), dtype)
    np.testing.assert_array_equal(ours.data.view(np.int16), theirs.view(torch.int16).numpy())
    narrow = HostTensor(dtype, ours.shape, ours.data)
    np.testing.assert_array_equal(rounded("w", narrow, "F32").data, theirs.float().numpy())


def test_between_the_narrow_dtypes() -> None:
    """bf16 -> fp16 rounds once, from the exact value."""
    bf16 = HostTensor("BF16", (2, 2), np.array([[0x3F80, 0x3F81], [0x0001, 0xBF80]], np.uint16))
    half = rounded("w", bf16, "F16")
    np.testing.assert_array_equal(half.data, np.array([[1, 1.0078125], [0, -1]], np.float16))
    assert rounded("w", half, "F16") is half
    assert rounded("w", half, "BF16").data.tolist() == [[0x3F80, 0x3F81], [0, 0xBF80]]


@pytest.mark.parametrize(("dtype", "value"), [("F16", 65520.0), ("BF16", 3.4e38)])
def test_an_overflow_is_refused_by_name(
    dtype: DType, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinity in a weight makes every logit NaN, and nobody is told why."""
    monkeypatch.setattr("solollm.rounding._CHUNK", 4)
    values = np.ones((3, 3), np.float32)
    values[2, 2] = -value
    with pytest.raises(ConfigError, match=r"'model\.norm\.weight' does not fit") as caught:
        rounded("model.norm.weight", HostTensor.of(values), dtype)
    assert f"{value:g}" in caught.value.why
