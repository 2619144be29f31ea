"""The optimizer: composes plan, state and backend into a `torch.optim.Optimizer`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from adafactor import _state
from adafactor._hyper import DEFAULTS, Hyper, Lr, caller_level, check_lr, dtype_name, resolve
from adafactor._plan import TensorPlan, check_parameter, resolve_factor, tensor_plan, view_of
from adafactor._reports import Diagnostics, Explanation, diagnostics_of, explanation_of
from adafactor._rounding import stream_key
from adafactor._schedule import rho_at
from adafactor.backends import Report, Task, select


class Adafactor(Optimizer):
    r"""Adafactor (Shazeer & Stern 2018): adaptive learning rates with sublinear memory.

    For a weight matrix the second moment is kept as its row means R and column means C,

    .. math:: V_{ij} = R_i C_j / \mathrm{mean}(R), \quad U = g / \sqrt V, \quad
              p \leftarrow p - \alpha\, U / \max(1, \mathrm{RMS}(U) / d).

    `docs/algorithm.md` has every formula. Weights in bfloat16 and float16 are rounded stochastically, so that updates
    smaller than their spacing still count; all arithmetic and all statistics are float32.

    Args:
        params: parameters, named parameters or param groups. Every argument below can be set per group.
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
        momentum_dtype: torch.float32 or torch.bfloat16 (default: torch.float32)
        nesterov: subtract beta1 M + (1 - beta1) alpha U in place of M (default: False)
        weight_decay_mode: p shrinks by weight_decay times "lr", "scaled_lr" (the whole step size), "independent" (1) or
            "lr_squared" (default: "lr")
        factor: "auto", "last2", "first2", "largest2", "none", or a function of (name, shape) that returns (batch axes,
            row axes, column axes) or None (default: "auto")
        min_dim_size_to_factor: both sides of a matrix must reach it to be factored (default: 32)
        rms_scope: RMS(U) and RMS(p) per "matrix" of a stack or of the whole "tensor" (default: "matrix")
        maximize: ascend (default: False)
        rounding: "stochastic" or "nearest", for 16-bit weights (default: "stochastic")
        weight_bits: not built yet (default: None)
        seed: of the stochastic rounding (default: 0)
        backend: "auto" or "reference" (default: "auto"); `explain()` says what was chosen

    Raises:
        ValueError: for a value out of range, or two arguments that contradict each other; the message says the fix.

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
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name in DEFAULTS}
        arguments["momentum_dtype"] = dtype_name(momentum_dtype)
        select(backend, torch.device("cpu"))
        self._backend = backend
        self._start()
        super().__init__(params, arguments)

    def _start(self) -> None:
        """What is rebuilt, not saved."""
        self._slots: dict[Tensor, _Slot] = {}
        self._warned_lr = False

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
            if not isinstance(group["factor"], str):
                group["factor"] = resolve_factor(group["factor"], _shapes(self._named(group, start)))
            resolve(group)
            self._rebuild()
        except Exception:
            self.param_groups.pop()
            raise

    # torch.compiler.disable does the same, but importing it imports the whole compiler.
    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Never waits for the device.

        Args:
            closure: re-evaluates the model and returns the loss; gradients are enabled while it runs.

        Raises:
            ValueError: for a sparse gradient, naming the parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._update()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, or of the Adafactor of `transformers`, `torch.optim` or `timm`.

        Statistics keep the dtypes of the plan. Hyperparameters are taken from our own checkpoints only; the groups of
        another package never overwrite ours. Its full second moments may become factored here; any other change of
        view is an error.

        Raises:
            ValueError: if the checkpoint does not fit; the message names the parameter and the fix.
        """
        before = self.state, self.param_groups
        hook = self.register_load_state_dict_pre_hook(_shield)
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.state, self.param_groups = before
            self._start()
            raise
        finally:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter and the param groups, plain values only."""
        self._forget_removed()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._forget_removed()
        return super().__getstate__() | {"_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
        if any(isinstance(saved, _Shielded) for saved in self.state.values()):
            self._adopt()

    # What users ask

    def explain(self) -> Explanation:
        """One row per parameter: its view, whether it is factored, its state in bytes, its backend and why.

        `print(optimizer.explain())` shows a table.
        """
        return explanation_of((slot.plan, select(self._backend, p.device)) for p, slot in self._all_slots())

    def diagnostics(self) -> dict[str, Diagnostics]:
        """Per parameter: updates, RMS(U), share of clipped updates, step size, skipped gradients. Waits for the device.

        Counts start when the optimizer is built, unpickled or loaded.
        """
        return {slot.plan.name: diagnostics_of(slot.report) for _, slot in self._all_slots()}

    def step_in_backward(self, accumulation_steps: int = 1) -> Any:
        """Not built yet: update parameters during backward and free their gradients."""
        raise NotImplementedError("step_in_backward is not built yet; call step() after backward")

    def _get_lr(self, param_group: dict[str, Any], param_state: dict[str, Any]) -> Any:
        """The lr of a group, under the name that transformers' AdafactorSchedule calls."""
        del param_state
        return param_group["lr"] if param_group["rho"] is None else param_group["rho"]

    # The step

    def _update(self) -> None:
        tasks: dict[torch.device, list[Task]] = {}
        for group in self.param_groups:
            check_lr(group["lr"])
            hyper, lr = Hyper.of(group), self._lr(group)
            updated = False
            for p in dict.fromkeys(group["params"]):
                if p.grad is None:
                    continue
                slot = self._slot(p, hyper)
                _check_gradient(slot.plan.name, p.grad)
                task = Task(slot.plan, hyper, p, p.grad, self.state[p], lr, slot.stream, slot.report)
                tasks.setdefault(p.device, []).append(task)
                updated = True
            if updated:
                group["updates"] += 1
                if group["rho"] is not None:
                    group["rho"] = group["lr"] = rho_at(hyper, None, group["updates"])
        for device, batch in tasks.items():
            backend = select(self._backend, device).backend
            _allocate_sums(batch, device)
            backend.sweep(batch)
            # On one device the local sums are the global sums; sharded, this is where they cross the mesh.
            backend.apply(batch)

    def _lr(self, group: dict[str, Any]) -> Lr | None:
        """The lr that the backends get: None where the relative step is the paper's own."""
        lr = group["lr"]
        if group["rho"] is None:
            return lr.reshape(()) if isinstance(lr, Tensor) else lr
        # AdafactorSchedule writes 0.0 before the first step; any other value that is not ours is a schedule's.
        if not self._warned_lr and lr not in (group["rho"], 0.0):
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

    def _named(self, group: dict[str, Any], start: int) -> Iterator[tuple[int, str, Tensor]]:
        """(index in the group, name or "param ordinal", parameter); `start` is the first one's ordinal."""
        names = group.get("param_names")
        for index, p in enumerate(group["params"]):
            yield index, names[index] if names else f"param {start + index}", p

    def _all_slots(self) -> Iterator[tuple[Tensor, _Slot]]:
        self._rebuild()
        yield from self._slots.items()

    def _slot(self, p: Tensor, hyper: Hyper) -> _Slot:
        """The plan of a parameter, with its state allocated; rebuilt when the parameter or its group has changed."""
        slot, state = self._slots.get(p), self.state.get(p)
        if slot is None or not state or slot.key != _key(p, hyper) or state["step"].device != p.device:
            self._rebuild()
            slot = self._slots[p]
        return slot

    def _rebuild(self) -> None:
        """Plans from the groups as they are; states allocated, moved or converted where they no longer fit.

        Parameters without data (on "meta", or lazy) wait for their first use.
        """
        self._forget_removed()
        old, slots = self._slots, {}
        start, seen = 0, Counter()
        for group in self.param_groups:
            hyper = Hyper.of(group)
            for index, name, p in self._named(group, start):
                seen[name] += 1
                if not _has_data(p):
                    continue
                name = name if seen[name] == 1 else f"{name}#{seen[name]}"
                check_parameter(name, p.dtype)
                _refuse_sharded(name, p)
                view = view_of(hyper.factor, index, tuple(p.shape), hyper.min_dim_size_to_factor)
                plan = tensor_plan(name, p.shape, p.dtype, hyper, view)
                state = self.state.get(p)
                if not state:
                    self.state[p] = _state.allocate(plan, p.device)
                elif not isinstance(state, _Shielded):
                    self.state[p] = _state.carry_over(plan, state, p.device)
                kept = p in old and old[p].report.counts.device == p.device
                report = old[p].report if kept else Report(torch.zeros(3, device=p.device))
                slots[p] = _Slot(_key(p, hyper), plan, stream_key(hyper.seed, name), report)
            start += len(group["params"])
        self._slots = slots

    def _forget_removed(self) -> None:
        """Drop the state of parameters that are no longer in any group: they were swapped for others."""
        alive = set(self._parameters())
        for p in [p for p in self.state if isinstance(p, Tensor) and p not in alive]:
            del self.state[p]

    def _adopt(self) -> None:
        """Turn the shielded states that `load_state_dict` has put in place into ours."""
        self._rebuild()
        for group in self.param_groups:
            steps = [0]
            for p in group["params"]:
                shielded = self.state.get(p)
                if isinstance(shielded, _Shielded):
                    plan = self._slots[p].plan
                    self.state[p] = _state.load(plan, shielded.saved, p.device, group["momentum_mode"], shielded.source)
                    steps.append(int(self.state[p]["step"]))
            group["updates"] = max(steps)
            if group["rho"] is not None and group["updates"]:
                group["rho"] = group["lr"] = rho_at(Hyper.of(group), None, group["updates"])


class _Slot(NamedTuple):
    key: tuple
    plan: TensorPlan
    stream: tuple[int, int]
    report: Report


@dataclass(frozen=True)
class _Shielded:
    """A saved state on its way through the base class, which would cast its tensors to the parameter's dtype."""

    saved: dict[str, Any]
    source: _state.Source


def _key(p: Tensor, hyper: Hyper) -> tuple:
    """What a parameter's plan and stream were made from."""
    momentum = hyper.momentum_dtype if hyper.momentum else None
    structure = hyper.factor, hyper.min_dim_size_to_factor, hyper.rms_scope, hyper.scale_parameter
    return p.shape, p.dtype, momentum, structure, hyper.seed


def _shield(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Runs last of the hooks before loading: finds the layout and puts every state beyond the base class's reach."""
    theirs, ours = state_dict["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in ours]:
        return state_dict  # the base class says so
    layout = _state.layout_of(theirs)
    state = {}
    for group, own_group in zip(theirs, ours, strict=True):
        for index, p in zip(group["params"], own_group["params"], strict=True):
            saved = state_dict["state"].get(index)
            if saved and not _has_data(p):
                raise ValueError(f"parameter {index} has no data yet (meta or lazy); materialize the model, then load")
            if saved:
                state[index] = _Shielded(dict(saved), _state.Source(layout, group))
            elif layout.own and _has_data(p):
                raise ValueError(f"the checkpoint has no state for parameter {index}: it is not complete")
    if layout.own:
        groups = [{**own_group, **group} for group, own_group in zip(theirs, ours, strict=True)]
    else:
        groups = [{**own_group, "params": group["params"]} for group, own_group in zip(theirs, ours, strict=True)]
    return {**state_dict, "state": state, "param_groups": groups}


def _allocate_sums(tasks: list[Task], device: torch.device) -> None:
    """One flat buffer per dtype for the partial sums of all parameters, so that they can cross a mesh together."""
    for dtype in {task.plan.compute_dtype for task in tasks}:
        batch = [task for task in tasks if task.plan.compute_dtype == dtype]
        sizes = [spec.numel for task in batch for spec in task.plan.sums]
        views = iter(torch.zeros(sum(sizes), dtype=dtype, device=device).split(sizes))
        for task in batch:
            task.sums = {spec.name: next(views).view(spec.shape) for spec in task.plan.sums}


def _has_data(p: Tensor) -> bool:
    return not (p.is_meta or is_lazy(p))


def _shapes(named: Iterable[tuple[int, str, Tensor]]) -> list[tuple[str, tuple[int, ...]]]:
    shapes = []
    for _, name, p in named:
        if is_lazy(p):
            raise ValueError(f"factor is a function, and parameter {name!r} has no shape yet; run the model once first")
        shapes.append((name, tuple(p.shape)))
    return shapes


def _check_gradient(name: str, gradient: Tensor) -> None:
    if gradient.is_sparse or gradient.layout != torch.strided:
        raise ValueError(
            f"the gradient of parameter {name!r} is sparse, which Adafactor does not take yet; "
            "build the embedding with sparse=False"
        )


def _refuse_sharded(name: str, p: Tensor) -> None:
    if hasattr(p, "_fsdp_flattened") or getattr(p, "_is_flat_param", False):
        raise ValueError(
            f"parameter {name!r} was flattened by FSDP1, which hides the matrices that Adafactor factors; "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if hasattr(p, "device_mesh"):
        raise NotImplementedError(f"parameter {name!r} is sharded (a DTensor), which is not built yet")
