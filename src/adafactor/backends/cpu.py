"""The CPU kernels of `csrc/`, which take the whole model in one call.

They are a library with a plain C interface, so that one build serves every Python and every torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor._plan import TensorPlan
from adafactor.backends import Task, _records
from adafactor.backends._records import ready as ready

name = "cpu"

_SWEEP, _APPLY = 1, 2


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
    if functions.adafactor_task_bytes() != _records.BYTES:
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


def describe() -> str:
    return f"CPU kernels, {instruction_set()}"


def refuses_parameter(plan: TensorPlan, p: Tensor) -> str | None:
    """Why the kernels cannot take a parameter, whatever its gradient, or None."""
    if p.device.type != "cpu":
        return f"it is on {p.device.type}"
    return missing() or _records.refuses_parameter(plan, p)


def refuses(task: Task) -> str | None:
    """Why the kernels cannot take this task, or None."""
    return _records.refuses(task, sums_of_squares=task.plan.dims[0] + 1)


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
    versions = _records.versions_of(tasks)
    table = _records.table(tasks, versions, [_records.number(task.lr) for task in tasks])
    address = ctypes.addressof(ctypes.c_char.from_buffer(table))
    sizes = ctypes.c_void_p(address), ctypes.c_int64(count), ctypes.c_int64(phases)
    size = functions.adafactor_workspace(*sizes, ctypes.c_int64(threads))
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    place = ctypes.c_void_p(workspace.data_ptr())
    functions.adafactor_run(*sizes, place, ctypes.c_int64(threads), ctypes.c_int64(instructions))
    if phases & _APPLY:
        _records.after_write(tasks, versions)
