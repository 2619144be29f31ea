"""What must not happen while parameters are stepped in backward: torch's functions, wrapped while any handle lives."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Handle(Protocol):
    """What the wrappers ask."""

    def watches(self, p: Tensor) -> bool: ...

    def has_stepped(self, p: Tensor) -> bool: ...

    def knows(self, module: torch.nn.Module) -> bool: ...

    def meet(self, module: DistributedDataParallel) -> None: ...

    def norm_of(self, p: Tensor) -> Tensor: ...

    def note_reentrant_checkpoint(self) -> None: ...

    def note_reduced_together(self, params: Sequence[Tensor]) -> None: ...

    def due(self, params: Sequence[Tensor]) -> list[Tensor]: ...

    def step(self, params: Sequence[Tensor]) -> None: ...

    def remove(self) -> None: ...


# Where a training loop is compiled as a whole, what the engine calls would be compiled too.
uncompiled: Any = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]

live: list[Handle] = []  # the handles
_wrapped: list[tuple[Any, str, Any, Any]] = []  # owner, name, what stood there, what stands there
_scaled_run = -1


def scaled_run() -> int:
    """The last run of the engine that went through a GradScaler's multiplication."""
    return _scaled_run


def wrap_all() -> None:
    from torch.nn import utils
    from torch.nn.utils import clip_grad
    from torch.utils.checkpoint import CheckpointFunction

    for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"):
        wrap(utils, name, _checked_clipping)
    # The last one is what clip_grad_norm_ calls, and so what sees those who imported that by name long ago.
    for name in ("clip_grad_norm_", "clip_grad_value_", "_clip_grads_with_norm_"):
        wrap(clip_grad, name, _checked_clipping)
    wrap(CheckpointFunction, "forward", _noted_checkpoint)
    scalers: list[type] = [torch.amp.GradScaler]
    for scaler in scalers:
        scalers.extend(scaler.__subclasses__())
        wrap(scaler, "scale", _marked_scale)
    wrap(DistributedDataParallel, "forward", _introduced_forward)


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Once, however many handles there are."""
    original = vars(owner).get(name)
    if original is None or any((owner, name) == each[:2] for each in _wrapped):
        return
    static = isinstance(original, staticmethod)
    function = original.__func__ if static else original
    wrapping: Any = functools.wraps(function)(wrapper(function))
    if static:
        wrapping = staticmethod(wrapping)
    setattr(owner, name, wrapping)
    _wrapped.append((owner, name, original, wrapping))


def put_back_all() -> None:
    """After the last handle."""
    while _wrapped:
        owner, name, original, wrapping = _wrapped.pop()
        if vars(owner).get(name) is wrapping:  # else somebody has wrapped ours, which passes everything through now
            setattr(owner, name, original)


def _checked_clipping(clip: Callable[..., Any]) -> Callable[..., Any]:
    @uncompiled
    def checked(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        gone = sum(any(handle.has_stepped(p) for handle in live) for p in params)
        if gone and clip.__name__ == "clip_grad_norm_" and _only_asks(*args, **kwargs):
            return _total_norm(params)
        if gone:
            raise ValueError(
                f"nothing left to clip: step_in_backward has applied and freed the gradients of {gone} of these "
                f"{len(params)} parameters. Adafactor clips every update instead (clip_threshold=1.0, on by default): "
                "leave gradient clipping out (max_grad_norm=0 in most trainers), or use the plain optimizer.step()"
            )
        return clip(params or parameters, *args, **kwargs)

    return checked


def _only_asks(max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: Any = None) -> bool:
    """Whether nothing is to be clipped, only the norm is asked for: trainers log it so."""
    return max_norm == math.inf and norm_type == 2 and not error_if_nonfinite


@torch.no_grad()
def _total_norm(params: Sequence[Tensor]) -> Tensor:
    """As torch computes it, of gradients that are here and of those that are gone."""
    norms = []
    for p in params:
        stepped = next((handle for handle in live if handle.has_stepped(p)), None)
        if stepped is not None:
            norms.append(stepped.norm_of(p))
        elif p.grad is not None:
            norms.append(torch.linalg.vector_norm(p.grad))
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _noted_checkpoint(forward: Callable[..., Any]) -> Callable[..., Any]:
    def noted(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        if any(ctx.needs_input_grad):
            for handle in live:
                handle.note_reentrant_checkpoint()
        return forward(ctx, *args, **kwargs)

    return noted


def _marked_scale(scale: Callable[..., Any]) -> Callable[..., Any]:
    @uncompiled
    def marked(self: torch.amp.GradScaler, outputs: Any) -> Any:
        scaled = scale(self, outputs)
        return _mark_scaled(scaled) if self.is_enabled() else scaled

    return marked


def _mark_scaled(scaled: Any) -> Any:
    if isinstance(scaled, Tensor):
        if scaled.requires_grad:
            scaled.register_hook(_note_scaled)
        return scaled
    if isinstance(scaled, (list, tuple)):
        for each in scaled:
            _mark_scaled(each)
        return scaled
    return map(_mark_scaled, scaled)


@uncompiled
def _note_scaled(gradient: Tensor) -> None:
    global _scaled_run
    _scaled_run = torch._C._current_graph_task_id()


TWO_MODULES = (
    "the parameters are in two DistributedDataParallel modules, and step_in_backward takes gradients from one: give "
    "each module an optimizer of its own, and delete a module that is no longer used"
)


def _introduced_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    def introduced(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
        strangers = [handle for handle in live if not handle.knows(self)] if torch.is_grad_enabled() else []
        if strangers:
            _introduce(self, strangers)
        return forward(self, *args, **kwargs)

    return introduced


@uncompiled
def _introduce(module: DistributedDataParallel, handles: Sequence[Handle]) -> None:
    for handle in handles:
        handle.meet(module)


_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_APPLY = {
    getattr(torch.autograd.function.BackwardCFunction, name).__code__
    for name in ("apply", "apply_boxed")
    if hasattr(torch.autograd.function.BackwardCFunction, name)
}


def is_nested() -> bool:
    """Whether this run of the engine was started from within an autograd function's backward: reentrant checkpointing.

    The engine says the number of a run, not which one it is part of; the stack does, in the engine's own threads too.
    """
    frame: FrameType | None = sys._getframe(1)
    inside = False
    while frame is not None:
        if frame.f_code is _ENGINE:
            inside = True
        elif inside and frame.f_code in _APPLY:
            return True
        frame = frame.f_back
    return False
