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
    **{f"ddp/{mode}": partial(ranks.ddp, BF16, MODES[mode]) for mode in SOME_MODES[:2]},
    "ddp/24 bits, views": partial(ranks.ddp, BF16, {"lr": 1e-2, "weight_bits": 24}, **VIEWS),
    "ddp/accumulation": partial(ranks.ddp, accumulation=3),
    "ddp/wrapped later": partial(ranks.ddp, accumulation=2, first=True),
    "ddp/accumulation, views": partial(ranks.ddp, accumulation=3, **VIEWS),
    "ddp/no_sync": partial(ranks.ddp, steps=4, accumulation=2, no_sync=True),
    "ddp/no_sync, views": partial(ranks.ddp, accumulation=2, no_sync=True, **VIEWS),
    "ddp/static graph, views": partial(ranks.ddp, accumulation=2, static_graph=True, **VIEWS),
    "ddp/checkpoints": partial(ranks.ddp, checkpointed=False),
    "ddp/reentrant checkpoints": partial(ranks.ddp, checkpointed=True, static_graph=True),
    "ddp/unused": partial(ranks.ddp, steps=4, **UNUSED),
    "ddp/unused, no_sync, views": partial(ranks.ddp, accumulation=3, no_sync=True, **UNUSED, **VIEWS),
    "ddp/output unused": partial(ranks.ddp, unused=True, find_unused_parameters=True),
    "ddp/batched copies": partial(ranks.ddp, accumulation=2, batched_grad_copy=True),
}
# On two processes: the bits of the plain sharded step.
MIXED = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
PAIRS: dict[str, Case] = {
    "float32": partial(ranks.sharded),
    **{f"bfloat16, {mode}": partial(ranks.sharded, "two", BF16, MODES[mode]) for mode in SOME_MODES},
    "accumulation": partial(ranks.sharded, accumulation=3),
    "without reduction": partial(ranks.sharded, accumulation=3, sync=False),
    "experts": partial(ranks.sharded, expert=other, steps=3),
    "experts, accumulation": partial(ranks.sharded, expert=other, accumulation=2, collectives=None),
    "experts, without reduction": partial(ranks.sharded, expert=other, accumulation=2, sync=False, collectives=6),
    "a block that runs twice": partial(ranks.sharded, repeated=1),
    "checkpoints": partial(ranks.sharded, checkpointed=False, collectives=None),
    "reentrant checkpoints": partial(ranks.sharded, checkpointed=True, collectives=None),
    "mixed precision": partial(ranks.sharded, mp_policy=MIXED),
    "offloaded": partial(ranks.sharded, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "kept whole": partial(ranks.sharded, reshard_after_forward=False),
}
# On four, where a sum has more than one order: as many digits.
FSDP: dict[str, Case] = {
    "fsdp/four": partial(ranks.sharded, "four", F64),
    "fsdp/hybrid": partial(ranks.sharded, "hybrid", F64, collectives=2 * 5),  # FSDP's own all-reduces among them
    "fsdp/fsdp x tp": partial(ranks.sharded, "fsdp x tp", F64, collectives=None),
    **{
        f"fsdp/{first} | {second}": partial(ranks.on_pairs, PAIRS[first], PAIRS[second])
        for first, second in zip(list(PAIRS)[::2], list(PAIRS)[1::2], strict=True)
    },
}
ALONE = [
    ranks.ddp_refusals,
    ranks.ddp_errors,
    ranks.ddp_comes_and_goes,
    ranks.ddp_without_a_gradient,
    ranks.ddp_with_uneven_data,
    ranks.fsdp_errors,
    ranks.fsdp_gradients_alive,
    ranks.fsdp_norms,
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


def test_what_ddp_is_refused(results):
    for found in good(results["ddp_refusals"]):
        assert set(found) == {"module first", "handle first"}
        assert all("has a communication hook already" in message for message in found.values())


def test_errors_under_ddp_come_at_the_end_of_the_pass(results):
    for found in good(results["ddp_errors"]):
        assert "backward pass 2 since the last optimizer.step()" in found["one pass too many"]
        assert "call optimizer.zero_grad()" in found["step after that"]
        assert "lr must be a number >= 0.0" in found["a step that raises"]
        assert "no backward pass (that reduces gradients" in found["nothing reduced"]
        assert found["steps"] == {3 + 1 + 2 + 1 + 2 + 1}


def test_ddp_is_as_before_after_remove_and_may_be_announced_again(results):
    good(results["ddp_comes_and_goes"])


def test_a_bucket_that_was_freed_is_there_again_when_ddp_writes_zeros_to_it(results):
    good(results["ddp_without_a_gradient"])


def test_ranks_that_run_out_of_data_under_ddp(results):
    assert all("leave that argument out" in message for message in good(results["ddp_with_uneven_data"]))


def test_errors_under_fsdp_come_at_the_end_of_the_pass(results):
    for found in good(results["fsdp_errors"]):
        assert "backward pass 2 since the last optimizer.step()" in found["one pass too many"]
        assert "call optimizer.zero_grad()" in found["step after that"]
        assert "leave out set_requires_gradient_sync(False)" in found["twice"]
        assert found["steps"] == 4


def test_under_fsdp_the_gradients_of_two_groups_are_alive_at_once(results):
    assert good(results["fsdp_gradients_alive"]) == [[2, 8]] * 4


def test_norms_of_sharded_gradients_that_are_gone(results):
    for (first, *ours), (_, *plain) in good(results["fsdp_norms"]):
        assert first != first
        assert ours == pytest.approx(plain, rel=1e-6)


def test_optimizers_that_share_fsdp_groups_take_a_collective_each(results):
    assert good(results["fsdp_optimizers"]) == [[2 * 5, 5, 0]] * 4


def test_tensor_parallel_parameters_cross_together_in_step(results):
    for plain, step, plain_too, step_too in good(results["tensor_parallel"]):
        assert (plain, step) == (plain_too, step_too)
        assert step == 1
