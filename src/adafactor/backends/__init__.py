"""Backends: what a backend is, and which one serves a parameter.

A backend sees local dense matrices only, and does two things: `sweep` reads the gradients once and leaves partial sums
behind; `apply` takes the sums, complete by then, and commits weights and state. `step` is both, for parameters whose
sums are complete where they are made; a backend may then go on with a parameter while its gradient is still in cache.
Each takes all parameters at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from adafactor._hyper import Hyper, check_backend
from adafactor._plan import TensorPlan

NO_GRADIENT = torch.empty(0)


class Streams(NamedTuple):
    """What sets apart the random bits of a parameter's weights and of its momentum: two words each."""

    weights: tuple[Any, Any]  # ints; in a wave, int32 tensors
    momentum: tuple[Any, Any]


@dataclass(slots=True)
class Task:
    """One parameter's update.

    The same object serves every step: thousands of new ones would wake the garbage collector each time.

    Attributes:
        p, g: the weights and their gradient, in the parameter's shape.
        state: the tensors of `plan.state`.
        lr: the group's lr, or None for the paper's relative step.
        streams: the words for stochastic rounding, of the weights and of their momentum.
        report: counters on the device, which apply advances.
        kept: what the backend keeps from step to step.
        sums: the tensors of `plan.sums`; sweep adds to them.
        rows: what sweep keeps for apply without committing it: the new R.  # [matrices, rows]
        t, beta2: of this update; sweep may note them for apply.
        places: where the rows that are here lie in the whole, if that is no run; then axis 0 is the view's rows.
        touched: the rows that a sparse gradient touches, as a task of their own.
    """

    plan: TensorPlan
    hyper: Hyper
    p: Tensor
    g: Tensor
    state: dict[str, Tensor]
    lr: float | Tensor | None
    streams: Streams
    report: Report
    kept: Kept
    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    t: Any = None  # a float, or a 0-d tensor where reading its value would wait for the device
    beta2: Any = None
    places: Tensor | None = None
    touched: Task | None = None

    def let_go(self) -> None:
        """Of everything that belongs to one step: gradients are not to outlive it here."""
        self.g, self.sums, self.rows, self.touched = NO_GRADIENT, {}, None, None


@dataclass(slots=True)
class Report:
    """What `diagnostics()` shows, on the device: nothing waits for it until asked."""

    values: Tensor  # [3 + 2 matrices]

    @classmethod
    def of(cls, plan: TensorPlan, device: torch.device) -> Report:
        return cls(torch.zeros(3 + 2 * plan.dims[0], dtype=plan.compute_dtype, device=device))

    @property
    def counts(self) -> Tensor:
        """Updates; matrix updates that clipping shortened, as a share; gradients skipped for being non-finite."""
        return self.values[:3]

    @property
    def update_rms(self) -> Tensor:  # [matrices]
        return self.values[3:].chunk(2)[0]

    @property
    def step_size(self) -> Tensor:  # [matrices]
        return self.values[3:].chunk(2)[1]


@dataclass(slots=True)
class Kept:
    """What a backend keeps of a parameter from step to step, and may lose at any time.

    Attributes:
        param_sq: the sums of p^2 that its last write of p left, which hold while nobody else writes to p, and p's
            fingerprint then.  # [matrices + 1]
        version: p's version then.
        row_param_sq: per row the sum of p^2 that the last step with a sparse gradient left.  # [rows]
        row_mark: what p was then.
        prepared, kind: the backend's own.
    """

    param_sq: Tensor | None = None
    version: int | None = None
    row_param_sq: Tensor | None = None
    row_mark: Any = None
    prepared: Any = None
    kind: Any = None


class Backend(Protocol):
    name: str

    def ready(self, task: Task) -> bool:
        """Whether it took the task before and nothing but values has changed since."""
        ...

    def refuses(self, task: Task) -> str | None:
        """Why it cannot take the task as it stands, or None."""
        ...

    def step(self, tasks: Sequence[Task]) -> None: ...

    def sweep(self, tasks: Sequence[Task]) -> None: ...

    def apply(self, tasks: Sequence[Task]) -> None: ...


class Choice(NamedTuple):
    backend: Backend
    reason: str


def check_available(requested: str) -> None:
    """Refuse a backend that nothing here could be served by.

    Raises:
        ValueError: if `requested` is no backend, or one that this installation lacks.
    """
    from adafactor.backends import cpu, triton

    check_backend(requested)
    for backend in (cpu, triton):
        if requested == backend.name and backend.missing():
            raise ValueError(
                f"backend={requested!r} is not available: {backend.missing()}; use backend='auto' or 'reference'"
            )


def select(requested: str, plan: TensorPlan, p: Tensor) -> Choice:
    """The backend for one parameter, and why. Without elements, as a rank's piece may be, there is nothing to serve.

    Raises:
        ValueError: if it was asked for by name and cannot serve this parameter.
    """
    from adafactor.backends import cpu, triton

    if requested == "reference":
        return Choice(_reference(p), "asked for")
    backend = triton if requested == "triton" or (requested == "auto" and p.device.type != "cpu") else cpu
    refusal = backend.refuses_parameter(plan, p)
    if refusal is None:
        return Choice(backend, backend.describe())
    if requested == backend.name and p.numel():
        raise ValueError(f"backend={requested!r} cannot serve parameter {plan.name!r}: {refusal}; use backend='auto'")
    return Choice(_reference(p), refusal)


def _reference(p: Tensor) -> Backend:
    from adafactor.backends import reference, waves

    return reference if p.device.type in reference.HOST else waves


def serving(choice: Choice, task: Task) -> Choice:
    """The choice, or what takes its place where it cannot take this task, and why.

    A sparse gradient whose step moves more than the rows it touches is made dense here.
    """
    if task.g.layout is torch.sparse_coo:
        from adafactor.backends import sparse

        refusal = sparse.refuses(task)
        if refusal is None:
            return Choice(sparse, "its gradient is sparse")
        task.g = task.g.to_dense()
        dense = serving(choice, task)
        return Choice(dense.backend, f"{dense.reason}; its sparse gradient is made dense, as {refusal}")
    refusal = choice.backend.refuses(task)
    if refusal is None:
        return choice
    return Choice(_reference(task.p), refusal)


def allocate_sums(tasks: Sequence[Task]) -> None:
    """A flat buffer per dtype and device for the partial sums of all parameters: they can cross a mesh together."""
    for dtype, device in {(task.plan.compute_dtype, task.p.device) for task in tasks}:
        batch = [task for task in tasks if task.plan.compute_dtype == dtype and task.p.device == device]
        sizes = [spec.numel for task in batch for spec in task.plan.sums]
        zeros = batch[0].p.new_zeros(sum(sizes), dtype=dtype)  # of p's: in a wave, every parameter has its own
        views = iter(zeros.split(sizes))
        for task in batch:
            task.sums = {spec.name: next(views).view(spec.shape) for spec in task.plan.sums}
