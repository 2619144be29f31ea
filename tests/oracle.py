"""Adafactor in numpy float64, one tensor at a time, written from arXiv 1804.04235 to be read beside it.

Shares nothing with the package it judges: V is formed, RMS(U) is taken from U, no step is merged with another.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
View = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # batch, row and column axes of the parameter


@dataclass(frozen=True)
class Hyper:
    """Letters as in the paper; None means: not given."""

    lr: float | None = None
    eps1: float = 1e-30
    eps2: float = 1e-3
    d: float | None = 1.0
    decay_rate: float = -0.8
    beta2: float | None = None
    beta2_cap: float | None = None
    beta1: float | None = None
    momentum_mode: str = "scaled"  # or "unscaled"
    nesterov: bool = False
    wd: float = 0.0
    weight_decay_mode: str = "lr"  # or "scaled_lr", "independent", "lr_squared"
    scale_parameter: bool | None = None  # None: only when no lr is given
    relative_step: bool | None = None  # None: only when no lr is given
    warmup_init: bool = False
    maximize: bool = False
    rms_scope: str = "matrix"  # or "tensor"

    def __post_init__(self):
        assert self.momentum_mode in ("scaled", "unscaled"), self.momentum_mode
        assert self.weight_decay_mode in ("lr", "scaled_lr", "independent", "lr_squared"), self.weight_decay_mode
        assert self.rms_scope in ("matrix", "tensor"), self.rms_scope
        assert self.lr is not None or self.relative_step is not False, "relative_step=False needs an lr"


@dataclass(frozen=True)
class State:
    """After t accepted steps. M, V and U (clipped) are shaped like p; R is [*batch, *rows], C [*batch, *columns].

    rms_u (before clipping) and alpha have one entry per matrix, or one in all, as rms_scope says.
    """

    p: Array
    M: Array
    t: int = 0
    R: Array | None = None  # None when V is kept in full
    C: Array | None = None
    V: Array | None = None  # None before the first step
    U: Array | None = None
    rms_u: Array | None = None
    alpha: Array | None = None
    rho: float | None = None


def mean(x: Array, axis: int | tuple[int, ...]) -> Array:
    """The mean along axis, which stays with size 1; of nothing it is 0."""
    total = x.sum(axis, keepdims=True)
    return total / max(1, x.size // max(1, total.size))


def beta2_at(t: int, h: Hyper) -> float:
    cap = math.inf if h.beta2_cap is None else h.beta2_cap
    if h.beta2 is None:
        return min(cap, 1 - t**h.decay_rate)
    # an average with this decay is Adam's bias-corrected average
    return min(cap, h.beta2 * (1 - h.beta2 ** (t - 1)) / (1 - h.beta2**t))


def rho_at(t: int, h: Hyper) -> float:
    lr = 1e-2 if h.lr is None else h.lr
    relative = h.lr is None if h.relative_step is None else h.relative_step
    if not relative:
        return lr
    return min(lr, 1 / math.sqrt(t), 1e-6 * t if h.warmup_init else math.inf)


def init(p0: ArrayLike) -> State:
    p = np.array(p0, np.float64)
    return State(p=p, M=np.zeros_like(p))


def step(s: State, g: ArrayLike, h: Hyper, view: View | None) -> State:
    """The state after one gradient of the parameter's shape; view None keeps V in full."""
    g = np.array(g, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite((g * g).sum()):  # the step does not happen
            return s
    t, shape = s.t + 1, g.shape
    batch, rows, cols = view or ((), (), tuple(range(g.ndim)))
    order = (*batch, *rows, *cols)
    batch_shape, row_shape, col_shape = (tuple(shape[i] for i in axes) for axes in (batch, rows, cols))

    def matrices(x: Array) -> Array:  # [batch, rows, columns]
        return x.transpose(order).reshape(math.prod(batch_shape), math.prod(row_shape), math.prod(col_shape))

    def tensor(x: Array) -> Array:
        return x.reshape(batch_shape + row_shape + col_shape).transpose(np.argsort(np.array(order, int)))

    def RMS(x: Array) -> Array:  # per matrix, or one for all
        return np.sqrt(mean(x * x, (1, 2) if h.rms_scope == "matrix" else (0, 1, 2)))

    p, M, G = matrices(s.p), matrices(s.M), matrices(-g if h.maximize else g)

    beta2 = beta2_at(t, h)
    G2 = G * G + h.eps1
    R = C = None
    if view is None:
        V = (1 - beta2) * G2 if s.V is None else beta2 * matrices(s.V) + (1 - beta2) * G2
    else:
        R, C = (1 - beta2) * mean(G2, 2), (1 - beta2) * mean(G2, 1)  # [batch, rows, 1], [batch, 1, columns]
        if s.R is not None and s.C is not None:
            R, C = R + beta2 * s.R.reshape(R.shape), C + beta2 * s.C.reshape(C.shape)
        mean_R = mean(R, 1)
        V = R * C / np.where(mean_R > 0, mean_R, 1)

    # V = 0 takes eps1 = 0 and g = 0: such an entry does not move
    U = np.divide(G, np.sqrt(V), out=np.zeros_like(G), where=V > 0)
    rms_u = RMS(U)
    if h.d is not None:
        U = U / np.maximum(1, rms_u / h.d)

    rho = rho_at(t, h)
    scale = h.lr is None if h.scale_parameter is None else h.scale_parameter
    alpha = rho * np.maximum(h.eps2, RMS(p)) if scale else rho * np.ones_like(RMS(p))

    scaled = h.momentum_mode == "scaled"
    delta = alpha * U if scaled else U
    if h.beta1 is not None:
        M = h.beta1 * M + (1 - h.beta1) * delta
        delta = h.beta1 * M + (1 - h.beta1) * delta if h.nesterov else M
    delta = delta if scaled else alpha * delta

    decay = {
        "lr": rho if h.lr is None else h.lr,  # a relative step caps rho, not this
        "scaled_lr": alpha,
        "independent": 1.0,
        "lr_squared": rho**2,
    }[h.weight_decay_mode]
    if rho != 0:  # with lr = 0 even the independent decay and what M still holds leave p alone
        p = p - h.wd * decay * p - delta

    if R is not None and C is not None:
        R, C = R.reshape(batch_shape + row_shape), C.reshape(batch_shape + col_shape)
    return State(tensor(p), tensor(M), t, R, C, tensor(V), tensor(U), rms_u.ravel(), alpha.ravel(), rho)


def trace(p0: ArrayLike, grads: Iterable[ArrayLike], h: Hyper, view: View | None = None) -> list[State]:
    """The state after each gradient."""
    states = [init(p0)]
    for g in grads:
        states.append(step(states[-1], g, h, view))
    return states[1:]


def run(p0: ArrayLike, grads: Iterable[ArrayLike], h: Hyper, view: View | None = None) -> list[Array]:
    """The parameter after each gradient."""
    return [s.p for s in trace(p0, grads, h, view)]


def view_for(rule: str, shape: Sequence[int], minimum: int) -> View | None:
    """How each factoring rule sees a shape; a side that is smaller than minimum is not factored."""
    n = len(shape)
    axes = tuple(range(n))

    def pair(a: int, b: int) -> View | None:
        ok = min(shape[a], shape[b]) >= minimum
        return (tuple(i for i in axes if i not in (a, b)), (a,), (b,)) if ok else None

    def split(k: int) -> tuple[int, int]:
        return math.prod(shape[:k]), math.prod(shape[k:])

    if rule not in ("none", "last2", "first2", "largest2", "auto"):
        raise ValueError(rule)
    if rule == "none" or n < 2:
        return None
    if rule == "last2":
        return pair(n - 2, n - 1)
    if rule == "first2":
        return (pair(0, 1) if n > 2 else None) or pair(n - 2, n - 1)
    if rule == "largest2":
        a, b = sorted(sorted(axes, key=lambda i: (shape[i], i))[-2:])
        return pair(a, b)
    if n == 3 and min(shape[1:]) >= minimum:
        return (0,), (1,), (2,)
    k = min(range(1, n), key=lambda k: sum(split(k)))  # of equals the first
    return ((), axes[:k], axes[k:]) if min(split(k)) >= minimum else None
