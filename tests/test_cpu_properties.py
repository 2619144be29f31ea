"""What must hold of the CPU kernels whatever they are given: shape, dtypes, mode, layout, threads, instruction set.

Gradients, weights, state and scratch lie in guarded memory at odd addresses, and scratch begins as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from _cases import LAYOUTS, MODES, Shape, Snapshot, assert_close, assert_same_bits, snapshot
from adafactor import Adafactor
from adafactor._rounding import random_bits, round_stochastic, step_key, stream_key
from adafactor.backends import Task, _records, allocate_sums, cpu

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

quickly = settings(max_examples=60, deadline=None, derandomize=True)
UNIT = 2.0**-24  # what one float32 operation may lose
ANY_GRADIENT = hasattr(Tensor, "grad_dtype")  # or gradients in their weight's dtype only
GUARD = 512  # bytes


# Memory


class Guards:
    """Places tensors between guards, at addresses that are multiples of their element size only."""

    def __init__(self) -> None:
        self.rooms: list[tuple[Tensor, int, int]] = []

    def hold(self, x: Tensor) -> Tensor:
        nbytes, start = x.numel() * x.itemsize, GUARD + x.itemsize
        room = torch.full((nbytes + 2 * GUARD + x.itemsize,), 0xA5, dtype=torch.uint8)
        self.rooms.append((room, start, start + nbytes))
        return room[start : start + nbytes].view(x.dtype).view(x.shape).copy_(x)

    def check(self) -> None:
        for room, start, stop in self.rooms:
            assert (room[:start] == 0xA5).all(), "written in front of a tensor"
            assert (room[stop:] == 0xA5).all(), "written behind a tensor"

    def empty(self, *size: int, dtype: torch.dtype, device: Any = None) -> Tensor:
        return self.hold(torch.full(size, 0xFF, dtype=dtype) if dtype == torch.uint8 else torch.full(size, math.nan))


@contextmanager
def kernels(step: Callable[[Sequence[Task]], None], threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.object(cpu, "step", step):
            yield
    finally:
        torch.set_num_threads(before)


def whole(instructions: int, tasks: Sequence[Task]) -> None:
    cpu._run(tasks, cpu._SWEEP | cpu._APPLY, instructions)


def apart(instructions: int, tasks: Sequence[Task]) -> None:
    allocate_sums(tasks)
    with mock.patch.object(cpu, "_run", partial(cpu._run, instructions=instructions)):
        cpu.sweep(tasks)
        cpu.apply(tasks)


# Problems


@dataclass(frozen=True)
class Given:
    """A parameter before a step: float32 numbers, rounded to the dtypes when it is taken."""

    p: Tensor
    g: Tensor
    t: int  # steps so far
    seed: int
    gradients: float  # their size
    p_dtype: torch.dtype = torch.float32
    g_dtype: torch.dtype = torch.float32


SIDES = st.sampled_from([1, 2, 15, 17, 31, 32, 33, 64, 65, 127, 129, 255, 300]) | st.integers(1, 300)
SHAPES = st.one_of(
    st.just(()),
    st.tuples(SIDES),
    st.tuples(SIDES, SIDES),
    st.tuples(SIDES, SIDES),
    st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)),
)
SIZES = st.sampled_from([1.0, 1.0, 1e-20, 1e-10, 1e4, 1e19])
PATTERNS = {
    "none": lambda g: None,
    "zero row": lambda g: g[:1].zero_(),
    "zero column": lambda g: g[..., -1:].zero_(),
    "all zero": lambda g: g.zero_(),
    "minus zero": lambda g: g.zero_().neg_(),
    "one element": lambda g: g.view(-1)[:-1].zero_(),
    "nan": lambda g: g.view(-1)[-1:].fill_(math.nan),
    "infinity": lambda g: g.view(-1)[g.numel() // 2 :][:1].fill_(math.inf),
    "overflow": lambda g: g.view(-1)[:1].fill_(3e38),
}
MIXTURES = sorted((pair for pair in _records._MIXTURES if ANY_GRADIENT or pair[0] == pair[1]), key=str)


def draw(shape: Shape, seed: int, size: float = 1.0, pattern: str = "none", t: int = 3) -> Given:
    generator = torch.Generator().manual_seed(seed)
    p, g = torch.randn(2, *shape, generator=generator).unbind()
    if g.ndim > 1:
        g = g * torch.randn(g.shape[0], generator=generator).exp().view(-1, *[1] * (g.ndim - 1))
    g = (g * size).contiguous()
    if g.ndim or "zero" not in pattern:
        PATTERNS[pattern](g)
    p.view(-1)[p.numel() // 3 :][:2] = -0.0
    return Given(p.contiguous(), g, t, seed, size)


@st.composite
def mixed(draw_from: Any, **kwargs: Any) -> Given:
    p_dtype, g_dtype = draw_from(st.sampled_from(MIXTURES))
    drawn = draw(draw_from(SHAPES), draw_from(st.integers(0, 2**32)), draw_from(SIZES), **kwargs)
    return replace(drawn, p_dtype=p_dtype, g_dtype=g_dtype, t=draw_from(st.sampled_from([0, 1, 5, 1000])))


@st.composite
def modes(draw_from: Any, few_bits: bool = True) -> dict[str, Any]:
    kwargs = dict(MODES[draw_from(st.sampled_from([mode for mode in MODES if "function" not in mode]))])
    kinds = [None, torch.float32, torch.bfloat16] + [torch.int8] * few_bits
    momentum = draw_from(st.sampled_from(kinds))
    if momentum is not None:
        kwargs = {"beta1": 0.9, **kwargs, "momentum_dtype": momentum}
    if few_bits:
        kwargs["weight_bits"] = draw_from(st.sampled_from([None, None, 24, 32]))
    kwargs.setdefault("min_dim_size_to_factor", draw_from(st.sampled_from([1, 32])))
    return {**kwargs, "rounding": draw_from(st.sampled_from(["stochastic", "nearest"]))}


# Steps


def step(
    given: Sequence[Given],
    kwargs: Mapping[str, Any],
    how: Callable[[Sequence[Task]], None] | None = None,
    threads: int = 1,
    layout: tuple[str | None, str | None] = (None, None),
    backend: str = "auto",
    steps: int = 1,
) -> tuple[list[Snapshot], Adafactor]:
    """All parameters by one optimizer; a snapshot of each, with its report."""
    guards, ps = Guards(), []
    if any(x.p_dtype == torch.float16 for x in given):
        kwargs = {**kwargs, "weight_bits": None}
    for x in given:
        p, g = (guards.hold(fitting(value, dtype)) for value, dtype in ((x.p, x.p_dtype), (x.g, x.g_dtype)))
        p, g = (LAYOUTS[kind](value) if kind else value for kind, value in zip(layout, (p, g), strict=True))
        p = torch.nn.Parameter(p)
        if ANY_GRADIENT:
            p.grad_dtype = None
        p.grad = g
        ps.append(p)
    optimizer = Adafactor(ps, backend=backend, **kwargs)
    for x, p in zip(given, ps, strict=True):
        state = optimizer.state[p]
        for name, values in earlier(x, state).items():
            state[name] = guards.hold(values.to(state[name].dtype))
    with kernels(how or partial(whole, 0), threads), mock.patch.object(cpu.torch, "empty", guards.empty):
        for _ in range(steps):
            optimizer.step()
    guards.check()
    reports = [optimizer._slots[p].task.report.values.clone() for p in ps]
    return [{**snapshot(optimizer, p), "report": report} for p, report in zip(ps, reports, strict=True)], optimizer


def fitting(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What is finite stays so."""
    largest = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.double().clamp(-largest, largest), x.double()).to(dtype)


def earlier(x: Given, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State as earlier steps might have left it. The same numbers for every dtype, which bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(x.seed + 1)
    made = {"step": torch.tensor(float(x.t))}
    for name in sorted(state.keys() - {"step"}):
        if not state[name].is_floating_point():
            ends = torch.iinfo(state[name].dtype)
            made[name] = torch.randint(ends.min, ends.max + 1, state[name].shape, generator=generator).float() * (
                x.t > 0
            )
            continue
        values = torch.randn(state[name].shape, generator=generator)
        if name != "exp_avg":
            values = (values.square() + 0.1) * min(max(x.gradients**2, 1e-30), 1e30)
        made[name] = (values * (x.t > 0)).bfloat16().float()
    return made


def unchanged(given: Given, taken: Snapshot) -> None:
    before = {"p": fitting(given.p, given.p_dtype)}
    for name, values in earlier(given, {name: taken[name] for name in taken.keys() - {"p", "report"}}).items():
        before[name] = values.to(taken[name].dtype)
    assert_same_bits({name: taken[name] for name in before}, before, "after a step that was skipped")
    assert taken["report"][:3].tolist() == [0, 0, 1]


# The result


def within_rounding(given: Given, kwargs: Mapping[str, Any]) -> None:
    """As close to float64 as the reference in float32 is, before rounding; and rounded by the definition.

    Beyond that, a result may have lost the operations of its own formula (16 are enough), and half of what the sums
    behind it have lost, which for n terms of one sign is a random walk: sqrt(n), taken three times.
    """
    (ours,), _ = step([given], kwargs)
    plain = {**kwargs, "momentum_dtype": torch.float32}
    # What p and g are as numbers of their dtypes, the state being the same for all.
    p0, g0 = fitting(given.p, given.p_dtype), fitting(given.g, given.g_dtype)
    wide = replace(given, p=p0.float(), g=g0.float(), p_dtype=torch.float32, g_dtype=torch.float32)
    (reference,), _ = step([wide], plain, backend="reference")
    exact = replace(wide, p_dtype=torch.float64, g_dtype=torch.float64)
    (right,), _ = step([exact], plain, backend="reference")
    if reference["report"][2]:
        unchanged(given, ours)
        return
    assert ours["report"][2] == 0
    depth = max(max(given.p.shape, default=1), given.p.numel() // 16 if "exp_avg_sq" in ours else 1)
    units = (16 + 1.5 * math.sqrt(depth)) * UNIT
    alpha = right["report"][3:].chunk(2)[1].max()
    m0 = earlier(given, {name: ours[name] for name in ours.keys() - {"p", "report"}}).get("exp_avg", torch.zeros(()))
    before = {"p": p0.double(), "exp_avg": m0.double()}
    for name in ours.keys() - {"report", "step"}:
        size = right[name].abs()
        if name in before:  # differences: what went in counts
            size = size + before[name].abs()
        if name == "p":
            size = size + m0.abs() * (alpha if kwargs.get("momentum_mode") == "unscaled" else 1)
        finite = size.isfinite()
        errors = ((reference[name].double() - right[name]).abs() / size)[finite & (size > 0)].tolist()
        allowed = (max(errors, default=0.0) + units) * size + 2.0**-140
        stream = {"p": "param 0", "exp_avg": "param 0/exp_avg"}.get(name)
        bounds = [
            rounded(right[name] + sign * allowed, ours[name].dtype, kwargs, stream, given.t + 1) for sign in (-1, 1)
        ]
        middle, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
        # float64's own rounding of the bounds
        assert_close(ours[name].double()[finite], middle[finite], (half + 1e-15 * size)[finite], name)
        passed = right[name][~finite]
        assert torch.equal(ours[name].double()[~finite].nan_to_num(nan=1.5), passed.nan_to_num(nan=1.5)), name
    counts = ours["report"][:3].double()
    rms, clip = right["report"][3:].chunk(2)[0], kwargs.get("clip_threshold", 1.0)
    if clip is None or ((rms / clip - 1).abs() > 1e-4).all():
        assert_close(counts, right["report"][:3], UNIT, "counts")
    shown = right["report"][3:]
    allowed = (reference["report"][3:].double() - shown).abs() + 2 * units * shown
    assert_close(ours["report"][3:].double(), shown, allowed, "RMS(U) and alpha")


def rounded(x: Tensor, dtype: torch.dtype, kwargs: Mapping[str, Any], stream: str | None, t: int) -> Tensor:
    """x in float64, written as `dtype`; which of two neighbours it becomes increases with x."""
    x = x.float()
    if dtype == torch.float32:
        return x.double()
    if kwargs["rounding"] == "nearest":
        return x.to(dtype).double()
    bits = random_bits(step_key(stream_key(0, str(stream)), t), torch.arange(x.numel()))
    return round_stochastic(x.reshape(-1), dtype, bits).view(x.shape).double()


@quickly
@given(mixed(), modes(few_bits=False), st.sampled_from(sorted(PATTERNS)))
def test_a_step_is_as_right_as_the_references(given: Given, kwargs: dict[str, Any], pattern: str):
    within_rounding(replace(given, g=draw(tuple(given.p.shape), given.seed, given.gradients, pattern).g), kwargs)


@pytest.mark.parametrize("p_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [None, torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_not_finite_pass_through(p_dtype: torch.dtype, momentum: torch.dtype | None):
    for rounding in ("stochastic", "nearest"):
        for seed, shape in enumerate([(3,), (77,), (40, 33), (3, 32, 35)]):
            x = replace(draw(shape, seed), p_dtype=p_dtype, g_dtype=p_dtype)
            for i, value in enumerate([math.inf, -math.inf, math.nan]):
                x.p.view(-1)[i::31] = value
            kwargs = {"lr": 0.01, "rounding": rounding}
            within_rounding(x, kwargs if momentum is None else {**kwargs, "beta1": 0.9, "momentum_dtype": momentum})


# The same bits


def same(ours: Sequence[Snapshot], theirs: Sequence[Snapshot], what: str) -> None:
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(one, other, f"{what}, parameter {index}:")


@quickly
@given(st.lists(mixed(), min_size=1, max_size=4), modes(), st.integers(2, 5))
def test_threads_instruction_sets_and_two_halves_give_the_same_bits(
    given: list[Given], kwargs: dict[str, Any], threads: int
):
    base, _ = step(given, kwargs, steps=2)
    for instructions, name in enumerate(cpu._library().instruction_sets):
        same(step(given, kwargs, partial(whole, instructions), threads, steps=2)[0], base, f"{name}, {threads} threads")
        same(step(given, kwargs, partial(apart, instructions), threads, steps=2)[0], base, f"{name}, in two halves")


# Shared by the threads, in strips and chunks; the stages of one overlap with those of the next but one.
LARGE: list[Shape] = [(363, 367), (2, 300, 251), (131_500,), (3000, 45), (45, 3001), (3, 5), (64, 64)]


@pytest.mark.parametrize("p_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["paper", "nesterov, unscaled", "decay with momentum"])
def test_large_tensors_that_threads_share_give_the_same_bits(mode: str, p_dtype: torch.dtype):
    given = [replace(draw(shape, seed), p_dtype=p_dtype, g_dtype=p_dtype) for seed, shape in enumerate(LARGE)]
    base, _ = step(given, MODES[mode], steps=2)
    for instructions, name in enumerate(cpu._library().instruction_sets):
        for threads in range(2, 6):
            for how in (whole, apart):
                taken, _ = step(given, MODES[mode], partial(how, instructions), threads, steps=2)
                same(taken, base, f"{name}, {threads} threads, {how.__name__}")


def test_optimizers_in_several_python_threads_give_the_same_bits():
    def run(seed: int) -> list[Snapshot]:
        p = torch.nn.Parameter(draw((300, 500), seed).p.bfloat16())
        optimizer, taken = Adafactor([p], beta1=0.9), []
        for t in range(5):
            p.grad = draw((300, 500), 10 * seed + t).g.bfloat16()
            optimizer.step()
            taken.append(snapshot(optimizer, p))
        return taken

    alone = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(alone, pool.map(run, range(4)), strict=True):
            same(other, one, "beside others")


def test_denormal_numbers_count_whatever_the_caller_set():
    given = draw((40, 50), 0, size=1e-20)
    kwargs = {"lr": 1e-38, "beta1": 0.9}
    base, _ = step([given], kwargs)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormal numbers")
    try:
        flushed, _ = step([given], kwargs)
    finally:
        torch.set_flush_denormal(False)
    same(flushed, base, "with denormals flushed elsewhere")


# A gradient that cannot be used


@quickly
@given(
    st.lists(mixed(), min_size=2, max_size=4),
    modes(),
    st.sampled_from(["nan", "infinity"]),
    st.integers(1, 4),
    st.data(),
)
def test_a_bad_gradient_skips_its_parameter_and_nothing_else(
    given: list[Given], kwargs: dict[str, Any], pattern: str, threads: int, data: st.DataObject
):
    base, _ = step(given, kwargs)
    bad = data.draw(st.integers(0, len(given) - 1))
    given[bad] = replace(given[bad], g=given[bad].g.clone())
    PATTERNS[pattern](given[bad].g)
    taken, _ = step(given, kwargs, threads=threads)
    unchanged(given[bad], taken.pop(bad))
    base.pop(bad)
    same(taken, base, "beside a bad gradient")


# Layouts


def expanded(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x)


@quickly
@given(mixed(), modes(), st.sampled_from(["transposed", "strided", "expanded"]), st.sampled_from(["p", "g", "both"]))
def test_other_layouts_are_served_by_the_reference(given: Given, kwargs: dict[str, Any], kind: str, which: str):
    if kind == "expanded":
        which, given = "g", replace(given, g=expanded(given.g).contiguous()) if given.g.ndim else given
    layouts = {**LAYOUTS, "expanded": lambda g: expanded(g) if g.ndim else g}
    layout = (kind if which != "g" else None, kind if which != "p" else None)
    with mock.patch.dict(LAYOUTS, layouts):
        (ours,), optimizer = step([given], kwargs, layout=layout)
        (theirs,), _ = step([given], kwargs, layout=layout, backend="reference")
        (straight,), _ = step([given], kwargs, backend="reference")
    p = optimizer.param_groups[0]["params"][0]
    if not (p.is_contiguous() and p.grad.is_contiguous()):
        assert {row.backend for row in optimizer.explain()} == {"reference"}
        assert_same_bits(ours, theirs, "by the reference")
    assert_same_bits(theirs, straight, "in another layout")
