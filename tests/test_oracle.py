"""The oracle against hand-worked numbers, the paper's own form, and trajectories recorded from seven packages."""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

import oracle
from oracle import Array, Hyper, State, run, step, trace, view_for

with np.load(Path(__file__).parent / "data" / "golden_f64.npz") as file:
    GOLDEN = dict(file)
SHAPES = ("scalar", "vec", "mat", "tall", "stack", "conv")

# What each configuration of the golden file is in the oracle's words: factoring rule, its minimum, hyperparameters.
# All of these packages take one RMS per tensor. A minimum of 17 is timm's "> 16".
TORCH = {"scale_parameter": True, "relative_step": True}
BIG_VISION = {"beta1": 0.9, "momentum_mode": "unscaled", "beta2_cap": 0.999, "d": None}
SETTINGS = {
    "torch/default": ("last2", 0, {"lr": 1e-2, **TORCH}),
    "torch/lr.3_wd.1": ("last2", 0, {"lr": 0.3, "wd": 0.1, **TORCH}),
    "torch/lr.3_d2_decay-1": ("last2", 0, {"lr": 0.3, "d": 2.0, "decay_rate": -1.0, **TORCH}),
    "hf/default": ("last2", 0, {}),
    "hf/warmup_init": ("last2", 0, {"warmup_init": True}),
    "hf/lr1e-2_noscale": ("last2", 0, {"lr": 1e-2}),
    "hf/lr1e-2_scale_b.9_wd.3": (
        "last2",
        0,
        {"lr": 1e-2, "scale_parameter": True, "beta1": 0.9, "wd": 0.3, "weight_decay_mode": "scaled_lr"},
    ),
    "timm/default": ("first2", 17, {}),
    "timm/lr1e-2_b.9_wd.3": ("first2", 17, {"lr": 1e-2, "beta1": 0.9, "wd": 0.3, "weight_decay_mode": "scaled_lr"}),
    "timm_bv/lr1e-2": ("largest2", 16, {"lr": 1e-2, **BIG_VISION}),
    "timm_bv/lr1e-2_clip1_wd.1": ("largest2", 16, {"lr": 1e-2, "wd": 0.1, **BIG_VISION, "d": 1.0}),
    "optax/adafactor1e-2_min16(f32 decay)": ("largest2", 16, {"lr": 1e-2, "scale_parameter": True}),
    "optax/chain_f64_lr1e-2_min16": ("largest2", 16, {"lr": 1e-2, "scale_parameter": True}),
    "optax/chain_f64_mom.9_wd1e-3": (
        "largest2",
        16,
        {"lr": 1e-2, "scale_parameter": True, "beta1": 0.9, "wd": 1e-3, "weight_decay_mode": "independent"},
    ),
    "big_vision/chain_f64_lr1e-2_wd1e-3": (
        "largest2",
        16,
        {"lr": 1e-2, "wd": 1e-3, "weight_decay_mode": "independent", **BIG_VISION},
    ),
    "palm/chain_f64_unfactored_mom.9_wd_lr2": (
        "none",
        0,
        {"lr": 1e-2, "scale_parameter": True, "beta1": 0.9, "d": None, "wd": 1.0, "weight_decay_mode": "lr_squared"},
    ),
    "pytorch_optimizer/default_f64mom": (
        "last2",
        0,
        {"beta1": 0.9, "beta2_cap": 0.999, "weight_decay_mode": "scaled_lr"},
    ),
}

MATRIX = ((), (0,), (1,))
NOSCALE = {"lr": 0.1, "scale_parameter": False, "relative_step": False}


def problem(*shape: int, steps: int = 4, seed: int = 0) -> tuple[Array, list[Array]]:
    """A parameter and gradients whose rows and columns differ in size, so that clipping works."""
    rng = np.random.default_rng(seed)
    size = np.exp(sum(np.ix_(*(rng.normal(size=n) for n in shape)), start=np.zeros(shape)))
    return rng.normal(size=shape), [size * rng.normal(size=shape) * 3.0**t for t in range(steps)]


def given(x: Array | None) -> Array:
    assert x is not None
    return x


def RMS(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


def error(ours: list[Array], theirs: Array, p0: Array) -> float:
    """The largest difference, in units of the largest displacement."""
    return float(np.max(np.abs(np.array(ours) - theirs)) / np.max(np.abs(theirs - p0)))


def test_shares_no_code_with_the_package():
    nodes = list(ast.walk(ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} - sys.stdlib_module_names == {"numpy"}


def test_table_names_every_recorded_trajectory():
    assert {f"y/{c}/{s}" for c in SETTINGS for s in SHAPES} == {k for k in GOLDEN if k.startswith("y/")}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", SETTINGS)
def test_golden(config: str, shape: str):
    rule, minimum, settings = SETTINGS[config]
    p0 = GOLDEN[f"p0/{shape}"]
    ours = run(p0, GOLDEN[f"g/{shape}"], Hyper(rms_scope="tensor", **settings), view_for(rule, p0.shape, minimum))
    e = error(ours, GOLDEN[f"y/{config}/{shape}"], p0)
    assert e <= (1e-7 if "f32 decay" in config else 1e-12), e


@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (2, 5, 9)])
def test_torch_where_its_cap_and_eps2_are_at_work(shape: tuple[int, ...]):
    # Nothing in the golden file reaches these: there lr < 1/sqrt t throughout, and RMS(p) > eps2.
    p0, grads = problem(*shape, steps=8)
    p0 = p0 * 1e-5
    p = torch.tensor(p0, requires_grad=True)
    opt = torch.optim.Adafactor([p], lr=0.9, weight_decay=0.1)
    theirs = []
    for g in grads:
        p.grad = torch.tensor(g)
        opt.step()
        theirs.append(p.detach().numpy().copy())
    h = Hyper(lr=0.9, wd=0.1, scale_parameter=True, relative_step=True, rms_scope="tensor")
    states = trace(p0, grads, h, view_for("last2", shape, 0))
    assert_allclose([given(s.alpha).item() for s in states[:2]], [0.9 * 1e-3, 2**-0.5 * max(1e-3, RMS(states[0].p))])
    assert error([s.p for s in states], np.array(theirs), p0) <= 1e-12


def test_two_steps_of_a_2x2_matrix_by_hand():
    # t = 1, beta2 = 0:      g^2 = [1 1; 1 9]   R = [1 5]   C = [1 5]   mean(R) = 3   V = [1/3 5/3; 5/3 25/3]
    #                        U^2 = g^2 / V = [3 3/5; 3/5 27/25], its mean is 1.32, so U is divided by sqrt 1.32.
    # t = 2, beta2 = 1/2:    g^2 = [1 9; 1 1]   R = [1+5 5+1]/2 = [3 3]   C = [1+1 5+5]/2 = [1 5]   V = [1 5; 1 5]
    #                        U^2 = [1 9/5; 1 1/5], its mean is 1: not clipped.
    # RMS(p0) = sqrt((9 + 16 + 0 + 25) / 4) = sqrt 12.5.
    p0 = np.array([[3.0, -4.0], [0.0, 5.0]])
    grads = [np.array([[1.0, 1.0], [-1.0, 3.0]]), np.array([[1.0, 3.0], [1.0, -1.0]])]
    one, two = trace(p0, grads, Hyper(lr=0.1, decay_rate=-1.0), MATRIX)
    assert_allclose(given(one.R), [1, 5], rtol=1e-14)
    assert_allclose(given(one.C), [1, 5], rtol=1e-14)
    assert_allclose(given(one.V), [[1 / 3, 5 / 3], [5 / 3, 25 / 3]], rtol=1e-14)
    U1 = np.array([[3, 0.6], [-0.6, 1.08]])
    U1 = np.sign(U1) * np.sqrt(np.abs(U1) / 1.32)
    assert_allclose(given(one.U), U1, rtol=1e-14)
    assert_allclose(given(one.rms_u), np.sqrt(1.32), rtol=1e-14)
    assert_allclose(one.p, p0 - 0.1 * U1, rtol=1e-14)
    assert_allclose(given(two.V), [[1, 5], [1, 5]], rtol=1e-14)
    U2 = np.array([[1, np.sqrt(1.8)], [1, -np.sqrt(0.2)]])
    assert_allclose(two.p, p0 - 0.1 * U1 - 0.1 * U2, rtol=1e-14)
    paper = trace(p0, grads[:1], Hyper(decay_rate=-1.0), MATRIX)[0]
    assert_allclose(paper.p, p0 - 1e-2 * np.sqrt(12.5) * U1, rtol=1e-14)


def encyclopedia(s: State) -> Array:
    """V_ij = R_i C_j / ((1/rc) sum_ij R_i C_j), as an encyclopedia prints it."""
    RC = np.outer(given(s.R), given(s.C))
    return RC / RC.mean()


def test_scaling_the_gradient_scales_V_by_its_square_but_not_in_the_encyclopedia():
    p0, grads = problem(5, 9)
    k = 10.0
    one, scaled = (trace(p0, [c * g for g in grads], Hyper(), MATRIX)[-1] for c in (1.0, k))
    assert_allclose(given(scaled.V) / given(one.V), k**2, rtol=1e-13)
    assert_allclose(encyclopedia(scaled) / encyclopedia(one), 1.0, rtol=1e-13)
    assert_allclose(given(one.V) / encyclopedia(one), np.mean(given(one.R)), rtol=1e-13)


def test_V_is_the_papers_form_with_sums():
    p0, (g,) = problem(5, 9, steps=1)
    V = given(trace(p0, [g], Hyper(eps1=0.0), MATRIX)[0].V)
    sums = g**2
    assert_allclose(V, np.outer(sums.sum(1), sums.sum(0)) / sums.sum(), rtol=1e-14)
    assert_allclose(V.mean(1), sums.mean(1), rtol=1e-14)
    assert_allclose(V.mean(0), sums.mean(0), rtol=1e-14)


def test_gradients_of_1e_minus_8_make_the_same_steps():
    p0, grads = problem(5, 9)
    tiny = run(p0, [1e-8 * g for g in grads], Hyper(lr=0.1), MATRIX)
    assert error(tiny, np.array(run(p0, grads, Hyper(lr=0.1), MATRIX)), p0) <= 1e-12


@pytest.mark.parametrize("view", [MATRIX, None])
def test_eps1_is_averaged_with_the_squares(view: oracle.View | None):
    # g^2 + 1 = [2 2; 2 2], then [5 5; 5 5] with beta2 = 1/2
    one, two = trace(np.zeros((2, 2)), [np.ones((2, 2)), np.full((2, 2), 2.0)], Hyper(eps1=1.0, decay_rate=-1.0), view)
    assert_allclose(given(one.V), 2.0, rtol=1e-14)
    assert_allclose(given(two.V), 3.5, rtol=1e-14)
    if view is not None:
        assert_allclose([given(two.R), given(two.C)], 3.5, rtol=1e-14)


def test_fixed_beta2_is_adams_bias_corrected_average():
    p0, grads = problem(5, 9)
    v = np.zeros_like(p0)
    for t, g in enumerate(grads, 1):
        v = 0.99 * v + 0.01 * g**2
        s = trace(p0, grads[:t], Hyper(beta2=0.99))[-1]
        assert_allclose(given(s.V), v / (1 - 0.99**t), rtol=1e-13)


def test_beta2_is_capped():
    # 1 - t^-1 = 0, 1/2, 2/3 with a cap of 0.6
    a, b, c = 1.0, 4.0, 9.0
    s = trace([0.0], [[a], [b], [c]], Hyper(decay_rate=-1.0, beta2_cap=0.6))[-1]
    assert_allclose(given(s.V), 0.6 * (a**2 + b**2) / 2 + 0.4 * c**2, rtol=1e-14)


@pytest.mark.parametrize(
    ("mode", "factor"), [("lr", 0.1), ("scaled_lr", 0.2), ("independent", 1.0), ("lr_squared", 0.01)]
)
def test_weight_decay_modes(mode: str, factor: float):
    # p = 2, g = -3: U = -1, alpha = lr RMS(p) = 0.2
    h = Hyper(lr=0.1, scale_parameter=True, wd=0.5, weight_decay_mode=mode)
    assert_allclose(run(2.0, [-3.0], h), [2 - 0.5 * factor * 2 + 0.2], rtol=1e-14)


def test_decay_mode_lr_follows_rho_when_no_lr_is_given():
    # rho_1 = 1e-6 under warmup_init; alpha = 2e-6
    h = Hyper(warmup_init=True, wd=0.5)
    assert_allclose(run(2.0, [-3.0], h), [2 - 0.5 * 1e-6 * 2 + 2e-6], rtol=1e-14)


@pytest.mark.parametrize(
    ("mode", "nesterov", "moves"),
    [
        ("scaled", False, (0.05, 0.125)),  # M = .5 x .1 = .05, then .5 x .05 + .5 x .2
        ("unscaled", False, (0.05, 0.150)),  # M = .5, then .75; times .1 and .2
        ("scaled", True, (0.075, 0.1625)),  # .5 M + .5 x .1, then .5 M + .5 x .2
        ("unscaled", True, (0.075, 0.175)),  # (.5 M + .5) x .1, then x .2
    ],
)
def test_momentum_while_lr_goes_from_one_tenth_to_two(mode: str, nesterov: bool, moves: tuple[float, float]):
    # A constant gradient: U = 1 at every step.
    h = Hyper(lr=0.1, beta1=0.5, momentum_mode=mode, nesterov=nesterov)
    one = step(oracle.init(1.0), 3.0, h, None)
    two = step(one, 3.0, replace(h, lr=0.2), None)
    assert_allclose([1 - one.p, one.p - two.p], moves, rtol=1e-14)


def test_unscaled_momentum_is_scaled_by_the_parameter_at_hand():
    # U = 1, M = .5 then .75; alpha = .1 x 1 then .1 x .95
    h = Hyper(lr=0.1, scale_parameter=True, beta1=0.5, momentum_mode="unscaled")
    assert_allclose(run(1.0, [3.0, 3.0], h), [0.95, 0.95 - 0.75 * 0.095], rtol=1e-14)


@pytest.mark.parametrize("momentum_mode", ["scaled", "unscaled"])
@pytest.mark.parametrize("relative_step", [False, True])
@pytest.mark.parametrize("mode", ["lr", "scaled_lr", "independent", "lr_squared"])
def test_lr_zero_changes_no_weight(mode: str, relative_step: bool, momentum_mode: str):
    p0, grads = problem(5, 9, steps=2)
    h = Hyper(lr=0.1, beta1=0.9, wd=0.5, weight_decay_mode=mode, momentum_mode=momentum_mode)
    before = step(oracle.init(p0), grads[0], h, MATRIX)
    after = step(before, grads[1], replace(h, lr=0.0, relative_step=relative_step), MATRIX)
    assert_array_equal(after.p, before.p)
    assert after.t == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("view", [MATRIX, None])
def test_non_finite_gradient_skips_the_whole_step(bad: float, view: oracle.View | None):
    p0, grads = problem(5, 9)
    poisoned = grads[1].copy()
    poisoned[2, 3] = bad
    h = Hyper(beta1=0.9, wd=0.1)
    skipped = trace(p0, [grads[0], poisoned, *grads[1:]], h, view)
    assert skipped[1] is skipped[0]
    assert_array_equal(skipped[-1].p, run(p0, grads, h, view)[-1])


def test_stacked_matrices_are_independent_unless_the_rms_is_shared():
    p0, grads = problem(3, 5, 9)
    h = Hyper(beta1=0.9, wd=0.1, weight_decay_mode="scaled_lr")
    stack = trace(p0, grads, h, ((0,), (1,), (2,)))[-1]
    for i in range(3):
        alone = trace(p0[i], [g[i] for g in grads], h, MATRIX)[-1]
        for name in ("p", "M", "R", "C", "V", "U"):
            assert_allclose(given(getattr(stack, name))[i], getattr(alone, name), rtol=1e-13)
        assert_allclose(given(stack.alpha)[i], given(alone.alpha)[0], rtol=1e-14)
    shared = run(p0, grads, replace(h, rms_scope="tensor"), ((0,), (1,), (2,)))[-1]
    assert np.max(np.abs(shared - stack.p)) > 1e-3 * np.max(np.abs(stack.p - p0))


def test_views_merge_and_permute_axes():
    p0, grads = problem(4, 3, 2, 5)
    h = Hyper(beta1=0.9)
    merged = trace(p0, grads, h, ((), (0,), (1, 2, 3)))[-1]
    flat = trace(p0.reshape(4, 30), [g.reshape(4, 30) for g in grads], h, MATRIX)[-1]
    assert_array_equal(merged.p.reshape(4, 30), flat.p)
    assert given(merged.R).shape == (4,)
    assert given(merged.C).shape == (3, 2, 5)
    axes = (2, 1, 3, 0)  # batch 2 and 1, rows 3, columns 0
    permuted = trace(p0, grads, h, ((2, 1), (3,), (0,)))[-1]
    moved = trace(p0.transpose(axes), [g.transpose(axes) for g in grads], h, ((0, 1), (2,), (3,)))[-1]
    assert_array_equal(permuted.p.transpose(axes), moved.p)
    assert given(permuted.R).shape == (2, 3, 5)
    assert given(permuted.C).shape == (2, 3, 4)


def test_transposing_the_problem_transposes_the_step():
    p0, grads = problem(5, 9)
    h = Hyper(beta1=0.9, wd=0.1)
    transposed = [p.T for p in run(p0.T, [g.T for g in grads], h, MATRIX)]
    assert error(transposed, np.array(run(p0, grads, h, MATRIX)), p0) <= 1e-13


def test_maximize_climbs():
    p0, grads = problem(5, 9)
    climbing = run(p0, grads, Hyper(maximize=True, wd=0.1), MATRIX)
    assert_array_equal(climbing, run(p0, [-g for g in grads], Hyper(wd=0.1), MATRIX))


@pytest.mark.parametrize("eps1", [1e-30, 0.0])
@pytest.mark.parametrize("view", [MATRIX, None])
def test_zero_rows_and_zero_gradients_leave_the_weight(eps1: float, view: oracle.View | None):
    p0, grads = problem(5, 9)
    for g in grads:
        g[1], g[:, 4] = 0, 0
    p = run(p0, grads, Hyper(eps1=eps1), view)[-1]
    assert_array_equal(p[1], p0[1])
    assert_array_equal(p[:, 4], p0[:, 4])
    assert np.isfinite(p).all()
    assert_array_equal(run(p0, [np.zeros_like(p0)] * 3, Hyper(eps1=eps1, beta1=0.9), view)[-1], p0)


@pytest.mark.parametrize(
    ("shape", "view"), [((0,), None), ((0, 4), MATRIX), ((4, 0), MATRIX), ((0, 3, 4), ((0,), (1,), (2,)))]
)
@pytest.mark.parametrize("rms_scope", ["matrix", "tensor"])
def test_empty_tensors(shape: tuple[int, ...], view: oracle.View | None, rms_scope: str):
    p0 = np.zeros(shape)
    s = trace(p0, [p0, p0], Hyper(beta1=0.9, wd=0.1, rms_scope=rms_scope), view)[-1]
    assert s.p.shape == shape
    assert not np.any(given(s.rms_u))
    assert s.t == 2


@pytest.mark.parametrize(
    ("rule", "minimum", "shape", "view"),
    [
        ("none", 0, (64, 64), None),
        ("last2", 0, (7,), None),
        ("last2", 0, (), None),
        ("last2", 0, (24, 20, 3, 3), ((0, 1), (2,), (3,))),
        ("last2", 4, (24, 20, 3, 3), None),
        ("first2", 17, (24, 20, 3, 3), ((2, 3), (0,), (1,))),
        ("first2", 17, (3, 20, 24), ((0,), (1,), (2,))),
        ("first2", 17, (24, 16, 3, 3), None),
        ("first2", 17, (17, 17), MATRIX),
        ("first2", 17, (16, 17), None),
        ("first2", 17, (32, 48, 64), ((2,), (0,), (1,))),
        ("largest2", 16, (3, 16, 24), ((0,), (1,), (2,))),
        ("largest2", 17, (3, 16, 24), None),
        ("largest2", 16, (24, 3, 20), ((1,), (0,), (2,))),
        ("largest2", 128, (128, 128, 128), ((0,), (1,), (2,))),
        ("largest2", 16, (24, 20, 20), ((1,), (0,), (2,))),
        ("auto", 32, (32, 32), MATRIX),
        ("auto", 32, (31, 4096), None),
        ("auto", 32, (8, 64, 32), ((0,), (1,), (2,))),
        ("auto", 32, (64, 3, 32), ((), (0,), (1, 2))),
        ("auto", 32, (8, 64, 16), None),
        ("auto", 32, (64, 32, 3, 3), ((), (0,), (1, 2, 3))),
        ("auto", 32, (64, 3, 7, 7), ((), (0,), (1, 2, 3))),
        ("auto", 32, (8, 8, 64, 32), ((), (0, 1), (2, 3))),
        ("auto", 32, (2, 32, 32, 32), ((), (0, 1), (2, 3))),
        ("auto", 32, (4, 4, 4, 64), ((), (0, 1, 2), (3,))),
        ("auto", 32, (64, 3, 64), ((), (0,), (1, 2))),  # a tie: 64 + 192 = 192 + 64
        ("auto", 32, (8, 512, 3, 3), None),
        ("auto", 32, (16, 3, 3, 3), None),
        ("auto", 32, (4096,), None),
    ],
)
def test_factoring_rules(rule: str, minimum: int, shape: tuple[int, ...], view: oracle.View | None):
    assert view_for(rule, shape, minimum) == view
