"""What ranks do in the tests of stepping in backward: each function runs on every rank, beside the plain step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from _cases import assert_same_bits
from adafactor import Adafactor, _in_backward_guards
from adafactor.memory import peak_allocated
from test_in_backward import Experts, everything


def three() -> Any:
    """A group of the first three ranks: dividing by three is not multiplying by a third."""
    if not hasattr(three, "group"):
        three.group = dist.new_group([0, 1, 2])
    return three.group


class Model(Experts):
    """Its convolution is stored with the channels last; a part of the output may be left unused."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.image = nn.Conv2d(36, 33, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, tokens, experts, unused=False):
        logits = torch.stack([super(Model, self).forward(tokens, expert) for expert in experts]).sum(0)
        seen = self.image(self.table(tokens).mT.unflatten(-1, (2, 4))).mean()
        return (logits, seen) if unused else logits + seen


def batch(seed: int) -> Any:
    generator = torch.Generator().manual_seed(17 * seed + dist.get_rank())
    return torch.randint(40, (2, 8), generator=generator)


def loss_of(model: nn.Module, seed: int, experts=(0, 1, 2), unused: bool = False) -> Any:
    tokens = batch(seed)
    out = model(tokens, experts, unused)
    logits = out[0] if unused else out
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens.roll(1, 1).flatten())


def build(dtype: torch.dtype, **arguments: Any) -> Model:
    torch.manual_seed(0)
    model = Model(**arguments).to(dtype)
    model.unused.requires_grad_(False)
    return model


def replicas_agree(model: nn.Module, group: Any) -> bool:
    mine = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    return all(torch.equal(mine, each) for each in every)


def ddp(
    dtype: torch.dtype = torch.float32,
    arguments: dict[str, Any] | None = None,
    steps: int = 4,
    accumulation: int = 1,
    no_sync: bool = False,
    experts: Callable[[int], Any] = lambda seed: (0, 1, 2),
    checkpointed: bool | None = None,
    unused: bool = False,
    **options: Any,
) -> None:
    """The bits of DistributedDataParallel and the plain step, on every replica."""
    if dist.get_rank() == 3:
        three()
        return
    results = []
    for in_backward in (False, True):
        model = build(dtype, checkpointed=checkpointed)
        parallel = DistributedDataParallel(model, process_group=three(), bucket_cap_mb=0.02, **options)
        optimizer = Adafactor(model.parameters(), **(arguments or {"lr": 1e-2, "beta1": 0.9}))
        handle = optimizer.step_in_backward(1 if no_sync else accumulation, ddp=parallel) if in_backward else None
        for step in range(steps):
            for micro in range(accumulation):
                seed = step * accumulation + micro
                gathers = no_sync and micro < accumulation - 1
                with parallel.no_sync() if gathers else contextlib.nullcontext():
                    (loss_of(parallel, seed, experts(seed), unused) / accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(model, optimizer))
        assert replicas_agree(model, three())
        if handle is not None:
            handle.remove()
    assert not _in_backward_guards.live
    assert_same_bits(*results)


class Stack(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def ddp_memory(in_backward: bool, **options: Any) -> tuple[float, float]:
    """At the peak of backward, and what stays after it: in gradients of the model."""
    count, width = 16, 512
    model = Stack(count, width)
    parallel = DistributedDataParallel(model, bucket_cap_mb=1.0, **options)
    optimizer = Adafactor(model.parameters(), lr=1e-3)
    handle = optimizer.step_in_backward(ddp=parallel) if in_backward else None
    x = torch.ones(4, width)

    def iteration():
        parallel(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    before = 0
    for _ in range(3):
        iteration()
    peak = peak_allocated(iteration)
    from adafactor._in_backward_ddp import _known

    stay = [b.untyped_storage().nbytes() >> 20 for b in _known[parallel]._buffers.values()] if in_backward else 0
    if handle:
        handle.remove()
    return peak / (4 * count * width * width), stay


# FSDP2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 70)
        self.down = nn.Linear(70, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).tanh())


class Blocks(nn.Module):
    """Blocks with a tied embedding; a branch of experts that a token may leave out."""

    def __init__(self, checkpointed: bool | None = None, width: int = 36) -> None:
        super().__init__()
        self.table = nn.Embedding(41, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.unused = nn.Linear(width, width)
        self.stack = nn.Parameter(torch.randn(3, width, width) / 6)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 41)
        self.head.weight = self.table.weight
        self.checkpointed = checkpointed

    def forward(self, tokens, expert=0):
        x = self.table(tokens)
        for block in self.blocks:
            if self.checkpointed is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointed)
        x = x + self.frozen(torch.tanh(self.experts[expert](x)))
        x = x + torch.einsum("bti,eij->btj", x, self.stack) / 10
        return self.head(self.norm(x))


GROUPS = 6  # of `fsdp` below: three blocks, two experts, of which one is used, and the root


@lru_cache
def mesh(*shape: int) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def fsdp(kind: str, dtype: torch.dtype, checkpointed: bool | None = None, **options: Any) -> Blocks:
    torch.manual_seed(0)
    model = Blocks(checkpointed).to(dtype)
    if kind == "two":  # two pairs, which do the same
        options["mesh"] = mesh(2, 2)["b"]
    elif kind == "four":
        options["mesh"] = mesh(4)
    elif kind == "hybrid":
        options["mesh"] = mesh(2, 2)
    elif kind == "fsdp x tp":
        for block in model.blocks:
            parallelize_module(block, mesh(2, 2)["b"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        options["mesh"] = mesh(2, 2)["a"]
    for part in (*model.blocks, *model.experts):
        fully_shard(part, **options)
    return fully_shard(model, **options)


def tokens_of(seed: int, kind: str) -> Any:
    rank = dist.get_rank()
    share = {"two": rank % 2, "fsdp x tp": rank // 2}.get(kind, rank)
    return torch.randint(41, (2, 8), generator=torch.Generator().manual_seed(17 * seed + share))


def local_of(seen: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in seen.items()}


def sharded(
    kind: str = "two",
    dtype: torch.dtype = torch.float32,
    arguments: dict[str, Any] | None = None,
    steps: int = 3,
    accumulation: int = 1,
    sync: bool = True,
    expert: Callable[[int], int] = lambda seed: 0,
    checkpointed: bool | None = None,
    collectives: int | None = GROUPS - 1,
    **options: Any,
) -> float:
    """How far stepping in backward is from the plain sharded step; the collectives are counted."""
    results = []
    for in_backward in (False, True):
        model = fsdp(kind, dtype, checkpointed, **options)
        optimizer = Adafactor(model.named_parameters(), **(arguments or {"lr": 1e-2, "beta1": 0.9}))
        handle = optimizer.step_in_backward(accumulation if sync else 1) if in_backward else None
        for step in range(steps):
            for micro in range(accumulation):
                last = micro == accumulation - 1
                model.set_requires_gradient_sync(sync or last)
                seed = step * accumulation + micro
                tokens = tokens_of(seed, kind)
                logits = model(tokens, expert(seed))
                loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens.roll(1, 1).flatten())
                with CommDebugMode() as during:
                    (loss / accumulation).backward()
                counted = during.get_comm_counts().get(torch.ops.c10d.allreduce_, 0)
            with CommDebugMode() as closing:
                optimizer.step()
            if in_backward and collectives is not None:
                assert counted == collectives, counted
                assert closing.get_total_counts() == 0
            optimizer.zero_grad()
        results.append(everything(model, optimizer))
        if handle is not None:
            handle.remove()
    assert not _in_backward_guards.live
    plain, ours = map(local_of, results)
    if kind == "two":
        assert_same_bits(ours, plain)
    return max(float((ours[name].double() - plain[name].double()).abs().max()) for name in plain if plain[name].numel())
