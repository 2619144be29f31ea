"""Stochastic rounding: its test vectors, an independent form in numpy, and what it promises on average."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from _cases import (
    FEW_SHAPES,
    MODES,
    Shape,
    assert_close,
    assert_same_bits,
    bits_of,
    parameter,
    problem,
    shape_id,
    walk,
)
from adafactor import Adafactor
from adafactor._rounding import random_bits, round_stochastic, step_key, stream_key
from adafactor.backends import reference

Words = NDArray[np.uint32]

# (seed, parameter), its stream, then step: its key and the bits of INDICES
INDICES = [0, 1, 2, 3, 2**31, 2**32 - 1, 2**33 + 2, 2**33 + 3, 2**40 + 5]
VECTORS = [
    (0, "param 0", "18d96292 68955131", 1, "06afa1d9 670ed43a", "a775 bd40 a3f1 51c0 a1e1 03b3 eb89 fd86 c5b7"),
    (0, "param 0", "18d96292 68955131", 2, "7f0a1139 4b1e61ce", "e058 71a0 703c 79e5 6b19 dc52 0ffc 72f9 2b21"),
    (0, "param 0", "18d96292 68955131", 2**24, "efd52591 a8d22cb0", "54be 74e9 c6ce 5cac a36e 9452 1495 6869 99cc"),
    (0, "param 1", "fac02889 3aec2d6e", 1, "40b1348a d99b527a", "188d d4a1 2f38 623a bd71 415d d2df 1db8 724d"),
    (1, "param 0", "6b426174 0f588c90", 1, "897f0b42 48d933af", "9ff7 23b0 39d7 cd86 5981 a2aa b02f 4a68 7086"),
    (
        -7,
        "decoder.weight",
        "8407fc1c c2cf4b7c",
        1000,
        "d23fa180 7ac98da6",
        "fe77 3243 f2e2 e9c7 f013 a5b2 1f47 6458 137b",
    ),
]
FORMATS = [torch.bfloat16, torch.float16]
GEOMETRY = {  # mantissa bits, exponent of the smallest normal number, largest finite value, random bits used
    torch.bfloat16: (7, -126, float(torch.finfo(torch.bfloat16).max), 16),
    torch.float16: (10, -14, 65504.0, 13),
}
each_format = pytest.mark.parametrize("dtype", FORMATS, ids=["bfloat16", "float16"])

# The same in numpy: 32-bit words that wrap around; and rounding by arithmetic on values, not on bits.


def mixed(word: Words, key: Words) -> Words:
    with np.errstate(over="ignore"):
        word = word ^ (word >> np.uint32(16))
        word = word * np.uint32(0x7FEB352D)
        word = word ^ (word >> np.uint32(15))
        word = (word + key) * np.uint32(0x846CA68B)
        return word ^ (word >> np.uint32(16))


def stream_words(seed: int, parameter: str) -> Words:
    return np.frombuffer(hashlib.blake2b(f"{seed}/{parameter}".encode(), digest_size=8).digest(), "<u4")


def step_words(stream: Words, step: int) -> Words:
    first = mixed(stream[:1] ^ np.uint32(step), stream[1:])
    return np.concatenate([first, mixed(stream[1:] ^ np.uint32(step), first)])


def bits_at(key: Words, index: NDArray[np.int64]) -> NDArray[np.int64]:
    pair = index.astype(np.uint64) >> np.uint64(1)
    low, high = (pair & np.uint64(0xFFFFFFFF)).astype(np.uint32), (pair >> np.uint64(32)).astype(np.uint32)
    word = mixed(low ^ (key[0] + high * np.uint32(0x9E3779B9)), key[1])
    return np.where(index % 2 == 0, word & np.uint32(0xFFFF), word >> np.uint32(16)).astype(np.int64)


def spacing_at(x: Any, dtype: torch.dtype) -> NDArray[np.float64]:
    """The distance of the two neighbours that x lies between."""
    mantissa, smallest, _, _ = GEOMETRY[dtype]
    exponent = np.frexp(np.abs(np.asarray(x, np.float64)))[1] - 1  # 2^exponent <= |x|
    return np.ldexp(1.0, np.maximum(exponent, smallest) - mantissa)


def rounded(x: Any, dtype: torch.dtype, bits: NDArray[np.int64]) -> NDArray[np.float64]:
    """x in units of its spacing, plus a random part of one, cut off."""
    used = GEOMETRY[dtype][3]
    x = np.asarray(x, np.float32).astype(np.float64)
    spacing = spacing_at(x, dtype)
    steps = np.rint(np.abs(x) / spacing * 2**used) + (bits >> (16 - used))
    magnitude = np.minimum(np.floor(steps / 2**used) * spacing, GEOMETRY[dtype][2])
    return np.copysign(np.where(np.isfinite(x), magnitude, np.abs(x)), x)


def as_signed(words: Words) -> tuple[int, int]:
    first, second = (int(word) for word in words.astype(np.int32))
    return first, second


def some_bits(count: int, seed: int = 0, name: str = "param 0", step: int = 1, first: int = 0) -> Tensor:
    return random_bits(step_key(stream_key(seed, name), step), torch.arange(first, first + count))


# The definition


@pytest.mark.parametrize(("seed", "name", "stream", "step", "key", "bits"), VECTORS)
def test_vectors(seed: int, name: str, stream: str, step: int, key: str, bits: str):
    def shown(words: Any, digits: int) -> str:
        return " ".join(f"{int(word) % 2 ** (4 * digits):0{digits}x}" for word in words)

    ours = stream_key(seed, name)
    assert shown(ours, 8) == shown(stream_words(seed, name), 8) == stream
    words = step_key(ours, step)
    assert shown(words, 8) == shown(step_words(stream_words(seed, name), step), 8) == key
    drawn = random_bits(words, torch.tensor(INDICES))
    assert shown(drawn, 4) == shown(bits_at(step_words(stream_words(seed, name), step), np.array(INDICES)), 4) == bits


@pytest.mark.parametrize("first", [0, 1, 2**31 - 500, 2**32 - 501, 2**33 - 500, 2**45 + 7])
def test_bits_are_those_of_the_independent_form(first: int):
    index = np.arange(first, first + 1000)
    for seed, name, step in [(0, "param 0", 1), (3, "a.b", 17), (-1, "", 2**24)]:
        ours = random_bits(step_key(stream_key(seed, name), step), torch.tensor(index))
        assert np.array_equal(ours.numpy(), bits_at(step_words(stream_words(seed, name), step), index))


def test_indices_are_not_taken_modulo_2_to_the_32():
    ranges = [some_bits(1000, first=first) for first in (0, 2**31, 2**32, 2**33, 2**34, 2**48)]
    for i, one in enumerate(ranges):
        for other in ranges[:i]:
            assert (one == other).sum() <= 1  # of 1000 draws, a thousandth chance of one in 65536 each is 0.015


@pytest.mark.parametrize("step", [1, 2, 1000, 2**24])
@pytest.mark.parametrize(("seed", "name"), [(0, "param 0"), (0, "param 1"), (5, "decoder.weight")])
def test_words_as_python_integers_and_as_tensors_agree(seed: int, name: str, step: int):
    stream = stream_key(seed, name)
    t = torch.tensor(step, dtype=torch.int32)
    numbers, tensors = step_key(stream, step), step_key(stream, t)
    assert t == step
    assert [word.dtype for word in tensors] == [torch.int32, torch.int32]
    assert numbers == tuple(word.item() for word in tensors)
    index = torch.cat([torch.arange(1000), torch.arange(2**33, 2**33 + 1000)])
    before = index.clone()
    drawn = random_bits(tensors, index)
    assert torch.equal(random_bits(numbers, index), drawn)
    assert torch.equal(index, before)
    assert tensors[0] == numbers[0]
    assert tensors[1] == numbers[1]
    assert 0 <= int(drawn.min()) <= int(drawn.max()) <= 0xFFFF


def values(dtype: torch.dtype, count: int) -> Tensor:
    """float32 numbers over the whole range of the format, both signs, and every kind of special case."""
    rng = np.random.default_rng(1)
    low, high = {torch.bfloat16: (-149, 128), torch.float16: (-40, 18)}[dtype]
    some = np.ldexp(rng.uniform(1, 2, count), rng.integers(low, high, count)) * rng.choice([-1, 1], count)
    largest = GEOMETRY[dtype][2]
    edges = [0.0, -0.0, largest, -largest, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-126, 2.0**-133, 2.0**-149]
    edges += [65519.0, 65520.0, 1e30, 3.4e38, -3.4e38, float(torch.finfo(torch.float32).max)]
    edges += [float(np.nextafter(np.float32(x), np.float32(0))) for x in (2.0**-14, 1.0, 65504.0, 2.0**-126)]
    return torch.tensor(np.concatenate([some, edges]).astype(np.float32))


@each_format
def test_rounding_is_that_of_the_independent_form(dtype: torch.dtype):
    x = values(dtype, 200_000)
    for step in range(3):
        bits = some_bits(len(x), step=step + 1)
        ours = round_stochastic(x, dtype, bits)
        assert ours.dtype == dtype
        expected = rounded(x.numpy(), dtype, bits.numpy())
        assert np.array_equal(ours.double().numpy(), expected)
        assert np.array_equal(np.signbit(ours.double().numpy()), np.signbit(expected))


@each_format
def test_the_argument_is_not_overwritten(dtype: torch.dtype):
    x, bits = values(dtype, 100), some_bits(100)
    kept_x, kept_bits = x[:100].clone(), bits.clone()
    round_stochastic(x[:100], dtype, bits)
    assert torch.equal(bits_of(x[:100]), bits_of(kept_x))
    assert torch.equal(bits, kept_bits)


# What it promises


@each_format
def test_exact_values_stay(dtype: torch.dtype):
    """All finite numbers of the format, under the smallest, the largest and other random bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    assert len(every) in (65280, 63488)
    for bits in (torch.zeros(len(every)), torch.full((len(every),), 0xFFFF), some_bits(len(every))):
        assert torch.equal(bits_of(round_stochastic(every.float(), dtype, bits.int())), bits_of(every))


@each_format
def test_non_finite_values_pass_through(dtype: torch.dtype):
    words = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000 - 2**32, -1], dtype=torch.int32)
    for bits in (0, 0xFFFF):
        drawn = torch.full((5,), bits, dtype=torch.int32)
        assert round_stochastic(words.view(torch.float32), dtype, drawn).isnan().all()
        infinite = torch.tensor([math.inf, -math.inf])
        assert torch.equal(round_stochastic(infinite, dtype, drawn[:2]).float(), infinite)


@each_format
def test_no_finite_value_becomes_infinite(dtype: torch.dtype):
    largest = GEOMETRY[dtype][2]
    huge = torch.tensor([largest, 3.4e38, float(torch.finfo(torch.float32).max), 65519.0, 65520.0, 65535.0, 1e6])
    huge = huge[huge >= largest]
    for sign in (1, -1):
        ours = round_stochastic(sign * huge, dtype, torch.full((len(huge),), 0xFFFF, dtype=torch.int32))
        assert ours.tolist() == [sign * largest] * len(huge)


@each_format
def test_values_land_on_their_two_neighbours(dtype: torch.dtype):
    x = values(dtype, 50_000)
    x = x[x.abs() < GEOMETRY[dtype][2]]
    exact = x.double().numpy()
    seen: set[str] = set()
    for bits in (torch.zeros(len(x)).int(), torch.full((len(x),), 0xFFFF).int(), some_bits(len(x))):
        off = (round_stochastic(x, dtype, bits).double().numpy() - exact) / spacing_at(exact, dtype)
        assert np.all(np.abs(off) < 1)
        seen |= {"away" if o > 0 else "toward" for o in np.unique(np.sign(off * np.sign(exact))) if o}
    assert seen == {"away", "toward"}


MIDDLE = {  # between two normal numbers, and between two subnormal ones, where float32 itself is normal
    torch.bfloat16: [1.00171, -0.02003, 3.1e20, -7.7e-39],
    torch.float16: [1.00017, -0.020003, 60013.7, -3.1e-5, 4.4e-7, 1.9e-8],
}
MIDDLES = [(dtype, x) for dtype in FORMATS for x in MIDDLE[dtype]]
each_middle = pytest.mark.parametrize(("dtype", "x"), MIDDLES, ids=[f"{str(d)[6:]} {x}" for d, x in MIDDLES])


def resolution(x: float, dtype: torch.dtype) -> float:
    """How finely x is seen: float16's subnormals are lifted, which leaves them 13 bits."""
    return float(spacing_at(x, dtype)) * 2.0**-14 if dtype == torch.float16 and abs(x) < 2.0**-14 else 0.0


@each_middle
def test_unbiased_over_all_random_bits(dtype: torch.dtype, x: float):
    """Each of the 65,536 draws once: the mean is x itself, exactly."""
    every = torch.full((1 << 16,), x)
    ours = round_stochastic(every, dtype, torch.arange(1 << 16, dtype=torch.int32)).double().mean().item()
    exact = every[0].double().item()
    assert abs(ours - exact) <= resolution(x, dtype)


@each_middle
def test_unbiased_over_a_million_elements(dtype: torch.dtype, x: float):
    """Within 6 sigma, sigma = spacing sqrt(f (1 - f) / N) for x a fraction f between its neighbours."""
    N, spacing = 1_000_000, float(spacing_at(x, dtype))
    drawn = round_stochastic(torch.full((N,), x), dtype, some_bits(N, name=f"{x}"))
    exact = torch.tensor(x, dtype=torch.float32).double().item()
    f = abs(exact) / spacing % 1
    assert 0.01 < f < 0.99
    sigma = spacing * math.sqrt(f * (1 - f) / N)
    assert abs(drawn.double().mean().item() - exact) <= 6 * sigma + resolution(x, dtype)
    assert len(drawn.unique()) == 2


# Independence. With N draws a correlation of independent numbers has sigma 1 / sqrt(N); the bounds are 6 sigma.

N = 1_000_000
OTHERS: dict[str, dict[str, Any]] = {  # than the first N elements of parameter 0 at step 1 under seed 0
    "neighbours": {"first": 1},
    "second neighbours": {"first": 2},
    "rows of 768": {"first": 768},
    "rows of 4096": {"first": 4096},
    "2^33 elements on": {"first": 2**33},
    "step 2": {"step": 2},
    "step 3": {"step": 3},
    "step 1001": {"step": 1001},
    "parameter 1": {"name": "param 1"},
    "parameter 10": {"name": "param 10"},
    "seed 1": {"seed": 1},
}


@pytest.mark.parametrize("than", OTHERS)
def test_draws_are_independent_of_those_of(than: str):
    """Not correlated, as numbers and bit by bit, and their 16 x 16 pairs of leading digits are equally frequent."""
    one, other = some_bits(N).numpy(), some_bits(N, **OTHERS[than]).numpy()
    count = len(one)
    assert abs(np.corrcoef(one, other)[0, 1]) <= 6 / math.sqrt(count)
    signs = [2.0 * ((draws[:, None] >> np.arange(16)) & 1) - 1 for draws in (one, other)]
    assert np.max(np.abs(signs[0].T @ signs[1])) <= 6 * math.sqrt(count)
    cells = np.bincount((one >> 12) * 16 + (other >> 12), minlength=256)
    chi2 = float(np.sum((cells - count / 256) ** 2) / (count / 256))
    assert abs(chi2 - 255) <= 6 * math.sqrt(2 * 255)


def test_the_halves_of_a_hash_are_independent():
    one, other = some_bits(N).numpy().reshape(-1, 2).T
    assert abs(np.corrcoef(one, other)[0, 1]) <= 6 / math.sqrt(len(one))


@pytest.mark.parametrize("step", [1, 2, 999])
def test_draws_are_uniform(step: int):
    """Chi squared over 1,024 cells of leading and of trailing digits, within 6 sigma."""
    drawn = some_bits(N, step=step).numpy()
    for cells in (np.bincount(drawn >> 6, minlength=1024), np.bincount(drawn & 1023, minlength=1024)):
        chi2 = float(np.sum((cells - N / 1024) ** 2) / (N / 1024))
        assert abs(chi2 - 1023) <= 6 * math.sqrt(2 * 1023)


def test_streams_of_one_element_are_independent_over_steps_and_parameters():
    """The first element of 256 parameters over 256 steps: one draw each, as norms and biases make them."""
    t = torch.arange(1, 257, dtype=torch.int32)
    first = torch.zeros(256, dtype=torch.int64)
    drawn = np.array([random_bits(step_key(stream_key(0, f"param {i}"), t), first).numpy() for i in range(256)])
    assert drawn[7, 41] == some_bits(1, name="param 7", step=42).item()
    assert abs(drawn.mean() / 65535 - 0.5) <= 6 / math.sqrt(12 * drawn.size)
    for one, other in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) <= 6 / math.sqrt(one.size)


# The optimizer


@pytest.mark.parametrize("elements", [None, 50], ids=["large blocks", "small blocks"])
@pytest.mark.parametrize("mode", ["paper", "decay with momentum", "function"])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
@each_format
def test_the_optimizer_rounds_by_the_definition(
    dtype: torch.dtype, shape: Shape, mode: str, elements: int | None, monkeypatch: pytest.MonkeyPatch
):
    """The bits of the float32 result, rounded with the draws of its seed, name, step and row-major index."""
    if elements:
        monkeypatch.setattr(reference, "BLOCK", elements)
    p0, grads = problem(shape, steps=4, dtype=dtype)
    narrow, wide = parameter(p0), parameter(p0.float())
    kwargs = {"seed": 3, "backend": "reference", **MODES[mode]}
    stochastic = Adafactor([("a.weight", narrow)], **kwargs)
    exact = Adafactor([("a.weight", wide)], **kwargs)
    index = np.arange(p0.numel()).reshape(shape)
    for t, g in enumerate(grads, 1):
        narrow.grad, wide.grad = g, g.float()
        stochastic.step()
        exact.step()
        bits = bits_at(step_words(stream_words(3, "a.weight"), t), index)
        expected = torch.tensor(rounded(wide.detach().numpy(), dtype, bits)).to(dtype)
        assert_same_bits({"p": narrow.detach()}, {"p": expected}, f"step {t}:")
        with torch.no_grad():
            wide.copy_(narrow)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("mode", ["momentum", "nesterov, unscaled", "function"])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_bfloat16_momentum_is_rounded_by_the_definition(shape: Shape, mode: str, rounding: str):
    """With a stream of its own, "name/exp_avg"; the weights receive it unrounded."""
    p0, grads = problem(shape, steps=4, dtype=torch.float32)
    narrow, wide = parameter(p0), parameter(p0)
    kwargs = {**MODES[mode], "seed": 3, "rounding": rounding, "backend": "reference"}
    stored = Adafactor([("a.weight", narrow)], momentum_dtype=torch.bfloat16, **kwargs)
    exact = Adafactor([("a.weight", wide)], **kwargs)
    index = np.arange(p0.numel()).reshape(shape)
    for t, g in enumerate(grads, 1):
        narrow.grad = wide.grad = g
        stored.step()
        exact.step()
        M = exact.state[wide]["exp_avg"]
        bits = bits_at(step_words(stream_words(3, "a.weight/exp_avg"), t), index)
        expected = torch.tensor(rounded(M.numpy(), torch.bfloat16, bits)) if rounding == "stochastic" else M
        ours = {"p": narrow.detach(), "M": stored.state[narrow]["exp_avg"]}
        assert_same_bits(ours, {"p": wide.detach(), "M": expected.bfloat16()}, f"step {t}:")
        M.copy_(ours["M"])


@pytest.mark.parametrize("name", [None, "block.0.weight"])
def test_the_stream_is_set_by_name_or_ordinal(name: str | None):
    p0, grads = problem((40, 70), steps=1, dtype=torch.bfloat16)
    params = [parameter(p0) for _ in range(3)]
    optimizer = Adafactor([(name + str(i), p) for i, p in enumerate(params)] if name else params, lr=1e-3)
    wide = parameter(p0.float())
    exact = Adafactor([wide], lr=1e-3)
    for p in params:
        p.grad = grads[0]
    wide.grad = grads[0].float()
    optimizer.step()
    exact.step()
    for i, p in enumerate(params):
        stream = stream_words(0, name + str(i) if name else f"param {i}")
        bits = bits_at(step_words(stream, 1), np.arange(40 * 70).reshape(40, 70))
        expected = torch.tensor(rounded(wide.detach().numpy(), torch.bfloat16, bits)).bfloat16()
        assert_same_bits({"p": p.detach()}, {"p": expected}, f"parameter {i}:")


def test_the_seed_changes_the_weights_and_nothing_else():
    p0, grads = problem((40, 70), steps=1, dtype=torch.bfloat16)
    one, same, other = (walk(p0, grads, lr=1e-3, seed=seed)[0] for seed in (0, 0, 1))
    assert_same_bits(one, same)
    assert not torch.equal(one["p"], other["p"])
    assert_same_bits({**one, "p": p0}, {**other, "p": p0})


def test_global_random_numbers_are_neither_read_nor_moved():
    p0, grads = problem((40, 70), dtype=torch.bfloat16)

    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    torch.manual_seed(1)
    before = states()
    one = walk(p0, grads, lr=1e-3)[-1]
    assert states() == before
    torch.manual_seed(2)
    random.seed(2)
    assert_same_bits(walk(p0, grads, lr=1e-3)[-1], one)


def test_a_skipped_step_draws_its_bits_again():
    p0, grads = problem((40, 70), steps=2, dtype=torch.bfloat16)
    skipped = [grads[0], torch.full_like(p0, math.nan), grads[1]]
    assert_same_bits(walk(p0, skipped, beta1=0.9)[-1], walk(p0, grads, beta1=0.9)[-1])


@each_format
@pytest.mark.filterwarnings("ignore:rounding='nearest' loses updates")
def test_small_updates_move_16_bit_weights_as_far_as_float32_on_average(dtype: torch.dtype):
    """Weights of 0.02 under steps of a millionth of that, which nearest rounding swallows.

    A weight jumps by one spacing with probability q = step / spacing, so the mean of N weights over T steps has
    sigma = spacing sqrt(T q / N); q is the same at every step, but for a weight that has jumped across a power of two.
    """
    shape, T = (800, 1000), 40
    start = torch.full(shape, 0.02).to(dtype)
    g = torch.ones(shape, dtype=dtype)
    lr = 0.02e-6
    moved = {}
    for name, values_, rounding in [
        ("float32", start.float(), "nearest"),
        ("stochastic", start, "stochastic"),
        ("nearest", start, "nearest"),
    ]:
        p = parameter(values_)
        optimizer = Adafactor([p], lr=lr, rounding=rounding)
        for _ in range(T):
            p.grad = g.to(p.dtype)
            optimizer.step()
        moved[name] = (start.double() - p.detach().double()).mean().item()
        if name == "nearest":
            assert_same_bits({"p": p.detach()}, {"p": start})
    spacing = float(spacing_at(0.02, dtype))
    sigma = spacing * math.sqrt(T * (lr / spacing) / start.numel())
    own = 2.0**-30 * T  # p - step is rounded to a spacing of 2^-29 before, in the same direction for all
    assert_close(moved["float32"], T * lr, own, "float32")
    assert_close(moved["stochastic"], T * lr, 6 * sigma + own, "stochastic")
    assert 6 * sigma + own < 0.2 * T * lr
