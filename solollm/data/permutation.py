"""A shuffle without a list: the image of any position of a keyed permutation, in O(1) memory."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


class Permutation:
    """A fixed pseudo-random bijection of range(size), chosen by `key`.

    A balanced Feistel network over the next even power of two, with cycle walking: an image
    outside the range is mapped again until it falls inside (Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains"). The domain is less than four times `size`, so the walk is short.
    """

    def __init__(self, size: int, key: bytes) -> None:
        if not 1 <= size <= 2**60:
            raise ValueError(f"a permutation needs a size from 1 to 2**60, not {size}")
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(key, digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Images of `positions` (integers in range(size), any shape) as int64."""
        image = self._encrypt(np.asarray(positions, np.uint64))
        outside = image >= self.size
        while outside.any():
            image = np.where(outside, self._encrypt(image), image)
            outside = image >= self.size
        return image.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (mixed_bits(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def mixed_bits(values: np.ndarray) -> np.ndarray:
    """A hash of each uint64: the finalizer of SplitMix64 (Steele et al. 2014); products wrap modulo
    2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
