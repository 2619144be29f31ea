"""What kernels that see raw pointers are given: one record per parameter, and what has to hold around their writes.

`csrc/task.h` and `_triton_kernels.py` read the record as `FIELDS` has it, 8 bytes each: addresses, integers, float64
(NaN for None), and two 32-bit words for a stream.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor._hyper import Hyper, dtype_name, dtype_of
from adafactor._plan import TensorPlan
from adafactor.backends import Task

_NOW = ["g", "sums", "new_r", "known", "lr"]  # what changes from step to step: zeros until `table` fills it in
_PLACES = ["p", "low", "lowest", "m", "m_scale", "r", "c", "step", "report", "param_sq"]
_GEOMETRY = ["matrices", "rows", "cols", "whole_rows", "whole_cols", "first", "matrix_stride", "row_stride"]
_KINDS = ["p_format", "g_format", "m_format", "factored", "shared_rms"]
_MODES = ["relative_step", "warmup_init", "scaled_momentum", "nesterov", "maximize", "decay", "stochastic"]
_REALS = ["eps1", "eps2", "clip_threshold", "decay_rate", "beta1", "beta2", "beta2_cap", "weight_decay"]
FIELDS = (*_NOW, *_PLACES, *_GEOMETRY, *_KINDS, *_MODES, *_REALS, "weights_stream", "momentum_stream")
BYTES = 8 * len(FIELDS)
_PREPARED = struct.Struct(f"{len(_PLACES + _GEOMETRY + _KINDS + _MODES)}q {len(_REALS)}d 4i")

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, None: 3, torch.int8: 4}
_MIXTURES = {  # of weights and gradients
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
}
_DECAY = {"lr": 0, "scaled_lr": 1, "independent": 2, "lr_squared": 3}


def refuses_parameter(plan: TensorPlan, p: Tensor) -> str | None:
    """Why no such kernels can take a parameter, whatever its gradient, or None."""
    if p.dtype not in FORMATS:
        return f"no kernels for {plan.dtype}"
    if any(spec.name == "row_sq" for spec in plan.sums) or plan.row_stat == "exp_avg_sq_col":
        return "its columns are split over ranks"
    if any(spec.name == "means" for spec in plan.sums):
        return "matrices on several ranks share one RMS"
    if plan.order != tuple(range(len(plan.shape))):
        return "the axes of its matrix view are not in memory order"
    if not _is_run(plan):
        return "its part on this rank is not a run of whole rows"
    if not p.is_contiguous() or p.is_neg():
        return "it is not contiguous"
    if p.numel() == 0:
        return "it has no elements"
    return None if p.data_ptr() else "it has no memory"


def ready(task: Task) -> bool:
    """Whether kernels can take the task because nothing but values has changed since they last did."""
    prepared = task.kept.prepared
    return prepared is not None and prepared.holds(task)


def refuses(task: Task, sums_of_squares: int) -> str | None:
    """Why kernels cannot take this task, or None: its gradient, or tensors that were exchanged by hand.

    Args:
        sums_of_squares: numbers that they keep for RMS(p) from step to step.
    """
    g, kept = task.g, task.kept
    refusal = _refuses_tensors(task)
    if refusal:
        return refusal
    if not g.is_contiguous() or g.is_neg():
        return "its gradient is not contiguous"
    if not g.data_ptr():
        return "its gradient has no memory"
    if kept.prepared is None or kept.prepared.weights != task.p.data_ptr():
        kept.version = None
    if task.hyper.scale_parameter and kept.param_sq is None:
        kept.param_sq = torch.empty(sums_of_squares, dtype=torch.float32, device=task.p.device)
    kept.prepared = _prepare(task)
    return None


def _refuses_tensors(task: Task) -> str | None:
    p, g = task.p, task.g
    if (p.dtype, g.dtype) not in _MIXTURES:
        return f"no kernels for weights in {dtype_name(p.dtype)} with gradients in {dtype_name(g.dtype)}"
    if g.shape != p.shape or g.device != p.device:
        return "its gradient does not fit"
    for spec in task.plan.state:
        tensor = task.state[spec.name]
        if (
            tensor.shape != spec.shape
            or tensor.dtype != dtype_of(spec.dtype)
            or tensor.device != p.device
            or not tensor.is_contiguous()
            or not tensor.data_ptr()
        ):
            return f"its {spec.name} is not as planned"
    return None if p.data_ptr() else "it has no memory"


def versions_of(tasks: Sequence[Task]) -> list[int | None]:
    """Those of the weights; they say whether autograd knows of a change."""
    return [None if task.p.is_inference() else task.p._version for task in tasks]


def knows_param_sq(task: Task, version: int | None) -> bool:
    """Whether what the last write left for RMS(p) still holds, for all that autograd knows."""
    return task.kept.version == version is not None


def table(tasks: Sequence[Task], versions: Sequence[int | None], lrs: Sequence[float]) -> bytearray:
    """The records, filled in column by column: that is quick where they are thousands."""
    records = bytearray().join([task.kept.prepared.packed for task in tasks])
    words, numbers, each = memoryview(records).cast("q"), memoryview(records).cast("d"), len(FIELDS)

    def column(name: str) -> slice:
        return slice(FIELDS.index(name), None, each)

    words[column("g")] = array("q", [task.g.data_ptr() for task in tasks])
    if tasks[0].sums:
        words[column("sums")] = array("q", [task.sums["grad_sq"].data_ptr() for task in tasks])
        words[column("new_r")] = array("q", [0 if task.rows is None else task.rows.data_ptr() for task in tasks])
    words[column("known")] = array("q", map(knows_param_sq, tasks, versions))
    numbers[column("lr")] = array("d", lrs)
    return records


def after_write(tasks: Sequence[Task], versions: Sequence[int | None]) -> None:
    """Autograd learns that the weights have changed; RMS(p) is known until somebody else changes them."""
    written = [(task, version) for task, version in zip(tasks, versions, strict=True) if version is not None]
    torch.autograd.graph.increment_version([task.p for task, _ in written])
    for task, version in written:
        task.kept.version = version + 1


class Prepared(NamedTuple):
    """The part of a record that stays the same, and what must be as it was for that."""

    hyper: Hyper
    shape: torch.Size
    gradient_dtype: torch.dtype
    weights: int  # address of p
    state: tuple[Tensor, ...]
    addresses: tuple[int, ...]  # of the state
    state_of: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    packed: bytes

    def holds(self, task: Task) -> bool:
        p, g = task.p, task.g
        return (
            task.hyper is self.hyper
            and p.data_ptr() == self.weights
            and p.shape == self.shape
            and p.is_contiguous()
            and g.dtype is self.gradient_dtype
            and g.layout is torch.strided
            and g.shape == self.shape
            and g.is_contiguous()
            and not g.is_neg()
            and g.data_ptr() != 0
            # `state` keeps those tensors alive, so that no others can stand at their addresses.
            and tuple(map(Tensor.data_ptr, self.state_of(task.state))) == self.addresses
        )


def _prepare(task: Task) -> Prepared:
    plan, hyper, p, kept = task.plan, task.hyper, task.p, task.kept
    tensors = {spec.name: task.state[spec.name] for spec in plan.state}
    momentum = tensors.get("exp_avg", tensors.get("exp_avg_code"))
    places = (
        p,
        tensors.get("weight_low"),
        tensors.get("weight_lowest"),
        momentum,
        tensors.get("exp_avg_scale"),
        tensors[plan.row_stat if plan.factored else "exp_avg_sq"],
        tensors.get(plan.col_stat),
        tensors["step"],
        task.report.values,
        kept.param_sq if hyper.scale_parameter else None,
    )
    packed = _PREPARED.pack(
        *(0 if tensor is None else tensor.data_ptr() for tensor in places),
        *geometry(plan),
        FORMATS[p.dtype],
        FORMATS[task.g.dtype],
        FORMATS[None if momentum is None else momentum.dtype],
        plan.factored,
        plan.shared_rms,
        *_modes(hyper),
        *task.streams.weights,
        *task.streams.momentum,
    )
    state_of = itemgetter(*tensors)
    state = state_of(tensors)
    addresses = tuple(map(Tensor.data_ptr, state))
    record = bytes(BYTES - len(packed)) + packed
    return Prepared(hyper, p.shape, task.g.dtype, p.data_ptr(), state, addresses, state_of, record)


def _is_run(plan: TensorPlan) -> bool:
    """Whether the indices of the elements here are linear in (matrix, row, column): what is split is an outer axis."""
    view = plan.view
    inner = view.batch[1:] + view.rows[1:] + view.cols if view else range(1, len(plan.shape))
    return all(plan.shape[axis] == plan.whole[axis] for axis in inner)


def geometry(plan: TensorPlan) -> tuple[int, ...]:
    """[matrices, rows, columns] here; rows and columns of the whole; the first element's index and its strides."""
    _, rows, cols = plan.whole_dims
    first = 0
    for offset, size in zip(plan.offset, plan.whole, strict=True):
        first = first * size + offset
    return *plan.dims, rows, cols, first, rows * cols, cols


@lru_cache
def _modes(hyper: Hyper) -> tuple:
    return (
        hyper.relative_step,
        hyper.warmup_init,
        hyper.momentum_mode == "scaled",
        hyper.nesterov,
        hyper.maximize,
        _DECAY[hyper.weight_decay_mode],
        hyper.rounding == "stochastic",
        *hyper.eps,
        number(hyper.clip_threshold),
        hyper.decay_rate,
        number(hyper.beta1),
        number(hyper.beta2),
        number(hyper.beta2_cap),
        hyper.weight_decay,
    )


def number(value: float | Tensor | None) -> float:
    return math.nan if value is None else float(value)
