"""Whose memory it is, moment by moment: the profiler's allocation records, read together with marks among them.

The profiler writes down every allocation and release of the allocator with its address. ``mark`` writes into the same
record, on the same clock, which addresses are weights, state or gradients, and where the step and its forward pass
end. ``peaks`` replays both. A block is of its kind from its allocation to its release:

- ``weights``, ``state``: what the parameters and the optimizer hold;
- ``gradients``: a gradient that autograd has just made for a parameter, finished or a part of a sum, and what
  ``p.grad`` holds;
- ``activations``: allocated in the forward pass and alive at its end, which is what backward will need;
- ``other``: there before the step, and none of these (the buckets of DistributedDataParallel);
- ``temporaries``: all the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._profiler import _EventType

from adafactor import memory

KINDS: tuple[str, ...] = ("weights", "gradients", "state", "other", "activations", "temporaries")
KEPT = ("weights", "gradients", "state")  # what grows with the model whatever its input
_MARK = "adafactor.mark "


@dataclass(frozen=True)
class Peaks:
    """Bytes by kind at three moments of a step.

    Args:
        kept: when weights, gradients and state together are largest.
        total: when all is largest.
        planned: when all but the activations is largest, which is what ``memory.report`` computes.
    """

    kept: dict[str, int]
    total: dict[str, int]
    planned: dict[str, int]


@dataclass(eq=False)
class _Block:
    """An allocation; ``last`` is the number of the record that releases it."""

    nbytes: int
    first: int
    kind: str = "temporaries"
    last: int | None = None


def mark(what: str, tensors: Iterable[Tensor | None] = ()) -> None:
    """Write a mark: the kind of these tensors, or ``begin``, ``forward`` (it is over) or ``end`` of the step."""
    addresses = [str(t.untyped_storage().data_ptr()) for t in tensors if t is not None]
    with torch.profiler.record_function(_MARK + " ".join([what, *addresses])):
        pass


def watch_gradients(loss: Tensor, parameters: Iterable[Tensor]) -> None:
    """Mark every gradient that backward from ``loss`` makes for a parameter, also one that will be added to another."""
    wanted = {id(p) for p in parameters}
    nodes = [cast(Any, loss.grad_fn)]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        for i, (following, _) in enumerate(node.next_functions):
            if id(getattr(following, "variable", None)) in wanted:
                node.register_hook(_marker(i))
            elif following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


def _marker(i: int) -> Callable[[Any, Any], None]:
    return lambda made, _: mark("gradients", made[i : i + 1])


def peaks(run: Callable[[], object], device: str = "cpu") -> Peaks:
    """Run, and find the peaks of this device's memory between the marks ``begin`` and ``end``.

    What should have a kind must be allocated inside of ``run``.
    """
    live: dict[int, _Block] = {}
    blocks: list[_Block] = []
    begin = end = 0
    for number, (what, addresses, nbytes) in enumerate(_records(run, device)):
        if what == "allocated":
            if unseen := live.get(addresses[0]):  # released by a thread that the profiler does not see
                unseen.last = number
            live[addresses[0]] = block = _Block(nbytes, number)
            blocks.append(block)
        elif what == "released":
            if block := live.pop(addresses[0], None):  # unknown where it was allocated before the run
                block.last = number
        elif what == "begin":
            begin = number
            _rename(live.values(), "other")
        elif what == "forward":
            _rename((block for block in live.values() if block.first > begin), "activations")
        elif what == "end":
            end = number
        else:
            for address in addresses:
                if address in live:
                    live[address].kind = what
    assert 0 < begin < end
    return _replay(blocks, begin, end)


def _rename(blocks: Iterable[_Block], kind: str) -> None:
    for block in blocks:
        if block.kind == "temporaries":
            block.kind = kind


def _replay(blocks: list[_Block], begin: int, end: int) -> Peaks:
    changes: list[tuple[int, str, int]] = []
    for block in blocks:
        if block.first < end and (block.last is None or block.last > begin):
            changes.append((max(block.first, begin), block.kind, block.nbytes))
            if block.last is not None and block.last < end:
                changes.append((block.last, block.kind, -block.nbytes))
    now: dict[str, int] = dict.fromkeys(KINDS, 0)
    kept = total = planned = now
    for _, kind, nbytes in sorted(changes, key=lambda change: change[0]):
        now = now | {kind: now[kind] + nbytes}
        if sum(now[k] for k in KEPT) > sum(kept[k] for k in KEPT):
            kept = now
        if sum(now.values()) > sum(total.values()):
            total = now
        if _but_activations(now) > _but_activations(planned):
            planned = now
    return Peaks(kept, total, planned)


def _but_activations(now: dict[str, int]) -> int:
    return sum(now.values()) - now["activations"]


def _records(run: Callable[[], object], device: str) -> Iterator[tuple[str, list[int], int]]:
    """(what, addresses, bytes) in the order of time."""
    for event in memory.profiled(run):
        if event.name.startswith(_MARK):
            what, *addresses = event.name.removeprefix(_MARK).split()
            yield what, [int(address) for address in addresses], 0
        elif event.tag == _EventType.Allocation:
            record = event.typed[1]
            if record.device.type == device:
                yield "allocated" if record.alloc_size > 0 else "released", [record.ptr], record.alloc_size
