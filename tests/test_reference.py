"""Tier 2: the reference backend, through `Adafactor`, against the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close as assert_torch_close

import oracle
from _cases import (
    FEW_SHAPES,
    LAYOUTS,
    LR_COURSE,
    MODES,
    SHAPES,
    Shape,
    Snapshot,
    assert_agrees_in_float64,
    assert_close,
    assert_same_bits,
    float32_bounds,
    lr_at,
    oracle_hyper,
    oracle_view,
    oracle_walk,
    parameter,
    permuted_view,
    poisoned_memory,
    problem,
    shape_id,
    snapshot,
    statistics,
    walk,
)
from adafactor import Adafactor
from adafactor.backends import cpu, reference
from adafactor.memory import peak_allocated

# Two modes on every shape, other views wherever there are any, and every mode on a few shapes.
CASES = [(shape, mode) for shape in SHAPES for mode in ("paper", "momentum")]
CASES += [(shape, mode) for shape in SHAPES for mode in ("last2", "function") if len(shape) > 1 and 0 not in shape]
CASES += [case for case in product(FEW_SHAPES, MODES) if case not in CASES]
all_cases = pytest.mark.parametrize(
    ("shape", "mode"), CASES, ids=[f"{shape_id(shape)} {mode}" for shape, mode in CASES]
)


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many elements the reference backend reads at once."""

    return lambda elements: monkeypatch.setattr(reference, "BLOCK", elements)


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the reference, for every dtype."""
    monkeypatch.setattr(cpu, "missing", lambda: "switched off by a test")


# Float64, and what float32 may lose


@all_cases
def test_float64_agrees_with_the_oracle(shape: Shape, mode: str):
    p0, grads = problem(shape)
    taken = walk(p0, grads, **MODES[mode])
    assert_agrees_in_float64(shape, MODES[mode], taken, oracle_walk(p0, grads, **MODES[mode]))


@all_cases
def test_float32_is_within_its_rounding_errors(shape: Shape, mode: str):
    kwargs = MODES[mode]
    p0, grads = problem(shape, dtype=torch.float32)
    taken, expected = walk(p0, grads, **kwargs), oracle_walk(p0, grads, **kwargs)
    for t, (ours, theirs, bound) in enumerate(
        zip(taken, expected, float32_bounds(p0, kwargs, expected), strict=True), 1
    ):
        assert_close(ours["p"].double(), theirs.p, bound["p"], f"p after step {t}")
        for letter, found in statistics(ours, oracle_view(shape, kwargs)).items():
            assert_close(found, getattr(theirs, letter), bound[letter], f"{letter} after step {t}")


LATE = ["paper", "beta2 fixed", "decay_rate -1", "relative, capped by lr", "momentum, unscaled", "warm-up"]


@pytest.mark.parametrize("shape", [(31,), (40, 70), (3, 40, 33)], ids=shape_id)
@pytest.mark.parametrize("mode", LATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_millionth_step_agrees_with_the_oracle(dtype: torch.dtype, mode: str, shape: Shape):
    """Where 1 - beta2_t is 1.6e-5 and less: to 1e-12 in float64, and in float32 to the roundings of a few steps."""
    p0, grads = problem(shape, dtype=dtype)
    kwargs = MODES[mode]
    p, state = parameter(p0), oracle.init(p0.double().numpy())
    optimizer = Adafactor([p], **kwargs)
    expected = []
    for index, g in enumerate(grads):
        if index == 2:
            optimizer.state[p]["step"].fill_(1e6)
            state = replace(state, t=1_000_000)
        p.grad = g
        optimizer.step()
        state = oracle.step(state, g.double().numpy(), oracle_hyper(kwargs), oracle_view(shape, kwargs))
        expected.append(state)
    taken = snapshot(optimizer, p)
    assert taken["step"].item() == 1_000_004
    bound = float32_bounds(p0, kwargs, expected, constant_lr=True)[-1]
    displacement = np.max(np.abs(state.p - p0.double().numpy()))
    if dtype == torch.float64:
        bound["p"] = 1e-12 * displacement + 12 * 2.0**-53 * np.max(np.abs(state.p))
    assert_close(taken["p"].double(), state.p, bound["p"], "p")
    for letter, found in statistics(taken, oracle_view(shape, kwargs)).items():
        right = getattr(state, letter)
        exact = 1e-12 * (np.max(np.abs(right)) if letter == "M" else right)
        assert_close(found, right, exact if dtype == torch.float64 else bound[letter], letter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_gradients_are_not_written_to(shape: Shape, dtype: torch.dtype):
    for mode in ("paper", "nesterov, unscaled", "maximize", "function"):
        p0, grads = problem(shape, steps=2, dtype=dtype)
        kept = [g.clone() for g in grads]
        walk(p0, grads, **MODES[mode])
        for g, before in zip(grads, kept, strict=True):
            assert_same_bits({"g": g}, {"g": before}, mode)


# 16-bit weights and momentum


@pytest.mark.parametrize("mode", ["paper", "nesterov, unscaled", "decay scaled_lr", "decay with momentum", "function"])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nearest_16_bit_weights_are_the_float32_result_rounded(dtype: torch.dtype, shape: Shape, mode: str):
    p0, grads = problem(shape, dtype=dtype)
    narrow, wide = parameter(p0), parameter(p0.float())
    rounded, exact = (Adafactor([p], rounding="nearest", **MODES[mode]) for p in (narrow, wide))
    for g in grads:
        narrow.grad, wide.grad = g, g.float()
        rounded.step()
        exact.step()
        with torch.no_grad():
            wide.copy_(wide.to(dtype))
        ours, theirs = snapshot(rounded, narrow), snapshot(exact, wide)
        assert_same_bits(ours | {"p": ours["p"].float()}, theirs)
    assert not torch.equal(narrow, p0)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_gradients_dtype_may_differ_from_the_parameters(gradient: torch.dtype):
    p0, grads = problem((40, 70), dtype=torch.float32)
    grads = [g.to(gradient) for g in grads]

    def run(grads: list[Tensor]) -> Snapshot:
        p = parameter(p0)
        p.grad_dtype = None
        optimizer = Adafactor([p], lr=0.01, beta1=0.9)
        for g in grads:
            p.grad = g
            optimizer.step()
        return snapshot(optimizer, p)

    assert_same_bits(run(grads), run([g.float() for g in grads]))


@pytest.mark.parametrize("mode", ["momentum", "momentum, unscaled", "nesterov", "nesterov, unscaled"])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_bfloat16_momentum_is_rounded_only_when_stored(shape: Shape, mode: str):
    p0, grads = problem(shape)
    kwargs = MODES[mode]
    taken = walk(p0, grads, **kwargs, momentum_dtype=torch.bfloat16)
    state, expected = oracle.init(p0.numpy()), []
    for index, g in enumerate(grads):
        state = oracle.step(
            state, g.numpy(), oracle_hyper({**kwargs, "lr": lr_at(kwargs, index)}), oracle_view(shape, kwargs)
        )
        state = replace(state, M=torch.tensor(state.M).bfloat16().double().numpy())
        expected.append(state)
    assert taken[-1]["exp_avg"].dtype == torch.bfloat16
    assert_agrees_in_float64(shape, kwargs, taken, expected)


SIZES = [(torch.bfloat16, 10.0**-k) for k in range(2, 9)] + [(torch.float16, 10.0**-k) for k in range(2, 6)]


@pytest.mark.parametrize(("dtype", "size"), SIZES, ids=[f"{str(dtype)[6:]} {size:.0e}" for dtype, size in SIZES])
def test_the_update_keeps_its_size_for_small_gradients(dtype: torch.dtype, size: float):
    """|U| = 1 everywhere for a gradient of one size, but for eps1 / g^2 = 1e-14 and float32's roundings."""
    signs = np.sign(np.random.default_rng(0).normal(size=(64, 96)))
    p = parameter(torch.zeros(64, 96, dtype=dtype))
    optimizer = Adafactor([p], lr=1.0, clip_threshold=None, rounding="nearest")
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.tensor(signs * size).to(dtype)
        optimizer.step()
        assert torch.equal(before - p.detach(), torch.tensor(signs).to(dtype))
        [rms] = optimizer.diagnostics()["param 0"].update_rms
        assert abs(rms - 1) <= 1e-5


# Memory layout


LAYOUT_SHAPES: list[Shape] = [(63,), (31, 63), (123, 507), (507, 123), (3, 40, 33), (33, 40, 3, 3)]
LAYOUT_CASES = [
    (shape, layout, which)
    for shape in LAYOUT_SHAPES
    for layout in LAYOUTS
    for which in ("gradient", "parameter", "both")
    if len(shape) >= {"strided": 1, "transposed": 2, "channels_last": 4}[layout]
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout", "which"), LAYOUT_CASES, ids=[f"{shape_id(s)} {lay} {w}" for s, lay, w in LAYOUT_CASES]
)
def test_strides_do_not_change_a_bit(shape: Shape, layout: str, which: str, dtype: torch.dtype):
    arrange = LAYOUTS[layout]
    p0, grads = problem(shape, steps=3, dtype=dtype)
    p, gs = p0, grads
    if which != "gradient":
        p = arrange(p0)
        assert not p.is_contiguous()
    if which != "parameter":
        gs = [arrange(g) for g in grads]
        assert not gs[0].is_contiguous()
    for kwargs in ({"beta1": 0.9}, {"factor": lambda name, shape: permuted_view(shape)}, {"factor": "none"}):
        assert_same_bits(walk(p, gs, **kwargs)[-1], walk(p0, grads, **kwargs)[-1])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(123, 507), (31, 63), (3, 40, 33)], ids=shape_id)
def test_expanded_gradients_do_not_change_a_bit(shape: Shape, axis: int):
    p0, grads = problem(shape, steps=3, dtype=torch.float32)
    expanded = [g.narrow(axis, 1, 1).expand(shape) for g in grads]
    scalar = [g.flatten()[1].expand(shape) for g in grads]
    for gs in (expanded, scalar):
        assert 0 in gs[0].stride()
        assert_same_bits(walk(p0, gs)[-1], walk(p0, [g.contiguous() for g in gs])[-1])


def test_a_parameter_keeps_its_strides():
    p0, grads = problem((33, 40, 3, 3))
    p = parameter(LAYOUTS["channels_last"](p0))
    strides, place = p.stride(), p.data_ptr()
    optimizer = Adafactor([p])
    p.grad = grads[0]
    optimizer.step()
    assert (p.stride(), p.data_ptr()) == (strides, place)


# Groups, missing gradients, learning rates as tensors


def test_groups_have_hyperparameters_of_their_own():
    modes = ["paper", "nesterov, unscaled", "decay scaled_lr", "beta2 fixed", "largest2", "clip 0.3", "maximize"]
    shapes: list[Shape] = [(40, 70), (3, 40, 33), (31,), (33, 4, 3, 3), (4, 16, 128), (), (40, 70)]
    problems = [problem(shape) for shape in shapes]
    params = [parameter(p0) for p0, _ in problems]
    optimizer = Adafactor([{"params": [p], **MODES[mode]} for p, mode in zip(params, modes, strict=True)], lr=0.5)
    taken: list[list[Snapshot]] = [[] for _ in modes]
    for index in range(6):
        for p, mode, group, (_, grads) in zip(params, modes, optimizer.param_groups, problems, strict=True):
            p.grad = grads[index]
            group["lr"] = lr_at({"lr": 0.5} | MODES[mode], index)
        optimizer.step()
        for p, seen in zip(params, taken, strict=True):
            seen.append(snapshot(optimizer, p))
    for shape, mode, (p0, grads), seen in zip(shapes, modes, problems, taken, strict=True):
        kwargs = {"lr": 0.5} | MODES[mode]
        assert_agrees_in_float64(shape, kwargs, seen, oracle_walk(p0, grads, **kwargs))


@pytest.mark.parametrize("mode", ["paper", "momentum", "decay with momentum", "warm-up"])
def test_a_parameter_without_gradient_stands_still_and_keeps_its_own_time(mode: str):
    kwargs = MODES[mode]
    shapes: list[Shape] = [(40, 70), (31,), (3, 40, 33)]
    problems = [problem(shape) for shape in shapes]
    params = [parameter(p0) for p0, _ in problems]
    optimizer = Adafactor(params, **kwargs)
    present = [(True, True, False, True, False, True), (False, False, True, True, True, False), (True,) * 6]
    states = [oracle.init(p0.numpy()) for p0, _ in problems]
    for index in range(6):
        if "lr" in kwargs:
            optimizer.param_groups[0]["lr"] = lr_at(kwargs, index)
        for i, (p, shape) in enumerate(zip(params, shapes, strict=True)):
            p.grad = problems[i][1][index] if present[i][index] else None
            if present[i][index]:
                hyper = oracle_hyper({**kwargs, "lr": lr_at(kwargs, index)})
                states[i] = oracle.step(states[i], problems[i][1][index].numpy(), hyper, oracle_view(shape, kwargs))
        before = [snapshot(optimizer, p) for p in params]
        optimizer.step()
        for i, p in enumerate(params):
            if not present[i][index]:
                assert_same_bits(snapshot(optimizer, p), before[i])
    for shape, p, (p0, _), state in zip(shapes, params, problems, states, strict=True):
        displacement = np.max(np.abs(state.p - p0.numpy()))
        assert_close(
            p.detach(), state.p, 1e-12 * displacement + 12 * 2.0**-53 * np.max(np.abs(state.p)), shape_id(shape)
        )
        assert optimizer.state[p]["step"].item() == state.t


@pytest.mark.parametrize("mode", [mode for mode, kwargs in MODES.items() if "lr" in kwargs])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_as_lr_is_that_number(dtype: torch.dtype, mode: str):
    p0, grads = problem((40, 70), dtype=dtype)
    kwargs = {key: value for key, value in MODES[mode].items() if key != "lr"}
    lr = torch.tensor(MODES[mode]["lr"], dtype=torch.float64)
    first, second = parameter(p0), parameter(p0)
    number, tensor = Adafactor([first], lr=lr.item(), **kwargs), Adafactor([second], lr=lr, **kwargs)
    for index, g in enumerate(grads):
        lr.fill_(MODES[mode]["lr"] * LR_COURSE[index])
        number.param_groups[0]["lr"] = lr.item()
        first.grad = second.grad = g
        number.step()
        tensor.step()
        assert_same_bits(snapshot(number, first), snapshot(tensor, second))


@pytest.mark.parametrize("lr", [torch.tensor([0.5]), torch.tensor(0.5), torch.tensor(1), torch.tensor(0.5).bfloat16()])
@pytest.mark.parametrize("mode", ["decay lr", "decay lr, relative", "decay lr_squared", "momentum, unscaled"])
def test_any_tensor_of_one_element_is_an_lr(lr: Tensor, mode: str):
    p0, grads = problem((40, 70), dtype=torch.float32)
    kwargs = {key: value for key, value in MODES[mode].items() if key != "lr"}
    first, second = parameter(p0), parameter(p0)
    number, tensor = Adafactor([first], lr=lr.item(), **kwargs), Adafactor([second], lr=lr, **kwargs)
    for g in grads:
        first.grad = second.grad = g
        number.step()
        tensor.step()
    assert_same_bits(snapshot(number, first), snapshot(tensor, second))


# Blocks


BLOCK_CASES: dict[str, tuple[Shape, int, dict[str, Any]]] = {
    "between the matrices of a stack": ((7, 40, 33), 2 * 40 * 33 + 5, {}),
    "one matrix each": ((7, 40, 33), 40 * 33, {}),
    "inside the rows of a stack": ((3, 40, 33), 7 * 33, {}),
    "one row each": ((40, 33), 33, {}),
    "rows wider than a block": ((40, 33), 10, {}),
    "rows of a stack wider than a block": ((3, 40, 33), 10, {}),
    "merged columns wider than a block": ((2, 5, 7, 30), 40, {"factor": lambda name, shape: ((0,), (2,), (3, 1))}),
    "inside two row axes": ((5, 7, 6, 8), 3 * 48 + 1, {"factor": lambda name, shape: ((), (0, 1), (2, 3))}),
    "inside two batch axes": ((3, 4, 5, 6), 2 * 30, {"factor": lambda name, shape: ((0, 1), (2,), (3,))}),
    "inside permuted axes": ((5, 7, 6, 8), 50, {"factor": lambda name, shape: ((3, 1), (2,), (0,))}),
    "inside permuted rows": ((5, 7, 6, 8), 50, {"factor": lambda name, shape: ((), (3, 1), (0, 2))}),
    "inside a wide full V": ((3, 1000), 256, {}),
    "inside a long full V": ((1000,), 64, {}),
    "single elements of a full V": ((4, 3, 5), 1, {}),
    "a merged convolution": ((64, 3, 3, 3), 100, {}),
    "one RMS per tensor": ((5, 40, 33), 7 * 33, {"rms_scope": "tensor"}),
}


@pytest.mark.parametrize("case", BLOCK_CASES)
def test_blocks_agree_with_the_oracle_and_with_one_large_block(block: Callable[[int], None], case: str):
    shape, elements, kwargs = BLOCK_CASES[case]
    kwargs = {"beta1": 0.9, "weight_decay": 0.1, **kwargs}
    p0, grads = problem(shape)
    block(elements)
    plan = Adafactor([parameter(p0)], **kwargs)._slots
    assert len(reference._blocks(next(iter(plan.values())).task)) > 1
    small = walk(p0, grads, **kwargs)
    assert_agrees_in_float64(shape, kwargs, small, oracle_walk(p0, grads, **kwargs))
    block(1 << 40)
    large = walk(p0, grads, **kwargs)
    for ours, theirs in zip(small, large, strict=True):
        for name in ours:
            assert_torch_close(ours[name], theirs[name], rtol=1e-13, atol=1e-13 * float(theirs[name].abs().max()))


@pytest.mark.parametrize("shape", [(1200, 2000), (2000, 500), (2_500_000,), (40, 100, 200), (6, 200_000)], ids=shape_id)
def test_tensors_of_many_blocks_agree_with_the_oracle(shape: Shape):
    p0, grads = problem(shape, steps=2)
    taken, expected = walk(p0, grads), oracle_walk(p0, grads)
    assert_agrees_in_float64(shape, {}, taken, expected)


# What must not happen


BAD = [
    (torch.float32, math.nan),
    (torch.float32, math.inf),
    (torch.float32, -math.inf),
    (torch.float32, 1e30),
    (torch.bfloat16, math.nan),
    (torch.bfloat16, -1e30),
    (torch.float16, math.inf),
    (torch.float64, math.nan),
    (torch.float64, 1e200),
]


@pytest.mark.parametrize("shape", [(31,), (40, 70), (3, 40, 33), (33, 4, 3, 3), (200, 300)], ids=shape_id)
@pytest.mark.parametrize(("dtype", "bad"), BAD, ids=[f"{str(dtype)[6:]} {bad}" for dtype, bad in BAD])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"lr": 0.01, "beta1": 0.9, "nesterov": True, "weight_decay": 0.1}],
    ids=["paper", "momentum and decay"],
)
def test_a_non_finite_gradient_skips_its_parameter_alone(
    kwargs: dict[str, Any], dtype: torch.dtype, bad: float, shape: Shape
):
    p0, grads = problem(shape, steps=4, dtype=dtype)
    kwargs = {**kwargs, "rounding": "nearest"}
    params, alone = [parameter(p0) for _ in range(3)], parameter(p0)
    optimizer, clean = Adafactor([*params], **kwargs), Adafactor([alone], **kwargs)
    for index, g in enumerate(grads):
        poisoned = g.clone()
        poisoned.view(-1)[-1 if index == 1 else 0] = bad
        for p in params:
            p.grad = g
        alone.grad = g
        if index in (1, 2):
            params[1].grad = poisoned
        before = snapshot(optimizer, params[1])
        optimizer.step()
        clean.step()
        if index in (1, 2):
            assert_same_bits(snapshot(optimizer, params[1]), before)
        for p in (params[0], params[2]):
            assert_same_bits(snapshot(optimizer, p), snapshot(clean, alone))
    reports = [optimizer.diagnostics()[f"param {ordinal}"] for ordinal in range(3)]
    assert [(report.updates, report.skipped) for report in reports] == [(4, 0), (2, 2), (4, 0)]
    assert all(map(math.isfinite, (*reports[1].update_rms, *reports[1].step_size)))

    resumed = parameter(p0)
    skipless = Adafactor([resumed], **kwargs)
    for g in (grads[0], grads[3]):
        resumed.grad = g
        skipless.step()
    assert_same_bits(snapshot(optimizer, params[1]), snapshot(skipless, resumed))


def test_a_non_finite_first_gradient_leaves_a_fresh_state():
    p0, grads = problem((40, 70), dtype=torch.float32)
    p = parameter(p0)
    optimizer = Adafactor([p], beta1=0.9)
    before = snapshot(optimizer, p)
    p.grad = torch.full_like(p0, math.nan)
    optimizer.step()
    assert_same_bits(snapshot(optimizer, p), before)
    p.grad = grads[0]
    optimizer.step()
    assert_same_bits(snapshot(optimizer, p), walk(p0, grads[:1], beta1=0.9)[0])


def test_a_skipped_gradient_leaves_the_diagnostics_of_the_last_update():
    p0, grads = problem((3, 40, 33), steps=1, dtype=torch.float32)
    p = parameter(p0)
    optimizer = Adafactor([p])
    p.grad = grads[0]
    optimizer.step()
    [before] = optimizer.diagnostics().values()
    p.grad = torch.full_like(p0, math.nan)
    optimizer.step()
    [after] = optimizer.diagnostics().values()
    assert after == before._replace(skipped=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("shape", [(31,), (40, 70), (3, 40, 33)], ids=shape_id)
def test_weights_whose_rms_is_not_finite_stop_a_scaled_step(shape: Shape, bad: float):
    """Their step size would be infinite or NaN, and poison the weights that still are numbers."""
    p0, grads = problem(shape, steps=1, dtype=torch.float32)
    p0.view(-1)[-1] = bad
    p = parameter(p0)
    optimizer = Adafactor([p], lr=0.01, scale_parameter=True, beta1=0.9, weight_decay=0.1)
    p.grad = grads[0]
    before = snapshot(optimizer, p)
    optimizer.step()
    assert_same_bits(snapshot(optimizer, p), before)
    assert optimizer.diagnostics()["param 0"].skipped == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_memory_is_written_before_it_is_read(shape: Shape, dtype: torch.dtype):
    p0, grads = problem(shape, dtype=dtype)
    kwargs = {"beta1": 0.9, "weight_decay": 0.1, "momentum_dtype": torch.bfloat16}
    expected = walk(p0, grads, **kwargs)
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(p0).isnan().all()
        assert p0.new_empty(3).isnan().all()
        taken = walk(p0, grads, **kwargs)
    for ours, theirs in zip(taken, expected, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(507, 123), (700, 700), (100_000,), (20, 64, 64)], ids=shape_id)
def test_the_same_inputs_give_the_same_bits(shape: Shape, dtype: torch.dtype):
    p0, grads = problem(shape, steps=3, dtype=dtype)
    first = walk(p0, grads, beta1=0.9)[-1]
    for _ in range(3):
        assert_same_bits(walk(p0, grads, beta1=0.9)[-1], first)


# Temporaries


WORKSPACE = 4 << 20
NESTEROV = {"lr": 0.01, "scale_parameter": True, "beta1": 0.9, "nesterov": True, "weight_decay": 0.1}
HALF_MOMENTUM = {"lr": 0.01, "beta1": 0.9, "momentum_mode": "unscaled", "momentum_dtype": torch.bfloat16}
PERMUTED = {"factor": lambda name, shape: ((3,), (2, 1), (0,))}
TEMPORARIES: list[tuple[Shape, torch.dtype, str, dict[str, Any]]] = [
    ((4000, 3000), torch.float32, "dense", {}),
    ((4000, 3000), torch.bfloat16, "dense", {}),
    ((1500, 2000), torch.float16, "dense", NESTEROV),
    ((1500, 2000), torch.float32, "dense", HALF_MOMENTUM),
    ((3_000_000,), torch.float32, "dense", NESTEROV),
    ((3_000_000,), torch.bfloat16, "dense", NESTEROV),
    ((3_000_000,), torch.float32, "expanded", {}),
    ((8, 200_000), torch.bfloat16, "dense", NESTEROV),
    ((8, 200_000), torch.bfloat16, "expanded", {}),
    ((40, 100_000), torch.bfloat16, "dense", NESTEROV),
    ((100_000, 40), torch.bfloat16, "dense", {}),
    ((32, 300_000), torch.float64, "dense", NESTEROV),
    ((32, 1_000_000), torch.float16, "dense", HALF_MOMENTUM),
    ((1500, 2000), torch.bfloat16, "transposed", NESTEROV),
    ((1500, 2000), torch.bfloat16, "expanded", {}),
    ((100, 200, 50), torch.bfloat16, "transposed", NESTEROV),
    ((96, 128, 10, 8), torch.bfloat16, "dense", PERMUTED),
    ((96, 128, 10, 8), torch.float32, "transposed", PERMUTED),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "kwargs"),
    [
        pytest.param(
            *case,
            id=f"{shape_id(case[0])} {str(case[1])[6:]} {case[2]} {'+'.join(case[3]) or 'paper'}",
            marks=[pytest.mark.slow] * (math.prod(case[0]) > 20_000_000),
        )
        for case in TEMPORARIES
    ],
)
def test_temporaries_of_a_step_are_small(shape: Shape, dtype: torch.dtype, layout: str, kwargs: dict[str, Any]):
    """At most 4 MiB and 64 bytes per row and column, over all matrices of a stack."""
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = Adafactor([p], **kwargs)
    p.grad = {
        "dense": lambda: torch.ones(shape, dtype=dtype),
        "expanded": lambda: torch.ones((), dtype=dtype).expand(shape),
        "transposed": lambda: torch.ones(shape[::-1], dtype=dtype).permute(tuple(reversed(range(len(shape))))),
    }[layout]()
    sides = [optimizer.state[p].get(name, torch.zeros(0)).numel() for name in ("exp_avg_sq_row", "exp_avg_sq_col")]
    used, allowed = peak_allocated(optimizer.step), WORKSPACE + 64 * sum(sides)
    assert used <= allowed, f"{used:,} bytes, {allowed:,} allowed"


def test_the_measure_of_temporaries_sees_them():
    def run() -> None:
        kept = torch.ones(1 << 20)
        kept.mul(2)
        kept.mul(3)

    assert 8 << 20 <= peak_allocated(run) <= (8 << 20) + 4096
