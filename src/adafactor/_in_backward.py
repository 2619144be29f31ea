"""Stepping inside of backward: hooks that call the optimizer for each parameter as soon as its gradient is final.

A backward pass is one run of the autograd engine, which numbers its runs. What would make the gradient at hand a wrong
one, or would look for gradients that are gone, is noticed by wrappers around torch's own functions
(`_in_backward_guards.py`). Gradients that are reduced over processes are stepped several at a time: those of a bucket
(`_in_backward_ddp.py`), or of an FSDP group (`_in_backward_fsdp.py`).
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from adafactor import _in_backward_fsdp as fsdp
from adafactor import _in_backward_guards as guards
from adafactor._distributed import is_dtensor
from adafactor._in_backward_ddp import Buckets, buckets_of, modules_around

Passes = int | str | Callable[[], bool]


class Stepper(Protocol):
    """What the hooks ask of an optimizer, whose `step` calls `check`, steps what has a gradient left, and `finish`."""

    param_groups: list[dict[str, Any]]

    def _attach(self, handle: InBackward | None) -> None: ...

    def _update(self, chosen: Iterable[tuple[dict[str, Any], Iterable[Tensor]]]) -> None: ...

    def _name_of(self, p: Tensor) -> str: ...


class InBackward:
    """What `Adafactor.step_in_backward` returns: lives until `remove()`, or to the end of a `with` block.

    It is the optimizer's and keeps neither it nor the model alive.
    """

    def __init__(self, optimizer: Stepper, accumulation_steps: Passes) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._expect(accumulation_steps)
        self._lock = threading.RLock()  # the engine has a thread for each device
        # Parameters go by id: swap_tensors refuses tensors with weak references, and strong ones would keep them alive.
        self._hooks: dict[int, tuple[RemovableHandle, int]] = {}  # and the tensor behind the Python object
        self._places: dict[int, int] = {}  # the group of each parameter
        self._hook = functools.partial(_arrived, weakref.ref(self))
        self._finalizer: weakref.finalize | None = None
        self._warned: set[str] = set()
        self._buckets: Buckets | None = None
        self._keeps_norms = False
        self._begin()
        module = self._refuse_others(optimizer)
        guards.live.append(self)
        try:
            self.watch()
            if module is not None:
                self.meet(module)
            guards.wrap_all()
            fsdp.wrap_reduction()
            optimizer._attach(self)
        except BaseException:
            self.remove()
            raise
        self._finalizer = weakref.finalize(optimizer, self.remove)
        self._finalizer.atexit = False

    def _begin(self) -> None:
        """An iteration: what happens until `optimizer.step()`."""
        self._stepped: set[int] = set()
        self._together: set[int] = set()  # parameters whose gradients are on all their ranks or on none
        self._lrs: dict[int, Any] = {}  # that groups were stepped with
        self._norms: dict[int, Tensor] = {}  # of gradients that are gone
        self._waits = False  # every step is left to optimizer.step()
        self._scaled_before = guards.scaled_run()
        self._begin_count()

    def _begin_count(self) -> None:
        self._passes = 0
        self._pass = -1  # the engine's number of the last one
        self._run = -1  # the engine's number of the run that the last hook was called in
        self._counted = True  # whether every pass that brought gradients could be told apart
        self._refused = False  # whether one of them was stopped by an error of ours

    # What users may do

    @property
    def accumulation_steps(self) -> int:
        """After how many backward passes the gradients are complete; a last, shorter group may assign its own.

        Where a function says which pass is the last: the passes so far, and one more if that was not it.

        Raises:
            ValueError: on assignment, for a value that `step_in_backward` does not take, or if parameters have been
                stepped in this iteration.
        """
        return self._accumulation_steps

    @accumulation_steps.setter
    def accumulation_steps(self, value: Passes) -> None:
        if self._stepped:
            raise ValueError(
                f"accumulation_steps={value!r} comes too late: {len(self._stepped)} parameters have been stepped in "
                "backward since the last optimizer.step(); assign it before the last backward pass"
            )
        self._expect(value)

    def _expect(self, value: Passes) -> None:
        self._is_last = _last_pass(value)
        self._accumulation_steps = 1 if self._is_last else int(value)  # pyright: ignore[reportArgumentType]

    def remove(self) -> None:
        """Undo it: no hooks, torch's functions as they were. Gradients gathered so far stay where they are."""
        if self not in guards.live:
            return
        guards.live.remove(self)
        if self._finalizer is not None:
            self._finalizer.detach()
        for key in list(self._hooks):
            self._unhook(key)
        if self._buckets is not None:
            self._buckets.leave(self)
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._attach(None)
        if not guards.live:
            guards.put_back_all()

    def __enter__(self) -> InBackward:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # What the optimizer calls

    def watch(self) -> None:
        """Hook every trainable parameter of the groups as they are now, and no other."""
        optimizer = self._optimizer()
        assert optimizer is not None
        places: dict[int, int] = {}
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                places.setdefault(id(p), index)
                if p.requires_grad and not self.watches(p) and not is_lazy(p):
                    if p._post_accumulate_grad_hooks:  # swap_tensors leaves Python's half of a hook behind
                        p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks
                    self._unhook(id(p))
                    self._hooks[id(p)] = p.register_post_accumulate_grad_hook(self._hook), p._cdata
        for key in self._hooks.keys() - places.keys():
            self._unhook(key)
        self._places = places

    def watches(self, p: Tensor) -> bool:
        hook, tensor = self._hooks.get(id(p), (None, 0))
        return hook is not None and tensor == p._cdata and hook.id in (p._post_accumulate_grad_hooks or ())

    def _unhook(self, key: int) -> None:
        if key in self._hooks:
            self._hooks.pop(key)[0].remove()

    def has_stepped(self, p: Tensor) -> bool:
        """In this iteration."""
        return id(p) in self._stepped

    def left(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those for `optimizer.step()`, the same on every rank; none that are sharded after a pass that stepped all.

        What FSDP reduces has gradients on all ranks or on none. Other sharded parameters are among those left, with a
        gradient or without: whether the ranks agree is found out in the collective.
        """
        here = (p for p in params if id(p) not in self._stepped)
        return [p for p in here if p.grad is not None or id(p) not in self._together]

    def check(self) -> None:
        """At the start of `optimizer.step()`.

        Raises:
            ValueError: if the passes do not add up, or a gradient came after its parameter's step.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        left = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for p in filter(self.has_stepped, left):
            raise ValueError(
                f"parameter {optimizer._name_of(p)!r} was stepped in backward and has a gradient again; call "
                "optimizer.zero_grad() to drop it, and optimizer.step() after every "
                f"{self._accumulation_steps} backward passes"
            )
        if self._refused and left:
            raise ValueError(
                f"{len(left)} parameters have gradients from a backward pass that was stopped by an error; call "
                "optimizer.zero_grad() to drop them"
            )
        expected, passes = self._accumulation_steps, self._passes
        if passes not in (0, expected):
            if self._is_last is not None:
                raise ValueError(
                    f"optimizer.step() after {passes} backward passes, none of which was the last one by what "
                    "accumulation_steps says (Accelerate's sync_gradients, or a function); call step() after that one"
                )
            raise ValueError(
                f"optimizer.step() after {passes} backward passes with accumulation_steps={expected} (a pass that "
                "brings none of this optimizer's parameters a gradient does not count, nor does one that leaves them "
                "unreduced, as under no_sync()); for a shorter group of micro-batches, assign accumulation_steps = "
                f"{passes} to what step_in_backward() returned"
            )
        if self._counted and not passes:
            for p in filter(self.watches, left):
                raise ValueError(
                    f"parameter {optimizer._name_of(p)!r} has a gradient, but no backward pass (that reduces "
                    "gradients, if there are several processes) has run since step_in_backward() or the last step(); "
                    "call step_in_backward() before backward, or zero_grad() to drop gradients that were there before "
                    "or set by hand"
                )
        for index, lr in self._lrs.items():
            if _mark(optimizer.param_groups[index]["lr"]) != lr:
                self._warn(
                    f"the lr of param group {index} changed between backward and optimizer.step(); with "
                    "step_in_backward the step was taken during backward, with the lr before: set lr before backward",
                )

    def finish(self) -> None:
        """At the end of `optimizer.step()`: no gradient is left, and the next iteration begins."""
        optimizer = self._optimizer()
        assert optimizer is not None
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = None
        self._begin()
        self.watch()

    def forget(self) -> None:
        """After `optimizer.zero_grad()`: passes whose gradients were dropped before any was used do not count.

        Whether parameters have to wait is decided in forward, which may be over already.
        """
        self._refused = False
        if not self._stepped:
            self._begin_count()

    # What torch calls

    def arrived(self, p: Tensor) -> None:
        """A gradient was added to `p.grad`.

        Raises:
            ValueError: before anything is written, if this gradient is not what the plain step would see.
        """
        if p.grad is None or fsdp.takes(p):
            return
        if is_dtensor(p):  # sharded, but not by FSDP: nothing tells that the other ranks are here too
            self.due((p,))
        elif self._buckets is not None and self._buckets.covers(p):
            self._buckets.note(p)
        else:
            self.step(self.due((p,)))

    def due(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Those of the parameters, whose gradients are final in this pass, that are to be stepped now.

        Raises:
            ValueError: as `arrived`.
        """
        with self._lock:
            optimizer = self._optimizer()
            ours = [p for p in params if id(p) in self._hooks]
            if optimizer is None or not ours:
                return []
            run = torch._C._current_graph_task_id()
            if run != self._run:
                self._enter(run)  # some may have left the optimizer
            ours = [p for p in ours if id(p) in self._places]
            for p in filter(self.has_stepped, (p for p in ours if p.grad is not None)):
                raise ValueError(
                    f"parameter {optimizer._name_of(p)!r} got a second gradient in one backward pass, after it was "
                    "stepped: a weight that is used inside and outside of a reentrant checkpoint (checkpoint with "
                    "use_reentrant=False), or an FSDP module that runs twice in forward, after passes without "
                    "reduction (leave out set_requires_gradient_sync(False))"
                )
            if self._waits or self._passes < self._accumulation_steps:
                return []
            return ours

    def step(self, params: Sequence[Tensor]) -> None:
        """One update, in the middle of backward; the gradients are freed."""
        optimizer = self._optimizer()
        if optimizer is None or not params:
            return
        with self._lock, torch.no_grad():
            places: dict[int, list[Tensor]] = {}
            for p in params:
                places.setdefault(self._places[id(p)], []).append(p)
            if self._keeps_norms:
                self._norms |= {id(p): torch.linalg.vector_norm(p.grad) for p in params if p.grad is not None}
            optimizer._update((optimizer.param_groups[place], group) for place, group in places.items())
            for p in params:
                if p.grad is not None:
                    p.grad = None
                    self._stepped.add(id(p))
            for place in places:
                self._lrs.setdefault(place, _mark(optimizer.param_groups[place]["lr"]))

    def note_reduced_together(self, params: Sequence[Tensor]) -> None:
        self._together.update(map(id, params))

    def knows(self, module: torch.nn.Module) -> bool:
        """Whether gradients come from this module's buckets."""
        return self._buckets is not None and self._buckets.module is module

    def meet(self, module: DistributedDataParallel) -> None:
        """Before its forward: gradients of this module's parameters come from its buckets from now on.

        Raises:
            ValueError: if they come from another module's, or the module has another communication hook.
        """
        if not any(map(self.watches, module.parameters())):
            return
        if self._buckets is not None:
            if self._buckets.module is not None:
                raise ValueError(guards.TWO_MODULES)
            self._buckets.leave(self)
            self._buckets = None
        buckets = buckets_of(module)
        buckets.join(self)
        self._buckets = buckets

    def norm_of(self, p: Tensor) -> Tensor:
        """The norm of the gradient that a parameter was stepped with; NaN when this is asked for the first time."""
        self._keeps_norms = True
        return self._norms[id(p)] if id(p) in self._norms else p.detach().new_full((), torch.nan)

    def note_reentrant_checkpoint(self) -> None:
        self._waits = True

    def _enter(self, run: int) -> None:
        """The first hook in a run of the engine, or the first one after a run inside of it."""
        self._refused, refused_before = True, self._refused
        nested = guards.is_nested()
        scaled = guards.scaled_run()
        if run == scaled or (nested and scaled > max(self._pass, self._scaled_before)):
            raise ValueError(
                "step_in_backward would apply gradients that a GradScaler has scaled. bfloat16 needs no scaler: leave "
                "it out, or build it with GradScaler(enabled=False); with float16, use the plain optimizer.step()"
            )
        if nested:
            self._waits, self._counted = True, False
        elif run != self._pass:
            if self._passes == self._accumulation_steps:
                raise ValueError(
                    f"backward pass {self._passes + 1} since the last optimizer.step(), with accumulation_steps="
                    f"{self._accumulation_steps}: call optimizer.step() after every {self._accumulation_steps}, or "
                    "step_in_backward(accumulation_steps=...) with the number of passes"
                )
            self.watch()
            self._passes, self._pass = self._passes + 1, run
            if self._is_last is not None:
                self._accumulation_steps = self._passes + (not self._is_last())
        if self._waits:
            self._warn(
                "a reentrant checkpoint delivers gradients before they are complete: all parameters wait for "
                "optimizer.step(), and no memory is saved; checkpoint with use_reentrant=False"
            )
        self._run, self._refused = run, refused_before

    def _refuse_others(self, optimizer: Stepper) -> DistributedDataParallel | None:
        """No other handle may watch the same parameters. Returns the DistributedDataParallel that they are in already.

        What is only waiting for the garbage collector does not count.
        """
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for last_try in (False, True):
            rivals = [p for p in params if any(handle.watches(p) for handle in guards.live)]
            modules = modules_around(params)
            if not (rivals or modules):
                return None
            if not last_try:
                modules.clear()
                gc.collect()
        if len(modules) > 1:
            raise ValueError(guards.TWO_MODULES)
        if not rivals:
            return modules[0]
        raise ValueError(
            f"parameter {optimizer._name_of(rivals[0])!r} is stepped in backward by another optimizer; remove() the "
            "handle of one of them"
        )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


@guards.uncompiled
def _arrived(reference: weakref.ref[InBackward], p: Tensor) -> None:
    """The hook, the same for every parameter; it does not keep the handle alive."""
    handle = reference()
    if handle is not None:
        handle.arrived(p)


def _last_pass(value: Any) -> Callable[[], object] | None:
    """What says whether the pass under way is the last one; None where passes are counted."""
    if value == "accelerate":
        try:
            from accelerate.state import GradientState
        except ImportError as error:
            raise ValueError('accumulation_steps="accelerate" needs the package accelerate') from error
        return lambda: GradientState().sync_gradients
    if callable(value):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            'accumulation_steps (step_in_backward in the constructor) must be an integer >= 1, "accelerate", or a '
            f"function that says whether a backward pass is the last one before optimizer.step(), got {value!r}"
        )
    return None


def _mark(lr: Any) -> Any:
    """Something that is equal as long as lr is; its value may be on a device that nobody waits for."""
    return (id(lr), lr._version) if isinstance(lr, Tensor) else lr
