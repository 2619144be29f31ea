"""FSDP2: the parameters of one `fully_shard` group are stepped together, with one collective.

FSDP reduces a group at once, sets `.grad` of its sharded parameters, and calls their hooks one by one. The hooks only
tell that there are gradients; the group is stepped when FSDP has begun to reduce the next one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adafactor import _in_backward_guards as guards
from adafactor._distributed import local
from adafactor._in_backward_turns import Chosen, Turns

_arrived: list[Tensor] | None = None  # in the reduction under way
_turns: Turns | None = None


def wrap_reduction() -> None:
    """Where there is nothing to wrap (another version of torch), sharded parameters wait for `optimizer.step()`."""
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    if module is not None:
        guards.wrap(module.FSDPParamGroup, "post_backward", _stepping)


def takes(p: Tensor) -> bool:
    """Whether a gradient comes from a reduction under way; its parameter is stepped with the group then."""
    if _arrived is None:
        return False
    _arrived.append(p)
    return True


@dataclass(frozen=True)
class _Group:
    """A group of FSDP's that is being reduced."""

    owner: Any
    chosen: Chosen
    reduced: Any  # an event

    def step(self) -> None:
        stream = self.owner.device_handle.current_stream()
        if self.reduced is not None:
            stream.wait_event(self.reduced)
        for receiver, params in self.chosen:
            for gradient in [local(p.grad) for p in params if p.grad is not None]:
                if gradient.device.type != "cpu":
                    gradient.record_stream(stream)  # its memory is another stream's, and is free after the step
            receiver.step(params)


def _stepping(post_backward: Callable[..., Any]) -> Callable[..., Any]:
    @guards.uncompiled
    def stepping(self: Any, *args: Any) -> Any:
        global _arrived, _turns
        params = [each.sharded_param for each in self.fsdp_params]
        handles = [handle for handle in guards.live if any(map(handle.watches, params))]
        if not handles:
            return post_backward(self, *args)
        _refuse_pinned(self)
        _arrived = []
        try:
            result = post_backward(self, *args)
        finally:
            arrived, _arrived = _arrived, None
        for handle in handles:
            handle.note_reduced_together(params)
        if arrived:
            run = torch._C._current_graph_task_id()
            if _turns is None or _turns.run != run:
                _turns = Turns(run)
            # Those without a gradient too: who has one is compared between ranks.
            _turns.take(_Group(self, _turns.choose(handles, params), self._post_reduce_event))
        return result

    return stepping


def _refuse_pinned(group: Any) -> None:
    if torch.__version__ < "2.13" and any(each.offload_to_cpu and each.pin_memory for each in group.fsdp_params):
        raise ValueError(
            f"step_in_backward with CPUOffloadPolicy(pin_memory=True) needs torch 2.13, this is {torch.__version__}: "
            "before, hooks saw gradients whose copy to the CPU was still under way; use pin_memory=False, or the plain "
            "optimizer.step()"
        )
