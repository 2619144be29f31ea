"""The optimizer: composes plan, state and backend into a `torch.optim.Optimizer`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from adafactor import _state
from adafactor._checks import refuse_replaced, refuse_shared, refuse_sparse, warn_of_lost_updates
from adafactor._distributed import Member, Reduction, local, twin
from adafactor._hyper import DEFAULTS, Hyper, Lr, caller_level, check_lr, dtype_name, resolve
from adafactor._in_backward import InBackward
from adafactor._plan import TensorPlan, View, resolve_factor, view_of
from adafactor._reports import Diagnostics, Explanation, diagnostics_of, explanation_of
from adafactor._rounding import join_weight
from adafactor._schedule import exact, rho_at
from adafactor._slot import Slot, slot_of
from adafactor.backends import (
    Backend,
    Task,
    allocate_sums,
    check_available,
    reference,
    serving,
)


class Adafactor(Optimizer):
    r"""Adafactor (Shazeer & Stern 2018): adaptive learning rates with sublinear memory.

    For a weight matrix the second moment is kept as its row means R and column means C,

    .. math:: V_{ij} = R_i C_j / \mathrm{mean}(R), \quad U = g / \sqrt V, \quad
              p \leftarrow p - \alpha\, U / \max(1, \mathrm{RMS}(U) / d).

    `docs/algorithm.md` has every formula. Weights in bfloat16 and float16 are rounded stochastically, so that updates
    smaller than their spacing still count; all arithmetic and all statistics are float32.

    Args:
        params: parameters, named parameters or param groups. Every argument but `backend` and `step_in_backward` can be
            set per group.
        lr: the learning rate, as in AdamW: a number >= 0 or a tensor with one element. None is the paper: the relative
            step `min(1e-2, 1/sqrt(t))` scaled by RMS(p) (default: None)
        eps: eps1 >= 1e-37, added to the squared gradient, and eps2 >= 0, the least RMS(p) when the step is scaled
            (default: (1e-30, 1e-3))
        clip_threshold: d > 0, the largest RMS of an update before the step size; None switches update clipping off
            (default: 1.0)
        decay_rate: the exponent <= 0 in `beta2_t = 1 - t^decay_rate` (default: -0.8)
        beta1: momentum in [0, 1); None keeps none (default: None)
        weight_decay: >= 0, see `weight_decay_mode` (default: 0.0)
        scale_parameter: multiply the step by max(eps2, RMS(p)) (default: only when lr is None)
        relative_step: `min(lr, 1/sqrt(t))`; lr is then a cap, which schedulers move (default: only when lr is None)
        warmup_init: with relative_step, `min(1e-6 t, lr, 1/sqrt(t))` (default: False)
        beta2: a fixed beta2 in [0, 1), bias-corrected as in Adam, in place of decay_rate (default: None)
        beta2_cap: an upper bound in [0, 1) on beta2_t (default: None)
        momentum_mode: "scaled" averages the steps alpha U, "unscaled" averages U (default: "scaled")
        momentum_dtype: torch.float32, torch.bfloat16, or torch.int8: one byte and a scale for every 128 of a row, where
            a parameter is factored (default: torch.float32)
        nesterov: subtract beta1 M + (1 - beta1) alpha U in place of M (default: False)
        weight_decay_mode: p shrinks by weight_decay times "lr", "scaled_lr" (the whole step size), "independent" (1) or
            "lr_squared" (default: "lr")
        factor: "auto", "last2", "first2", "largest2", "none", or a function of (name, shape) that returns (batch axes,
            row axes, column axes) or None (default: "auto")
        min_dim_size_to_factor: both sides of a matrix must reach it to be factored (default: 32)
        rms_scope: RMS(U) and RMS(p) per "matrix" of a stack or of the whole "tensor" (default: "matrix")
        maximize: ascend (default: False)
        rounding: "stochastic" or "nearest", for 16-bit weights and momentum (default: "stochastic")
        weight_bits: 24 or 32 keeps that many bits of bfloat16 weights, the missing ones in the state, in place of
            `rounding`; wider weights have them already, float16 ones are refused (default: None)
        seed: of the stochastic rounding (default: 0)
        backend: "auto", "reference" or "cpu" (default: "auto"); `explain()` says which
            one serves each parameter, and why
        step_in_backward: call the method of this name with this value, where a trainer reaches the constructor only;
            None does not (default: None)

    Raises:
        ValueError: for a value out of range, two arguments that contradict each other, or a backend that cannot serve a
            parameter; the message says the fix.

    Example:
        >>> import torch, adafactor
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = adafactor.Adafactor(model.parameters(), lr=1e-3, beta1=0.9, weight_decay=0.01)
        >>> model(torch.ones(8, 64)).square().mean().backward()
        >>> optimizer.step()

    Reference: https://arxiv.org/abs/1804.04235
    """

    def __init__(
        self,
        params: Any,
        lr: Lr | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float | None = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool | None = None,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        *,
        beta2: float | None = None,
        beta2_cap: float | None = None,
        momentum_mode: str = "scaled",
        momentum_dtype: torch.dtype | str = torch.float32,
        nesterov: bool = False,
        weight_decay_mode: str = "lr",
        factor: str | Callable[[str, tuple[int, ...]], Any] = "auto",
        min_dim_size_to_factor: int = 32,
        rms_scope: str = "matrix",
        maximize: bool = False,
        rounding: str = "stochastic",
        weight_bits: int | None = None,
        seed: int = 0,
        backend: str = "auto",
        step_in_backward: int | str | Callable[[], bool] | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name in DEFAULTS}
        arguments["momentum_dtype"] = dtype_name(momentum_dtype)
        check_available(backend)
        self._backend = backend
        self._start(ready=False)
        super().__init__(params, arguments)
        self._ready = True
        self._rebuild()
        for group in self.param_groups:
            warn_of_lost_updates(group, self._plans())
        if step_in_backward is not None:
            self.step_in_backward(step_in_backward)

    _in_backward: InBackward | None = None  # the living handle, which copies do not have

    def _start(self, ready: bool = True) -> None:
        """What is rebuilt, not saved."""
        self._slots: dict[Tensor, Slot] = {}
        self._split: set[Tensor] = set()  # parameters whose sums cross a mesh
        self._reductions: dict[tuple[int, ...], Reduction] = {}
        self._updated: dict[int, dict[str, Any]] = {}  # groups with updates that `step` has not counted yet
        self._warned_lr = False
        self._ready = ready  # not before the constructor has all groups

    # The torch.optim contract

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with hyperparameters of their own if the group holds any.

        Raises:
            ValueError: as the constructor; the optimizer is then unchanged.
        """
        start = len(self._parameters())
        super().add_param_group(dict(param_group))
        group = self.param_groups[-1]
        try:
            if callable(group["factor"]):
                group["factor"] = resolve_factor(group["factor"], _shapes(self._named(group, start)))
            resolve(group)
            if self._ready:
                self._rebuild()
                warn_of_lost_updates(group, self._plans())
                if self._in_backward is not None:
                    self._in_backward.watch()
        except Exception:
            self.param_groups.pop()
            raise

    # torch.compiler.disable does the same, but importing it imports the whole compiler.
    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Never waits for the device, unless a gradient is sparse.

        Where parameters are sharded, every rank has to call it: a step is one collective per process group.

        While `step_in_backward` is on, those are the few that were not stepped during backward; their gradients are
        freed too.

        Args:
            closure: re-evaluates the model and returns the loss; gradients are enabled while it runs.

        Raises:
            ValueError: for a gradient of a sharded parameter that is sparse, not final, or on some ranks only, naming
                the parameter; and if `step_in_backward` is on and the backward passes since the last step
                do not add up.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        handle = self._in_backward
        if handle is not None:
            handle.check()
        with torch.no_grad():
            left = handle.left if handle is not None else list
            self._update((group, left(dict.fromkeys(group["params"]))) for group in self.param_groups)
        for group in self._updated.values():
            self._show_lr(group, group["updates"] + 1)
        self._updated.clear()
        if handle is not None:
            handle.finish()
        return loss

    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in `torch.optim`. Backward passes whose gradients are dropped do not count for `step_in_backward`."""
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            self._in_backward.forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, or of the Adafactor of `transformers`, `torch.optim` or `timm`.

        Statistics keep the dtypes of the plan. Hyperparameters are taken from our own checkpoints only; the groups of
        another package never overwrite ours. Its full second moments may become factored here; any other change of
        view is an error.

        Raises:
            ValueError: if the checkpoint does not fit; the message names the parameter and the fix.
        """
        refuse_replaced(self.param_groups, self._slots)
        before = self.state, self.param_groups
        hook = self.register_load_state_dict_pre_hook(_state.shield)
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.state, self.param_groups = before
            self._start()
            raise
        finally:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The state of every trainable parameter and the param groups, plain values only."""
        self._rebuild()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._rebuild()
        saved = super().__getstate__() | {"_backend": self._backend}
        if callable(self.defaults["factor"]):  # the groups hold what it chose; a later group has to bring its own
            saved["defaults"] = self.defaults | {"factor": "a function that was not saved"}
        return saved

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # the base class adds it to what it restores
        self._start()
        self._adopt()

    # What users ask

    def explain(self) -> Explanation:
        """One row per parameter: its view, whether it is factored, its state in bytes, its backend and why.

        `print(optimizer.explain())` shows a table.
        """
        self._rebuild()
        slots = self._slots.items()
        return explanation_of((slot.plan, slot.task.plan, p in self.state, slot.served) for p, slot in slots)

    def diagnostics(self) -> dict[str, Diagnostics]:
        """Per parameter: updates, RMS(U), share of clipped updates, step size, skipped gradients. Waits for the device.

        Counts start when the optimizer is built, unpickled or loaded.
        """
        self._rebuild()
        return {slot.plan.name: diagnostics_of(slot.task.report) for slot in self._slots.values()}

    def full_precision_weights(self) -> dict[str, Tensor]:
        """Copies of all weights by name, for export or evaluation: float32 where `weight_bits` keeps missing bits."""
        self._rebuild()
        weights = {}
        for p, slot in self._slots.items():
            planes = [local(self.state[p][plane]) for plane in slot.plan.planes if p in self.state]
            piece = join_weight(local(p).detach(), *planes) if planes else local(p).detach().clone()
            weights[slot.plan.name] = slot.sharding.like(p, piece) if slot.sharding else piece
        return weights

    def step_in_backward(self, accumulation_steps: int | str | Callable[[], bool] = 1) -> InBackward:
        """Update each parameter during backward, as soon as its gradient is final, and free the gradient.

        The bits are those of the plain step. `step()` stays the call at the end of an iteration: it steps what waited
        for it, checks that the passes add up, and counts the updates that lr schedules show. `docs/in-backward.md` has
        what works together, and what raises.

        Args:
            accumulation_steps: backward passes >= 1 that gather gradients before each `step()`; parameters are stepped
                during the last one. Where gradients are reduced over processes, passes without a reduction, as under
                `no_sync()`, do not count. Or a function that says, while a pass runs, whether it is the last one;
                "accelerate" is Accelerate's `sync_gradients` (default: 1)

        Returns:
            A handle: `remove()`, or the end of a `with` block, undoes it; `accumulation_steps` may be assigned.

        Raises:
            ValueError: if it is on already, or the model is in DistributedDataParallel that has a communication hook.
                Later, in backward: if a pass is one too many, or gradients are not what the plain step would see; the
                message says the fix.

        Example:
            >>> import torch, adafactor
            >>> model = torch.nn.Linear(64, 64)
            >>> optimizer = adafactor.Adafactor(model.parameters(), lr=1e-3)
            >>> with optimizer.step_in_backward():
            ...     for _ in range(3):
            ...         model(torch.ones(8, 64)).square().mean().backward()  # steps, and frees gradients
            ...         optimizer.step()
            >>> model.weight.grad is None
            True
        """
        if self._in_backward is not None:
            raise ValueError(
                "step_in_backward is on already for this optimizer; remove() its handle first, or assign the handle's "
                "accumulation_steps"
            )
        return InBackward(self, accumulation_steps)

    def _attach(self, handle: InBackward | None) -> None:
        """Let a handle step parameters, or none. If some are sharded, process groups are made here, on all ranks."""
        self._in_backward = handle
        self._reductions.clear()
        if handle is not None:
            self._reduction([self._slots[p] for p in self._parameters() if p in self._split])

    def _get_lr(self, param_group: dict[str, Any], param_state: dict[str, Any]) -> Any:
        """The step size of a group before scaling, under the name that transformers' AdafactorSchedule calls."""
        if param_group["rho"] is not None:
            return param_group["rho"]
        return rho_at(Hyper.of(param_group), param_group["lr"], max(1, int(param_state["step"])))

    # The step

    def _update(self, chosen: Iterable[tuple[dict[str, Any], Iterable[Tensor]]]) -> None:
        """One update of those of the chosen parameters that have a gradient, group by group."""
        chosen = [(group, tuple(params)) for group, params in chosen]
        batches: dict[Backend, list[Task]] = {}
        updated: dict[int, dict[str, Any]] = {}
        split: list[Tensor] = []
        slots = self._slots
        try:
            for group, params in chosen:
                hyper = Hyper.of(group)
                lr = self._lr(group, hyper)
                for p in params:
                    g = p.grad
                    if g is None:
                        if self._split and p.requires_grad and p in self._split:
                            split.append(p)
                        continue
                    slot = self._slots.get(p)
                    if slot is None or not slot.take(hyper, p, g, self.state.get(p)):
                        slot = self._slot(p, hyper)
                        if slot.sharding and g.layout is not torch.strided:
                            refuse_sparse(slot.plan.name)
                        slot.fill(hyper, p, g, self.state[p])
                        slot.served = serving(slot.choice, slot.task)
                    slot.task.lr = lr
                    updated[id(group)] = group
                    if slot.is_split:
                        split.append(p)
                        continue
                    batches.setdefault(slot.served.backend, []).append(slot.task)
            if self._slots is not slots:  # rebuilt on the way: what was looked up before that is out of date
                self._update(chosen)
                return
            for backend, batch in batches.items():
                backend.step(batch)
            if split:
                self._update_split(split)
        finally:
            for p in split:
                self._slots[p].task.let_go()
            for batch in batches.values():
                for task in batch:
                    task.let_go()
        self._updated |= updated

    def _update_split(self, params: list[Tensor]) -> None:
        """One update of parameters whose sums cross a mesh: sweep, reduce, apply. The same parameters on every rank."""
        slots = [self._slots[p] for p in params]
        reduction = self._reduction(slots)
        tasks = [slot.task if p.grad is not None else None for slot, p in zip(slots, params, strict=True)]
        batches: dict[Backend, list[Task]] = {}
        for slot, task in zip(slots, tasks, strict=True):
            if task is not None:
                batches.setdefault(slot.served.backend, []).append(task)
        present = [task for task in tasks if task is not None]
        allocate_sums(present)
        reference.sum_rows([task for task in present if "row_sq" in task.sums])
        sums = [None if task is None else task.sums for task in tasks]
        reduction.rows(sums)
        for backend, batch in batches.items():
            backend.sweep(batch)
        for begins in reduction.complete(sums):
            reference.mean_squares([task for task in map(tasks.__getitem__, begins) if task is not None])
        for backend, batch in batches.items():
            backend.apply(batch)
        written = [p for p in params if p.grad is not None and not p.is_inference()]
        torch.autograd.graph.increment_version(written)

    def _reduction(self, slots: list[Slot]) -> Reduction:
        key = tuple(map(id, slots))
        if key not in self._reductions:
            if len(self._reductions) > len(self._slots):  # what is left over after backward may differ every time
                self._reductions.clear()
            members = [Member(slot.task.plan, slot.sharding) for slot in slots if slot.sharding]
            self._reductions[key] = Reduction(members, twin) if self._in_backward else Reduction(members)
        return self._reductions[key]

    def _show_lr(self, group: dict[str, Any], updates: int) -> None:
        group["updates"] = updates
        if group["rho"] is not None and updates:
            group["rho"] = group["lr"] = rho_at(Hyper.of(group), None, updates)

    def _lr(self, group: dict[str, Any], hyper: Hyper) -> Lr | None:
        """The lr that the backends get: None where the relative step is the paper's own."""
        lr = check_lr(group["lr"])
        if lr is None or (group["rho"] is not None and not hyper.relative_step):
            raise ValueError(
                f"lr={lr} and relative_step={hyper.relative_step} in a group that was built otherwise; "
                "build the optimizer with an lr to switch relative_step off"
            )
        if group["rho"] is None:
            return exact(lr) if isinstance(lr, Tensor) else lr
        # transformers' AdafactorSchedule writes 0.0 where it has no gradient to ask, and leaves no initial_lr behind.
        if not self._warned_lr and lr != group["rho"] and (lr or "initial_lr" in group):
            self._warned_lr = True
            warnings.warn(
                f"lr was set to {lr}, but this group was built with lr=None: its step is the paper's relative step, "
                "which lr only shows. To use a schedule, build the optimizer with an lr (and scale_parameter=True to "
                "scale it by RMS(p)).",
                stacklevel=caller_level(),
            )
        return None

    # Plans, states and names

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _plans(self) -> dict[Tensor, TensorPlan]:
        return {p: slot.plan for p, slot in self._slots.items()}

    def _name_of(self, p: Tensor) -> str:
        if p not in self._slots:
            self._rebuild()
        return self._slots[p].plan.name

    def _named(self, group: dict[str, Any], start: int) -> Iterator[tuple[int, str, Tensor]]:
        """(index in the group, name or "param ordinal", parameter); `start` is the first one's ordinal."""
        names = group.get("param_names")
        for index, p in enumerate(group["params"]):
            yield index, names[index] if names else f"param {start + index}", p

    def _slot(self, p: Tensor, hyper: Hyper) -> Slot:
        """The plan of a parameter, with its state allocated; rebuilt when the parameter or its group has changed."""
        slot = self._slots.get(p)
        if slot and slot.fits(p, hyper, self.state.get(p)):
            return slot
        if slot and slot.has_moved(p, hyper):  # the others are as they were
            self._slots[p] = slot = self._new_slot(p, slot.plan.name, hyper, slot.plan.view)
            self._split.discard(p)
            if slot.is_split:
                self._split.add(p)
            self._reductions.clear()
        else:
            self._rebuild()
        return self._slots[p]

    def _rebuild(self) -> None:
        """Plans from the groups as they are; states allocated, moved or converted where they no longer fit.

        Parameters without data (on "meta", or lazy) and frozen ones wait for their first use.
        """
        refuse_replaced(self.param_groups, self._slots)
        self._forget_removed()
        self._reductions.clear()
        slots: dict[Tensor, Slot] = {}
        start, seen, places = 0, Counter(), {}
        for group in self.param_groups:
            hyper = Hyper.of(group)
            for index, name, p in self._named(group, start):
                seen[name] += 1
                name = name if seen[name] == 1 else f"{name}#{seen[name]}"
                if _state.has_data(p) and p not in slots:
                    refuse_shared(name, p, places)
                    view = view_of(hyper.factor, index, name, tuple(p.shape), hyper.min_dim_size_to_factor)
                    slots[p] = self._new_slot(p, name, hyper, view)
            start += len(group["params"])
        self._slots = slots
        self._split = {p for p, slot in slots.items() if slot.is_split}

    @torch.inference_mode(False)  # wherever the optimizer is built, steps write to what is allocated here
    def _new_slot(self, p: Tensor, name: str, hyper: Hyper, view: View | None) -> Slot:
        slot, state = slot_of(p, name, hyper, view, self._backend, self._slots.get(p)), self.state.get(p)
        if isinstance(state, dict) and state:
            self.state[p] = _state.carry_over(slot.plan, state, slot.home)
        elif not state and (p.requires_grad or p.grad is not None):
            self.state[p] = _state.allocate(slot.plan, slot.home)
        return slot

    def _forget_removed(self) -> None:
        """Drop the state of parameters that are no longer in any group: they were swapped for others."""
        alive = set(self._parameters())
        for p in [p for p in self.state if isinstance(p, Tensor) and p not in alive]:
            del self.state[p]

    def _adopt(self) -> None:
        """Turn the shielded states that `load_state_dict` has put in place into ours, and count on from there."""
        self._rebuild()
        for group in self.param_groups:
            steps = [0]
            for p in group["params"]:
                shielded = self.state.get(p)
                if isinstance(shielded, _state.Shielded):
                    slot, mode = self._slots[p], group["momentum_mode"]
                    self.state[p] = _state.load(slot.plan, shielded.saved, slot.home, mode, shielded.source)
                if p in self.state:
                    steps.append(int(self.state[p]["step"]))
            self._show_lr(group, max(steps))


def _shapes(named: Iterable[tuple[int, str, Tensor]]) -> list[tuple[str, tuple[int, ...]]]:
    shapes = []
    for _, name, p in named:
        if is_lazy(p):
            raise ValueError(f"factor is a function, and parameter {name!r} has no shape yet; run the model once first")
        shapes.append((name, tuple(p.shape)))
    return shapes
