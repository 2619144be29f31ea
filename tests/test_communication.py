"""``benchmarks/communication.py``: a real step sends what it says, and the page says what it prints."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from _ranks import good, run_on_ranks
from adafactor import Adafactor
from adafactor.cli._known_models import llama
from adafactor.memory import report

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").exists():
    pytest.skip("benchmarks/ is not part of the sdist", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))
import communication  # noqa: E402

SMALL = {name: tuple(p.shape) for name, p in llama(2, 70, 130, 33, vocabulary=301).named_parameters()}
MODES = {"paper": {}, "adamw_like": {"lr": 1e-3, "beta1": 0.9}, "scaled": {"lr": 1e-3, "scale_parameter": True}}


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert communication.table() in page, "paste what `python benchmarks/communication.py` prints"


def sent(arguments: dict[str, Any]) -> tuple[list[int], int]:
    """The bytes of each collective of a step, and of this rank's state."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = {}
    for name, shape in SMALL.items():
        params[name] = torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
        params[name].grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
    optimizer = Adafactor(params.items(), **arguments)
    sizes, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda buffer, *rest, **options: (  # what it does stays as it is
        sizes.append(buffer.nbytes),
        all_reduce(buffer, *rest, **options),
    )[1]
    try:
        optimizer.step()
    finally:
        dist.all_reduce = all_reduce
    kept = (value for state in optimizer.state.values() for value in state.values())
    return sizes, sum((value.to_local() if isinstance(value, DTensor) else value).nbytes for value in kept)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_sends_and_keeps_what_the_plan_says(ranks: int):
    found = run_on_ranks(ranks, {mode: partial(sent, arguments) for mode, arguments in MODES.items()})
    for mode, arguments in MODES.items():
        planned = report(SMALL, ranks=ranks, **arguments)
        for rank, (sizes, state) in enumerate(good(found[mode])):
            assert sizes == [planned.crossing]
            assert state == planned.rows[0].state if rank == 0 else state <= planned.rows[0].state
