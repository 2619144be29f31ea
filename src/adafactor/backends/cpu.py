"""The CPU kernels of `csrc/`, which take the whole model in one call.

They are a library with a plain C interface, so that one build serves every Python and every torch. This file packs what
they need, as `struct Task` of `csrc/task.h` has it, and keeps what must hold around a write through raw pointers.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor._hyper import Hyper, dtype_name, dtype_of
from adafactor._plan import TensorPlan
from adafactor.backends import Task

name = "cpu"

_NOW = struct.Struct("4q d")  # the part of a task that changes from step to step
_PREPARED = struct.Struct("7q 9q 7q 8d 4i")
_TASK_BYTES = _NOW.size + _PREPARED.size
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
    if plan.order != tuple(range(len(plan.shape))):
        return "the axes of its matrix view are not in memory order"
    if not p.is_contiguous() or p.is_neg():
        return "it is not contiguous"
    if p.numel() == 0:
        return "it has no elements"
    return None if p.data_ptr() else "it has no memory"


def refuses(task: Task) -> str | None:
    """Why the kernels cannot take this task, or None: its gradient, or tensors that were exchanged by hand."""
    g, prepared = task.g, task.kept.prepared
    if prepared is None or not prepared.holds(task):
        refusal = _refuses_tensors(task)
        if refusal:
            return refusal
        task.kept.prepared = _prepare(task)
    if not g.is_contiguous() or g.is_neg():
        return "its gradient is not contiguous"
    return None if g.data_ptr() else "its gradient has no memory"


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
    table = bytearray().join(map(_packed, tasks))
    address = ctypes.addressof(ctypes.c_char.from_buffer(table))
    sizes = ctypes.c_void_p(address), ctypes.c_int64(count), ctypes.c_int64(phases)
    size = functions.adafactor_workspace(*sizes, ctypes.c_int64(threads))
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    place = ctypes.c_void_p(workspace.data_ptr())
    functions.adafactor_run(*sizes, place, ctypes.c_int64(threads), ctypes.c_int64(instructions))
    if phases & _APPLY:
        _after_write(tasks)


def _packed(task: Task) -> bytes:
    kept, sums, rows, lr = task.kept, task.sums, task.rows, task.lr
    now = _NOW.pack(
        task.g.data_ptr(),
        sums["grad_sq"].data_ptr() if sums else 0,
        0 if rows is None else rows.data_ptr(),
        kept.mark is not None and kept.mark == _mark(task.p),
        math.nan if lr is None else float(lr),
    )
    return now + kept.prepared.packed


class _Prepared(NamedTuple):
    """The part of a task that stays the same, and what must be as it was for that."""

    hyper: Hyper
    numel: int
    gradient_dtype: torch.dtype
    weights: int  # address of p
    state: list[tuple[str, Tensor, int]]  # and each tensor's address
    packed: bytes

    def holds(self, task: Task) -> bool:
        g, state = task.g, task.state
        if task.hyper is not self.hyper or g.dtype is not self.gradient_dtype or g.numel() != self.numel:
            return False
        for name, tensor, address in self.state:
            if state[name] is not tensor or tensor.data_ptr() != address:
                return False
        return task.p.data_ptr() == self.weights


def _prepare(task: Task) -> _Prepared:
    plan, hyper, p, kept = task.plan, task.hyper, task.p, task.kept
    tensors = {spec.name: task.state[spec.name] for spec in plan.state}
    if hyper.scale_parameter and kept.param_sq is None:
        kept.param_sq = torch.empty(plan.dims[0] + 1, dtype=torch.float32, device="cpu")
    momentum = tensors.get("exp_avg")
    places = (
        p,
        momentum,
        tensors["exp_avg_sq_row" if plan.factored else "exp_avg_sq"],
        tensors.get("exp_avg_sq_col"),
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
    state = [(name, tensor, tensor.data_ptr()) for name, tensor in tensors.items()]
    return _Prepared(hyper, p.numel(), task.g.dtype, p.data_ptr(), state, packed)


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


def _after_write(tasks: Sequence[Task]) -> None:
    """Autograd learns that the weights have changed; RMS(p) is known until somebody else changes them."""
    torch.autograd.graph.increment_version([task.p for task in tasks if not task.p.is_inference()])
    for task in tasks:
        if task.hyper.scale_parameter:
            task.kept.mark = _mark(task.p)
