"""Stepping in backward where gradients are reduced over processes: the bits of the plain step on four of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import _in_backward_ranks as ranks
from _cases import MODES
from _ranks import Case, good, run_on_ranks

BF16, F64 = torch.bfloat16, torch.float64
SOME_MODES = ["paper", "decay with momentum", "nesterov, unscaled", "warm-up, capped by lr"]


def unlike(seed: int) -> tuple[int, ...]:
    """Experts that other ranks and other batches do not use; one that nobody does."""
    return ((seed + ranks.dist.get_rank()) % 2,) if seed % 2 else (0,)


def other(seed: int) -> int:
    return seed % 2


VIEWS = {"gradient_as_bucket_view": True}
UNUSED: dict[str, Any] = {"experts": unlike, "find_unused_parameters": True}
# On three processes: the bits of DDP and the plain step.
DDP: dict[str, Case] = {
    **{f"ddp/{mode}": partial(ranks.ddp, BF16, MODES[mode], steps=3) for mode in SOME_MODES},
    "ddp/24 bits, views": partial(ranks.ddp, BF16, {"lr": 1e-2, "weight_bits": 24}, 3, **VIEWS),
    "ddp/accumulation": partial(ranks.ddp, steps=3, accumulation=3),
    "ddp/accumulation, views": partial(ranks.ddp, steps=3, accumulation=3, **VIEWS),
    "ddp/no_sync": partial(ranks.ddp, steps=4, accumulation=2, no_sync=True),
    "ddp/no_sync, views": partial(ranks.ddp, steps=3, accumulation=2, no_sync=True, **VIEWS),
    "ddp/static graph, views": partial(ranks.ddp, steps=3, accumulation=2, static_graph=True, **VIEWS),
    "ddp/checkpoints": partial(ranks.ddp, checkpointed=False),
    "ddp/reentrant checkpoints": partial(ranks.ddp, steps=3, checkpointed=True, static_graph=True),
    "ddp/unused": partial(ranks.ddp, **UNUSED),
    "ddp/unused, no_sync, views": partial(ranks.ddp, accumulation=3, no_sync=True, **UNUSED, **VIEWS),
    "ddp/output unused": partial(ranks.ddp, unused=True, find_unused_parameters=True),
    "ddp/batched copies": partial(ranks.ddp, steps=3, accumulation=2, batched_grad_copy=True),
}
# On two processes the bits of the plain sharded step; on four, where sums have another order, as many digits.
MIXED = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
FSDP: dict[str, Case] = {
    "fsdp/float32": partial(ranks.sharded, "two"),
    **{f"fsdp/bfloat16, {mode}": partial(ranks.sharded, "two", BF16, MODES[mode], 2) for mode in SOME_MODES},
    "fsdp/four": partial(ranks.sharded, "four", F64, steps=5),
    "fsdp/hybrid": partial(ranks.sharded, "hybrid", F64, collectives=2 * 5),  # FSDP's own all-reduces among them
    "fsdp/fsdp x tp": partial(ranks.sharded, "fsdp x tp", F64, collectives=None),
    "fsdp/accumulation": partial(ranks.sharded, steps=2, accumulation=3),
    "fsdp/without reduction": partial(ranks.sharded, steps=2, accumulation=3, sync=False),
    "fsdp/experts": partial(ranks.sharded, expert=other),
    "fsdp/experts, accumulation": partial(ranks.sharded, expert=other, accumulation=2, collectives=None),
    "fsdp/experts, without reduction": partial(
        ranks.sharded, steps=2, expert=other, accumulation=2, sync=False, collectives=6
    ),
    "fsdp/checkpoints": partial(ranks.sharded, checkpointed=False, collectives=None),
    "fsdp/reentrant checkpoints": partial(ranks.sharded, steps=2, checkpointed=True, collectives=None),
    "fsdp/mixed precision": partial(ranks.sharded, steps=2, mp_policy=MIXED),
    "fsdp/offloaded": partial(ranks.sharded, steps=2, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp/kept whole": partial(ranks.sharded, steps=2, reshard_after_forward=False),
}
ALONE = [
    ranks.ddp_refusals,
    ranks.ddp_errors,
    ranks.ddp_comes_and_goes,
    ranks.ddp_without_a_gradient,
    ranks.ddp_with_uneven_data,
    ranks.fsdp_errors,
    ranks.fsdp_optimizers,
    ranks.tensor_parallel,
]


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    return run_on_ranks(4, {**DDP, **FSDP, **{function.__name__: function for function in ALONE}})


@pytest.mark.parametrize("name", DDP)
def test_ddp_gives_the_bits_of_the_plain_step_on_every_replica(name, results):
    good(results[name])


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_gives_the_bits_of_the_plain_step_with_one_collective_per_group(name, results):
    assert max(good(results[name])) < 1e-12
