"""What must not happen while parameters are stepped in backward: torch's functions, wrapped while any handle lives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Handle(Protocol):
    """What the wrappers ask."""

    def watches(self, p: Tensor) -> bool: ...

    def has_stepped(self, p: Tensor) -> bool: ...

    def announced(self, module: torch.nn.Module) -> bool: ...

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
    wrap(DistributedDataParallel, "forward", _refused_forward)


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
        if gone:
            raise ValueError(
                f"nothing left to clip: step_in_backward has applied and freed the gradients of {gone} of these "
                f"{len(params)} parameters. Adafactor clips every update instead (clip_threshold=1.0, on by default): "
                "leave gradient clipping out (max_grad_norm=0 in most trainers), or use the plain optimizer.step()"
            )
        return clip(params or parameters, *args, **kwargs)

    return checked


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


DATA_PARALLEL = (
    "the model is in DistributedDataParallel, whose gradients are final only after its all-reduce, and that comes "
    "after the hooks: step_in_backward(ddp=model) steps them then"
)


def _refused_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    def refused(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        strangers = [handle for handle in live if not handle.announced(self)] if torch.is_grad_enabled() else []
        if strangers and any(handle.watches(p) for p in self.parameters() for handle in strangers):
            raise ValueError(DATA_PARALLEL)
        return forward(self, *args, **kwargs)

    return refused
