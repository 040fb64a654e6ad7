"""Position in the run -> which image, which random generator. Pure functions: nothing here has a state to save."""

import functools
import hashlib
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

# Streams of random numbers, the first part of each key after the seed.
SIZES, CROP, BLOCKS, CONTEXT, PATCHES = range(5)
_ROUNDS = 8
_MIN_SIDE = 8  # of the Feistel rectangle: smaller ones reach some permutations too often, or never (only even ones)
_MASK64 = (1 << 64) - 1


def generator_for(seed: int, *key: int) -> np.random.Generator:
    """A random generator of its own for each (seed, *key), e.g. generator_for(seed, step, position).

    seed, key: any number of int64s. Different keys, of different lengths too, are independent streams.
    BLAKE2b of the little-endian int64s gives Philox's 128-bit key and 256-bit counter, so a stream is the same on every
    platform. NumPy promises that for the raw bits and, in practice, for `random()`: draw with that where it must last.
    """
    digest = hashlib.blake2b(struct.pack(f"<{1 + len(key)}q", seed, *key), digest_size=48, person=b"ijepa generator")
    words = np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64, copy=False)
    key_words: Any = _Key(words[:2])  # Any: NumPy's stub names SeedSequence alone, its documentation this interface
    return np.random.Generator(np.random.Philox(key_words, counter=words[2:]))


class _Key(ISeedSequence):
    """A Philox key. As key=... Philox takes it too, but asks the system for entropy first: twice the time."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert (n_words, dtype) == (2, np.uint64)
        return self._words


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(struct.pack("<2q", seed, epoch), digest_size=8 * _ROUNDS, person=b"ijepa epoch")
    return struct.unpack(f"<{_ROUNDS}Q", digest.digest())


def _mix(value: int, key: int) -> int:
    """64 bits -> 64 bits: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    value = (value + key) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def permuted_index(seed: int, epoch: int, num_images: int, index: int) -> int:
    """Where `index` goes in the random permutation of range(num_images) of that epoch, in O(1) time and memory.

    A Feistel network on the pairs (left, right) of a rows x columns rectangle that just holds num_images (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002). A result past num_images goes through again: that is rare,
    as at most about sqrt(num_images) pairs lie there.
    """
    if not 0 <= index < num_images:
        raise ValueError(f"index {index} is outside 0..{num_images - 1}; num_images is {num_images}")
    rows = max(_MIN_SIDE, math.isqrt(num_images - 1) + 1)
    columns = max(_MIN_SIDE, -(-num_images // rows))
    keys = _round_keys(seed, epoch)
    while True:
        left, right = divmod(index, columns)
        for i in range(0, _ROUNDS, 2):
            left = (left + _mix(right, keys[i])) % rows
            right = (right + _mix(left, keys[i + 1])) % columns
        index = left * columns + right
        if index < num_images:
            return index


def image_at(seed: int, step: int, position: int, *, num_images: int, global_batch_size: int) -> int:
    """Index of the image at `position` (0..global_batch_size-1) of the global batch of `step`.

    An epoch is num_images // global_batch_size steps and has a permutation of its own; its remainder is dropped.
    """
    steps_per_epoch = num_images // global_batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"the global batch of {global_batch_size} images is larger than the data set of {num_images}; "
            f"make it at most {num_images}, or use more images"
        )
    if step < 0 or not 0 <= position < global_batch_size:
        raise ValueError(
            f"no position {position} of step {step}: steps start at 0, positions are 0..{global_batch_size - 1}"
        )
    epoch, step_of_epoch = divmod(step, steps_per_epoch)
    return permuted_index(seed, epoch, num_images, step_of_epoch * global_batch_size + position)


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the same proportions; 0.1 is taken as the decimal it is written as."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    common = math.gcd(*whole)
    return tuple(weight // common for weight in whole)


def mixture_turn(n: int, weights: Sequence[int]) -> tuple[int, int]:
    """(which source the n-th image of a mixture is of, how many of that source came before it), in exact integers.

    weights: positive integers. Of n images one half of the sources gets floor(n * its share), the other half the rest,
    and so on within each: every stretch of a run has the sources in proportion, to within log2(sources) images.
    """
    low, high = 0, len(weights)
    while high - low > 1:
        middle = (low + high) // 2
        left, both = sum(weights[low:middle]), sum(weights[low:high])
        before = n * left // both
        if (n + 1) * left // both > before:
            n, high = before, middle
        else:
            n, low = n - before, middle
    return low, n


def source_seed(seed: int, source: int, *key: int) -> int:
    """A seed of its own for each source of a mixture, and for each key: the run's own for the first without a key."""
    if not source and not key:
        return seed
    digest = hashlib.blake2b(
        struct.pack(f"<{2 + len(key)}q", seed, source, *key), digest_size=8, person=b"ijepa source"
    )
    return int.from_bytes(digest.digest(), "little") >> 1


def mixed_image_at(n: int, *, seed: int, sizes: Sequence[int], weights: Sequence[int]) -> tuple[int, int]:
    """(source, index of its image) of the n-th image of the run. Each source goes through epochs of its own.

    n: step * global_batch_size + position. sizes: images of each source.
    """
    source, before = mixture_turn(n, weights)
    epoch, index = divmod(before, sizes[source])
    return source, permuted_index(source_seed(seed, source), epoch, sizes[source], index)
