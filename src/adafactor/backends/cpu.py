"""The CPU kernels of `csrc/`, which take the whole model in one call.

They are a library with a plain C interface, so that one build serves every Python and every torch. This file packs what
they need, as `struct Task` of `csrc/task.h` has it, and keeps what must hold around a write through raw pointers.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import struct
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor._hyper import Hyper, caller_level, dtype_of
from adafactor._plan import TensorPlan
from adafactor.backends import Task, Written

name = "cpu"

_TASK = struct.Struct("11q 9q 7q 9d 4i")
_KNOWN = struct.Struct("q")  # in: param_sq holds; out: _CHANGED where p had been changed nevertheless
_KNOWN_AT, _CHANGED = 10 * 8, 2
_SWEEP, _APPLY = 1, 2
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, None: 3}
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
    if functions.adafactor_task_bytes() != _TASK.size:
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
    if plan.order != tuple(range(len(plan.shape))):
        return "the axes of its matrix view are not in memory order"
    if not p.is_contiguous():
        return "it is not contiguous"
    if p.numel() == 0 or not p.data_ptr():
        return "it has no elements"
    return None


def refuses(task: Task) -> str | None:
    """Why the kernels cannot take this task, or None: its gradient, or tensors that were exchanged by hand."""
    p, g = task.p, task.g
    if not g.is_contiguous() or g.is_neg():
        return "its gradient is not contiguous"
    if (p.dtype, g.dtype) not in _MIXTURES:
        return f"no CPU kernels for weights in {task.plan.dtype} with gradients in {str(g.dtype).removeprefix('torch.')}"
    if g.numel() != p.numel() or g.device != p.device:
        return "its gradient does not fit"
    for spec in task.plan.state:
        tensor = task.state[spec.name]
        if tensor.numel() != spec.numel or tensor.dtype != dtype_of(spec.dtype) or not tensor.is_contiguous():
            return f"its {spec.name} is not as planned"
    return None


def step(tasks: Sequence[Task]) -> None:
    _run(tasks, _SWEEP | _APPLY)


def sweep(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if task.plan.factored:
            matrices, rows, _ = task.plan.dims
            task.rows = torch.empty(matrices, rows, dtype=torch.float32)
    _run(tasks, _SWEEP)


def apply(tasks: Sequence[Task]) -> None:
    _run(tasks, _APPLY)


def _run(tasks: Sequence[Task], phases: int, instructions: int = 0) -> None:
    functions, count, threads = _library().functions, len(tasks), torch.get_num_threads()
    table = bytearray(count * _TASK.size)
    for index, task in enumerate(tasks):
        _pack(table, index * _TASK.size, task)
    address = ctypes.addressof(ctypes.c_char.from_buffer(table))
    sizes = ctypes.c_void_p(address), ctypes.c_int64(count), ctypes.c_int64(phases)
    workspace = torch.empty(functions.adafactor_workspace(*sizes, ctypes.c_int64(threads)), dtype=torch.uint8)
    place = ctypes.c_void_p(workspace.data_ptr())
    functions.adafactor_run(*sizes, place, ctypes.c_int64(threads), ctypes.c_int64(instructions))
    if phases & _APPLY:
        _after_write(tasks, table)


def _pack(table: bytearray, at: int, task: Task) -> None:
    state, sums, written = task.state, task.sums, task.written
    momentum = state.get("exp_avg")
    factored = task.plan.factored
    geometry, modes = _geometry(task.plan), _modes(task.hyper)
    known = 0
    if task.hyper.scale_parameter:
        if written.param_sq is None:
            written.param_sq = torch.empty(task.plan.dims[0], dtype=torch.float32)
        known = written.trusted and written.mark == _mark(task.p)
    _TASK.pack_into(
        table,
        at,
        task.p.data_ptr(),
        task.g.data_ptr(),
        0 if momentum is None else momentum.data_ptr(),
        state["exp_avg_sq_row" if factored else "exp_avg_sq"].data_ptr(),
        state["exp_avg_sq_col"].data_ptr() if factored else 0,
        state["step"].data_ptr(),
        task.report.values.data_ptr(),
        0 if not task.hyper.scale_parameter else written.param_sq.data_ptr(),
        sums["grad_sq"].data_ptr() if sums else 0,
        0 if task.rows is None else task.rows.data_ptr(),
        known,
        *geometry,
        _FORMATS[task.p.dtype],
        _FORMATS[task.g.dtype],
        _FORMATS[None if momentum is None else momentum.dtype],
        factored,
        task.plan.shared_rms,
        *modes,
        math.nan if task.lr is None else float(task.lr),
        *task.streams.weights,
        *task.streams.momentum,
    )


def _geometry(plan: TensorPlan) -> tuple[int, int, int, int]:
    """[matrices, rows, columns], and the index of the first element."""
    return *plan.dims, 0


@lru_cache
def _modes(hyper: Hyper) -> tuple:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

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


def _mark(p: Tensor) -> tuple[int, int] | None:
    return None if p.is_inference() else (p.data_ptr(), p._version)


def _after_write(tasks: Sequence[Task], table: bytearray) -> None:
    """Autograd learns that the weights have changed; RMS(p) is known until somebody else changes them."""
    torch.autograd.graph.increment_version([task.p for task in tasks if not task.p.is_inference()])
    for index, task in enumerate(tasks):
        if not task.hyper.scale_parameter:
            continue
        written = task.written
        written.mark = _mark(task.p)
        if _KNOWN.unpack_from(table, index * _TASK.size + _KNOWN_AT)[0] == _CHANGED:
            _distrust(task.plan.name, written)


def _distrust(parameter: str, written: Written) -> None:
    written.trusted = False
    warnings.warn(
        f"parameter {parameter!r} was changed between two steps in a way that autograd cannot see (through .data or "
        "another library), so its last step was scaled by the RMS it had before; from now on its RMS is computed anew in "
        "every step. Change weights under torch.no_grad() to keep the faster way.",
        stacklevel=caller_level(),
    )
