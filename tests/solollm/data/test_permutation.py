"""The keyed permutation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solollm.data.permutation import Permutation


@given(size=st.integers(1, 3000), key=st.binary(max_size=16))
def test_every_position_has_its_own_image(size: int, key: bytes) -> None:
    """Guards against rows seen twice or never: a walk that leaves the range, a lossy round."""
    images = Permutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


def test_images_do_not_depend_on_what_else_is_asked() -> None:
    """Guards the pure function: one position alone and within a batch map alike."""
    permutation = Permutation(10**12, b"key")
    positions = np.array([0, 1, 999_999_999_999, 123_456_789_012])
    together = permutation(positions)
    assert [int(permutation(np.array([p]))[0]) for p in positions] == together.tolist()
    assert together.max() < 10**12


def test_order_is_frozen() -> None:
    """Guards resumed runs against a changed mix or key schedule: these images may never move."""
    assert Permutation(10, b"frozen")(np.arange(10)).tolist() == [5, 9, 7, 3, 6, 2, 4, 0, 1, 8]


def test_orders_look_unrelated() -> None:
    """Guards against a weak mix: fixed points and kept neighbours stay near chance (about 1)."""
    size = 4096
    for key in (b"a", b"b", b"c"):
        images = Permutation(size, key)(np.arange(size))
        assert (images == np.arange(size)).sum() <= 8
        assert (np.diff(images) == 1).sum() <= 8
        # Mean of the first eighth within 5 standard errors of the middle.
        error = size / np.sqrt(12 * size / 8)
        assert abs(images[: size // 8].mean() - size / 2) < 5 * error


def test_impossible_sizes_are_refused() -> None:
    """Guards against an endless walk over nothing."""
    with pytest.raises(ValueError, match="size"):
        Permutation(0, b"")
