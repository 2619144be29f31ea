"""The reference on a GPU, where every operation is a launch: parameters that are treated alike are stepped together.

A wave of them is stacked, the reference's step of one parameter is mapped over the stack (`torch.vmap`: each operation
runs once, for all), and what it has written is copied back. So everything is still each parameter's own: its time, its
random bits, whether its gradient is finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch import _foreach_add_ as foreach_add  # pyright: ignore[reportPrivateImportUsage]
from torch import _foreach_copy_ as foreach_copy  # pyright: ignore[reportPrivateImportUsage]

from adafactor.backends import Kept, Report, Streams, Task, reference

name = reference.name
ready, refuses, sweep, apply = reference.ready, reference.refuses, reference.sweep, reference.apply


def step(tasks: Sequence[Task]) -> None:
    alone = []
    for wave in _waves(tasks):
        if len(wave) > 1:
            _step(wave)
        else:
            alone += wave
    reference.step(alone)


def _waves(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Those that differ in nothing but values and names, as many at a time as a block has room for."""
    alike: dict[tuple, list[Task]] = {}
    for task in tasks:
        lr = id(task.lr) if isinstance(task.lr, Tensor) else task.lr
        key = replace(task.plan, name=""), task.hyper, lr, task.p.device, task.g.dtype
        alike.setdefault(key, []).append(task)
    for same in alike.values():
        p = same[0].p
        most = max(reference.block_size(p.device) // max(p.numel(), 1), 1)
        for first in range(0, len(same), most):
            yield same[first : first + most]


def _step(wave: Sequence[Task]) -> None:
    kept = {spec.name: [task.state[spec.name] for task in wave] for spec in wave[0].plan.state}
    kept |= {"p": [task.p.detach() for task in wave], "report": [task.report.values for task in wave]}
    stacks = {name: torch.stack(tensors) for name, tensors in kept.items()}
    g = torch.stack([task.g for task in wave])
    stepped = torch.vmap(partial(_step_one, wave[0]))(stacks, g, _words(wave))
    for name, tensors in kept.items():
        foreach_copy(tensors, list(stepped[name].unbind()))


def _step_one(like: Task, kept: dict[str, Tensor], g: Tensor, words: Tensor) -> dict[str, Tensor]:
    """One parameter of a wave, as vmap shows it. Overwrites what is kept."""
    a, b, c, d = words.unbind()
    streams, report = Streams((a, b), (c, d)), Report(kept["report"])
    reference.step([replace(like, p=kept["p"], g=g, state=kept, streams=streams, report=report, kept=Kept())])
    return kept


def _words(wave: Sequence[Task]) -> Tensor:
    """Those of the streams. They go to the device as arguments of a launch: nothing waits.  # [parameters, 4]"""
    words = torch.zeros(len(wave), 4, dtype=torch.int32, device=wave[0].p.device)
    foreach_add(list(words.view(-1).unbind()), [word for task in wave for stream in task.streams for word in stream])
    return words
