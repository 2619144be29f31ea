"""Stochastic rounding: the one definition.

A float32 value x between two neighbours of the narrower format becomes the upper one with the probability that makes
the result right on average. The random bits are a hash of (seed, step, parameter, global element index): replicas
agree without talking, every sharding draws the same bits, resuming continues the stream, and the global random number
generator is neither read nor moved. All arithmetic is on 32-bit integers, so every backend gives the same bits;
`docs/rounding.md` lists test vectors.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor)  # a 32-bit word, read as signed: a Python int, or an int32 tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0x7FEB352D, 0x846CA68B - (1 << 32)  # "lowbias32" (Wellons, hash-prospector, 2018), read as signed

# format: (mantissa bits that are dropped, largest finite value as float32 bits)
_FORMATS = {torch.bfloat16: (16, 0x7F7F0000), torch.float16: (13, 0x477FE000)}
_FLOAT16_SMALLEST_NORMAL = 2.0**-14
_GOLDEN = 0x9E3779B9 - (1 << 32)  # 2^32 / golden ratio
_INFINITY = 0x7F800000


def stream_key(seed: int, parameter: str) -> tuple[int, int]:
    """The two 32-bit words that set one parameter's stream apart from all others."""
    digest = hashlib.blake2b(f"{seed}/{parameter}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def step_key(stream: tuple[int, int], step: Word) -> tuple[Word, Word]:
    """The two words that set one step of a stream apart; `step` counts from 1."""
    first = _mix(stream[0] ^ step, stream[1])
    return first, _mix(stream[1] ^ step, first)


def random_bits(key: tuple[Any, Any], index: Tensor) -> Tensor:
    """16 random bits for each element.  # index: int64, the element's row-major index in the whole tensor

    Two neighbours (index 2k and 2k + 1) share one hash, of which they take the low and the high half.
    """
    pair = index >> 1
    high = (pair >> 32).to(torch.int32)  # 0 below 2^33 elements
    word = _mix(pair.to(torch.int32) ^ (high * _GOLDEN + key[0]), key[1])
    return (word >> ((index & 1) << 4).to(torch.int32)) & 0xFFFF


def round_stochastic(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 `x` to bfloat16 or float16 with 16 random bits per element.

    Exact values stay, non-finite values pass through, and no finite value becomes infinite. The mean of the result
    is x: exactly so for bfloat16, to 2^-13 of a spacing for float16.
    """
    dropped, largest = _FORMATS[dtype]
    magnitude = x.abs()
    if dtype == torch.float16:
        # Below its smallest normal number float16 has fewer mantissa bits; above it, the same spacing and all of them.
        lift = (magnitude < _FLOAT16_SMALLEST_NORMAL) * _FLOAT16_SMALLEST_NORMAL
        magnitude += lift
    word = magnitude.view(torch.int32)
    rounded = ((word + (bits >> (16 - dropped))) >> dropped << dropped).clamp_(max=largest)
    magnitude = torch.where(word < _INFINITY, rounded, word).view(torch.float32)
    if dtype == torch.float16:
        magnitude -= lift
    return magnitude.copysign_(x).to(dtype)


def _mix(word: Word, key: Word) -> Word:
    """A 32-bit hash of `word`: a bijection for each `key`, which enters between its two multiplications.

    Overwrites a tensor `word`.
    """
    word ^= _shifted(word, 16)
    word = _wrapped(word * _MULTIPLIERS[0])
    word ^= _shifted(word, 15)
    word = _wrapped(word + key)
    word = _wrapped(word * _MULTIPLIERS[1])
    word ^= _shifted(word, 16)
    return word


def _shifted(word: Word, by: int) -> Word:
    """The word shifted right as an unsigned one."""
    return (word >> by) & (_MASK >> by)


def _wrapped(word: Word) -> Word:
    """The low 32 bits; int32 tensors wrap by themselves."""
    return word if isinstance(word, Tensor) else ((word + 0x80000000) & _MASK) - 0x80000000
