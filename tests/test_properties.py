"""What must hold whatever the numbers are: symmetries of the algorithm, and limits equal to simpler optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from _cases import (
    FEW_SHAPES,
    LR_COURSE,
    MODES,
    Shape,
    Snapshot,
    assert_close,
    assert_same_bits,
    parameter,
    problem,
    shape_id,
    snapshot,
    walk,
)
from adafactor import Adafactor

MATRIX_MODES = [mode for mode in MODES if mode != "none" and "function" not in mode]
MOMENTUM = {"lr": 0.01, "scale_parameter": True, "beta1": 0.9}
quickly = settings(max_examples=25, deadline=None, derandomize=True)


def random_problem(shape: Shape, seed: int, steps: int = 4, dtype: torch.dtype = torch.float64):
    """No zeros, slices of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    size = torch.ones(shape, dtype=torch.float64)
    for axis, n in enumerate(shape):
        size *= normal(n).exp().view([-1 if i == axis else 1 for i in range(len(shape))])
    grads = [size * normal(*shape) * 2.0**t for t in range(steps)]
    return normal(*shape).to(dtype), [g.to(dtype) for g in grads]


def errors_allowed(p0: Tensor, p: Tensor, relative: float, steps: int) -> float:
    """`relative` of the displacement, and float64's rounding of the weights, once per step on both sides."""
    return relative * float((p - p0).abs().max()) + 2 * steps * 2.0**-53 * float(p.abs().max())


# Symmetries


@pytest.mark.parametrize("mode", MATRIX_MODES)
@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (123, 507), (2, 3)], ids=shape_id)
def test_transposing_the_problem_transposes_the_step(shape: Shape, mode: str):
    p0, grads = problem(shape)
    kwargs = MODES[mode]
    one = walk(p0, grads, **kwargs)[-1]
    other = walk(p0.T.contiguous(), [g.T.contiguous() for g in grads], **kwargs)[-1]
    assert_close(other["p"].T, one["p"], errors_allowed(p0, one["p"], 1e-13, len(grads)), "p")
    twins = {"exp_avg_sq_row": "exp_avg_sq_col", "exp_avg_sq_col": "exp_avg_sq_row"}
    for name in set(one) - {"p", "step"}:
        theirs = other[name if mode == "largest2" else twins.get(name, name)]
        assert_close(theirs.t(), one[name], 1e-13 * float(one[name].abs().max()), name)


@quickly
@given(st.integers(32, 80), st.integers(32, 80), st.integers(0, 2**32))
def test_transposing_any_matrix_transposes_the_step(n: int, m: int, seed: int):
    p0, grads = random_problem((n, m), seed)
    one, other = (walk(p, gs, **MOMENTUM)[-1] for p, gs in ((p0, grads), (p0.T, [g.T for g in grads])))
    assert_close(other["p"].T, one["p"], errors_allowed(p0, one["p"], 1e-13, len(grads)), "p")


ORDER_SHAPES: list[Shape] = [(40, 70), (31,), (3, 40, 33), (), (33, 4, 3, 3), (200, 300)]


def walk_together(order: list[int], named: bool, dtype: torch.dtype, **kwargs: Any) -> dict[int, Snapshot]:
    problems = {i: problem(ORDER_SHAPES[i], steps=3, dtype=dtype) for i in order}
    params = {i: parameter(problems[i][0]) for i in order}
    optimizer = Adafactor([(f"layer{i}", params[i]) if named else params[i] for i in order], **kwargs)
    for t in range(3):
        for i in order:
            params[i].grad = problems[i][1][t]
        optimizer.step()
    return {i: snapshot(optimizer, params[i]) for i in order}


@pytest.mark.parametrize(
    ("dtype", "rounding", "named"),
    [
        (torch.float64, "stochastic", False),
        (torch.float32, "nearest", False),
        (torch.bfloat16, "nearest", False),
        (torch.bfloat16, "stochastic", True),
        (torch.float16, "stochastic", True),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]], ids=str)
def test_the_order_of_parameters_does_not_matter(order: list[int], dtype: torch.dtype, rounding: str, named: bool):
    sorted_, shuffled = (
        walk_together(indices, named, dtype, rounding=rounding, **MOMENTUM) for indices in (sorted(order), order)
    )
    for i in order:
        assert_same_bits(shuffled[i], sorted_[i], shape_id(ORDER_SHAPES[i]))


def test_the_order_matters_to_stochastic_rounding_without_names():
    one, other = (
        walk_together(order, False, torch.bfloat16, **MOMENTUM) for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])
    )
    assert not torch.equal(one[0]["p"], other[0]["p"])


@pytest.mark.parametrize("factor", ["auto", "none"])
@pytest.mark.parametrize("k", [1e-8, 3e-5, 0.1, 7.0, 1e3, 1e8])
@pytest.mark.parametrize("shape", [s for s in FEW_SHAPES if s], ids=shape_id)
def test_scaling_the_gradient_scales_V_by_its_square_and_leaves_U(shape: Shape, k: float, factor: str):
    """The weights see only U. The smallest square here is (1e-8 x 1e-2)^2, and float64 swallows an eps1 of 1e-37."""
    p0, grads = random_problem(shape, seed=1)
    grads = [g + 1e-2 * g.sign() for g in grads]
    kwargs = {"eps": (1e-37, 1e-3), "factor": factor, **MOMENTUM}
    one, scaled = walk(p0, grads, **kwargs), walk(p0, [k * g for g in grads], **kwargs)
    for ours, theirs in zip(scaled, one, strict=True):
        assert_close(ours["p"], theirs["p"], errors_allowed(p0, theirs["p"], 1e-13, len(grads)), "p")
        assert_close(ours["exp_avg"], theirs["exp_avg"], 1e-13 * float(theirs["exp_avg"].abs().max()), "M")
        for name in {"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"} & set(theirs):
            assert_close(ours[name], k**2 * theirs[name], 1e-13 * k**2 * theirs[name].numpy(), name)


@quickly
@given(st.integers(-26, 26), st.sampled_from([(31,), (40, 70), (3, 40, 33)]), st.integers(0, 2**32))
def test_scaling_by_a_power_of_two_changes_no_bit_of_the_weights(exponent: int, shape: Shape, seed: int):
    p0, grads = random_problem(shape, seed)
    grads = [g + 1e-2 * g.sign() for g in grads]
    one, scaled = (walk(p0, [k * g for g in grads], eps=(1e-37, 1e-3), beta1=0.9)[-1] for k in (1.0, 2.0**exponent))
    for name in one:
        factor = 4.0**exponent if "sq" in name else 1.0
        assert torch.equal(scaled[name], one[name] * factor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["paper", "nesterov, unscaled", "decay scaled_lr", "beta2 fixed", "clip 0.3"])
@pytest.mark.parametrize("shape", [(3, 40, 33), (2, 32, 32), (7, 64, 48), (3, 200, 300), (40, 32, 33)], ids=shape_id)
def test_a_stack_is_its_matrices_bit_for_bit(shape: Shape, mode: str, dtype: torch.dtype):
    p0, grads = problem(shape, steps=3, dtype=dtype)
    kwargs = {"rounding": "nearest", **MODES[mode]}
    stack = walk(p0, grads, **kwargs)[-1]
    for e in range(shape[0]):
        alone = walk(p0[e], [g[e] for g in grads], **kwargs)[-1]
        assert_same_bits({name: stack[name] if name == "step" else stack[name][e] for name in stack}, alone, f"{e}:")


def test_a_stack_with_one_rms_per_tensor_is_not_its_matrices():
    p0, grads = problem((3, 40, 33), steps=3)
    stack = walk(p0, grads, rms_scope="tensor")[-1]["p"]
    alone = walk(p0[0], [g[0] for g in grads])[-1]["p"]
    assert (stack[0] - alone).abs().max() > 1e-3 * (alone - p0[0]).abs().max()


# Limits


@quickly
@given(st.integers(32, 70), st.integers(32, 70), st.integers(0, 2**32))
def test_factoring_loses_nothing_where_the_square_has_rank_one(n: int, m: int, seed: int):
    """g_ij = ±a_i b_j: R C / mean(R) is g^2, and stays so while a and b keep their directions."""
    p0, (signs, *_) = random_problem((n, m), seed)
    _, (row, col, *_) = random_problem((max(n, m),), seed)
    size = torch.outer(row[:n].abs() + 0.1, col[:m].abs() + 0.1)
    grads = [c * size * signs.roll(t, 1).sign() for t, c in enumerate((1.0, 3.0, 0.01, 20.0))]
    factored, full = (walk(p0, grads, factor=factor, **MOMENTUM)[-1]["p"] for factor in ("last2", "none"))
    assert_close(factored, full, errors_allowed(p0, full, 1e-13, 4), "p")


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_without_memory_and_clipping_it_is_sign_descent(shape: Shape):
    p0, grads = problem(shape)
    p = p0.clone()
    for g, ours in zip(
        grads, walk(p0, grads, lr=0.01, decay_rate=0.0, clip_threshold=None, factor="none"), strict=True
    ):
        lr = 0.01 * (1.0, 0.5, 2.0, 0.25, 3.0, 1.0)[int(ours["step"]) - 1]
        p = p - lr * g.sign()
        assert_close(ours["p"], p, errors_allowed(p0, p, 1e-13, len(grads)), "p")


def adamw(p0: Tensor, grads: list[Tensor], lrs: list[float], betas: tuple[float, float], decay: float) -> list[Tensor]:
    p = parameter(p0)
    optimizer = torch.optim.AdamW([p], lr=1.0, betas=betas, eps=0.0, weight_decay=decay)
    taken = []
    for g, lr in zip(grads, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = g
        optimizer.step()
        taken.append(p.detach().clone())
    return taken


FULL_ADAM = {"lr": 0.01, "beta2": 0.99, "factor": "none", "clip_threshold": None}
LRS = [0.01 * k for k in LR_COURSE[:4]]


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_with_a_fixed_beta2_it_is_adamw_without_momentum(shape: Shape, decay: float):
    p0, grads = random_problem(shape, seed=2)
    theirs = adamw(p0, grads, LRS, (0.0, 0.99), decay)
    for ours, p in zip(walk(p0, grads, weight_decay=decay, **FULL_ADAM), theirs, strict=True):
        assert_close(ours["p"], p, errors_allowed(p0, p, 1e-13, len(grads)), "p")


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_with_momentum_it_is_adamw_without_its_first_correction_where_the_gradients_size_is_constant(shape: Shape):
    """Adam divides the average of g by sqrt(V), big_vision's momentum averages g / sqrt(V).

    With |g| constant in time, V is g^2 at every step and can be moved across the average; Adam's 1 / (1 - beta1^t)
    is then the only difference, and goes into its learning rate.
    """
    p0, grads = random_problem(shape, seed=3)
    grads = [grads[0].abs() * g.sign() for g in grads]
    theirs = adamw(p0, grads, [lr * (1 - 0.9**t) for t, lr in enumerate(LRS, 1)], (0.9, 0.99), 0.0)
    taken = walk(p0, grads, beta1=0.9, momentum_mode="unscaled", **FULL_ADAM)
    for ours, p in zip(taken, theirs, strict=True):
        assert_close(ours["p"], p, errors_allowed(p0, p, 1e-13, len(grads)), "p")


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_scaled_and_unscaled_momentum_agree_at_a_constant_step_size(shape: Shape, nesterov: bool):
    p0, grads = problem(shape)
    kwargs: dict[str, Any] = {"scale_parameter": False, "beta1": 0.9, "nesterov": nesterov}  # rho = 1e-2 until t = 10^4
    scaled, unscaled = (walk(p0, grads, momentum_mode=mode, **kwargs)[-1] for mode in ("scaled", "unscaled"))
    assert_close(scaled["p"], unscaled["p"], errors_allowed(p0, unscaled["p"], 1e-13, len(grads)), "p")
    M = 1e-2 * unscaled["exp_avg"]
    assert_close(scaled["exp_avg"], M, 1e-13 * float(M.abs().max()), "M")


# Nothing moves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("decay_mode", ["lr", "scaled_lr", "independent", "lr_squared"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("momentum_mode", ["scaled", "unscaled"])
@pytest.mark.parametrize("shape", [(31,), (3, 40, 33)], ids=shape_id)
def test_lr_zero_changes_no_weight(
    shape: Shape, momentum_mode: str, relative: bool, decay_mode: str, dtype: torch.dtype
):
    """The averages go on."""
    p0, grads = problem(shape, steps=4, dtype=dtype)
    p = parameter(p0)
    kwargs: dict[str, Any] = {"relative_step": relative, "scale_parameter": True, "beta1": 0.9, "weight_decay": 0.5}
    kwargs |= {"momentum_mode": momentum_mode, "weight_decay_mode": decay_mode, "nesterov": True}
    optimizer = Adafactor([p], lr=0.1, **kwargs)
    p.grad = grads[0]
    optimizer.step()
    for lr, g in zip((0.0, torch.tensor(0.0), 0), grads[1:], strict=True):
        optimizer.param_groups[0]["lr"] = lr
        before = snapshot(optimizer, p)
        p.grad = g
        optimizer.step()
        after = snapshot(optimizer, p)
        assert_same_bits({"p": after["p"]}, {"p": before["p"]})
        assert not torch.equal(after["exp_avg"], before["exp_avg"])
        assert after["step"] == before["step"] + 1
    assert not torch.equal(p.detach(), p0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [mode for mode, kwargs in MODES.items() if "weight_decay" not in kwargs])
def test_zero_gradients_leave_the_weights(mode: str, dtype: torch.dtype):
    for shape in FEW_SHAPES:
        p0, grads = problem(shape, steps=4, dtype=dtype)
        taken = walk(p0, [torch.zeros_like(p0)] * 3, **MODES[mode])
        for name, value in taken[-1].items():
            assert value.isfinite().all(), name
        assert_same_bits({"p": taken[-1]["p"]}, {"p": p0})
        if not MODES[mode].get("beta1"):  # with momentum, past gradients go on moving the weights
            first = walk(p0, grads[:1], **MODES[mode])[-1]["p"]
            assert_same_bits(
                {"p": walk(p0, [grads[0], *[torch.zeros_like(p0)] * 3], **MODES[mode])[-1]["p"]}, {"p": first}
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-8, 1e15])
def test_rows_and_columns_without_gradient_stand_still(size: float, dtype: torch.dtype):
    """An embedding whose tokens were not in the batch, also beside gradients for which R C leaves float32's range."""
    p0, grads = random_problem((200, 64), seed=4, dtype=torch.float64)
    for t, g in enumerate(grads):
        g *= size / g.abs().max()
        g[:100] = 0
        g[100 + t] = 0
        g[:, 5] = 0
    taken = walk(p0.to(dtype), [g.to(dtype) for g in grads], lr=0.01)
    for t, (before, after) in enumerate(zip([{"p": p0.to(dtype)}, *taken[:-1]], taken, strict=True)):
        moved = before["p"] != after["p"]
        assert not moved[:100].any()
        assert not moved[100 + t].any()
        assert not moved[:, 5].any()
        assert moved[100:].any()
        assert all(value.isfinite().all() for value in after.values())
