"""FSDP1 and DeepSpeed's ZeRO flatten a model, which hides its matrices: refused. What only looks like them is not."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from _ranks import good, run_on_ranks
from adafactor import Adafactor

FIX = r"hides the matrices that Adafactor factors; use torch\.distributed\.fsdp\.fully_shard \(FSDP2\)"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 48), nn.Linear(48, 40), nn.LayerNorm(40))


def loss_of(model: Any) -> Tensor:
    return model(torch.arange(8)).float().square().mean()


# FSDP1


def fsdp1(use_orig_params: bool, built: str) -> str:
    """What Adafactor says, built before or after the model is wrapped."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated
        model = net()
        params = list(model.parameters())
        optimizer = Adafactor(params, lr=1e-2) if built == "before" else None
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        try:
            optimizer = optimizer or Adafactor(wrapped.parameters(), lr=1e-2)
            loss_of(wrapped).backward()
            optimizer.step()
        except ValueError as error:
            return str(error)
        return "no error"


def fsdp1_cases():
    cases = {f"after/{use_orig}": partial(fsdp1, use_orig, "after") for use_orig in (True, False)}
    return cases | {"before/True": partial(fsdp1, True, "before")}


@pytest.mark.parametrize("world", [1, 2])
def test_parameters_flattened_by_fsdp1_are_refused(world: int):
    found = run_on_ranks(world, fsdp1_cases())
    if world == 1:
        del found["before/True"]  # on one rank its shapes are as they were, and so is the step
    for case, messages in found.items():
        for message in good(messages):
            assert re.match(rf"parameter '.*' was flattened by FSDP1, which {FIX}", message), case


# DeepSpeed


def zero(folder: Path, stage: int, bf16: bool, kind: str) -> dict[str, Any]:
    """A step under DeepSpeed: the error, and whether any weight had moved by then."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()))
    warnings.simplefilter("ignore")  # its own
    logging.disable()
    import deepspeed  # pyright: ignore[reportMissingImports]

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    model = net()
    if kind == "zero.Init":
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = net()
    names = dict(model.named_parameters())
    groups: Any = names.items()
    if kind == "groups":  # of two matrices, of two vectors, of one
        names = list(names.items())
        groups = [{"params": names[:2]}, {"params": names[2:4]}, {"params": names[4:]}]
    masters, before, initialized = [], [], False
    try:
        optimizer = Adafactor(groups, lr=1e-2)
        if kind == "in backward":
            optimizer.step_in_backward()
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        initialized = True
        flat = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        masters = [p for name in flat for p in getattr(engine.optimizer, name, ())]
        before = [p.detach().clone() for p in masters]
        if kind == "saved":
            engine.save_checkpoint(folder)
        if kind == "loaded":
            optimizer.load_state_dict(Adafactor(net().parameters(), lr=1e-2).state_dict())
        engine.backward(loss_of(engine))
        engine.step()
    except ValueError as error:
        moved = [not torch.equal(p, old) for p, old in zip(masters, before, strict=True)]
        return {"error": str(error), "moved": moved, "initialized": initialized}
    return {"error": None, "rows": [row.shape for row in optimizer.explain()]}


ZERO = [
    *((stage, bf16, "plain") for stage in (1, 2, 3) for bf16 in (False, True)),
    *((stage, True, kind) for stage in (1, 2, 3) for kind in ("groups", "in backward", "saved")),
    *((stage, True, "loaded") for stage in (1, 2)),
    (3, True, "zero.Init"),
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed")
def test_zero_is_refused_and_its_stage_0_is_not(tmp_path: Path):
    cases = {str(case): partial(zero, tmp_path, *case) for case in ZERO}
    cases |= {f"stage 0, bf16={bf16}": partial(zero, tmp_path, 0, bf16, "plain") for bf16 in (False, True)}
    found = run_on_ranks(2, cases)
    for case in ZERO:
        for result in good(found[str(case)]):
            assert re.search(f"DeepSpeed ZeRO.*, which {FIX}", result["error"]), case
            if case[2] == "zero.Init":
                assert not result["initialized"], "the constructor is the place to raise"
            else:
                assert result["moved"] == [False] * len(result["moved"]) != []
    for bf16 in (False, True):
        for result in good(found[f"stage 0, bf16={bf16}"]):
            assert result == {"error": None, "rows": [tuple(p.shape) for p in net().parameters()]}


# The same without DeepSpeed. What follows is what DeepSpeed 0.19.8 was seen to do, on 1 and on 2 ranks, with and
# without names, in float32 and bfloat16, with and without offloading:
# - Stages 1 and 2 (and stage 1's BF16_Optimizer) replace each group's "params" by one tensor, which is float32, flat,
#   a leaf that requires gradients, no Parameter, and has no attributes. "param_names" stays. The parameters get
#   attributes, `_hp_mapping` among them. Each group is stepped on its own, with `param_groups` narrowed to it.
# - Stage 3 empties all "params", and the parameters, which get `ds_id` and other attributes. To step a group, its
#   "params" are such a flat tensor, which has a `ds_id`; then they are empty again.
# - Before that, `zero.Init` makes parameters that are empty and have `ds_id` and `ds_shape`.
# - Stage 0 puts float32 copies of bfloat16 parameters in their place: no Parameters, but of the same shapes.


def stage_1_or_2(optimizer: Adafactor, world: int, marked: bool = True) -> list[Tensor]:
    flat = []
    for group in optimizer.param_groups:
        flat.append(torch.zeros(-(-sum(p.numel() for p in group["params"]) // world), requires_grad=True))
        if marked:
            for p in group["params"]:
                p._hp_mapping = None
        group["params"] = flat[-1:]
    return flat


def stage_3(optimizer: Adafactor, world: int) -> list[Tensor]:
    flat = []
    for number, group in enumerate(optimizer.param_groups):
        flat.append(torch.zeros(-(-sum(p.numel() for p in group["params"]) // world), requires_grad=True))
        flat[-1].ds_id = str(number)
        for p in group["params"]:
            p.ds_shape, p.ds_id, p.data = p.shape, number, torch.empty(0)
        group["params"] = []
    return flat


def step_as_zero_does(optimizer: Adafactor, flat: list[Tensor], only: int) -> None:
    groups = optimizer.param_groups
    kept = groups[only]["params"]
    groups[only]["params"] = flat[only : only + 1]
    flat[only].grad = torch.ones_like(flat[only])
    optimizer.param_groups = groups[only : only + 1]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
        groups[only]["params"] = kept


@pytest.mark.parametrize("only", [0, 1, 2])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("flatten", "world"),
    [
        *((stage_1_or_2, world) for world in (1, 2)),
        *((stage_3, world) for world in (1, 2)),
        (partial(stage_1_or_2, marked=False), 2),
    ],
)
def test_groups_that_zero_has_flattened_are_refused(flatten, world: int, named: bool, only: int):
    names = list(net().named_parameters()) if named else list(net().parameters())
    split = {0: names[:1], 1: names[1:4], 2: names[4:]}  # the last group is a single vector
    optimizer = Adafactor([{"params": split[number]} for number in range(3)], lr=1e-2)
    flat = flatten(optimizer, world)
    with pytest.raises(ValueError, match=f"DeepSpeed ZeRO.*, which {FIX}"):
        step_as_zero_does(optimizer, flat, only)
    assert all(not p.any() for p in flat)
    assert not any(p in optimizer.state for p in flat)


@pytest.mark.parametrize("marked", [True, False])
def test_no_checkpoint_is_written_or_read_of_what_zero_has_flattened(marked: bool):
    optimizer = Adafactor(net().named_parameters(), lr=1e-2)
    saved = optimizer.state_dict()
    stage_1_or_2(optimizer, 2, marked)
    for use in (optimizer.state_dict, partial(optimizer.load_state_dict, saved), optimizer.explain):
        with pytest.raises(ValueError, match=f"DeepSpeed ZeRO.*, which {FIX}"):
            use()


def test_parameters_that_zero_has_made_are_refused():
    p = nn.Parameter(torch.empty(0))
    vars(p).update(ds_id=0, ds_shape=torch.Size([64, 48]))
    with pytest.raises(ValueError, match=f"parameter 'w' was partitioned by DeepSpeed ZeRO, which {FIX}"):
        Adafactor([("w", p)])


def float32_copies(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone().float().requires_grad_() for p in params]


def plain(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


REPLACED = {
    "float32 copies": (list(net().bfloat16().parameters()), float32_copies),
    "float32 copies of vectors": ([nn.Parameter(torch.zeros(40).bfloat16())], float32_copies),
    "other parameters": (list(net().parameters()), lambda _: list(net().parameters())),
    "a vector for a matrix": ([nn.Parameter(torch.zeros(40, 50))], lambda _: [nn.Parameter(torch.zeros(9))]),
    "a matrix for a vector": ([nn.Parameter(torch.zeros(40))], lambda _: [plain(40, 50)]),
    "fewer parameters": (list(net().parameters()), lambda params: params[3:]),
    "one vector": ([nn.Parameter(torch.zeros(5000))], lambda params: params),
    "a longer plain tensor": ([plain(40)], lambda _: [plain(50)]),
    "one plain tensor more": ([plain(40)], lambda params: [*params, plain(50)]),
}


@pytest.mark.parametrize("case", REPLACED)
def test_what_only_looks_like_zero_is_stepped(case: str):
    params, replace = REPLACED[case]
    optimizer = Adafactor(params, lr=1e-2)
    group = optimizer.param_groups[0]
    group["params"] = replace(group["params"])
    before = [p.detach().clone() for p in group["params"]]
    for p in group["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(group["params"], before, strict=True))


def test_swapped_tensors_are_stepped():
    p = nn.Parameter(torch.zeros(40, 50))
    optimizer = Adafactor([p], lr=1e-2)
    torch.utils.swap_tensors(p, nn.Parameter(torch.ones(40, 50)))
    p.grad = torch.ones(40, 50)
    optimizer.step()
    assert (p < 1).all()
