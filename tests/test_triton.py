"""Tier 3 for GPUs: the Triton kernels, on a GPU where there is one and in Triton's interpreter elsewhere."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import _sharded
from _cases import (
    FEW_SHAPES,
    MODES,
    SHAPES,
    Shape,
    Snapshot,
    assert_close,
    assert_same_bits,
    float32_bounds,
    lr_at,
    oracle_view,
    oracle_walk,
    poisoned_memory,
    problem,
    shape_id,
    snapshot,
    statistics,
)
from _ranks import good, run_on_ranks
from adafactor import Adafactor
from adafactor._rounding import random_bits, round_stochastic, step_key, stream_key
from adafactor.backends import Task, _records, allocate_sums, triton

pytestmark = pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
slow = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK = [(40, 70), (31,), (3, 40, 33)]
MIXTURES = sorted((pair for pair in _records._MIXTURES if hasattr(Tensor, "grad_dtype") or pair[0] == pair[1]), key=str)


def parameter(values: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values.to(DEVICE, copy=True))


def taken_from(optimizer: Adafactor, p: Tensor) -> Snapshot:
    return {name: value.cpu() for name, value in snapshot(optimizer, p).items()}


def walk(p0: Tensor, grads: Sequence[Tensor], backend: str = "triton", **kwargs: Any) -> list[Snapshot]:
    """What one parameter goes through, after each step, on the CPU."""
    p = parameter(p0)
    optimizer = Adafactor([p], backend=backend, **kwargs)
    taken = []
    for index, g in enumerate(grads):
        if kwargs.get("lr") is not None:
            optimizer.param_groups[0]["lr"] = lr_at(kwargs, index)
        p.grad = g.to(DEVICE)
        optimizer.step()
        taken.append(taken_from(optimizer, p))
    assert {row.backend for row in optimizer.explain()} == {backend}
    return taken


# Against the oracle and the reference

GRID = [(shape, mode) for shape in SHAPES for mode in ("paper", "momentum", "last2") if 0 not in shape]
GRID += [case for case in product(FEW_SHAPES, MODES) if case not in GRID]
CASES = [
    pytest.param(
        shape,
        mode,
        id=f"{shape_id(shape)} {mode}",
        marks=() if shape == (40, 70) or (mode == "paper" and shape in FEW_SHAPES) else slow,
    )
    for shape, mode in GRID
    if not mode.startswith("function")
    and not (mode in ("first2", "largest2") and len(shape) > 2)  # not in memory order
]


# Every width of tile, strips and blocks in whole and in part, chunks, rows that are read twice.
LARGE: list[Shape] = [(300, 50), (33_003,)]
LARGER: list[Shape] = [(700, 200), (700, 701), (190, 1500), (70, 4000), (5, 200, 301), (70, 8192), (33, 70_000)]
LARGER += [(20_000, 33), (4097, 64), (300_003,)]
CASES += [pytest.param((5, 9001), "last2", id="5x9001")]  # rows that are read twice, few of them
CASES += [pytest.param(shape, "paper", id=shape_id(shape)) for shape in LARGE]
CASES += [
    pytest.param(shape, "nesterov, unscaled", id=f"{shape_id(shape)} nesterov", marks=slow)
    for shape in [*LARGE, (33, 9001)]
]
CASES += [pytest.param(shape, "paper", id=shape_id(shape), marks=slow) for shape in LARGER]


@pytest.mark.parametrize(("shape", "mode"), CASES)
def test_float32_is_within_the_reference_backends_rounding_errors(shape: Shape, mode: str):
    kwargs = MODES[mode]
    p0, grads = problem(shape, steps=2, dtype=torch.float32)
    with poisoned_memory():
        taken = walk(p0, grads, **kwargs)
    expected = oracle_walk(p0, grads, **kwargs)
    for t, (ours, theirs, bound) in enumerate(
        zip(taken, expected, float32_bounds(p0, kwargs, expected), strict=True), 1
    ):
        assert_close(ours["p"].double(), theirs.p, bound["p"], f"p after step {t}")
        for letter, found in statistics(ours, oracle_view(shape, kwargs)).items():
            assert_close(found, getattr(theirs, letter), bound[letter], f"{letter} after step {t}")


@pytest.mark.parametrize("shape", [(40, 70), (3, 40, 33)], ids=shape_id)
def test_many_strips_and_blocks_are_within_the_same_bounds(shape: Shape, monkeypatch: pytest.MonkeyPatch):
    """As large matrices are cut: several strips and blocks in each, the last ones in part."""
    for name, value in {"STRIP_ROWS": 8, "STRIP_LEAST": 1, "STRIP_MOST": 1 << 9, "BLOCK": 1 << 10}.items():
        monkeypatch.setattr(triton, name, value)
    triton.cut.cache_clear()
    try:
        one = triton.cut(True, (shape[0] if len(shape) == 3 else 1, *shape[-2:]))
        assert one.strips > 2
        assert one.blocks > 2
        test_float32_is_within_the_reference_backends_rounding_errors(shape, "paper")
    finally:
        triton.cut.cache_clear()


@pytest.mark.parametrize("momentum", [None, torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("p_dtype", "g_dtype"), MIXTURES, ids=str)
@pytest.mark.parametrize("shape", [(40, 70), pytest.param((31,), marks=slow)], ids=shape_id)
def test_every_mixture_of_dtypes_follows_the_reference(
    shape: Shape, p_dtype: torch.dtype, g_dtype: torch.dtype, momentum: torch.dtype | None
):
    """Where both round the same float32 number the same way: but for sums that differ in their last place."""
    p0, grads = problem(shape, steps=2)
    kwargs: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    if momentum is not None:
        kwargs |= {"beta1": 0.9, "momentum_dtype": momentum}
    found = []
    for backend in ("triton", "reference"):
        p = parameter(p0.to(p_dtype))
        if p_dtype != g_dtype:
            p.grad_dtype = g_dtype
        optimizer = Adafactor([("w", p)], backend=backend, **kwargs)
        for g in grads:
            p.grad = (g / 100).to(DEVICE, g_dtype)
            optimizer.step()
        found.append(taken_from(optimizer, p))
    for name, theirs in found[1].items():
        differ = found[0][name].float() - theirs.float()
        if theirs.dtype in (torch.float32, torch.float64):
            assert differ.abs().max() <= 1e-5 * theirs.abs().max(), name
        else:  # a number at the edge may fall to the other side
            assert (differ != 0).float().mean() <= 0.01, name


# The interpreter computes in numpy, which warns of infinities; no other test may.
numpy_may_warn = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


# Rounding: by the definition


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(31,), (33, 35), pytest.param((3, 40, 33), marks=slow)], ids=shape_id)
def test_weights_are_rounded_by_the_definition(shape: Shape, dtype: torch.dtype, rounding: str):
    """Float32 weights beside 16-bit ones do the same arithmetic, and show what is rounded."""
    p0, grads = problem(shape, steps=2, dtype=dtype)
    kwargs: dict[str, Any] = {"lr": 0.01, "seed": 3, "rounding": rounding, "weight_decay": 0.1, "beta1": 0.9}
    narrow, wide = parameter(p0), parameter(p0.float())
    optimizer = Adafactor([("a.weight", narrow)], backend="triton", **kwargs)
    exact = Adafactor([("a.weight", wide)], backend="triton", **kwargs)
    index = torch.arange(p0.numel()).view(shape)
    for t, g in enumerate(grads, 1):
        narrow.grad, wide.grad = g.to(DEVICE), g.to(DEVICE).float()
        optimizer.step()
        exact.step()
        x = wide.detach().cpu()
        expected = x.to(dtype)
        if rounding == "stochastic":
            expected = round_stochastic(x, dtype, random_bits(step_key(stream_key(3, "a.weight"), t), index))
        assert_same_bits({"p": narrow.detach().cpu()}, {"p": expected}, f"step {t}")
        with torch.no_grad():
            wide.copy_(narrow)


@pytest.mark.skipif(
    (torch.float32, torch.bfloat16) not in MIXTURES, reason="this torch has no gradients of another dtype"
)
def test_split_weights_are_summed_in_the_order_of_float32_ones():
    """RMS(p) has the same bits then, also where rows are a multiple of 16; all else is in test_few_bits.py."""
    p0, grads = problem((40, 80), steps=2, dtype=torch.bfloat16)
    ends = []
    for values in (p0, p0.float()):
        p = parameter(values)
        if values.dtype == torch.float32:
            p.grad_dtype = torch.bfloat16
        optimizer = Adafactor([("w", p)], backend="triton", weight_bits=32)
        for g in grads:
            p.grad = g.to(DEVICE)
            optimizer.step()
        ends.append(optimizer.full_precision_weights())
    assert_same_bits(ends[0], ends[1])


@pytest.mark.parametrize("first", [2**33 - 64, 2**33 - 37, 2**33 + 2, 2**34 + 1, 2**40])
def test_the_index_that_rounding_counts_has_64_bits(first: int, monkeypatch: pytest.MonkeyPatch):
    """One huge tensor is not at hand: the index of its first element is moved instead."""
    monkeypatch.setattr(_records, "geometry", lambda plan: (*plan.dims, 33, 35, first, 33 * 35, 35))
    p0, grads = problem((33, 35), steps=1, dtype=torch.bfloat16)
    [moved] = walk(p0, grads, lr=0.01)
    monkeypatch.undo()
    [wide] = walk(p0.float(), [grads[0].float()], lr=0.01)
    index = torch.arange(first, first + p0.numel()).view(p0.shape)
    expected = round_stochastic(wide["p"], torch.bfloat16, random_bits(step_key(stream_key(0, "param 0"), 1), index))
    assert_same_bits({"p": moved["p"]}, {"p": expected})


@numpy_may_warn
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_at_the_edge_of_their_format(dtype: torch.dtype, rounding: str):
    info = torch.finfo(dtype)
    values = [math.inf, -math.inf, math.nan, info.max, -info.max, info.tiny, info.tiny / 2, 0.0, -0.0, 1.0]
    values += [info.smallest_normal * k / 8 for k in range(9)]
    p0 = torch.tensor(values * 40, dtype=dtype)
    p = parameter(p0)
    optimizer = Adafactor([p], lr=1e-3, rounding=rounding, backend="triton")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits({"p": p.detach().cpu().nan_to_num(7.0)}, {"p": p0.nan_to_num(7.0)})
    optimizer.param_groups[0]["lr"] = info.max / 4096
    p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    finite, after = p0.isfinite(), p.detach().cpu()
    if rounding == "stochastic":
        assert after[finite].isfinite().all()
    assert torch.equal(after[~finite].nan_to_num(7.0), p0[~finite].nan_to_num(7.0))


# The same bits, alone or among others, in one go or in two


TOGETHER: list[Shape] = [(40, 70), (31,), (2, 33, 32)]


def step_all(how: str, kwargs: dict[str, Any]) -> list[Snapshot]:
    drawn = [problem(shape, steps=2, dtype=torch.bfloat16) for shape in TOGETHER]
    params = [parameter(p0) for p0, _ in drawn]
    optimizer = Adafactor([(f"w{k}", p) for k, p in enumerate(params)], backend="triton", **kwargs)
    for t in range(2):
        for p, (_, grads) in zip(params, drawn, strict=True):
            p.grad = grads[t].to(DEVICE)
            if how == "one by one":
                with torch.no_grad():
                    optimizer._update([(optimizer.param_groups[0], [p])])
                p.grad = None
        optimizer.step()
    return [taken_from(optimizer, p) for p in params]


@pytest.mark.parametrize("mode", ["paper", pytest.param("nesterov, unscaled", marks=slow)])
def test_parameters_alone_or_together_or_in_two_halves_give_the_same_bits(mode: str, monkeypatch: pytest.MonkeyPatch):
    together, alone = step_all("together", MODES[mode]), step_all("one by one", MODES[mode])

    def apart(tasks: Sequence[Task]) -> None:
        allocate_sums(tasks)
        triton.sweep(tasks)
        triton.apply(tasks)

    monkeypatch.setattr(triton, "step", apart)
    halves = step_all("together", MODES[mode])
    for shape, one, other, third in zip(TOGETHER, together, alone, halves, strict=True):
        assert_same_bits(other, one, f"{shape} alone")
        assert_same_bits(third, one, f"{shape} in two halves")


@pytest.mark.parametrize("shape", [(31,), (2, 40, 33), pytest.param((300, 150), marks=slow)], ids=shape_id)
def test_the_cached_rms_has_the_bits_of_a_fresh_one(shape: Shape):
    p0, grads = problem(shape, steps=3, dtype=torch.bfloat16)
    p, fresh = parameter(p0), parameter(p0)
    cached, recomputed = (Adafactor([x], lr=0.1, scale_parameter=True, backend="triton") for x in (p, fresh))
    for t, g in enumerate(grads):
        p.grad, fresh.grad = g.to(DEVICE), g.to(DEVICE)
        with torch.no_grad():
            fresh.add_(0)
        cached.step()
        recomputed.step()
        assert_same_bits(taken_from(cached, p), taken_from(recomputed, fresh), f"step {t}")
    assert cached.diagnostics()["param 0"] == recomputed.diagnostics()["param 0"]


def test_a_change_behind_autograds_back_is_seen_one_step_late():
    p = parameter(torch.ones(40, 50))
    optimizer = Adafactor([p], lr=0.1, scale_parameter=True, backend="triton")
    for expected in (0.1, 0.1, 0.4, 0.4):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert optimizer.diagnostics()["param 0"].step_size == pytest.approx((expected,))
        if optimizer.diagnostics()["param 0"].updates == 1:
            p.data.mul_(4.0)


@numpy_may_warn
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("shape", [(31,), (2, 40, 33)], ids=shape_id)
def test_a_bad_gradient_changes_nothing_and_is_counted(shape: Shape, bad: float):
    p0, grads = problem(shape, steps=3, dtype=torch.bfloat16)
    p = parameter(p0)
    optimizer = Adafactor([p], beta1=0.9, weight_decay=0.1, backend="triton")
    p.grad = grads[0].to(DEVICE)
    optimizer.step()
    before = taken_from(optimizer, p)
    p.grad = grads[1].to(DEVICE)
    p.grad.view(-1)[-1] = bad
    optimizer.step()
    assert_same_bits(taken_from(optimizer, p), before)
    report = optimizer.diagnostics()["param 0"]
    assert (report.updates, report.skipped) == (1, 1)


@pytest.mark.parametrize(
    "kwargs", [{}, {"relative_step": True}, {"weight_decay": 0.1, "weight_decay_mode": "lr_squared"}]
)
def test_an_lr_on_the_device_is_read_there(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    p0, grads = problem((40, 70), steps=3, dtype=torch.bfloat16)
    found = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64, device=DEVICE)):
        p = parameter(p0)
        optimizer = Adafactor([p], lr=lr, backend="triton", **kwargs)
        if isinstance(lr, Tensor):
            monkeypatch.setattr(triton, "on_device", lambda lr, device: isinstance(lr, Tensor))
        for g in grads:
            p.grad = g.to(DEVICE)
            optimizer.step()
        found.append(taken_from(optimizer, p))
    assert_same_bits(found[1], found[0])


def test_autograd_learns_of_the_write():
    p = parameter(torch.randn(40, 40))
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    Adafactor([p], lr=0.1, backend="triton").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# What is launched, and what it takes


def launches(monkeypatch: pytest.MonkeyPatch, optimizer: Adafactor) -> list[str]:
    names, real = [], triton.launch
    monkeypatch.setattr(
        triton, "launch", lambda kernel, *rest, **more: (names.append(kernel.fn.__name__), real(kernel, *rest, **more))
    )
    optimizer.step()
    monkeypatch.undo()
    return names


def test_three_launches_for_all_parameters_of_a_kind(monkeypatch: pytest.MonkeyPatch):
    params = [parameter(torch.randn(shape).bfloat16()) for shape in [(32, 40), (48, 64), (7,), (2, 33, 32), (7,)]]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = Adafactor(params, scale_parameter=True, lr=0.1, backend="triton")
    aligned = len({p.dim() < 2 or p.shape[-1] % 16 == 0 for p in params})
    once = ["sweep", "finalize", "apply"]
    assert launches(monkeypatch, optimizer) == ["apply", *once] * aligned  # RMS(p) is measured first
    assert launches(monkeypatch, optimizer) == once * aligned  # and known from then on


def test_while_a_graph_is_captured_nothing_is_known(monkeypatch: pytest.MonkeyPatch):
    """A captured step has not run: the next one must not rely on the sums of p^2 that it would have left."""
    p = parameter(torch.randn(40, 40))
    p.grad = torch.ones_like(p)
    optimizer = Adafactor([p], scale_parameter=True, lr=0.1, backend="triton")
    with monkeypatch.context() as patch:
        patch.setattr(triton, "_capturing", lambda device: True)
        optimizer.step()
    assert launches(monkeypatch, optimizer)[0] == "apply"
    assert launches(monkeypatch, optimizer)[0] == "sweep"


class _Event:
    """In place of a device's: copies are done when the test says so."""

    done = False

    def query(self) -> bool:
        return self.done

    def record(self) -> None:
        self.done = False


def test_pinned_memory_is_not_written_before_it_is_copied(monkeypatch: pytest.MonkeyPatch):
    stream = SimpleNamespace(stream_id=0)
    module = SimpleNamespace(Event=_Event, current_stream=lambda: stream)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(triton, "_pinned", lambda size: torch.empty(size, dtype=torch.int64))
    monkeypatch.setattr(triton, "_rings", {})
    monkeypatch.setattr(triton, "_reserve", {})

    def copy(value: int, size: int = 5) -> None:
        triton._copied(torch.device("cpu"), torch.full((size,), value))

    def held() -> list[int]:
        return [int(slot.memory[0]) for ring in triton._rings.values() for slot in ring]

    for value in range(3):
        copy(value)
    assert held() == [0, 1, 2]  # the device is behind: each copy has memory of its own
    for ring in triton._rings.values():
        ring[0].copied.done = True
    copy(3)
    assert held() == [1, 2, 3]  # what was copied first is free first
    copy(4)
    assert held() == [1, 2, 3, 4]
    stream.stream_id = 1
    copy(5)
    stream.stream_id = 0
    copy(6, 50)
    assert held() == [1, 2, 3, 4, 5, 6]  # another stream, another size
    assert len(triton._rings) == 3


LLAMA = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
MODELS = {
    "Llama-3-8B, two layers": [*LLAMA, (4096,), (4096,)] * 2,
    "300 tensors of a GiB": [(1024, 1792), (1024,)] * 146,
    "5,000 small": [(64, 64)] * 5000,
    "embedding": [(128_256, 4096)],
    "wide": [(8192, 28_672)] * 2,
    "few rows": [(32, 300_000)],
    "experts": [(64, 2048, 768)] * 4,
}


def waves_of(shapes: Sequence[Shape]) -> tuple[tuple[triton.Cut, ...], tuple[triton.Wave, ...]]:
    from adafactor import plan

    plans = plan({str(index): shape for index, shape in enumerate(shapes)}, lr=0.1)
    cuts = tuple(triton.cut(tensor.factored, tensor.dims) for tensor in plans)
    return cuts, triton.waves(cuts, 2)


@pytest.mark.parametrize("model", MODELS)
def test_launches_and_scratch_stay_within_their_bounds(model: str):
    shapes = MODELS[model]
    cuts, waves = waves_of(shapes)
    gradients = 2 * sum(math.prod(shape) for shape in shapes)
    assert 3 * len(waves) <= 6 * math.ceil(gradients / 2**30)
    for wave in waves:
        sides = sum(cuts[k].matrices * (cuts[k].rows + cuts[k].cols * bool(cuts[k].rows)) for k in wave.members)
        assert 4 * wave.scratch <= (16 << 20) + 20 * sides + 64 * len(wave.members)


@pytest.mark.parametrize("model", ["Llama-3-8B, two layers", "embedding", "wide"])
def test_partial_sums_add_little_to_the_traffic(model: str):
    """Column sums are written and read once, 16 bytes per column and strip; p and g make 8 bytes per parameter."""
    cuts, _ = waves_of(MODELS[model])
    partial = sum(16 * one.matrices * one.strips * one.cols for one in cuts if one.rows)
    assert partial <= 0.025 * 8 * sum(math.prod(shape) for shape in MODELS[model])


def test_programs_of_a_wave_cover_every_strip_chunk_and_block_once():
    cuts, waves = waves_of([(5000, 300), (3, 40, 33), (77,), (40, 20_000), (70_001,)])
    for wave in waves:
        lists = [torch.frombuffer(bytearray(each), dtype=torch.int64).tolist() for each in wave.lists]
        for found, count in zip(lists, (lambda c: c.strips, lambda c: c.chunks, lambda c: c.blocks), strict=True):
            expected = [
                at << 32 | k
                for at, index in enumerate(wave.members)
                for k in range(cuts[index].matrices * count(cuts[index]))
            ]
            assert sorted(found) == expected
    for one in cuts:
        size = one.rows or one.cols
        assert (one.strips - 1) * one.strip_rows < size <= one.strips * one.strip_rows
        assert (one.blocks - 1) * one.block_rows < size <= one.blocks * one.block_rows


# What goes to the reference


@pytest.mark.parametrize(
    ("p", "reason"),
    [
        (torch.zeros(4, dtype=torch.float64), "float64"),
        (torch.zeros(4, 4).t()[1:], "not contiguous"),
    ],
    ids=["float64", "strided"],
)
def test_asked_for_by_name_it_raises_where_it_cannot_serve(p: Tensor, reason: str):
    with pytest.raises(
        ValueError, match=f"backend='triton' cannot serve parameter 'w': .*{reason}.*use backend='auto'"
    ):
        Adafactor([("w", torch.nn.Parameter(p.to(DEVICE)))], backend="triton")


def run_python(code: str, **environment: str) -> str:
    """A fresh interpreter's last line of output."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_why_there_are_no_kernels():
    """On a CPU without the interpreter, and without Triton, of which torch may have a part loaded."""
    code = (
        "import sys, torch\nfrom adafactor import Adafactor\nfrom adafactor.backends import triton\n"
        "def said():\n"
        "    try: Adafactor([torch.nn.Parameter(torch.ones(4))], backend='triton')\n"
        "    except ValueError as error: return str(error)\n"
        "def forget():\n"
        "    triton._module.cache_clear()\n"
        "    sys.modules.pop('adafactor.backends._triton_kernels', None)\n"
        "    vars(sys.modules['adafactor.backends']).pop('_triton_kernels', None)\n"
        "on_cpu = said()\nforget()\nsys.modules['triton'] = None\n"
        "print(on_cpu, '|', said(), '|', triton.missing())"
    )
    on_cpu, without, why = run_python(code).split("|")
    assert "TRITON_INTERPRET=1" in on_cpu
    assert "backend='triton' is not available: Triton is not installed" in without
    assert "pip install triton" in why


@slow
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the ranks talk through gloo, in the interpreter")
def test_pieces_on_several_ranks_are_stepped_as_the_whole():
    momentum = {"lr": 0.01, "scale_parameter": True, "beta1": 0.9, "momentum_dtype": torch.int8, "weight_decay": 0.1}
    modes = {"paper": {}, "momentum": momentum, "24 bits": {"weight_bits": 24}}
    cases = {name: partial(_sharded.pieces_of_the_gpu_kernels, kwargs) for name, kwargs in modes.items()}
    found = run_on_ranks(2, cases)
    assert {name: good(results) for name, results in found.items()} == {name: [[], []] for name in modes}


# Compiled, for machines that are not at hand


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """By target and kernel: registers, spilled bytes, widths of loads and stores."""
    script = Path(__file__).with_name("_triton_compile.py")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_kernels_compile_for_three_architectures_without_spills(compiled: dict[str, dict[str, Any]]):
    for target in ("sm_80", "sm_90", "gfx942"):
        for name in ("sweep bf16", "sweep fp32", "finalize", "apply bf16", "apply bf16 bf16 momentum", "apply fp32"):
            found = compiled[f"{target} {name}"]
            assert found["spilled"] == 0, (target, name, found)
            assert found["registers"] <= 128, (target, name, found)


def test_loads_and_stores_of_tensors_are_vectors(compiled: dict[str, dict[str, Any]]):
    for target in ("sm_80", "sm_90", "gfx942"):
        assert compiled[f"{target} sweep bf16"]["wide loads"] >= 6  # one for each width of tile, at least
        assert compiled[f"{target} apply bf16"]["wide loads"] >= 8  # g and p for each
    for target in ("sm_80", "sm_90"):
        assert compiled[f"{target} apply bf16"]["wide stores"] >= 4


def test_loads_of_single_elements_are_those_of_ends(compiled: dict[str, dict[str, Any]]):
    """The last elements of a full V, four for each thread: of g in a sweep, of g and p in apply."""
    for target in ("sm_80", "sm_90"):
        assert compiled[f"{target} sweep bf16"]["16-bit loads"] <= 4
        assert compiled[f"{target} apply bf16"]["16-bit loads"] <= 8


def test_no_product_is_fused_and_no_quotient_rough(compiled: dict[str, dict[str, Any]]):
    found = {name: built["rough"] for name, built in compiled.items() if built.get("rough")}
    assert not found


def test_apply_exchanges_nothing_between_threads_in_its_loops(compiled: dict[str, dict[str, Any]]):
    """Shared memory and barriers are for sums; a sweep has one for the rows of each width."""
    for target in ("sm_80", "sm_90"):
        assert compiled[f"{target} apply bf16"]["conversions in loops"] == 0
