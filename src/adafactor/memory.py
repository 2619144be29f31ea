"""Bytes by component: planned for a model (`report`), measured for a call (`peak_allocated`)."""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from adafactor._hyper import dtype_of
from adafactor._plan import Shape, TensorPlan, first_piece, named_shapes, plan

WORKSPACE = 4 << 20  # what a step may allocate besides its sums, whatever the size of the model


@dataclass(frozen=True)
class Bytes:
    """What training with one optimizer needs on a device at its peak, without activations.

    Attributes:
        optimizer: its name.
        weights: parameters and buffers.
        gradients: the most that are alive at once. A tied embedding's comes in parts, which count while they are added
            up. Over several ranks, their shards.
        state: the optimizer's.
        temporaries: what the optimizer's step takes beyond all that; an upper bound for Adafactor.
        unsharded: over several ranks, the weights and gradients that FSDP2 holds whole, and what it sends.
    """

    optimizer: str
    weights: int
    gradients: int
    state: int
    temporaries: int
    unsharded: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state + self.temporaries + self.unsharded


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
        columns = ("weights", "gradients", "state", *(("unsharded",) * (self.ranks > 1)), "temporaries", "total")
        width = max(len(row.optimizer) for row in self.rows)
        lines = [f"{self.parameters:,} parameters".ljust(width) + "".join(name.rjust(13) for name in columns)]
        for row in self.rows:
            cells = "".join(_readable(getattr(row, name)).rjust(13) for name in columns)
            per_parameter = f"{row.total / max(self.parameters, 1):.2f} bytes/parameter"
            lines.append(f"{row.optimizer.ljust(width)}{cells}  {per_parameter}")
        if self.ranks > 1:
            lines.append(f"on each of {self.ranks:,} ranks; an Adafactor step all-reduces {_readable(self.crossing)}")
        return "\n".join(lines)


def report(model_or_shapes: Any, *, ranks: int = 1, in_backward: bool = False, **kwargs: Any) -> Report:
    """What training needs, without activations, with `Adafactor(params, **kwargs)` and with the usual alternatives.

    Args:
        model_or_shapes: what `adafactor.plan` takes. Only a module shows which parameters are tied.
        ranks: over how many ranks FSDP2 shards the model; bytes are those of the first. Every numbered block
            (`layers.0`) is a `fully_shard` group, and the rest is the root's (default: 1)
        in_backward: Adafactor with `step_in_backward()`; the others step as usual (default: False)
        **kwargs: the arguments of `Adafactor`.

    Returns:
        A `Report`. Adafactor's state is exact to the byte. AdamW and Lion are torch's (fused) and lion-pytorch's, with
        state in the weights' dtype; "mixed precision" keeps float32 master weights and moments beside 16-bit weights,
        and has one gradient at a time in float32; 8-bit AdamW is bitsandbytes' (blocks of 256, tensors below 4,096
        elements in float32).

    Example:
        >>> rows = report({"embedding": (32128, 768)}, lr=1e-3).rows
        >>> [(row.optimizer, row.state) for row in rows[:2]]
        [('Adafactor', 131588), ('AdamW', 197394436)]
    """
    if not isinstance(model_or_shapes, torch.nn.Module):
        model_or_shapes = list(model_or_shapes.items() if isinstance(model_or_shapes, Mapping) else model_or_shapes)
    plans = plan(model_or_shapes, ranks=ranks, **kwargs)
    everything = named_shapes(model_or_shapes, frozen=True)
    weights = sum(math.prod(first_piece(shape, ranks)) * dtype_of(dtype).itemsize for _, shape, dtype in everything)
    if isinstance(model_or_shapes, torch.nn.Module):
        weights += sum(buffer.nbytes for buffer in model_or_shapes.buffers())
    uses = _uses(model_or_shapes, plans, ranks)
    groups = _groups(everything, uses) if ranks > 1 else None

    def bytes_of(name: str, state: int, temporaries: int, in_backward: bool = False) -> Bytes:
        if groups is None:
            gradients, at_step = _alive(uses, in_backward)
            unsharded, rest = 0, at_step + temporaries - gradients
        else:
            gradients, unsharded = _sharded(groups, in_backward)
            rest = temporaries - unsharded
        return Bytes(name, weights, gradients, state, max(0, rest), unsharded)

    numels = [math.prod(tensor.shape) for tensor in plans]
    sizes = [_itemsize(tensor) for tensor in plans]
    each = list(zip(numels, sizes, strict=True))
    mixed = sum((8 + 4 * (size < 4)) * numel + 4 for numel, size in each)
    rows = (
        bytes_of("Adafactor", sum(tensor.nbytes for tensor in plans), _temporaries(plans, in_backward), in_backward),
        bytes_of("AdamW", sum(2 * numel * size + 4 for numel, size in each), 0),
        bytes_of("AdamW, mixed precision", mixed, max((4 * numel * (size < 4) for numel, size in each), default=0)),
        bytes_of("AdamW, 8-bit", sum(map(_adamw_8bit, numels)), 0),
        bytes_of("Lion", sum(numel * size for numel, size in each), 0),
    )
    return Report(
        parameters=sum(math.prod(shape) for _, shape, _ in everything),
        rows=rows,
        ranks=ranks,
        crossing=sum(tensor.crossing_bytes for tensor in plans),
    )


def peak_allocated(run: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """The most bytes that tensors held at once while `run()` ran, above what they held before.

    Counted from the allocator's own records: on the CPU by the profiler (in this thread and those it starts; what was
    there before counts as held to the end), on CUDA by the caching allocator's statistics.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    from torch._C._profiler import _EventType  # private, so not what importing this package rests on

    live: dict[int, int] = {}
    now = peak = 0
    for event in profiled(run):
        if event.tag == _EventType.Allocation:
            record = event.typed[1]
            # Of a block from before, a release has the size that an earlier profile saw at this address, if any did.
            now -= live.pop(record.ptr, 0)
            if record.alloc_size > 0:
                live[record.ptr] = record.alloc_size
                now += record.alloc_size
                peak = max(peak, now)
    return peak


def profiled(run: Callable[[], object]) -> list[Any]:
    """The events that the profiler wrote down while `run()` ran, allocations and releases among them, by their time."""
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    events = []
    waiting = profiler.profiler.kineto_results.experimental_event_tree()[::-1]  # type: ignore[union-attr]
    while waiting:
        events.append(waiting.pop())
        waiting += events[-1].children[::-1]
    return sorted(events, key=lambda event: event.start_time_ns)


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


def _temporaries(plans: Sequence[TensorPlan], in_backward: bool) -> int:
    """The sums that a step gathers, its scratch for rows and columns, and the workspace."""
    sums, scratch = [0], [0]
    for tensor in plans:
        matrices, rows, cols = tensor.dims
        both = matrices * (rows + cols) * tensor.compute_dtype.itemsize if tensor.factored else 0
        row_sums = matrices * rows * tensor.compute_dtype.itemsize if tensor.factored else 0
        sums.append(row_sums + sum(spec.nbytes for spec in tensor.sums))
        scratch.append(4 * both)
    if in_backward:  # one parameter at a time
        return max(map(sum, zip(sums, scratch, strict=True))) + WORKSPACE
    return sum(sums) + max(scratch) + WORKSPACE


@dataclass(frozen=True)
class _Use:
    """A module that holds a trainable parameter, and so makes a gradient for it, or a part of one.

    Attributes:
        name: of the parameter.
        key: the same for all uses of one parameter.
        nbytes: of the gradient.
        shard: of the first rank's shard of it.
        own: it is a tensor that nothing else can see, so a second part is added into it. An output layer's is not.
    """

    name: str
    key: int
    nbytes: int
    shard: int
    own: bool = True


def _uses(model_or_shapes: Any, plans: Sequence[TensorPlan], ranks: int) -> list[_Use]:
    """In the order in which modules are registered, which is that of forward as a rule."""

    def use(name: str, key: int, shape: Shape, itemsize: int, own: bool = True) -> _Use:
        return _Use(name, key, math.prod(shape) * itemsize, math.prod(first_piece(shape, ranks)) * itemsize, own)

    if not isinstance(model_or_shapes, torch.nn.Module):
        return [use(tensor.name, key, tensor.whole, _itemsize(tensor)) for key, tensor in enumerate(plans)]
    return [
        use(f"{path}.{name}".lstrip("."), id(p), tuple(p.shape), p.itemsize, isinstance(module, torch.nn.Embedding))
        for path, module in model_or_shapes.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if p.requires_grad
    ]


def _alive(uses: Sequence[_Use], in_backward: bool = False) -> tuple[int, int]:
    """The most bytes of gradients that are alive at once in a backward pass, and the most when a step is taken.

    Backward goes from the last use to the first. A gradient of several parts waits for all of them. Where the first
    part is not its own, the sum with the second is a third tensor.
    """
    missing = Counter(use.key for use in uses)
    waiting: dict[int, bool] = {}
    now = most = at_step = 0
    for use in reversed(uses):
        now += use.nbytes
        most = max(most, now)
        if use.key in waiting:
            most = max(most, now + use.nbytes * (not waiting[use.key]))
            now -= use.nbytes
        waiting[use.key] = use.own or use.key in waiting
        missing[use.key] -= 1
        if in_backward and not missing[use.key]:
            at_step = max(at_step, now)
            now -= use.nbytes
    return most, max(at_step, now)


class _Group(NamedTuple):
    """What `fully_shard` keeps together, whole: bytes of its weights, and its uses."""

    weights: int
    uses: list[_Use]

    @property
    def gradients(self) -> int:
        return sum({use.key: use.nbytes for use in self.uses}.values())

    @property
    def shards(self) -> int:
        return sum({use.key: use.shard for use in self.uses}.values())


def _groups(everything: Iterable[tuple[str, Shape, str]], uses: Iterable[_Use]) -> list[_Group]:
    """The root's group, and one for each numbered block."""
    weights: Counter[str] = Counter({"": 0})
    members: dict[str, list[_Use]] = {}
    for name, shape, dtype in everything:
        weights[_block(name)] += math.prod(shape) * dtype_of(dtype).itemsize
    for use in uses:
        members.setdefault(_block(use.name), []).append(use)
    return [_Group(size, members.get(block, [])) for block, size in weights.items()]


def _block(name: str) -> str:
    found = re.match(r"(.*?\.)??\d+(?=\.)", name)
    return found[0] if found else ""


def _sharded(groups: Sequence[_Group], in_backward: bool) -> tuple[int, int]:
    """The shards of gradients that are alive, and what FSDP2 holds whole beside them, at the peak of a step.

    The root's weights stay gathered from forward to the end of backward. While a block goes through backward, there are
    its weights and gradients, the weights of the next one, and the gradients of the last one, on their way. At the end
    there are the root's gradients and those of one block on their way.
    """
    root, *blocks = groups
    two = sorted(blocks, key=lambda block: block.weights)[-2:]
    output = max((use.nbytes for use in root.uses if not use.own), default=0)
    within = root.weights + output + sum(block.weights + block.gradients for block in two)
    whole, _ = _alive(root.uses)
    at_end = root.weights + whole + max((block.gradients for block in blocks), default=0)
    if in_backward:
        return max(group.shards for group in blocks or groups), max(within, at_end)
    # Not all shards are there yet.
    within -= root.shards + sum(block.shards for block in two)
    return sum(group.shards for group in groups), max(within, at_end - root.shards)


def _adamw_8bit(numel: int) -> int:
    return 8 * numel if numel < 4096 else 2 * (numel + 4 * -(-numel // 256))


def _itemsize(tensor: TensorPlan) -> int:
    return dtype_of(tensor.dtype).itemsize


def _readable(nbytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"
