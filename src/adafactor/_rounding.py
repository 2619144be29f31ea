"""How numbers are kept in fewer bits: stochastic rounding, split weights, momentum in one byte. The one definition.

Stochastic rounding. A float32 value x between two neighbours of the narrower format becomes the upper one with the
probability that makes the result right on average. The random bits are a hash of (seed, step, parameter, global element
index): replicas agree without talking, every sharding draws the same bits, resuming continues the stream, and the
global random number generator is neither read nor moved.

Split weights. A float32 weight is a bfloat16 one, which the model sees, and a signed remainder, which the optimizer
keeps in one or two bytes.

Momentum in one byte. A block of values shares a scale; each is the signed square of its code, so that small ones
survive beside large ones.

All arithmetic is on 32-bit integers, or is one correctly rounded operation at a time, so every backend gives the same
bits; `docs/rounding.md` lists test vectors.
"""

from __future__ import annotations

import hashlib
import math
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
_QUIET_NAN = 0x7FC00000
_SMALLEST_BLOCK = 2.0**-100


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
    word = _bits(magnitude, torch.int32)
    rounded = ((word + (bits >> (16 - dropped))) >> dropped << dropped).clamp_max_(largest)
    magnitude = _bits(torch.where(word < _INFINITY, rounded, word), torch.float32)
    if dtype == torch.float16:
        magnitude -= lift
    return magnitude.copysign_(x).to(dtype)


PLANES = {24: ("weight_low",), 32: ("weight_low", "weight_lowest")}  # weight_bits: where the bytes are kept


def split_weight(x: Tensor, bits: int) -> tuple[Tensor, ...]:
    """A float32 tensor as bfloat16 and its missing bits, one uint8 tensor for 24 bits and two for 32.

    The bfloat16 part is the nearest one, and the remainder signed. 32 bits are all of them; 24 are rounded to nearest,
    with an error of at most 2^-16 of x above its smallest normal number. Finite numbers stay finite as a whole; those
    beyond the largest bfloat16 plus half its spacing have an infinite bfloat16 part, as rounding to nearest would.
    """
    word = _bits(x.contiguous(), torch.int32)
    magnitude, sign = word & 0x7FFFFFFF, word & ~0x7FFFFFFF
    if bits == 24:
        rounded = ((magnitude + 0x80) & ~0xFF).clamp_max_(_INFINITY - 0x100)
        magnitude = torch.where(magnitude < _INFINITY, rounded, magnitude)
    word = torch.where(magnitude > _INFINITY, _QUIET_NAN, magnitude) | sign
    top = (word + 0x8000) >> 16
    remainder = word - (top << 16)  # in [-0x8000, 0x7FFF]
    planes = [(remainder >> 8) & 0xFF, remainder & 0xFF]
    return _bits(top.to(torch.int16), torch.bfloat16), *(plane.to(torch.uint8) for plane in planes[: bits // 8 - 2])


def join_weight(p: Tensor, *planes: Tensor) -> Tensor:
    """The float32 tensor that `split_weight` took apart."""
    word = _bits(p.contiguous(), torch.int16).to(torch.int32) << 16
    word += _bits(planes[0], torch.int8).to(torch.int32) << 8
    if len(planes) > 1:
        word += planes[1]
    return _bits(word, torch.float32)


MOMENTUM_BLOCK = 128  # values of a row that share a scale
_CODES = 127.0
_SCALE = float(torch.tensor(1 / _CODES**2))  # as float32 has it


def quantize(M: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Momentum in one byte.  # [rows, columns] float32 -> [rows, columns] int8, [rows, blocks] float32

    M = code |code| scale, with the largest of each block at code 127 or -127. Between two neighbouring squares the
    choice is as `round_stochastic`'s, right on average, or the nearer one where `bits` is None. A block whose largest
    value is below 2^-100 is zero; one that is not finite becomes NaN.
    """
    blocks = M.abs()
    blocks = torch.nn.functional.pad(blocks, (0, -M.shape[1] % MOMENTUM_BLOCK)).unflatten(1, (-1, MOMENTUM_BLOCK))
    largest = blocks.amax(2, keepdim=True)
    good = (largest >= _SMALLEST_BLOCK) & largest.isfinite()
    scale = torch.where(largest < _SMALLEST_BLOCK, 0.0, largest * _SCALE)
    scale = torch.where(good | (scale == 0), scale, math.inf)
    square = (blocks * torch.where(good, 1 / scale, 0.0)).nan_to_num_(0.0).clamp_max_(_CODES**2)
    square = square.flatten(1)[:, : M.shape[1]]
    code = square.sqrt().floor_()
    draw = 0.5 if bits is None else (bits + 0.5) / 65536
    code += (square - code * code) > draw * (2 * code + 1)
    return code.copysign_(M).to(torch.int8), scale.squeeze(2)


def dequantize(code: Tensor, scale: Tensor) -> Tensor:
    """Momentum from one byte.  # [rows, columns] int8, [rows, blocks] -> [rows, columns] float32"""
    code = code.float()
    return (code * code.abs()) * scale.repeat_interleave(MOMENTUM_BLOCK, 1)[:, : code.shape[1]]


class _Bits(torch.autograd.Function):
    """`Tensor.view(dtype)` for `torch.vmap`."""

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.view(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, None], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
        return x.view(dtype), in_dims[0]


def _bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits as another dtype of that width: a view."""
    try:
        return x.view(dtype)
    except RuntimeError:  # vmap does not know it before torch 2.13
        return _Bits.apply(x, dtype)  # pyright: ignore[reportReturnType]


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
