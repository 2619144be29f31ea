"""DistributedDataParallel: parameters are stepped from its buckets, which a communication hook sees.

DDP copies gradients into buckets, calls the hook for each bucket that is full, and writes what the hook returned to
every `.grad` after backward. Our hook starts the all-reduce that DDP would have started, and steps the bucket before
while it runs. The rest keeps memory low: a gradient goes as soon as the bucket holds it; a stepped parameter shows DDP
a `.grad` that is the hook's result already, which DDP does not write then; and a bucket's memory goes after its step
and comes back before DDP writes to it.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from adafactor._in_backward_turns import Chosen, Receiver, Turns


def buckets_of(module: DistributedDataParallel) -> Buckets:
    """Those of this module; the first call registers its communication hook, for good.

    Raises:
        ValueError: if the module has another hook.
    """
    if module not in _known:
        buckets = Buckets(module)
        try:
            module.register_comm_hook(buckets, _hook)
        except RuntimeError as error:
            raise ValueError(
                "the model's DistributedDataParallel has a communication hook already, and takes only one, which "
                "step_in_backward needs; register no other, or use the plain optimizer.step()"
            ) from error
        _known[module] = buckets
    return _known[module]


def _hook(state: Buckets, bucket):  # unannotated: DDP compares annotations with types, and these are strings
    return state.reduce(bucket)


class Buckets:
    """The buckets of one module. Without receivers they are reduced as by DDP itself, and nothing else happens."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = weakref.ref(module)
        self._receivers: list[Receiver] = []
        self._covered = frozenset(id(p) for p in module.parameters())
        self._used: dict[int, int] = {}  # parameters used since the last reduction: where their gradients are
        self._pass: _Pass | None = None
        # DDP writes to a bucket without a gradient having arrived, or keeps `.grad` in it.
        bound = module.find_unused_parameters or module.static_graph or module.gradient_as_bucket_view
        self._may_free = not bound
        self._buffers: dict[int, Tensor] = {}  # of the last pass, by the bucket's index
        self._restored: dict[int, tuple[Tensor, list[Any]]] = {}  # buffers that may be freed, and what brings them back

    def join(self, receiver: Receiver) -> None:
        self._receivers.append(receiver)

    def leave(self, receiver: Receiver) -> None:
        self._receivers.remove(receiver)
        if not self._receivers:
            for index in list(self._restored):
                self._keep(index)
            self._buffers.clear()
            self._used.clear()

    @property
    def module(self) -> DistributedDataParallel | None:
        return self._module()

    def covers(self, p: Tensor) -> bool:
        return id(p) in self._covered and self.module is not None

    def note(self, p: Tensor) -> None:
        """A gradient was added to `p.grad`; DDP copies it to the bucket next."""
        assert p.grad is not None
        self._used[id(p)] = 0 if p.grad.is_sparse else p.grad.data_ptr()

    def reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """The hook: DDP's own reduction, to the bit; and the step of the bucket before while it runs."""
        module, buffer = self.module, bucket.buffer()
        assert module is not None
        self._divide(module, bucket)
        work = dist.all_reduce(buffer, group=module.process_group, async_op=True)
        assert work is not None
        reduced = work.get_future().then(_first)
        run = torch._C._current_graph_task_id()
        if not self._receivers or buffer.is_sparse or run == -1:  # no run: `join()`, in a process without more data
            return reduced
        if self._pass is None or self._pass.run != run:
            self._pass = _Pass(run, self._used)
        params, gradients = bucket.parameters(), bucket.gradients()
        used = [p for p in params if id(p) in self._used]
        full = _Bucket(work, self._pass.choose(self._receivers, used))
        self._pass.take(full)
        due = full.due()
        result = self._result(bucket, len(due) == len(params))
        if result is not buffer:
            full.freed = buffer.untyped_storage()
            reduced = torch.futures.Future()
            reduced.set_result(result)
        places = {id(p): gradient.storage_offset() for p, gradient in zip(params, gradients, strict=True)}
        for p in due:
            full.gradients[id(p)] = _view(buffer, p, places[id(p)])
            full.shown[id(p)] = _view(result, p, places[id(p)])
            p.grad = None
        return reduced

    def _divide(self, module: DistributedDataParallel, bucket: Any) -> None:
        """By the number of processes, with the operation that DDP chooses when it has no hook."""
        buffer, size = bucket.buffer(), dist.get_world_size(module.process_group)
        if module._join_config.enable and not module._divide_by_initial_world_size:
            raise ValueError(
                "join(divide_by_initial_world_size=False) divides gradients by a number that step_in_backward cannot "
                "know; leave that argument out, or use the plain optimizer.step()"
            )
        if buffer.is_sparse or getattr(module, "batched_grad_copy", False):
            buffer.div_(size)
            return
        gradients = bucket.gradients()
        # Without a hook DDP multiplies while it copies to the bucket; a gradient that was added there is divided.
        added = [self._used.get(id(p)) == g.data_ptr() for p, g in zip(bucket.parameters(), gradients, strict=True)]
        if not any(added):
            buffer.mul_(1.0 / size)
            return
        for gradient, in_place in zip(gradients, added, strict=True):
            if in_place:
                gradient.div_(size)
            else:
                gradient.mul_(1.0 / size)

    # Memory

    def _result(self, bucket: Any, stepped: bool) -> Tensor:
        """What DDP gets for a bucket: its buffer; or the beginning of a larger one, if the buffer goes after the step.

        DDP reads nothing there if `.grad` is the same view of it.
        """
        index, buffer = bucket.index(), bucket.buffer()
        settled = self._buffers.get(index) is buffer  # DDP makes new buckets after its first pass
        self._buffers[index] = buffer
        if bucket.is_last():
            for gone in [other for other in self._buffers if other > index]:
                del self._buffers[gone]
        storage = buffer.untyped_storage()
        if not (stepped and settled and self._may_free and storage.resizable()):
            return buffer
        alike = [each for each in self._buffers.values() if (each.dtype, each.device) == (buffer.dtype, buffer.device)]
        largest = max(alike, key=Tensor.numel)
        if largest is buffer:
            return buffer
        if index not in self._restored or self._restored[index][0] is not buffer:
            self._keep(index)
            restore = functools.partial(_restore, storage, storage.nbytes())
            # Called even when autograd has no gradient for the parameter, and DDP writes zeros.
            hooks = [get_gradient_edge(p).node.register_prehook(restore) for p in bucket.parameters()]
            self._restored[index] = buffer, [restore, *hooks]
        return largest[: buffer.numel()]

    def _keep(self, index: int) -> None:
        if index in self._restored:
            _, (restore, *hooks) = self._restored.pop(index)
            restore(())
            for hook in hooks:
                hook.remove()


_known: weakref.WeakKeyDictionary[DistributedDataParallel, Buckets] = weakref.WeakKeyDictionary()


@dataclass(slots=True)
class _Bucket:
    """A bucket that is being reduced, or has been."""

    work: dist.Work
    chosen: Chosen
    gradients: dict[int, Tensor] = field(default_factory=dict)
    shown: dict[int, Tensor] = field(default_factory=dict)  # to DDP, as `.grad`
    freed: torch.UntypedStorage | None = None  # after the step
    stepped: bool = False

    def due(self) -> list[Tensor]:
        return [p for _, params in self.chosen for p in params]

    def step(self) -> None:
        self.work.wait()
        for receiver, params in self.chosen:
            for p in params:
                p.grad = self.gradients[id(p)]
            receiver.step(params)
        self.stepped = True
        if self.freed is not None:
            self.freed.resize_(0)


class _Pass(Turns):
    """One run of the engine in which buckets fill."""

    def __init__(self, run: int, used: dict[int, int]) -> None:
        super().__init__(run)
        self._used = used
        self._buckets: list[_Bucket] = []

    def take(self, item: _Bucket) -> None:
        super().take(item)
        self._buckets.append(item)

    def end(self) -> None:
        """Before DDP writes to `.grad`."""
        self.step()
        for each in self._buckets:
            for p in each.due():
                p.grad = each.shown[id(p)]
        Variable._execution_engine.queue_callback(self._after_ddp_wrote)

    def _after_ddp_wrote(self) -> None:
        for each in self._buckets:
            for p in each.due():
                p.grad = None if each.stepped else each.gradients[id(p)].clone()
        self._buckets.clear()
        self._used.clear()
        self.check()


def _first(future: torch.futures.Future[list[Tensor]]) -> Tensor:
    return future.value()[0]


def _view(flat: Tensor, p: Tensor, place: int) -> Tensor:
    """A parameter's part of a bucket, laid out as DDP does it."""
    if torch.ops.aten.is_non_overlapping_and_dense.default(p):
        return flat.as_strided(p.size(), p.stride(), place)
    return flat.as_strided((p.numel(),), (1,), place).view(p.size())


def _restore(storage: torch.UntypedStorage, size: int, gradients: Any) -> None:
    if storage.nbytes() == 0:
        storage.resize_(size)


def modules_around(params: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """Those that hold any of the parameters, which do not tell; also what only waits for the garbage collector."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    ours, objects = {id(p) for p in params}, gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, DistributedDataParallel)}
    modules = [each for each in objects if type(each) in kinds] if kinds else []
    return [module for module in modules if any(id(p) in ours for p in module.parameters())]
