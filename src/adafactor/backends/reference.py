"""The algorithm, readable beside the paper (Shazeer & Stern 2018), in float32 or float64.

Letters are the paper's. A parameter is seen as matrices of [rows, columns] and read block by block, in an order that
depends on its shape alone, so that temporaries stay small whatever the size of the parameter.

One sweep over the gradient is enough. R_i is final once row i has been read, so the sweep that adds up the columns can
also add up s_j = sum_i g_ij^2 / R_i, and from these, with n rows and m columns,

    mean(U^2) = mean(R) / (n m) * sum_j s_j / C_j          since  U_ij^2 = g_ij^2 mean(R) / (R_i C_j).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor._plan import Axes, Shape, TensorPlan
from adafactor._rounding import (
    dequantize,
    join_weight,
    quantize,
    random_bits,
    round_stochastic,
    split_weight,
    step_key,
)
from adafactor._schedule import beta2_at, exact, rho_at
from adafactor.backends import Task, allocate_sums

name = "reference"

BLOCK = 1 << 15  # elements read at once: a float32 block and its temporaries stay below 4 MiB
ACCELERATED = 1 << 7  # times as many on a GPU, where every operation is a launch
HOST = ("cpu",)  # the devices whose values can be read without waiting


def ready(task: Task) -> bool:
    return False  # it keeps nothing to compare with


def refuses(task: Task) -> str | None:
    return None


def step(tasks: Sequence[Task]) -> None:
    allocate_sums(tasks)
    sweep(tasks)
    apply(tasks)


def sweep(tasks: Sequence[Task]) -> None:
    for task in tasks:
        task.t = _time(task)
        task.beta2 = beta2_at(task.hyper, task.t)
        if task.plan.factored:
            _sweep_factored(task)
        else:
            _sweep_full(task)


def apply(tasks: Sequence[Task]) -> None:
    for task in tasks:
        _apply(task)


def sum_rows(tasks: Sequence[Task]) -> None:
    """Before a sweep whose rows are split over devices: per row the sum of g^2, which has to be complete by then."""
    for task in tasks:
        for block in _blocks(task):
            task.sums["row_sq"].view(-1)[block.rows] = _read(task.plan, task.g, block).square().sum(2).view(-1)


def row_param_sq(task: Task) -> Tensor:
    """Per row the sum of p^2.  # [matrices * rows]"""
    matrices, n, _ = task.plan.dims
    sums = torch.empty(matrices * n, dtype=task.plan.compute_dtype, device=task.p.device)
    for block in _blocks(task):
        sums[block.rows] = _weights(task, block).square().sum(2).view(-1)
    return sums


def mean_squares(tasks: Sequence[Task]) -> None:
    """After it: what the columns or matrices that are here add to the means of U^2 and p^2."""
    for task in tasks:
        _, n, m = task.plan.whole_dims
        sums = task.sums
        mean_p2 = sums["param_sq"] / (n * m) if "param_sq" in sums else torch.zeros_like(sums["grad_sq"])
        means = torch.stack([_factors(task).mean_U2, mean_p2])
        if task.plan.shared_rms:
            means = means.sum(1, keepdim=True) / task.plan.whole_dims[0]
        sums["means"] += means


def _sweep_factored(task: Task) -> None:
    """R of this step into scratch; per column the sums of g^2 and of g^2 / R; the sums of R, g^2 and p^2."""
    plan, sums, eps1 = task.plan, task.sums, task.hyper.eps[0]
    matrices, n, _ = plan.dims
    m = plan.whole_dims[2]
    R = _ordered(task.state[plan.row_stat], plan.row_axes).reshape(-1)  # [matrices * rows]
    R = R * task.beta2  # a copy: nothing is committed before apply
    for block in _blocks(task):
        b = block.matrices
        G2 = _read(plan, task.g, block).square()  # [b, r, m]
        row_sq = G2.sum(2)  # [b, r]
        R_block = R[block.rows].view_as(row_sq)
        complete = sums["row_sq"].view(-1)[block.rows].view_as(row_sq) if "row_sq" in sums else row_sq
        R_block += (1 - task.beta2) * (complete / m + eps1)
        sums["grad_sq"][b] += row_sq.sum(1)
        sums["row_sum"][b] += R_block.sum(1)
        sums["col_sq"][b] += G2.sum(1)
        sums["col_ratio"][b] += G2.div_(R_block[:, :, None]).sum(1)
        if "param_sq" in sums:
            sums["param_sq"][b] += _weights(task, block).square().sum((1, 2))
    task.rows = R.view(matrices, n)


def _sweep_full(task: Task) -> None:
    """The sums of g^2, U^2 and p^2."""
    plan, sums = task.plan, task.sums
    for block in _blocks(task):
        G2 = _read(plan, task.g, block).square()
        sums["grad_sq"] += G2.sum()
        sums["update_sq"] += (G2 / _full_V(task, block, G2)).sum()
        if "param_sq" in sums:
            sums["param_sq"] += _weights(task, block).square().sum()


def _apply(task: Task) -> None:
    """C, RMS(U) and the step size from the sums; then U, momentum and decay block by block, committed where ok."""
    plan, hyper, sums, state = task.plan, task.hyper, task.sums, task.state
    _, n, m = plan.whole_dims
    rho = rho_at(hyper, task.lr, task.t)

    factors = _factors(task) if plan.factored else None
    mean_U2 = factors.mean_U2 if factors else sums["update_sq"] / max(m, 1)
    mean_p2 = sums["param_sq"] / max(n * m, 1) if hyper.scale_parameter else mean_U2
    if "means" in sums:
        mean_U2, mean_p2 = (mean.expand_as(mean_U2) for mean in sums["means"])
    rms_U = _rms(plan, mean_U2)
    clip = torch.ones_like(rms_U) if hyper.clip_threshold is None else (rms_U / hyper.clip_threshold).clamp(min=1)
    alpha = torch.ones_like(rms_U) * rho
    if hyper.scale_parameter:
        alpha *= _rms(plan, mean_p2).clamp(min=hyper.eps[1])
    # Sums that overflow, and weights that are not finite already, stop the step as a bad gradient does.
    ok = (sums["grad_sq"] + rms_U + alpha).isfinite().all()
    if "finite" in sums:  # a piece may have no matrices, and none to say it
        ok &= sums["finite"].isfinite().all()
    moves = ok & (rho != 0)

    for block in _blocks(task, whole_rows="exp_avg_scale" in state):
        g, p = _read(plan, task.g, block), _weights(task, block)  # [b, r, m]
        if factors:
            U = g * factors.a.view(-1)[block.rows].view(*g.shape[:2], 1)
            U *= factors.b[block.matrices, None, block.cols]
        else:
            V = _full_V(task, block, g.square())
            U = g * V.rsqrt()
            _commit(_piece(plan, state["exp_avg_sq"], block), V, ok)
        U /= block.spread(-clip if hyper.maximize else clip)
        step = _descend(task, block, U, block.spread(alpha), ok)
        if hyper.weight_decay:
            p = p - p * (hyper.weight_decay * block.spread(_decay_factor(task, rho, alpha)))
        _write_weights(task, block, p - step, moves)

    if factors:
        _commit(_ordered(state[plan.row_stat], plan.row_axes), factors.R, ok)
        _commit(_ordered(state[plan.col_stat], plan.col_axes), factors.C, ok)
    state["step"] += ok
    report = task.report
    counts = report.counts
    clipped = (clip > 1).sum() / max(len(clip), 1)
    counts += torch.stack([ok.float(), ok * clipped, (~ok).float()])
    _commit(report.update_rms, rms_U, ok)
    _commit(report.step_size, alpha, ok)


class Factors(NamedTuple):
    """The factored second moment: 1 / sqrt(V_ij) = a_i b_j."""

    R: Tensor  # [matrices, rows]
    C: Tensor  # [matrices, columns]
    a: Tensor  # [matrices, rows]: sqrt(mean(R) / R_i)
    b: Tensor  # [matrices, columns]: 1 / sqrt(C_j)
    mean_U2: Tensor  # [matrices]


def _factors(task: Task) -> Factors:
    """V_ij = R_i C_j / mean(R), never formed: the product R C would underflow for small gradients.

    The ratio mean(R) / R_i would overflow for large gradients beside an unseen row, so the roots are taken first.
    """
    plan, sums, R = task.plan, task.sums, task.rows
    assert R is not None
    _, n, m = plan.whole_dims
    C = _ordered(task.state[plan.col_stat], plan.col_axes).reshape(plan.dims[0], plan.dims[2])
    C = task.beta2 * C + (1 - task.beta2) * (sums["col_sq"] / n + task.hyper.eps[0])
    root_mean_R = (sums["row_sum"] / n).sqrt()[:, None]
    b = C.rsqrt()
    mean_U2 = ((sums["col_ratio"] / n).sqrt() * (root_mean_R * b)).square().sum(1) / m
    return Factors(R, C, root_mean_R * R.rsqrt(), b, mean_U2)


def _full_V(task: Task, block: Block, G2: Tensor) -> Tensor:
    """V <- beta2 V + (1 - beta2) (g^2 + eps1), for one block."""
    V = _read(task.plan, task.state["exp_avg_sq"], block)
    return task.beta2 * V + (1 - task.beta2) * (G2 + task.hyper.eps[0])


def _descend(task: Task, block: Block, U: Tensor, alpha: Tensor, ok: Tensor) -> Tensor:
    """What the update subtracts from p: alpha U, or its momentum, which is committed. Overwrites U.

    p receives M as computed. What is kept of it is rounded as weights are; to nearest, an average in bfloat16 would
    stop short of its mean.
    """
    hyper = task.hyper
    if not hyper.beta1:
        return U.mul_(alpha)
    beta1, scaled = hyper.beta1, hyper.momentum_mode == "scaled"
    if scaled:
        U *= alpha
    M = beta1 * _momentum(task, block).to(U.dtype).reshape(U.shape)
    U *= 1 - beta1
    M += U
    _write_momentum(task, block, M, ok)
    step = U.add_(M, alpha=beta1) if hyper.nesterov else M
    return step if scaled else step * alpha


def _momentum(task: Task, block: Block) -> Tensor:
    if "exp_avg_scale" not in task.state:
        return _piece(task.plan, task.state["exp_avg"], block)
    kept = _piece(task.plan, task.state["exp_avg_code"], block)
    scales = _scales(task, block)
    return dequantize(kept.reshape(-1, block.shape[2]), scales.reshape(-1, scales.shape[-1]))


def _write_momentum(task: Task, block: Block, M: Tensor, ok: Tensor) -> None:
    kept = _piece(task.plan, task.state["exp_avg_code" if "exp_avg_scale" in task.state else "exp_avg"], block)
    if "exp_avg_scale" in task.state:
        rows, stochastic = M.view(-1, block.shape[2]).float(), task.hyper.rounding == "stochastic"
        bits = _random_bits(task, block, rows, task.streams.momentum) if stochastic else None
        kept_M, scale = quantize(rows, bits)
        _commit(_scales(task, block), scale, ok)
    else:
        kept_M = _rounded(task, block, M, kept.dtype, task.streams.momentum)
    _commit(kept, kept_M, ok)


def _scales(task: Task, block: Block) -> Tensor:
    """Those of one-byte momentum, as a view.  # [*row axes of the block, blocks of MOMENTUM_BLOCK columns]"""
    return _ordered(task.state["exp_avg_scale"], task.plan.row_axes)[block.index[: len(task.plan.row_axes)]]


def _decay_factor(task: Task, rho: Any, alpha: Tensor) -> Tensor:
    """What p shrinks by, per unit of weight decay.  # [matrices]"""
    mode = task.hyper.weight_decay_mode
    if mode == "scaled_lr":
        return alpha
    lr = rho if task.lr is None else task.lr
    return torch.ones_like(alpha) * {"lr": lr, "independent": 1.0, "lr_squared": rho * rho}[mode]


def _weights(task: Task, block: Block) -> Tensor:
    """One block of p, with the bits that the state keeps of it.  # [b, r, m]"""
    if not task.plan.planes:
        return _read(task.plan, task.p, block)
    pieces = [task.p, *(task.state[plane] for plane in task.plan.planes)]
    return join_weight(*(_piece(task.plan, piece, block) for piece in pieces)).reshape(block.shape)


def _write_weights(task: Task, block: Block, x: Tensor, moves: Tensor) -> None:
    plan = task.plan
    if plan.planes:
        parts = split_weight(x, 16 + 8 * len(plan.planes))
    else:
        parts = (_rounded(task, block, x, task.p.dtype, task.streams.weights),)
    pieces = [task.p, *(task.state[plane] for plane in plan.planes)]
    for piece, part in zip(pieces, parts, strict=True):
        _commit(_piece(plan, piece, block), part, moves)


def _rounded(task: Task, block: Block, x: Tensor, dtype: torch.dtype, stream: tuple[int, int]) -> Tensor:
    if dtype == x.dtype or x.dtype == torch.float64 or task.hyper.rounding == "nearest":
        return x.to(dtype)
    return round_stochastic(x, dtype, _random_bits(task, block, x, stream))


def _random_bits(task: Task, block: Block, x: Tensor, stream: tuple[int, int]) -> Tensor:
    """For each element of x, which is one block."""
    t = task.t
    key: Any = step_key(stream, t.int()) if isinstance(t, Tensor) else step_key(stream, int(t))
    return random_bits(key, _element_index(task.plan, block, x.device, task.places).view_as(x))


def _rms(plan: TensorPlan, mean_square: Tensor) -> Tensor:
    """The root, per matrix or shared by all matrices of the tensor.  # [matrices] -> [matrices]"""
    if plan.shared_rms and mean_square.numel():
        mean_square = mean_square.mean().expand_as(mean_square)
    return mean_square.sqrt()


def _time(task: Task) -> Any:
    """t of this update. On the CPU a number; elsewhere a tensor, whose value nobody waits for."""
    t = task.state["step"] + 1
    return t.item() if t.device.type in HOST else exact(t)


def _commit(target: Tensor, value: Tensor, where: Tensor) -> None:
    target.copy_(torch.where(where, value.to(target.dtype).reshape(target.shape), target))


# Blocks: how a parameter is read piece by piece.


def block_size(device: torch.device) -> int:
    return BLOCK if device.type in HOST else BLOCK * ACCELERATED


class Block(NamedTuple):
    """A run of whole rows of a factored parameter, of columns of one row, or of elements of a full V.

    Attributes:
        index: what to index a tensor in the plan's axis order with.
        rows: which of the (matrices * rows) rows these are.
        matrices: which matrices they belong to.
        cols: which of the columns.
        shape: the block as [matrices, rows, columns].
    """

    index: tuple[slice, ...]
    rows: slice
    matrices: slice
    cols: slice
    shape: tuple[int, int, int]

    def spread(self, scalars: Tensor) -> Tensor:
        """One number per matrix, to broadcast over the block.  # [all matrices] -> [matrices, 1, 1]"""
        return scalars[self.matrices, None, None]


def _blocks(task: Task, whole_rows: bool = True) -> list[Block]:
    """The blocks in their order. Only a sweep needs whole rows; without, wide rows are cut as well."""
    plan, budget = task.plan, block_size(task.p.device)
    sizes = tuple(plan.shape[axis] for axis in plan.order)
    _, n, m = plan.dims
    cuts = _cuts if task.places is None else _cuts.__wrapped__  # as many as there were rows in any step
    if plan.view and (whole_rows or m <= budget):
        lead = len(plan.view.batch) + len(plan.view.rows)
        runs = cuts(sizes[:lead], m, budget)
        return [
            Block(
                index,
                slice(r, r + rows),
                slice(r // n, -(-(r + rows) // n)),
                slice(0, m),
                (max(rows // n, 1), min(rows, n), m),
            )
            for index, r, rows in runs
        ]
    blocks = []
    for index, first, count in cuts(sizes, 1, budget):
        row, col = divmod(first, m)
        matrix = row // n
        blocks.append(
            Block(index, slice(row, row + 1), slice(matrix, matrix + 1), slice(col, col + count), (1, 1, count))
        )
    return blocks


@lru_cache(maxsize=1024)
def _cuts(sizes: Shape, weight: int, budget: int) -> tuple[tuple[tuple[slice, ...], int, int], ...]:
    """Cut a tensor of these sizes, whose entries weigh `weight` each, into row-major runs that weigh up to `budget`.

    Gives (index, first entry, number of entries). Every run takes whole inner axes, part of one axis, and one position
    of each outer axis.
    """
    return tuple(_runs(sizes, max(budget // max(weight, 1), 1)))


def _runs(sizes: Shape, budget: int) -> Iterator[tuple[tuple[slice, ...], int, int]]:
    inner, axis = 1, len(sizes)
    while axis and inner * sizes[axis - 1] <= budget:
        axis -= 1
        inner *= sizes[axis]
    if axis == 0:
        if inner:
            yield (), 0, inner
        return
    axis -= 1
    pieces = min(-(-sizes[axis] * inner // budget), sizes[axis])
    bounds = [sizes[axis] * piece // pieces for piece in range(pieces + 1)]
    for outer in range(math.prod(sizes[:axis])):
        index, rest = [], outer
        for size in reversed(sizes[:axis]):
            rest, position = divmod(rest, size)
            index.insert(0, slice(position, position + 1))
        for low, high in pairwise(bounds):
            yield (*index, slice(low, high)), (outer * sizes[axis] + low) * inner, (high - low) * inner


def _piece(plan: TensorPlan, tensor: Tensor, block: Block) -> Tensor:
    """One block of a tensor of the parameter's shape, as a view."""
    return tensor.detach().permute(plan.order)[block.index]


def _read(plan: TensorPlan, tensor: Tensor, block: Block) -> Tensor:
    """One block, in the dtype that the plan computes in; contiguous, so that sums do not depend on strides."""
    return _piece(plan, tensor, block).to(plan.compute_dtype).reshape(block.shape).contiguous()


def _element_index(plan: TensorPlan, block: Block, device: torch.device, places: Tensor | None) -> Tensor:
    """The row-major index, in the whole parameter, of each element of a block."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for position, axis in enumerate(plan.order):
        cut = block.index[position] if position < len(block.index) else slice(0, plan.shape[axis])
        stride = math.prod(plan.whole[axis + 1 :])
        here = torch.arange(cut.start, cut.stop, device=device) if axis or places is None else places[cut]
        index = index[..., None] + (here + plan.offset[axis]) * stride
    return index


def _ordered(statistic: Tensor, axes: Axes) -> Tensor:
    """A statistic over `axes` of the parameter, its axes brought into that order: a view. Further axes stay behind."""
    kept = sorted(axes)
    return statistic.permute([kept.index(axis) for axis in axes] + list(range(len(axes), statistic.dim())))
