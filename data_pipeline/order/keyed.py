"""Randomness as a pure function of a key: no generator, no state, alike on all machines and numpys."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64
_MASK = 2**64 - 1
_ROUNDS = 4


def mix(words: Words) -> Words:
    """SplitMix64's step, a bijection of 64-bit words that avalanches (Steele, Lea & Flood 2014, fig. 17)."""
    z = words + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key_of(*numbers: int | NDArray[np.int64]) -> Words:
    """One 64-bit key for each row of the numbers, [n]; scalars count for every row."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        word = np.uint64(number & _MASK) if isinstance(number, int) else number.astype(np.uint64)
        key = mix(key ^ word)
    return key


def permute(x: NDArray[np.int64], size: NDArray[np.int64], key: Words) -> NDArray[np.int64]:
    """Image of each x under a permutation of [0, size) that its key chooses.

    An alternating Feistel network over the smallest power of two that holds `size`, walked along its cycle
    until it lands inside (Black & Rogaway 2002, sec. 3): fewer than two passes on average, and no table.

    Args:
        x: [n], each in [0, size).
        size: [n] or [1], each below 2^53.
        key: [n] or [1].

    Raises:
        ValueError: an x outside of [0, size), whose cycle may never come back inside.
    """
    size = np.broadcast_to(size, x.shape)
    key = np.broadcast_to(key, x.shape)
    if ((x < 0) | (x >= size)).any():
        raise ValueError("a permutation of [0, size) takes numbers of it alone")
    bits = np.frexp((size - 1).astype(np.float64))[1].astype(np.uint64)  # bit length, exact below 2^53
    image = _feistel(x.astype(np.uint64), bits, key).astype(np.int64)
    outside = np.flatnonzero(image >= size)
    while outside.size:
        image[outside] = _feistel(image[outside].astype(np.uint64), bits[outside], key[outside])
        outside = outside[image[outside] >= size[outside]]
    return image


def _feistel(x: Words, bits: Words, key: Words) -> Words:
    one = np.uint64(1)
    low_bits = (bits + one) >> one
    low_mask = (one << low_bits) - one
    high_mask = (one << (bits - low_bits)) - one
    low, high = x & low_mask, x >> low_bits
    for _ in range(_ROUNDS):
        key = mix(key)
        low = low ^ (mix(key ^ high) & low_mask)
        key = mix(key)
        high = high ^ (mix(key ^ low) & high_mask)
    image: Words = (high << low_bits) | low
    return image


def uniforms(purpose: str, seed: int, epoch: int, view: int, key: str) -> Iterator[float]:
    """Endless numbers in [0, 1), of 53 bits each, for one view of one sample; cheap where few are taken.

    `purpose` keeps unlike draws apart. For a pair of a step's samples, the step stands for the epoch, the number of
    the pair for the view, and the key is empty.
    """
    text = _text(purpose, seed, epoch, view, key)
    for block in itertools.count():
        digest = hashlib.blake2b(text, digest_size=64, salt=block.to_bytes(16, "little")).digest()
        for word in struct.unpack("<8Q", digest):
            yield (word >> 11) * 2.0**-53


def words(purpose: str, seed: int, epoch: int, view: int, key: str, *, count: int) -> Words:
    """`count` words for one view of one sample, [count]: a SplitMix64 stream, cheap where many are taken."""
    digest = hashlib.blake2b(_text(purpose, seed, epoch, view, key), digest_size=8).digest()
    steps: Words = np.arange(count, dtype=np.uint64)
    return mix(steps * np.uint64(_GOLDEN) + np.frombuffer(digest, "<u8"))


def _text(purpose: str, seed: int, epoch: int, view: int, key: str) -> bytes:
    return f"{purpose}\n{seed}\n{epoch}\n{view}\n{key}".encode("utf-8", "surrogateescape")
