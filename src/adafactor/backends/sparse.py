"""Row-sparse gradients, as `nn.Embedding(sparse=True)` makes them: the dense gradient's step, for the rows touched.

The rows that a gradient touches are taken out as a matrix of their own, stepped by the reference, and put back. Of the
others nothing has to be read but the row statistics: their g and U are 0, so their weights stay, they add nothing to
the columns' sums, and

    R_i <- beta2 R_i + (1 - beta2) eps1.

RMS(p) is over all rows. Their sums of p^2 are kept from step to step, row by row: each is a function of the row as it
is now, so that nothing drifts and a run that was resumed has the bits of one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adafactor.backends import Task, allocate_sums, reference

name = "sparse"


def ready(task: Task) -> bool:
    return False


def refuses(task: Task) -> str | None:
    """Why the step has to read or write more than the rows that the gradient touches, or None."""
    view = task.plan.view
    if view is None:
        return "the full V decays everywhere"
    if view.batch or view.rows != (0,) or task.g.sparse_dim() != 1:
        return "what it holds are not rows of the matrix view"
    if task.hyper.momentum:
        return "momentum moves every row"
    return "weight decay moves every row" if task.hyper.weight_decay else None


def step(tasks: Sequence[Task]) -> None:
    allocate_sums(tasks)
    for task in tasks:  # one after the other: what is taken out of one is gone before the next
        _sweep(task)
        _apply(task)


def sweep(tasks: Sequence[Task]) -> None:
    for task in tasks:
        _sweep(task)


def apply(tasks: Sequence[Task]) -> None:
    for task in tasks:
        _apply(task)


def _sweep(task: Task) -> None:
    task.touched = touched = _touched(task)
    places, sums = touched.places, task.sums
    assert places is not None
    reference.sweep([touched])
    assert touched.rows is not None
    R = task.state[task.plan.row_stat] * touched.beta2  # [rows]
    R += (1 - touched.beta2) * R.new_full((1,), task.hyper.eps[0])
    task.rows = R.index_copy_(0, places, touched.rows.view(-1))[None]
    sums["row_sum"].copy_(R.sum())
    if "param_sq" in sums:
        sums["param_sq"].copy_(_param_sq(task, touched))


def _apply(task: Task) -> None:
    touched, state, kept = task.touched, task.state, task.kept
    assert touched is not None
    assert touched.places is not None
    assert task.rows is not None
    skipped = task.report.counts[2].clone()
    reference.apply([touched])
    ok = task.report.counts[2] == skipped
    R = state[task.plan.row_stat]
    R.copy_(torch.where(ok, task.rows[0], R))
    task.p.detach().index_copy_(0, touched.places, touched.p)
    for plane in task.plan.planes:
        state[plane].index_copy_(0, touched.places, touched.state[plane])
    if "param_sq" in task.sums and kept.row_param_sq is not None:
        kept.row_param_sq = kept.row_param_sq.index_copy(0, touched.places, reference.row_param_sq(touched))
        kept.row_mark = _mark(task)
    task.touched = None


def _touched(task: Task) -> Task:
    """The rows that the gradient touches. They share what is not kept by row: C, the step, the sums, the report."""
    g = task.g.coalesce()
    places = g.indices()[0]
    plan = replace(task.plan, shape=(len(places), *task.plan.shape[1:]))
    by_row = {name: task.state[name].index_select(0, places) for name in (plan.row_stat, *plan.planes)}
    p = task.p.detach().index_select(0, places)
    return replace(task, plan=plan, p=p, g=g.values(), state=task.state | by_row, places=places)


def _param_sq(task: Task, touched: Task) -> Tensor:
    """The sum of p^2 over all rows, which are read only where they may have been written by somebody else.

    Autograd does not see every write; the touched rows, whose sums are at hand, show those of all rows.
    """
    kept = task.kept
    if kept.row_param_sq is not None and kept.row_mark is not None and kept.row_mark == _mark(task):
        total = kept.row_param_sq.sum()
        if total.isfinite() and kept.row_param_sq[touched.places].equal(reference.row_param_sq(touched)):
            return total
    kept.row_param_sq = reference.row_param_sq(task)
    return kept.row_param_sq.sum()


def _mark(task: Task) -> Any:
    """Something that changes with the weights, as far as autograd sees it; None where it sees nothing."""
    tensors = [task.p, *(task.state[plane] for plane in task.plan.planes)]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
