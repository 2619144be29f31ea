"""Bytes by component: planned for a model (`report`), measured for a call (`peak_allocated`)."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from adafactor._hyper import dtype_of
from adafactor._plan import TensorPlan, first_piece, named_shapes, plan

WORKSPACE = 4 << 20  # what a step may allocate besides its sums, whatever the size of the model


@dataclass(frozen=True)
class Bytes:
    """What one optimizer needs on the device while it steps. `temporaries` is an upper bound for Adafactor."""

    optimizer: str
    weights: int
    gradients: int
    state: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state + self.temporaries


@dataclass(frozen=True)
class Report:
    """One `Bytes` per optimizer, the planned Adafactor first, on each of `ranks` devices; prints as a table.

    `crossing` are the bytes that each rank gives to the collectives of an Adafactor step.
    """

    parameters: int
    rows: tuple[Bytes, ...]
    ranks: int = 1
    crossing: int = 0

    def __str__(self) -> str:
        columns = ("weights", "gradients", "state", "temporaries", "total")
        width = max(len(row.optimizer) for row in self.rows)
        lines = [f"{self.parameters:,} parameters".ljust(width) + "".join(name.rjust(13) for name in columns)]
        for row in self.rows:
            cells = "".join(_readable(getattr(row, name)).rjust(13) for name in columns)
            per_parameter = f"{row.total / max(self.parameters, 1):.2f} bytes/parameter"
            lines.append(f"{row.optimizer.ljust(width)}{cells}  {per_parameter}")
        if self.ranks > 1:
            lines.append(f"on each of {self.ranks:,} ranks; an Adafactor step all-reduces {_readable(self.crossing)}")
        return "\n".join(lines)


def report(model_or_shapes: Any, *, ranks: int = 1, **kwargs: Any) -> Report:
    """What training needs, without activations, with `Adafactor(params, **kwargs)` and with the usual alternatives.

    Args:
        model_or_shapes: what `adafactor.plan` takes.
        ranks: over how many ranks FSDP2 shards the model; bytes are those of the first (default: 1)
        **kwargs: the arguments of `Adafactor`.

    Returns:
        A `Report`. Adafactor's state is exact to the byte. AdamW and Lion are torch's and lion-pytorch's, with state
        in the weights' dtype; "mixed precision" keeps float32 master weights and moments beside 16-bit weights; 8-bit
        AdamW is bitsandbytes' (blocks of 256, tensors below 4,096 elements in float32).

    Example:
        >>> rows = report({"embedding": (32128, 768)}, lr=1e-3).rows
        >>> [(row.optimizer, row.state) for row in rows[:2]]
        [('Adafactor', 131588), ('AdamW', 197394436)]
    """
    if not isinstance(model_or_shapes, torch.nn.Module):
        model_or_shapes = list(model_or_shapes.items() if isinstance(model_or_shapes, Mapping) else model_or_shapes)
    plans = plan(model_or_shapes, ranks=ranks, **kwargs)
    everything = named_shapes(model_or_shapes, frozen=True)
    parameters = sum(math.prod(shape) for _, shape, _ in everything)
    weights = sum(math.prod(first_piece(shape, ranks)) * dtype_of(dtype).itemsize for _, shape, dtype in everything)
    gradients = sum(_numel(tensor) * _itemsize(tensor) for tensor in plans)
    others = {
        "AdamW": sum(2 * _numel(tensor) * _itemsize(tensor) + 4 for tensor in plans),
        "AdamW, mixed precision": sum((8 + 4 * (_itemsize(tensor) < 4)) * _numel(tensor) + 4 for tensor in plans),
        "AdamW, 8-bit": sum(_adamw_8bit(_numel(tensor)) for tensor in plans),
        "Lion": gradients,
    }
    ours = Bytes("Adafactor", weights, gradients, sum(tensor.nbytes for tensor in plans), _temporaries(plans))
    return Report(
        parameters=parameters,
        rows=(ours, *(Bytes(name, weights, gradients, state, 0) for name, state in others.items())),
        ranks=ranks,
        crossing=sum(tensor.crossing_bytes for tensor in plans),
    )


def peak_allocated(run: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """The most bytes that tensors held at once while `run()` ran, above what they held before.

    Counted from the allocator's own records: on the CPU by the profiler (in this thread and those it starts), on CUDA
    by the caching allocator's statistics.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    events = profiled(run).events()
    records = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, nbytes in records:
        live += nbytes
        peak = max(peak, live)
    return peak


def profiled(run: Callable[[], object]) -> Any:
    """What the profiler wrote down while `run()` ran, every allocation and release among it, as its C++ side has it."""
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    return profiler.profiler.kineto_results  # type: ignore[union-attr]


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side announces itself on file descriptor 2, below Python's sys.stderr."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _temporaries(plans: Iterable[TensorPlan]) -> int:
    """The sums that a step gathers, its scratch for rows and columns, and the workspace."""
    sums = scratch = 0
    for tensor in plans:
        sums += sum(spec.nbytes for spec in tensor.sums)
        matrices, rows, cols = tensor.dims
        if tensor.factored:
            sums += matrices * rows * tensor.compute_dtype.itemsize
            scratch = max(scratch, 4 * matrices * (rows + cols) * tensor.compute_dtype.itemsize)
    return sums + scratch + WORKSPACE


def _adamw_8bit(numel: int) -> int:
    return 8 * numel if numel < 4096 else 2 * (numel + 4 * -(-numel // 256))


def _numel(tensor: TensorPlan) -> int:
    matrices, rows, cols = tensor.dims
    return matrices * rows * cols


def _itemsize(tensor: TensorPlan) -> int:
    return dtype_of(tensor.dtype).itemsize


def _readable(nbytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"
