"""What ranks do in the tests of stepping in backward: each function runs on every rank, beside the plain step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from _cases import assert_same_bits
from adafactor import Adafactor, _in_backward_guards
from adafactor._in_backward_ddp import buckets_of
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
        self.image = nn.Conv2d(36, 33, 3, padding=1).to(memory_format=torch.channels_last)  # pyright: ignore

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
    model = Model(**arguments).to(dtype=dtype)
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
    steps: int = 3,
    accumulation: int = 1,
    no_sync: bool = False,
    experts: Callable[[int], Any] = lambda seed: (0, 1, 2),
    checkpointed: bool | None = None,
    unused: bool = False,
    first: bool = False,
    **options: Any,
) -> None:
    """The bits of DistributedDataParallel and the plain step, on every replica; `first`: its handle is there first."""
    if dist.get_rank() == 3:
        three()
        return
    results = []
    for in_backward in (False, True):
        model = build(dtype, checkpointed=checkpointed)
        optimizer = Adafactor(model.parameters(), **(arguments or {"lr": 1e-2, "beta1": 0.9}))
        passes = 1 if no_sync else accumulation
        handle = optimizer.step_in_backward(passes) if in_backward and first else None
        parallel = DistributedDataParallel(model, process_group=three(), bucket_cap_mb=0.02, **options)
        if in_backward and not first:
            handle = optimizer.step_in_backward(passes)
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


# DDP: what goes wrong, and what ends


def small(**options: Any) -> tuple[Any, DistributedDataParallel]:
    """Four layers, a bucket each."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(33, 33, bias=False) for _ in range(4)))
    return model, DistributedDataParallel(model, bucket_cap_mb=0.003, **options)


def shares(seed: int) -> Any:
    return torch.randn(4, 33, generator=torch.Generator().manual_seed(17 * seed + dist.get_rank()))


def steps_of(run: Callable[..., Any], optimizer: Adafactor, seeds: Any) -> None:
    for seed in seeds:
        run(shares(seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def message_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return "no error"


def ddp_refusals() -> dict[str, str]:
    messages = {}
    for order in ("module first", "handle first"):
        torch.manual_seed(0)
        model = nn.Linear(33, 33)
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        handle = optimizer.step_in_backward() if order == "handle first" else None
        parallel = DistributedDataParallel(model)
        parallel.register_comm_hook(None, default_hooks.allreduce_hook)
        if handle is None:
            messages[order] = message_of(optimizer.step_in_backward)
        else:
            messages[order] = message_of(lambda parallel=parallel: parallel(shares(0)))
            handle.remove()
        assert optimizer._in_backward is None
    assert not _in_backward_guards.live
    return messages


def ddp_errors() -> dict[str, Any]:
    """Errors in the middle of a pass come at its end; DDP, the other ranks and the optimizer go on."""
    model, parallel = small()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    messages = {}
    with optimizer.step_in_backward():
        steps_of(parallel, optimizer, range(3))
        parallel(shares(3)).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        messages["one pass too many"] = message_of(parallel(shares(4)).sum().backward)
        messages["step after that"] = message_of(optimizer.step)
        assert all(map(torch.equal, model.parameters(), before))
        optimizer.zero_grad()
        optimizer.step()
        steps_of(parallel, optimizer, range(5, 7))
        optimizer.param_groups[0]["lr"] = -1.0
        messages["a step that raises"] = message_of(parallel(shares(4)).sum().backward)
        assert all(p.grad is not None for p in model.parameters())
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
        steps_of(parallel, optimizer, range(7, 9))
        with parallel.no_sync():
            parallel(shares(3)).sum().backward()
        messages["nothing reduced"] = message_of(optimizer.step)
        optimizer.zero_grad()
        steps_of(parallel, optimizer, range(9, 10))
    assert replicas_agree(model, None)
    messages["steps"] = {int(state["step"]) for state in optimizer.state.values()}
    return messages


def ddp_comes_and_goes() -> None:
    """After `remove()` the module is as it was; a later handle works, also of another optimizer."""
    results = []
    for in_backward in (False, True):
        model, parallel = small()
        halves = [Adafactor(model[:2].parameters(), lr=1e-2), Adafactor(model[2:].parameters(), lr=1e-2, beta1=0.9)]
        handles = []
        for round in range(4):
            if in_backward:
                handles = [each.step_in_backward() for each in halves[: round % 3]]
            for seed in range(4):
                parallel(shares(4 * round + seed)).square().mean().backward()
                assert [p.grad is None for p in model.parameters()] == [2 * k // 4 < len(handles) for k in range(4)]
                for each in halves:
                    each.step()
                    each.zero_grad()
            for handle in handles:
                handle.remove()
        results.append(everything(model, *halves))
    assert_same_bits(*results)


class NoGradient(torch.autograd.Function):
    """Uses a parameter, and has no gradient for it."""

    @staticmethod
    def forward(ctx, x, p):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0], None


def ddp_without_a_gradient() -> None:
    """DDP writes zeros to a bucket whose memory was freed, for a parameter that autograd has no gradient for."""
    results = []
    for in_backward in (False, True):
        model, parallel = small()
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        handle = optimizer.step_in_backward() if in_backward else None
        plain = model[1].forward
        freed = []
        for seed in range(6):
            model[1].forward = plain if seed < 3 else lambda x, model=model: NoGradient.apply(x, model[1].weight)
            steps_of(parallel, optimizer, [seed])
            if in_backward:
                storages = [buffer.untyped_storage() for buffer in buckets_of(parallel)._buffers.values()]
                freed.append([storage.nbytes() == 0 for storage in storages].count(True))
        results.append(everything(model, optimizer))
        if handle is not None:
            handle.remove()
            assert freed == [0, 0, 3, 2, 2, 2], freed  # all but one, once DDP has settled; and but the one with zeros
            assert all(storage.nbytes() for storage in storages)
    assert_same_bits(*results)


def ddp_with_uneven_data() -> str:
    """`join()`: processes without more data reduce zeros, and take the weights of the others at the end."""
    results = []
    for in_backward in (False, True):
        model, parallel = small()
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        handle = optimizer.step_in_backward() if in_backward else None
        with parallel.join():
            steps_of(parallel, optimizer, range(3 + 2 * dist.get_rank()))
        results.append(everything(model, optimizer))
        steps_of(parallel, optimizer, range(2))
        if handle is not None:
            with parallel.join(divide_by_initial_world_size=False):
                message = message_of(partial(steps_of, parallel, optimizer, [0]))
    assert_same_bits(*results)
    return message


# FSDP2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 72)
        self.down = nn.Linear(72, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).tanh())


class Blocks(nn.Module):
    """Blocks, some of which may run twice; experts, one at a time; a tied embedding."""

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
        self.repeated = 0

    def forward(self, tokens, expert=0):
        x = self.table(tokens)
        for block in (*self.blocks, *self.blocks[: self.repeated]):
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        x = x + self.frozen(torch.tanh(self.experts[expert](x)))
        x = x + torch.einsum("bti,eij->btj", x, self.stack) / 10
        return self.head(self.norm(x))


GROUPS = 6  # of `fsdp` below: three blocks, two experts, of which one is used, and the root


@lru_cache
def mesh(*shape: int) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def fsdp(kind: str, dtype: torch.dtype, checkpointed: bool | None = None, **options: Any) -> Any:
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


def on_pairs(first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """Two cases that need two ranks each, at once."""
    mesh(2, 2)
    return (first if dist.get_rank() < 2 else second)()


def local_of(seen: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in seen.items()}


def all_reduces(mode: Any) -> int:
    return mode.get_comm_counts().get(torch.ops.c10d.allreduce_, 0)


def sharded(
    kind: str = "two",
    dtype: torch.dtype = torch.float32,
    arguments: dict[str, Any] | None = None,
    steps: int = 2,
    accumulation: int = 1,
    sync: bool = True,
    expert: Callable[[int], int] = lambda seed: 0,
    checkpointed: bool | None = None,
    repeated: int = 0,
    collectives: int | None = GROUPS - 1,
    **options: Any,
) -> float:
    """How far stepping in backward is from the plain sharded step.

    The collectives of the last iteration are counted; None, where activations are recomputed, which confuses the count.
    """
    results = []
    for in_backward in (False, True):
        model: Any = fsdp(kind, dtype, checkpointed, **options)
        model.repeated = repeated
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
                counts = in_backward and collectives is not None and step == steps - 1 and last
                with CommDebugMode() if counts else contextlib.nullcontext() as during:
                    (loss / accumulation).backward()
            with CommDebugMode() if counts else contextlib.nullcontext() as closing:
                optimizer.step()
            if during and closing:
                assert all_reduces(during) == collectives
                assert closing.get_total_counts() == 0
            optimizer.zero_grad()
        rounds = [
            each for reduction in optimizer._reductions.values() for each in (*reduction.before, *reduction.after)
        ]
        assert rounds
        assert {each.group.group_name.endswith("/adafactor") for each in rounds} == {in_backward}
        results.append(everything(model, optimizer))
        if handle is not None:
            handle.remove()
    assert not _in_backward_guards.live
    plain, ours = map(local_of, results)
    if kind == "two":
        assert_same_bits(ours, plain)
    return max(float((ours[name].double() - plain[name].double()).abs().max()) for name in plain if plain[name].numel())


def fsdp_loss(model: nn.Module, seed: int) -> Any:
    tokens = tokens_of(seed, "four")
    return functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())


def fsdp_errors() -> dict[str, Any]:
    """A pass too many: the error comes at the end of backward, and training goes on."""
    post_backward = vars(FSDPParamGroup)["post_backward"]
    model: Any = fsdp("four", torch.float32)
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    messages = {}
    with optimizer.step_in_backward():
        assert vars(FSDPParamGroup)["post_backward"] is not post_backward
        fsdp_loss(model, 0).backward()
        before = [p.to_local().clone() for p in model.parameters()]
        messages["one pass too many"] = message_of(fsdp_loss(model, 1).backward)
        messages["step after that"] = message_of(optimizer.step)
        assert all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
        optimizer.zero_grad()
        optimizer.step()
        fsdp_loss(model, 2).backward()
        optimizer.step()
        fsdp_loss(model, 3).backward()
        optimizer.step()
        model.repeated = 1
        model.set_requires_gradient_sync(False)
        fsdp_loss(model, 4).backward()
        model.set_requires_gradient_sync(True)
        messages["twice"] = message_of(fsdp_loss(model, 5).backward)
        optimizer.zero_grad()
        optimizer.step()
        fsdp_loss(model, 6).backward()
        optimizer.step()
    assert vars(FSDPParamGroup)["post_backward"] is post_backward
    messages["steps"] = int(optimizer.state[model.head.bias]["step"])
    return messages


def fsdp_norms() -> list[list[float]]:
    """The norm of all gradients: of those that are gone, and of an expert's from the first of two passes."""
    norms = []
    for in_backward in (True, False):
        model = fsdp("four", torch.float32)
        optimizer = Adafactor(model.parameters(), lr=1e-2, step_in_backward=2 if in_backward else None)
        norms.append([])
        for step in range(3):
            for micro in range(2):
                tokens = tokens_of(2 * step + micro, "four")
                model(tokens, micro).square().mean().backward()
            assert [p.grad is None for p in model.parameters()].count(False) == 2 or not in_backward
            norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
            norms[-1].append(float(norm.full_tensor()))
            optimizer.step()
            optimizer.zero_grad()
        if optimizer._in_backward is not None:
            optimizer._in_backward.remove()
    return norms


def fsdp_gradients_alive() -> list[int]:
    """How many reduced gradients there were at once in eight groups: with the step in backward, and without."""
    most = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(33, 33, bias=False) for _ in range(8)))
        for layer in model:
            fully_shard(layer, mesh=mesh(4))
        fully_shard(model, mesh=mesh(4))
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        seen: list[weakref.ref] = []
        alive: list[int] = []

        def count(p: Any, seen=seen, alive=alive) -> None:
            seen.append(weakref.ref(p.grad.to_local()))
            alive.append(sum(reference() is not None for reference in seen))

        handle = optimizer.step_in_backward() if in_backward else contextlib.nullcontext()
        with handle:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(count)
            model(shares(0)).square().mean().backward()
            optimizer.step()
        most.append(max(alive))
    return most


def fsdp_optimizers() -> list[int]:
    """Two optimizers share a group; the collectives of both, of one that steps in backward, and of none."""
    results, counts = [], []
    for handles in (2, 1, 0):
        model = fsdp("two", torch.float32)
        norms = [p for p in model.parameters() if p.dim() == 1]
        rest = [p for p in model.parameters() if p.dim() > 1]
        optimizers = [Adafactor(norms, lr=1e-2), Adafactor(rest, lr=1e-2, beta1=0.9)]
        living = [optimizer.step_in_backward() for optimizer in optimizers[:handles]]
        for seed in range(3):
            loss = fsdp_loss(model, seed)
            with CommDebugMode() as during:
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        counts.append(all_reduces(during))
        results.append(local_of(everything(model, *optimizers)))
        for handle in living:
            handle.remove()
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[2])
    return counts


def tensor_parallel() -> list[int]:
    """Sharded, not by FSDP: those parameters wait for `step()`, where they cross together."""
    results, counts = [], []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = Block(36)
        parallelize_module(model, mesh(4), {"up": ColwiseParallel(), "down": RowwiseParallel()})
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        handle = optimizer.step_in_backward(2) if in_backward else None
        for seed in range(6):
            loss = model(torch.randn(4, 36, generator=torch.Generator().manual_seed(seed))).square().mean()
            with CommDebugMode() as during:
                loss.backward()
            if seed % 2:
                if in_backward:
                    assert model.norm.weight.grad is None
                with CommDebugMode() as closing:
                    optimizer.step()
                optimizer.zero_grad()
        counts.append(during.get_total_counts())
        counts.append(closing.get_total_counts())
        results.append(local_of(everything(model, optimizer)))
        if handle is not None:
            handle.remove()
    assert_same_bits(*results)
    return counts
