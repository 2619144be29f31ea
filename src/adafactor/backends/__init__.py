"""Backends: what a backend is, and which one serves a parameter.

A backend sees local dense matrices only, and does two things: `sweep` reads the gradients once and leaves partial sums
behind; `apply` takes the sums, complete by then, and commits weights and state. Both take all parameters at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from adafactor._hyper import Hyper, check_backend
from adafactor._plan import TensorPlan


class Streams(NamedTuple):
    """What sets apart the random bits of a parameter's weights and of its momentum."""

    weights: tuple[int, int]
    momentum: tuple[int, int]


@dataclass(slots=True)
class Task:
    """One parameter's update, from sweep to apply.

    Attributes:
        p, g: the weights and their gradient, in the parameter's shape.
        state: the tensors of `plan.state`.
        lr: the group's lr, or None for the paper's relative step.
        streams: the words for stochastic rounding, of the weights and of their momentum.
        sums: the tensors of `plan.sums`, zero at first; sweep adds to them.
        report: counters on the device, which apply advances.
        t, beta2: of this update; sweep notes them for apply.
        rows: what sweep keeps for apply without committing it: the new R.  # [matrices, rows]
    """

    plan: TensorPlan
    hyper: Hyper
    p: Tensor
    g: Tensor
    state: dict[str, Tensor]
    lr: float | Tensor | None
    streams: Streams
    report: Report
    sums: dict[str, Tensor] = field(default_factory=dict)
    t: Any = None  # a float, or a 0-d tensor where reading its value would wait for the device
    beta2: Any = None
    rows: Tensor | None = None


@dataclass(slots=True)
class Report:
    """What `diagnostics()` shows, as tensors on the device: nothing waits for them until asked.

    `counts` is the number of updates, of matrix updates that clipping shortened (as a share), and of gradients that
    were skipped for being non-finite.
    """

    counts: Tensor  # [3]
    update_rms: Tensor | None = None  # [matrices]
    step_size: Tensor | None = None  # [matrices]


class Backend(Protocol):
    name: str

    def sweep(self, tasks: Sequence[Task]) -> None: ...

    def apply(self, tasks: Sequence[Task]) -> None: ...


class Choice(NamedTuple):
    backend: Backend
    reason: str


def select(requested: str, device: torch.device) -> Choice:
    """The backend for parameters on `device`, and why.

    Raises:
        ValueError: if `requested` is no backend at all.
        NotImplementedError: if it is one that this version does not have.
    """
    from adafactor.backends import reference

    check_backend(requested)
    if requested == "auto":
        return Choice(reference, f"the only one for {device.type} in this version")
    if requested == "reference":
        return Choice(reference, "asked for")
    raise NotImplementedError(f"backend={requested!r} is not built yet; available: 'auto', 'reference'")
