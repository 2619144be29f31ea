"""Tier 3: the CPU kernels, against the float64 oracle, the reference backend and the definition of rounding."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from _cases import (
    FEW_SHAPES,
    MODES,
    SHAPES,
    Shape,
    assert_close,
    assert_same_bits,
    float32_bounds,
    oracle_view,
    oracle_walk,
    parameter,
    poisoned_memory,
    problem,
    shape_id,
    snapshot,
    statistics,
    walk,
)
from adafactor import Adafactor
from adafactor._rounding import random_bits, round_stochastic, step_key, stream_key
from adafactor.backends import _records, cpu, select
from adafactor.memory import WORKSPACE, peak_allocated

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

# Shared by all threads, cut into strips and chunks, whole blocks and none; wide, tall, stacked.
LARGE: list[Shape] = [(700, 700), (1000, 1537), (33, 20_000), (20_000, 33), (200_003,), (5, 200, 301)]


def served(optimizer: Adafactor) -> set[str]:
    return {row.backend for row in optimizer.explain()}


# Against the oracle


CASES = [(shape, mode) for shape in SHAPES for mode in ("paper", "momentum", "last2") if 0 not in shape]
CASES += [case for case in product(FEW_SHAPES, MODES) if case not in CASES]


@pytest.mark.parametrize(("shape", "mode"), CASES, ids=[f"{shape_id(shape)} {mode}" for shape, mode in CASES])
def test_float32_is_within_the_reference_backends_rounding_errors(shape: Shape, mode: str):
    kwargs = MODES[mode]
    if mode == "last2" and len(shape) < 2:
        kwargs = {**kwargs, "beta1": 0.9}
    p0, grads = problem(shape, dtype=torch.float32)
    with poisoned_memory():
        taken = walk(p0, grads, **kwargs)
    expected = oracle_walk(p0, grads, **kwargs)
    for t, (ours, theirs, bound) in enumerate(
        zip(taken, expected, float32_bounds(p0, kwargs, expected), strict=True), 1
    ):
        assert_close(ours["p"].double(), theirs.p, bound["p"], f"p after step {t}")
        for letter, found in statistics(ours, oracle_view(shape, kwargs)).items():
            assert_close(found, getattr(theirs, letter), bound[letter], f"{letter} after step {t}")


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("mode", ["paper", "nesterov, unscaled", "decay with momentum"])
@pytest.mark.parametrize("shape", LARGE, ids=shape_id)
def test_large_tensors_err_no_more_than_the_reference(shape: Shape, mode: str, threads: int):
    """The worst element against float64, plus two roundings of the largest number."""
    p0, grads = problem(shape, steps=3, dtype=torch.float32)
    exact = walk(p0.double(), [g.double() for g in grads], **MODES[mode])
    reference = walk(p0, grads, backend="reference", **MODES[mode])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernels = walk(p0, grads, backend="cpu", **MODES[mode])
    finally:
        torch.set_num_threads(before)
    for name, truth in exact[-1].items():
        errors = [(taken[-1][name].double() - truth).abs().max() for taken in (kernels, reference)]
        assert errors[0] <= errors[1] + 2**-23 * truth.abs().max(), name


# Rounding


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("momentum", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(31,), (40, 70), (33, 35), (3, 40, 33), (700, 301), (70_001,)], ids=shape_id)
def test_weights_are_rounded_by_the_definition(
    shape: Shape, dtype: torch.dtype, momentum: torch.dtype | None, rounding: str
):
    """Float32 weights beside 16-bit ones do the same arithmetic in the same order, and show what is rounded."""
    p0, grads = problem(shape, steps=3, dtype=dtype)
    kwargs: dict[str, Any] = {"lr": 0.01, "seed": 3, "rounding": rounding, "weight_decay": 0.1}
    if momentum is not None:
        kwargs |= {"beta1": 0.9, "momentum_dtype": momentum}
    narrow, wide = parameter(p0), parameter(p0.float())
    optimizer = Adafactor([("a.weight", narrow)], backend="cpu", **kwargs)
    exact = Adafactor([("a.weight", wide)], backend="cpu", **kwargs)
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype")
    wide.grad_dtype = torch.bfloat16  # which puts float32 weights in pair order as well
    index = torch.arange(p0.numel()).view(shape)
    for t, g in enumerate(grads, 1):
        g = g.to(torch.bfloat16)
        narrow.grad, wide.grad = g.to(dtype), g
        optimizer.step()
        exact.step()
        x = wide.detach()
        if rounding == "stochastic":
            expected = round_stochastic(x, dtype, random_bits(step_key(stream_key(3, "a.weight"), t), index))
        else:
            expected = x.to(dtype)
        assert_same_bits({"p": narrow.detach()}, {"p": expected}, f"step {t}")
        with torch.no_grad():
            wide.copy_(narrow)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("shape", [(31,), (40, 70), (33, 35), (3, 40, 33)], ids=shape_id)
def test_bfloat16_momentum_is_rounded_by_the_definition(shape: Shape, rounding: str):
    """With a stream of its own, "name/exp_avg"."""
    p0, grads = problem(shape, steps=3, dtype=torch.bfloat16)
    kwargs = {"lr": 0.01, "beta1": 0.9, "seed": 3, "rounding": rounding, "backend": "cpu"}
    narrow, wide = parameter(p0), parameter(p0)
    stored = Adafactor([("a.weight", narrow)], momentum_dtype=torch.bfloat16, **kwargs)
    exact = Adafactor([("a.weight", wide)], **kwargs)
    index = torch.arange(p0.numel()).view(shape)
    for t, g in enumerate(grads, 1):
        narrow.grad = wide.grad = g
        stored.step()
        exact.step()
        M = exact.state[wide]["exp_avg"]
        bits = random_bits(step_key(stream_key(3, "a.weight/exp_avg"), t), index)
        expected = round_stochastic(M, torch.bfloat16, bits) if rounding == "stochastic" else M.bfloat16()
        ours = {"p": narrow.detach(), "M": stored.state[narrow]["exp_avg"]}
        assert_same_bits(ours, {"p": wide.detach(), "M": expected}, f"step {t}")
        M.copy_(ours["M"])


@pytest.mark.parametrize("first", [2**33 - 64, 2**33 - 37, 2**33 + 2, 2**34 + 1, 2**40])
def test_the_index_that_rounding_counts_has_64_bits(first: int, monkeypatch: pytest.MonkeyPatch):
    """One huge tensor is not at hand: the index of its first element is moved instead."""
    monkeypatch.setattr(_records, "geometry", lambda plan: (*plan.dims, 33, 35, first, 33 * 35, 35))
    p0, grads = problem((33, 35), steps=1, dtype=torch.bfloat16)
    narrow = parameter(p0)
    narrow.grad = grads[0]
    Adafactor([("w", narrow)], lr=0.01, backend="cpu").step()
    monkeypatch.undo()
    wide = parameter(p0.float())
    wide.grad_dtype = torch.bfloat16
    wide.grad = grads[0]
    Adafactor([("w", wide)], lr=0.01, backend="cpu").step()
    index = torch.arange(first, first + p0.numel()).view(p0.shape)
    expected = round_stochastic(wide.detach(), torch.bfloat16, random_bits(step_key(stream_key(0, "w"), 1), index))
    assert_same_bits({"p": narrow.detach()}, {"p": expected})


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_at_the_edge_of_their_format(dtype: torch.dtype, rounding: str):
    """Non-finite values pass through, finite ones stay so when rounded stochastically, tiny ones keep their grid."""
    info = torch.finfo(dtype)
    values = [math.inf, -math.inf, math.nan, info.max, -info.max, info.tiny, info.tiny / 2, 0.0, -0.0, 1.0]
    values += [info.smallest_normal * k / 8 for k in range(9)]
    p0 = torch.tensor(values * 40, dtype=dtype)
    p = parameter(p0)
    p.grad = torch.zeros_like(p)
    Adafactor([p], lr=1e-3, rounding=rounding, backend="cpu").step()
    assert_same_bits({"p": p.detach()}, {"p": p0})
    p.grad = torch.full_like(p, -1.0)
    Adafactor([p], lr=info.max / 4096, rounding=rounding, backend="cpu").step()
    finite = p0.isfinite()
    if rounding == "stochastic":
        assert p.detach()[finite].isfinite().all()
    assert torch.equal(p.detach()[~finite].nan_to_num(7.0), p0[~finite].nan_to_num(7.0))


# What goes to the reference


def test_what_the_kernels_cannot_take_goes_to_the_reference_alone():
    torch.manual_seed(0)
    named = {
        "plain": torch.randn(40, 50),
        "double": torch.randn(40, 50, dtype=torch.float64),
        "strided": torch.randn(50, 40).t(),
        "empty": torch.randn(0, 5),
        "first2": torch.randn(40, 50, 3),
    }
    params = {name: torch.nn.Parameter(x) for name, x in named.items()}
    optimizer = Adafactor(params.items(), lr=0.1, factor="first2")
    rows = {row.name: row for row in optimizer.explain()}
    assert {name: row.backend for name, row in rows.items()} == {
        "plain": "cpu",
        "double": "reference",
        "strided": "reference",
        "empty": "reference",
        "first2": "reference",
    }
    assert "float64" in rows["double"].reason
    assert "not contiguous" in rows["strided"].reason
    assert "no elements" in rows["empty"].reason
    assert "memory order" in rows["first2"].reason
    assert "CPU kernels" in rows["plain"].reason
    for p in params.values():
        p.grad = torch.ones_like(p)
    params["plain"].grad = torch.ones(()).expand(40, 50)
    optimizer.step()
    rows = {row.name: row for row in optimizer.explain()}
    assert rows["plain"].backend == "reference"
    assert "gradient is not contiguous" in str(optimizer.explain())
    params["plain"].grad = torch.ones(40, 50)
    optimizer.step()
    assert {row.name for row in optimizer.explain() if row.backend == "cpu"} == {"plain"}


def test_asked_for_by_name_it_does_not_stumble_over_a_parameter_without_elements():
    """As pieces of small parameters are, on some ranks."""
    optimizer = Adafactor([torch.nn.Parameter(torch.zeros(shape)) for shape in [(0, 5), (4, 5)]], backend="cpu")
    assert [row.backend for row in optimizer.explain()] == ["reference", "cpu"]


def test_a_state_tensor_exchanged_by_hand_is_noticed():
    p = torch.nn.Parameter(torch.randn(40, 50))
    optimizer = Adafactor([p], lr=0.1, beta1=0.9)
    for swap in (lambda x: x.clone(), lambda x: x.t().contiguous().t()):
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state[p]["exp_avg"] = swap(optimizer.state[p]["exp_avg"])
        twin = torch.nn.Parameter(p.detach().clone())
        other = Adafactor([twin], lr=0.1, beta1=0.9, backend="reference")
        for name, tensor in optimizer.state[p].items():
            other.state[twin][name] = tensor.clone()
        twin.grad = p.grad.clone()
        optimizer.step()
        other.step()
        assert_close(p.detach(), twin.detach(), 1e-6, "p")
        assert_close(optimizer.state[p]["exp_avg"], other.state[twin]["exp_avg"], 1e-6, "M")
        optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].float().contiguous()


@pytest.mark.parametrize(
    ("p", "reason"),
    [
        (torch.zeros(4, dtype=torch.float64), "float64"),
        (torch.zeros(4, 4).t()[1:], "not contiguous"),
        (torch.zeros(4, device="meta"), "meta"),
    ],
    ids=["float64", "strided", "meta"],
)
def test_asked_for_by_name_it_raises_where_it_cannot_serve(p: Tensor, reason: str):
    if p.device.type == "meta":
        optimizer = Adafactor([("w", torch.nn.Parameter(p))], backend="cpu")  # waits for its data
        assert not optimizer.explain()
        return
    with pytest.raises(ValueError, match=f"backend='cpu' cannot serve parameter 'w': .*{reason}.*use backend='auto'"):
        Adafactor([("w", torch.nn.Parameter(p))], backend="cpu")


def test_without_the_library_auto_uses_the_reference_and_says_why(monkeypatch: pytest.MonkeyPatch):
    cpu._library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        optimizer = Adafactor([torch.nn.Parameter(torch.zeros(40, 50))])
        assert served(optimizer) == {"reference"}
        assert "C++ compiler" in str(optimizer.explain())
        with pytest.raises(ValueError, match=r"backend='cpu' is not available: .*C\+\+ compiler.*backend='auto'"):
            Adafactor([torch.nn.Parameter(torch.zeros(4))], backend="cpu")
    finally:
        cpu._library.cache_clear()


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_library_that_does_not_load_is_named(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(content)
    spec = importlib.util.spec_from_file_location("adafactor._kernels", broken)
    cpu._library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    try:
        assert "do not load" in str(cpu.missing())
    finally:
        cpu._library.cache_clear()


# The cached RMS(p)


def scaled(p: torch.nn.Parameter) -> Adafactor:
    return Adafactor([p], lr=0.1, scale_parameter=True)


def known(optimizer: Adafactor, p: Tensor) -> bool:
    """Whether the next step will use what the last one left."""
    kept = optimizer._slots[p].task.kept
    return kept.version == p._version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(31,), (40, 70), (3, 40, 33), (700, 301), (40, 9001), (300_001,)], ids=shape_id)
def test_the_cached_rms_has_the_bits_of_a_fresh_one(shape: Shape, dtype: torch.dtype):
    p0, grads = problem(shape, steps=5, dtype=dtype)
    p, fresh = parameter(p0), parameter(p0)
    cached, recomputed = scaled(p), scaled(fresh)
    for t, g in enumerate(grads):
        p.grad, fresh.grad = g, g.clone()
        with torch.no_grad():
            fresh.add_(0)
        assert known(cached, p) == (t > 0)
        assert not known(recomputed, fresh)
        cached.step()
        recomputed.step()
        assert_same_bits(snapshot(cached, p), snapshot(recomputed, fresh), f"step {t}")
    assert cached.diagnostics()["param 0"] == recomputed.diagnostics()["param 0"]


def test_a_change_that_autograd_sees_is_taken_into_account():
    p = torch.nn.Parameter(torch.ones(40, 50))
    optimizer = scaled(p)
    for factor in (1.0, 5.0, 2.0):
        with torch.no_grad():
            p.fill_(factor)
        p.grad = torch.randn(40, 50)
        optimizer.step()
        assert optimizer.diagnostics()["param 0"].step_size == pytest.approx((0.1 * factor,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (31,), (40, 50), (3, 40, 33), (700, 301)], ids=shape_id)
def test_a_change_behind_autograds_back_is_taken_into_account(shape: Shape, dtype: torch.dtype):
    """Through `.data`, or by another optimizer's fused kernel, weights change and their version does not."""
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = scaled(p)
    for expected in (0.1, 0.4, 1.6, 1.6):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        step_sizes = optimizer.diagnostics()["param 0"].step_size
        assert step_sizes == pytest.approx((expected,) * len(step_sizes))
        assert known(optimizer, p)
        if expected < 1:
            p.data.mul_(4.0)
            assert known(optimizer, p)  # for all that autograd knows


def test_a_weight_put_right_behind_autograds_back_moves_again():
    """Its fingerprint may miss a single element, but a sum of p^2 that is not finite is never kept."""
    p = torch.nn.Parameter(torch.ones(700, 301))
    optimizer = scaled(p)
    for value, updates in ((1.0, 1), (math.nan, 1), (1.0, 2)):
        if math.isnan(value):
            with torch.no_grad():
                p.add_(0)
        p.data[333, 111] = value
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.diagnostics()["param 0"].updates == updates


def test_autograd_learns_of_the_write():
    """A raw write would leave a graph that silently uses the new weights."""
    p = torch.nn.Parameter(torch.randn(40, 40))
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    optimizer = Adafactor([p], lr=0.1, backend="cpu")
    before = p._version
    optimizer.step()
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_under_inference_mode():
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.ones(40, 40), requires_grad=False)
        optimizer = Adafactor([p], lr=0.1, scale_parameter=True)
        for _ in range(2):
            p.grad = torch.ones(40, 40)
            optimizer.step()
    assert torch.allclose(p, torch.full_like(p, 0.9 * 0.9))


# What a step costs


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(
    ("shapes", "dtype", "kwargs"),
    [
        ([(64, 64)] * 500, torch.float32, {}),
        ([(3000, 1000)], torch.float32, {}),
        ([(32, 300_000)], torch.bfloat16, {}),
        ([(8, 500, 700)], torch.bfloat16, {"lr": 1e-3, "beta1": 0.9}),
        ([(4096, 1024), (1024, 4096), (4_000_000,), (1024,)], torch.float32, {"lr": 1e-3}),
    ],
    ids=["many small", "one", "wide", "stack", "mixed"],
)
def test_a_step_makes_one_allocation_and_a_small_one(
    shapes: list[Shape], dtype: torch.dtype, kwargs: dict[str, Any], threads: int
):
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = Adafactor(params, **kwargs)
    for p in params:
        p.grad = torch.ones_like(p)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        optimizer.step()
        with torch.profiler.profile(profile_memory=True) as profiler:
            optimizer.step()
        used = peak_allocated(optimizer.step)
    finally:
        torch.set_num_threads(before)
    events: Any = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    allocations = [event for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    assert len(allocations) == 1
    sides = sum(
        optimizer.state[p][name].numel()
        for p in params
        for name in ("exp_avg_sq_row", "exp_avg_sq_col")
        if name in optimizer.state[p]
    )
    assert used <= WORKSPACE + 64 * sides


def test_a_gradient_is_not_kept():
    p = torch.nn.Parameter(torch.ones(40, 40))
    optimizer = scaled(p)
    p.grad = torch.ones(40, 40)
    gradient = weakref.ref(p.grad)
    optimizer.step()
    p.grad = None
    assert gradient() is None


def test_it_is_found_wherever_the_package_is():
    code = "from adafactor.backends import cpu; print(cpu.missing(), cpu.instruction_set())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["None", cpu.instruction_set()]


def test_select_is_asked_per_parameter():
    from adafactor import plan

    [tensor] = plan({"w": (40, 50)})
    assert select("auto", tensor, torch.zeros(40, 50)).backend.name == "cpu"
    assert select("reference", tensor, torch.zeros(40, 50)).backend.name == "reference"
