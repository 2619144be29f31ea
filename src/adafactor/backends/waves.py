"""The reference on a GPU, where every operation is a launch: parameters that are treated alike are stepped together.

A wave of them is stacked, the reference's step of one parameter is mapped over the stack (`torch.vmap`, which runs each
of its operations once for all), and what it has written is copied back. So whatever is a parameter's own stays so: its
time, its random bits, whether its gradient is finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from adafactor.backends import Kept, Report, Streams, Task, reference

name = reference.name
ready, refuses, sweep, apply = reference.ready, reference.refuses, reference.sweep, reference.apply


def step(tasks: Sequence[Task]) -> None:
    alone = []
    for wave in _waves(tasks):
        if len(wave) == 1:
            alone += wave
        else:
            _step(wave)
    reference.step(alone)


def _waves(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Those whose step differs in nothing but values, as many as together are no larger than a block."""
    alike: dict[tuple, list[Task]] = {}
    for task in tasks:
        lr = id(task.lr) if isinstance(task.lr, Tensor) else task.lr
        key = replace(task.plan, name=""), task.hyper, lr, task.p.device, task.g.dtype
        alike.setdefault(key, []).append(task)
    for same in alike.values():
        most = max(reference.block_size(same[0].p.device) // max(same[0].p.numel(), 1), 1)
        yield from (same[first : first + most] for first in range(0, len(same), most))


def _step(wave: Sequence[Task]) -> None:
    """As `reference.step`, in a constant number of operations."""
    names = [spec.name for spec in wave[0].plan.state]
    kept = {name: [task.state[name] for task in wave] for name in names}
    kept |= {"p": [task.p.detach() for task in wave], "report": [task.report.values for task in wave]}
    stacks = {name: torch.stack(tensors) for name, tensors in kept.items()}
    g, words = torch.stack([task.g for task in wave]), _words(wave)
    stacks = torch.vmap(partial(_step_one, wave[0]))(stacks, g, words)
    for name, tensors in kept.items():
        torch._foreach_copy_(tensors, list(stacks[name].unbind()))


def _step_one(like: Task, kept: dict[str, Tensor], g: Tensor, words: Tensor) -> dict[str, Tensor]:
    """One of the wave, as `torch.vmap` shows it. Writes to what is kept."""
    weights, momentum = words.view(2, 2).unbind()
    streams = Streams(tuple(weights.unbind()), tuple(momentum.unbind()))
    reference.step(
        [replace(like, p=kept["p"], g=g, state=kept, streams=streams, report=Report(kept["report"]), kept=Kept())]
    )
    return kept


def _words(wave: Sequence[Task]) -> Tensor:
    """The words of each parameter's streams, on the device. As scalars of an operation they wait for no copy.  # [K, 4]"""
    words = torch.zeros(len(wave), 4, dtype=torch.int32, device=wave[0].p.device)
    torch._foreach_add_(words.view(-1).unbind(), list(chain.from_iterable(chain(*task.streams) for task in wave)))
    return words
