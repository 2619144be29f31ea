"""Problems, modes and comparisons that several test files share. Nothing here is itself a test."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from adafactor import Adafactor
from adafactor.backends import reference
from oracle import Array, State, View

Shape = tuple[int, ...]
Snapshot = dict[str, Tensor]  # "p" and the state tensors, after one step

FIELDS = {"exp_avg_sq_row": "R", "exp_avg_sq_col": "C", "exp_avg_sq": "V", "exp_avg": "M"}

# Every size the design names, and every way that "auto" can see a tensor.
SHAPES: list[Shape] = [
    (),
    (0,),
    (1,),
    (2,),
    (31,),
    (63,),
    (0, 5),
    (5, 0),
    (0, 40, 33),
    (1, 1),
    (2, 3),
    (31, 63),
    (40, 33),
    (123, 507),
    (507, 123),
    (2, 3000),
    (3000, 2),
    (32, 2000),
    (2000, 32),
    (3, 40, 33),
    (2, 32, 32),
    (1, 33, 32),
    (4, 16, 128),
    (64, 3, 32),
    (64, 3, 3, 3),
    (33, 40, 3, 3),
    (2, 3, 40, 33),
    (2, 3, 4, 5),
]

# A few of them that stand for the others: full V, one matrix, a stack, merged axes behind, merged axes in front.
FEW_SHAPES: list[Shape] = [(), (31,), (40, 70), (3, 40, 33), (33, 4, 3, 3), (4, 16, 128)]

DECAY = {"lr": 0.01, "weight_decay": 0.3}
MODES: dict[str, dict[str, Any]] = {
    "paper": {},
    "lr": {"lr": 0.01},
    "lr scaled by RMS(p)": {"lr": 0.01, "scale_parameter": True},
    "relative, capped by lr": {"lr": 0.5, "relative_step": True},
    "relative, unscaled": {"scale_parameter": False},
    "warm-up": {"warmup_init": True},
    "warm-up, capped by lr": {"lr": 3e-6, "relative_step": True, "warmup_init": True, "scale_parameter": True},
    "momentum": {"lr": 0.01, "beta1": 0.9},
    "momentum, paper": {"beta1": 0.9},
    "momentum 0": {"lr": 0.01, "beta1": 0.0},
    "momentum, unscaled": {"lr": 0.01, "scale_parameter": True, "beta1": 0.9, "momentum_mode": "unscaled"},
    "nesterov": {"lr": 0.01, "beta1": 0.9, "nesterov": True},
    "nesterov, unscaled": {"lr": 0.01, "beta1": 0.9, "nesterov": True, "momentum_mode": "unscaled"},
    "nesterov without momentum": {"lr": 0.01, "nesterov": True},
    "decay lr": {**DECAY},
    "decay lr, paper": {"weight_decay": 0.3},
    "decay lr, relative": {"lr": 0.5, "relative_step": True, "weight_decay": 0.03},
    "decay scaled_lr": {**DECAY, "scale_parameter": True, "weight_decay_mode": "scaled_lr"},
    "decay independent": {"lr": 0.01, "weight_decay": 0.003, "weight_decay_mode": "independent"},
    "decay lr_squared": {"lr": 0.01, "weight_decay": 30.0, "weight_decay_mode": "lr_squared"},
    "decay lr_squared, paper": {"weight_decay": 30.0, "weight_decay_mode": "lr_squared"},
    "decay with momentum": {**DECAY, "beta1": 0.9, "momentum_mode": "unscaled", "weight_decay_mode": "scaled_lr"},
    "no clip": {"lr": 0.01, "clip_threshold": None},
    "clip 0.3": {"lr": 0.01, "clip_threshold": 0.3},
    "clip 1.5": {"lr": 0.01, "clip_threshold": 1.5},
    "beta2 fixed": {"lr": 0.01, "beta2": 0.99},
    "beta2 0": {"lr": 0.01, "beta2": 0.0},
    "beta2 capped": {"lr": 0.01, "beta2_cap": 0.5},
    "decay_rate -1": {"decay_rate": -1.0},
    "decay_rate 0": {"decay_rate": 0.0},
    "eps": {"eps": (0.03, 4.0)},
    "maximize": {**DECAY, "beta1": 0.9, "maximize": True},
    "one RMS per tensor": {"rms_scope": "tensor", "beta1": 0.9},
    "none": {"factor": "none", "beta1": 0.9},
    "last2": {"factor": "last2", "min_dim_size_to_factor": 0},
    "first2": {"factor": "first2", "min_dim_size_to_factor": 3},
    "largest2": {"factor": "largest2", "min_dim_size_to_factor": 3},
    "function": {"factor": lambda name, shape: permuted_view(shape), "beta1": 0.9},
    "function, one RMS per tensor": {"factor": lambda name, shape: permuted_view(shape), "rms_scope": "tensor"},
}

LR_COURSE = (1.0, 0.5, 2.0, 0.25, 3.0, 1.0, 0.1)  # what a given lr is multiplied by, step after step


def shape_id(shape: Any) -> str:
    return ("x".join(map(str, shape)) or "scalar") if isinstance(shape, tuple) else str(shape)


def permuted_view(shape: Sequence[int]) -> View | None:
    """A view whose axes are in no usual order: rows and columns swapped, batch axes between or behind them."""
    views: dict[int, View] = {2: ((), (1,), (0,)), 3: ((1,), (2,), (0,)), 4: ((2,), (3, 0), (1,))}
    return views.get(len(shape))


def oracle_view(shape: Sequence[int], kwargs: Mapping[str, Any]) -> View | None:
    """How the oracle should see a shape. An empty tensor has nothing to factor; "largest2" has the larger columns."""
    rule = kwargs.get("factor", "auto")
    if 0 in shape:
        return None
    if not isinstance(rule, str):
        return rule("", tuple(shape))
    view = oracle.view_for(rule, shape, kwargs.get("min_dim_size_to_factor", 32))
    if rule == "largest2" and view is not None:
        batch, (row,), (col,) = view
        return (batch, (col,), (row,)) if shape[row] > shape[col] else view
    return view


def oracle_hyper(kwargs: Mapping[str, Any]) -> oracle.Hyper:
    names = {"clip_threshold": "d", "weight_decay": "wd"}
    settings = {names.get(name, name): value for name, value in kwargs.items()}
    for idle in ("factor", "min_dim_size_to_factor", "momentum_dtype", "rounding", "seed"):
        settings.pop(idle, None)
    if "eps" in settings:
        settings["eps1"], settings["eps2"] = settings.pop("eps")
    return oracle.Hyper(**settings)


def problem(shape: Sequence[int], steps: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """A parameter and gradients: slices of unlike sizes, so that clipping works; some rows are zero, one for long."""
    rng = np.random.default_rng(zlib.crc32(repr(tuple(shape)).encode()))
    p0 = rng.normal(size=shape)
    size = np.exp(sum(np.ix_(*(rng.normal(size=n) for n in shape)), start=np.zeros(shape)))
    grads = [np.asarray(size * rng.normal(size=shape) * 2.0**t) for t in range(steps)]
    if shape and shape[0] > 2:
        for t, g in enumerate(grads):
            g[t % shape[0]] = 0
            g[1] *= t >= 3
            g[..., :1] *= t >= 2 or len(shape) == 1
    return torch.tensor(p0).to(dtype), [torch.tensor(g).to(dtype) for g in grads]


def parameter(values: Tensor) -> torch.nn.Parameter:
    """A parameter of its own, with the strides of `values`."""
    return torch.nn.Parameter(like(values))


def like(x: Tensor) -> Tensor:
    """A copy with the same strides."""
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return y.copy_(x)


def snapshot(optimizer: Adafactor, p: Tensor) -> Snapshot:
    return {
        "p": p.detach().clone(memory_format=torch.contiguous_format),
        **{name: value.clone(memory_format=torch.contiguous_format) for name, value in optimizer.state[p].items()},
    }


def lr_at(kwargs: Mapping[str, Any], index: int) -> float | None:
    lr = kwargs.get("lr")
    return None if lr is None else lr * LR_COURSE[index % len(LR_COURSE)]


def walk(p0: Tensor, grads: Sequence[Tensor], **kwargs: Any) -> list[Snapshot]:
    """What `Adafactor` makes of one parameter, after each step; a given lr follows LR_COURSE."""
    p = parameter(p0)
    optimizer = Adafactor([p], **kwargs)
    taken = []
    for index, g in enumerate(grads):
        if kwargs.get("lr") is not None:
            optimizer.param_groups[0]["lr"] = lr_at(kwargs, index)
        p.grad = g
        optimizer.step()
        taken.append(snapshot(optimizer, p))
    return taken


def oracle_walk(p0: Tensor, grads: Sequence[Tensor], **kwargs: Any) -> list[State]:
    """The same by the oracle."""
    view, states = oracle_view(p0.shape, kwargs), [oracle.init(p0.double().numpy())]
    for index, g in enumerate(grads):
        hyper = oracle_hyper({**kwargs, "lr": lr_at(kwargs, index)})
        states.append(oracle.step(states[-1], g.double().numpy(), hyper, view))
    return states[1:]


def statistics(taken: Snapshot, view: View | None) -> dict[str, Array]:
    """R, C, V and M in the oracle's letters, axis order and float64."""
    found = {FIELDS[name]: value.double().numpy() for name, value in taken.items() if name in FIELDS}
    if view is not None:
        batch, rows, cols = view
        found["R"] = np.transpose(found["R"], ranks(batch + rows))
        found["C"] = np.transpose(found["C"], ranks(batch + cols))
    return found


def float32_bounds(
    p0: Tensor, kwargs: dict[str, Any], states: list[State], constant_lr: bool = False
) -> list[dict[str, Any]]:
    """How far float32 may be from the oracle, to first order in u = 2^-24, by counting roundings.

    torch adds in a cascade of four levels of at most 16 additions each for up to 2^16 terms, in at most 32 lanes, which
    5 more additions join: D <= 69 roundings per term, and never more than there are terms. Blocks are joined one by
    one. All terms are positive (g^2, R, g^2 / R), so relative errors do not grow when they are added.

        statistic     s = D + blocks + 4, and 3 per step         square, mean, eps1; times 1 - beta2, times beta2, plus
        mean(R)       s + D + blocks + 1
        U             s + (D + blocks) / 2 + s / 2 + 8           half of mean(R), of R_i, of C_j; roots, products
        RMS(U)        s + (D + blocks) + s / 2 + D / 2 + 10      half of s_j, of mean(R), of C_j and of their mean
        alpha         D / 2 + blocks / 2 + 4, and 3 per step     half of the sum of p^2, and the error of p itself

    A step of p is a product of the last three; momentum averages such products, so its error is at most that share of
    the average of their sizes. p itself is rounded once per step, three times with weight decay.
    """
    u, hyper = 2.0**-24, oracle_hyper(kwargs)
    blocks = 1 + 2 * (p0.numel() // reference.BLOCK)
    D = min(max(p0.numel(), 1), 69)
    T = len(states)
    s = D + blocks + 4 + 3 * T
    count = (1.5 * s + (D + blocks) / 2 + 8) + (1.5 * s + D + blocks + D / 2 + 10) + (D + blocks) / 2 + 4 + 3 * T + 4
    mean_size = np.zeros(p0.shape)
    allowed = np.zeros(p0.shape)
    bounds = []
    for index, state in enumerate(states):
        assert state.U is not None
        assert state.alpha is not None
        assert state.rho is not None
        alpha = float(np.max(state.alpha, initial=0.0))
        size = np.abs(state.U) * (alpha if hyper.momentum_mode == "scaled" else 1)
        step = size
        if hyper.beta1:
            mean_size = hyper.beta1 * mean_size + (1 - hyper.beta1) * size
            step = hyper.beta1 * mean_size + (1 - hyper.beta1) * size if hyper.nesterov else mean_size
        step = step * (1 if hyper.momentum_mode == "scaled" else alpha)
        lr = state.rho if hyper.lr is None else hyper.lr * (1.0 if constant_lr else LR_COURSE[index])
        decay = {"lr": lr, "scaled_lr": alpha, "independent": 1.0, "lr_squared": state.rho**2}
        decayed = hyper.wd * decay[hyper.weight_decay_mode] * np.abs(state.p)
        allowed = allowed + u * (count * (step + decayed) + (3 if hyper.wd else 1) * np.abs(state.p))
        bounds.append(
            {
                "p": allowed,
                "M": count * u * mean_size,
                "R": None if state.R is None else s * u * state.R,
                "C": None if state.C is None else s * u * state.C,
                "V": None if state.V is None else s * u * state.V,
            }
        )
    return bounds


def ranks(axes: Sequence[int]) -> list[int]:
    return [sorted(axes).index(axis) for axis in axes]


def assert_close(ours: Any, theirs: Any, allowed: Any, what: str) -> None:
    """Elementwise |ours - theirs| <= allowed; the worst element is named."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape, f"{what}: shape {ours.shape}, not {theirs.shape}"
    if not ours.size:
        return
    allowed = np.broadcast_to(np.asarray(allowed, np.float64), ours.shape)
    excess = np.abs(ours - theirs) - allowed
    excess = np.where(np.isfinite(excess), excess, np.inf)
    worst = np.unravel_index(np.argmax(excess), ours.shape)
    assert excess[worst] <= 0, (
        f"{what}, worst at {tuple(map(int, worst))}: {ours[worst]!r}, not {theirs[worst]!r}; "
        f"off by {abs(ours[worst] - theirs[worst]):.3g}, allowed {allowed[worst]:.3g}"
    )


def assert_same_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], what: str = "") -> None:
    assert ours.keys() == theirs.keys()
    different = {
        name: f"{int((bits_of(ours[name]) != bits_of(theirs[name])).sum())} of {ours[name].numel()} elements"
        for name in ours
        if ours[name].dtype != theirs[name].dtype or not torch.equal(bits_of(ours[name]), bits_of(theirs[name]))
    }
    assert not different, f"{what} other bits: {different}"


def bits_of(x: Tensor) -> Tensor:
    """The bits of a tensor, as integers: NaN equals NaN, and 0 is not -0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(integers[x.dtype.itemsize])


def assert_agrees_in_float64(shape: Shape, kwargs: Mapping[str, Any], taken: list[Snapshot], expected: list[State]):
    """1e-12 of the displacement for weights, 1e-12 relative for R, C and V elementwise and for M as a whole.

    A weight is also rounded once or twice in every step, on both sides: 2^-52 of its size.
    """
    view = oracle_view(shape, kwargs)
    p0 = problem(shape)[0].numpy()
    largest = np.max(np.abs(p0), initial=0.0)
    for t, (ours, theirs) in enumerate(zip(taken, expected, strict=True), 1):
        displacement = np.max(np.abs(theirs.p - p0), initial=0.0)
        assert_close(ours["p"], theirs.p, 1e-12 * displacement + 2 * t * 2.0**-53 * largest, f"p after step {t}")
        assert ours["step"].item() == theirs.t
        for letter, found in statistics(ours, view).items():
            right = getattr(theirs, letter)
            size = np.max(np.abs(right), initial=0.0) if letter == "M" else right
            assert_close(found, right, 1e-12 * size, f"{letter} after step {t}")


def transposed(x: Tensor) -> Tensor:
    """The same values, with the axes stored in reverse order."""
    axes = tuple(reversed(range(x.ndim)))
    return x.permute(axes).contiguous().permute(axes)


def strided(x: Tensor) -> Tensor:
    """The same values, at every second place of the memory."""
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "strided": strided,
    "channels_last": channels_last,
}


class _Poison(TorchDispatchMode):
    """Fills whatever is allocated without a value with NaN, or with the largest integer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in func.overloadpacket.__name__ and isinstance(result, Tensor):
            result.fill_(math.nan if result.is_floating_point() else torch.iinfo(result.dtype).max)
        return result


@contextmanager
def poisoned_memory() -> Iterator[None]:
    with _Poison():
        yield
