"""The CPU kernels of `csrc/`, which take the whole model in one call.

They are a library with a plain C interface, so that one build serves every Python and every torch. This file packs what
they need, as `struct Task` of `csrc/task.h` has it, and keeps what must hold around a write through raw pointers.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import struct
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor._hyper import Hyper, dtype_name, dtype_of
from adafactor._plan import TensorPlan
from adafactor.backends import Task

name = "cpu"

_NOW = struct.Struct("4q d")  # the part of a task that changes from step to step: zeros until a run fills it in
_G, _SUMS, _ROWS, _KNOWN, _LR = range(5)
_PREPARED = struct.Struct("10q 13q 7q 8d 4i")
_TASK_BYTES = _NOW.size + _PREPARED.size
_SWEEP, _APPLY = 1, 2
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, None: 3, torch.int8: 4}
_MIXTURES = {  # of weights and gradients
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
}
_DECAY = {"lr": 0, "scaled_lr": 1, "independent": 2, "lr_squared": 3}


class _Library(NamedTuple):
    functions: Any
    instruction_sets: tuple[str, ...]  # that this machine has, the best first
    problem: str | None


@lru_cache(maxsize=1)
def _library() -> _Library:
    spec = importlib.util.find_spec("adafactor._kernels")
    if spec is None or spec.origin is None:
        return _Library(None, (), "the CPU kernels were not built, for want of a C++ compiler when it was installed")
    try:
        functions = ctypes.CDLL(spec.origin)
    except OSError as error:
        return _Library(None, (), f"the CPU kernels do not load: {error}")
    for function in (functions.adafactor_task_bytes, functions.adafactor_workspace):
        function.restype = ctypes.c_int64
    if functions.adafactor_task_bytes() != _TASK_BYTES:
        return _Library(None, (), "the CPU kernels belong to another version of adafactor; install it again")
    functions.adafactor_run.restype = None
    functions.adafactor_instruction_set.restype = ctypes.c_char_p
    sets: list[str] = []
    while (found := functions.adafactor_instruction_set(ctypes.c_int64(len(sets)))) is not None:
        sets.append(found.decode())
    return _Library(functions, tuple(sets), None)


def missing() -> str | None:
    """Why there are no kernels here, or None."""
    return _library().problem


def instruction_set() -> str:
    """What the kernels use here."""
    return _library().instruction_sets[0]


def refuses_parameter(plan: TensorPlan, p: Tensor) -> str | None:
    """Why the kernels cannot take a parameter, whatever its gradient, or None."""
    if p.device.type != "cpu":
        return f"no kernels for {p.device.type} in this version"
    if missing():
        return missing()
    if p.dtype not in _FORMATS:
        return f"no CPU kernels for {plan.dtype}"
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
    """Whether the kernels can take the task because nothing but values has changed since they last did."""
    prepared = task.kept.prepared
    return prepared is not None and prepared.holds(task)


def refuses(task: Task) -> str | None:
    """Why the kernels cannot take this task, or None: its gradient, or tensors that were exchanged by hand."""
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
    kept.prepared = _prepare(task)
    return None


def _refuses_tensors(task: Task) -> str | None:
    p, g = task.p, task.g
    if (p.dtype, g.dtype) not in _MIXTURES:
        return f"no CPU kernels for weights in {dtype_name(p.dtype)} with gradients in {dtype_name(g.dtype)}"
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


def step(tasks: Sequence[Task]) -> None:
    _run(tasks, _SWEEP | _APPLY)


def sweep(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if task.plan.factored:
            matrices, rows, _ = task.plan.dims
            task.rows = torch.empty(matrices, rows, dtype=torch.float32, device="cpu")
    _run(tasks, _SWEEP)


def apply(tasks: Sequence[Task]) -> None:
    _run(tasks, _APPLY)


def _run(tasks: Sequence[Task], phases: int, instructions: int = 0) -> None:
    functions, count, threads = _library().functions, len(tasks), torch.get_num_threads()
    if not count:
        return
    versions = [None if task.p.is_inference() else task.p._version for task in tasks]
    table = _table(tasks, versions)
    address = ctypes.addressof(ctypes.c_char.from_buffer(table))
    sizes = ctypes.c_void_p(address), ctypes.c_int64(count), ctypes.c_int64(phases)
    size = functions.adafactor_workspace(*sizes, ctypes.c_int64(threads))
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    place = ctypes.c_void_p(workspace.data_ptr())
    functions.adafactor_run(*sizes, place, ctypes.c_int64(threads), ctypes.c_int64(instructions))
    if phases & _APPLY:
        _after_write(tasks, versions)


def _table(tasks: Sequence[Task], versions: list[int | None]) -> bytearray:
    """The tasks as `csrc/task.h` has them, filled in column by column: that is quick where they are thousands."""
    table = bytearray().join([task.kept.prepared.packed for task in tasks])
    words, numbers = memoryview(table).cast("q"), memoryview(table).cast("d")
    each = _TASK_BYTES // 8
    words[_G::each] = array("q", [task.g.data_ptr() for task in tasks])
    if tasks[0].sums:
        words[_SUMS::each] = array("q", [task.sums["grad_sq"].data_ptr() for task in tasks])
        words[_ROWS::each] = array("q", [0 if task.rows is None else task.rows.data_ptr() for task in tasks])
    words[_KNOWN::each] = array(
        "q", [task.kept.version == now is not None for task, now in zip(tasks, versions, strict=True)]
    )
    numbers[_LR::each] = array("d", [_number(task.lr) for task in tasks])
    return table


class _Prepared(NamedTuple):
    """The part of a task that stays the same, and what must be as it was for that."""

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


def _prepare(task: Task) -> _Prepared:
    plan, hyper, p, kept = task.plan, task.hyper, task.p, task.kept
    tensors = {spec.name: task.state[spec.name] for spec in plan.state}
    if hyper.scale_parameter and kept.param_sq is None:
        kept.param_sq = torch.empty(plan.dims[0] + 1, dtype=torch.float32, device="cpu")
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
        *_geometry(plan),
        _FORMATS[p.dtype],
        _FORMATS[task.g.dtype],
        _FORMATS[None if momentum is None else momentum.dtype],
        plan.factored,
        plan.shared_rms,
        *_modes(hyper),
        *task.streams.weights,
        *task.streams.momentum,
    )
    state_of = itemgetter(*tensors)
    state = state_of(tensors)
    addresses = tuple(map(Tensor.data_ptr, state))
    return _Prepared(hyper, p.shape, task.g.dtype, p.data_ptr(), state, addresses, state_of, bytes(_NOW.size) + packed)


def _is_run(plan: TensorPlan) -> bool:
    """Whether the indices of the elements here are linear in (matrix, row, column): what is split is an outer axis."""
    view = plan.view
    inner = view.batch[1:] + view.rows[1:] + view.cols if view else range(1, len(plan.shape))
    return all(plan.shape[axis] == plan.whole[axis] for axis in inner)


def _geometry(plan: TensorPlan) -> tuple[int, ...]:
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
        _number(hyper.clip_threshold),
        hyper.decay_rate,
        _number(hyper.beta1),
        _number(hyper.beta2),
        _number(hyper.beta2_cap),
        hyper.weight_decay,
    )


def _number(value: float | Tensor | None) -> float:
    return math.nan if value is None else float(value)


def _after_write(tasks: Sequence[Task], versions: list[int | None]) -> None:
    """Autograd learns that the weights have changed; RMS(p) is known until somebody else changes them."""
    written = [(task, version) for task, version in zip(tasks, versions, strict=True) if version is not None]
    torch.autograd.graph.increment_version([task.p for task, _ in written])
    for task, version in written:
        task.kept.version = version + 1
