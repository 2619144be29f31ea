"""Parameters replaced by sharded ones, and other changes that a step has to notice: beside one process's step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from _ranks import good, run_on_ranks
from adafactor import Adafactor

SHAPES = [(40, 50), (64, 33), (9,)]


def place(p: Tensor, placement: Placement) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [placement]))


def replace(optimizer: Adafactor, params: list[Tensor]) -> list[Tensor]:
    """As Accelerate does under FSDP2: through placeholders of one element."""
    sharded: list[Tensor] = [place(p, Shard(0)) for p in params]
    for group in optimizer.param_groups:
        places = [next(k for k, p in enumerate(params) if p is q) for q in group["params"]]
        group["params"] = [torch.empty(1) for _ in places]
        group["params"] = [sharded[k] for k in places]
    return sharded


def swap(optimizer: Adafactor, params: list[Tensor]) -> list[Tensor]:
    """Within the same Python objects: replicated, then sharded."""
    replicated: list[Any] = [place(p, Replicate()) for p in params]
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = replicated[:1], replicated[1:]
    optimizer.explain()
    for p in replicated:
        torch.utils.swap_tensors(p, place(p.full_tensor(), Shard(0)))
    return replicated


def add_momentum(optimizer: Adafactor, params: list[Tensor]) -> list[Tensor]:
    """To the second group, which a step sees after it has looked at the first."""
    sharded = replace(optimizer, params)
    optimizer.explain()
    optimizer.param_groups[1]["beta1"] = 0.9
    return sharded


def compared(change: Callable[[Adafactor, list[Tensor]], list[Tensor]], start: int = 0) -> float:
    """The largest difference to one process after three steps, the first of which comes after the change."""
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    optimizers, found = [], []
    for sharded in (False, True):
        params: list[Tensor] = [nn.Parameter(value.clone()) for value in values]
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        optimizers.append(Adafactor(groups, lr=1e-2))
        if sharded:
            params = change(optimizers[-1], params)
        elif change is add_momentum:
            optimizers[-1].param_groups[1]["beta1"] = 0.9
        found.append(params)
    for _ in range(3):
        gradients = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
        for p, q, g in list(zip(*found, gradients, strict=True))[start:]:
            p.grad, q.grad = g, distribute_tensor(g, q.device_mesh, q.placements, src_data_rank=None)
        for optimizer in optimizers:
            optimizer.step()
    steps = [[int(state["step"]) for state in optimizer.state.values()] for optimizer in optimizers]
    assert steps[0] == steps[1] == [0] * start + [3] * (len(SHAPES) - start)
    return max((q.full_tensor() - p).abs().max().item() for p, q in zip(*found, strict=True))


CASES = {
    "replaced": partial(compared, replace),
    "replaced, and the first has no gradient": partial(compared, replace, 1),
    "swapped": partial(compared, swap),
    "changed in the middle of a step": partial(compared, add_momentum),
}


@pytest.fixture(scope="module")
def results() -> dict[str, list]:
    return run_on_ranks(2, CASES)


@pytest.mark.parametrize("case", CASES)
def test_the_first_step_after_a_change_is_that_of_one_process(results: dict[str, list], case: str):
    assert max(good(results[case])) < 1e-14
