"""What ranks do in the tests of sharded steps: each function runs on every rank, beside one process's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from adafactor import Adafactor

Shape = tuple[int, ...]
Placements = Sequence[Placement]

# Full V, matrices (tall, wide, too short for every rank to get a row), stacks, merged columns, merged rows.
SHAPES: list[Shape] = [(9,), (4, 5), (70, 45), (33, 64), (3, 40, 33), (6, 33, 40), (40, 3, 3, 3), (33, 4, 3, 3)]
FEW_SHAPES: list[Shape] = [(9,), (33, 64), (3, 40, 33), (40, 3, 3, 3)]


@lru_cache
def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b", "c")[: len(shape)])


def fits(shape: Shape, placements: Placements) -> bool:
    return all(getattr(placement, "dim", 0) < len(shape) for placement in placements)


class Pair(NamedTuple):
    """The same parameters in one process and sharded, each with its optimizer."""

    plain: list[nn.Parameter]
    sharded: list[nn.Parameter]
    one: Adafactor
    many: Adafactor

    def step(self, gradients: Sequence[Tensor | None]) -> int:
        """A step of both. Returns how many collectives there were."""
        for p, q, g in zip(self.plain, self.sharded, gradients, strict=True):
            p.grad = q.grad = None
            if g is not None:
                p.grad, q.grad = g.clone(), like(q, g)
        self.one.step()
        with CommDebugMode() as collectives:
            self.many.step()
        return collectives.get_total_counts()


def like(q: Any, value: Tensor) -> Any:
    """A value that is known on every rank, sharded as q is."""
    if not isinstance(q, DTensor):
        return value.clone()
    return distribute_tensor(value.clone(), q.device_mesh, q.placements, src_data_rank=None)


def whole(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def pair(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    shard: Callable[[Tensor], Tensor],
    alone: dict[str, Any] | None = None,
    **arguments: Any,
) -> Pair:
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    plain = [nn.Parameter(value.clone()) for value in values]
    sharded = [nn.Parameter(shard(value.clone())) for value in values]
    named = [[(f"w{k}", p) for k, p in enumerate(params)] for params in (plain, sharded)]
    one = Adafactor(named[0], **{**arguments, **(alone or {})})
    return Pair(plain, sharded, one, Adafactor(named[1], **arguments))


def random_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(p.shape, dtype=torch.float64).to(p.dtype) for p in params]


class Agreement(NamedTuple):
    """How a sharded run compares with one process.

    Attributes:
        weights: the largest difference of a weight, relative to the largest weight.
        state: the same of the state tensors, those in whole numbers left out.
        differ: the share of weights that are not the same bits.
        collectives: of the last step.
        backends: that served.
    """

    weights: float
    state: float
    differ: float
    collectives: int
    backends: frozenset[str]


def agreement(both: Pair, collectives: int) -> Agreement:
    weights = state = 0.0
    differ = count = 0
    for p, q in zip(both.plain, both.sharded, strict=True):
        found = whole(q.detach())
        weights = max(weights, distance(found, p.detach()))
        differ += int((found != p).sum())
        count += p.numel()
        ours, theirs = both.many.state[q], both.one.state[p]
        assert ours["step"] == theirs["step"]
        for name in sorted(ours.keys() & theirs.keys()):
            if ours[name].is_floating_point() and ours[name].numel() > 1:
                state = max(state, distance(whole(ours[name]), theirs[name]))
    for name, theirs in both.one.diagnostics().items():
        ours = both.many.diagnostics()[name]
        assert (ours.updates, ours.skipped) == (theirs.updates, theirs.skipped)
    return Agreement(
        weights, state, differ / max(count, 1), collectives, frozenset(row.backend for row in both.many.explain())
    )


def distance(found: Tensor, right: Tensor) -> float:
    if found.numel() == 0:
        return 0.0
    assert found.shape == right.shape
    scale = max(right.double().abs().max().item(), 1e-300)
    worst = (found.double() - right.double()).abs().max().item() / scale
    return math.inf if math.isnan(worst) else worst


def steps(
    sizes: Sequence[int],
    placements: Placements,
    dtype: torch.dtype,
    arguments: dict[str, Any],
    count: int = 3,
    shapes: Sequence[Shape] = SHAPES,
    **alone: Any,
) -> Agreement:
    """`alone` are arguments that one process takes in place of the sharded one's."""
    over = mesh(*sizes)
    chosen = [shape for shape in shapes if fits(shape, placements)]
    both = pair(
        chosen,
        dtype,
        lambda value: distribute_tensor(value, over, placements, src_data_rank=None),
        alone,
        **arguments,
    )
    collectives = 0
    for _ in range(count):
        collectives = both.step(random_gradients(both.plain))
    return agreement(both, collectives)


# Models under torch's own wrappers


class Net(nn.Module):
    """Odd sizes, a norm, a bias, a stack of experts, a tied pair."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.embed = nn.Linear(33, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 70)
        self.down = nn.Linear(70, width)
        self.experts = nn.Parameter(torch.randn(5, width, width) / 8)
        self.head = nn.Linear(width, 33, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))
        h = h + self.down(self.up(h).tanh())
        h = h + torch.einsum("bi,eij->bj", h, self.experts)
        return self.head(h)


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(1)
    return Net().to(dtype)


def trained(kind: str, dtype: torch.dtype, arguments: dict[str, Any], count: int) -> Agreement:
    """A model under `kind`, trained on its ranks' shares of each batch, beside one process on all of it."""
    model, single = net(dtype), net(dtype)
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    shares, share = ranks, rank
    if kind == "fsdp":
        fully_shard(model.up, mesh=mesh(ranks))
        fully_shard(model, mesh=mesh(ranks))
    elif kind == "hsdp":
        fully_shard(model.up, mesh=mesh(2, ranks // 2))
        fully_shard(model, mesh=mesh(2, ranks // 2))
    else:
        shares, share = (1, 0) if kind == "tp" else (2, rank // (ranks // 2))
        data, tensor = mesh(2, ranks // 2)["a"], mesh(2, ranks // 2)["b"]
        parallelize_module(model, tensor, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if kind == "fsdp x tp":
            fully_shard(model, mesh=data)
        else:
            assert kind == "tp"
    one = Adafactor(single.named_parameters(), **arguments)
    many = Adafactor(model.named_parameters(), **arguments)
    torch.manual_seed(2)
    collectives = 0
    for _ in range(count):
        x = torch.randn(8 * shares, 33, dtype=dtype)
        y = torch.randn(8 * shares, 33, dtype=dtype)
        (single(x) - y).square().mean().backward()
        mine = slice(8 * share, 8 * share + 8)
        (model(x[mine]) - y[mine]).square().mean().backward()
        one.step()
        with CommDebugMode() as mode:
            many.step()
        collectives = mode.get_total_counts()
        one.zero_grad()
        many.zero_grad()
    names = dict(single.named_parameters())
    plain = [names[name] for name, _ in model.named_parameters()]
    return agreement(Pair(plain, list(model.parameters()), one, many), collectives)


def placements_of(kind: str) -> dict[str, str]:
    """Where a model's parameters and their statistics lie."""
    ranks = torch.distributed.get_world_size()
    model = net(torch.float32)
    over = mesh(2, ranks // 2)
    parallelize_module(model, over["b"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if kind == "fsdp x tp":
        fully_shard(model, mesh=over["a"])
    optimizer = Adafactor(model.named_parameters(), lr=1e-3, beta1=0.9)
    found = {}
    for name, p in model.named_parameters():
        for key, value in {"p": p, **optimizer.state[p]}.items():
            if isinstance(value, DTensor):
                assert tuple(value.to_local().shape) == tuple(value._local_tensor.shape)
                found[f"{name} {key}"] = str(tuple(value.placements))
    return found


# One thing at a time


def replicas() -> list[list[Tensor]]:
    """The local weights and states of every rank after steps under HSDP."""
    ranks = torch.distributed.get_world_size()
    model = net(torch.bfloat16)
    fully_shard(model, mesh=mesh(2, ranks // 2))
    optimizer = Adafactor(model.named_parameters(), lr=1e-2, beta1=0.9, scale_parameter=True)
    torch.manual_seed(3 + torch.distributed.get_rank())
    for _ in range(20):
        model(torch.randn(4, 33, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [
        [value.to_local().detach() for value in (p, *optimizer.state[p].values()) if isinstance(value, DTensor)]
        for p in model.parameters()
    ]


def skips(bad_rank: int) -> dict[str, Any]:
    """One step with a gradient that is not finite on one rank only, in one row, one bias, one expert."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    shapes = [(33, 64), (9,), (ranks - 1, 40, 33), (64, 33)]
    both = pair(shapes, torch.float32, lambda value: distribute_tensor(value, mesh(ranks), [Shard(0)]), lr=1e-2)
    before = [whole(q.detach()) for q in both.sharded]
    for k, q in enumerate(both.sharded):
        q.grad = gradient = like(q, random_gradients([both.plain[k]])[0])
        if rank == bad_rank and k < 3 and gradient.to_local().numel():
            gradient.to_local().view(-1)[0] = math.nan
    with CommDebugMode() as mode:
        both.many.step()
    moved = [not torch.equal(whole(q.detach()), old) for q, old in zip(both.sharded, before, strict=True)]
    counts = [(each.updates, each.skipped) for each in both.many.diagnostics().values()]
    finite = all(whole(value).isfinite().all() for q in both.sharded for value in both.many.state[q].values())
    steps_taken = [int(both.many.state[q]["step"]) for q in both.sharded]
    return {
        "moved": moved,
        "counts": counts,
        "finite": finite,
        "steps": steps_taken,
        "collectives": mode.get_total_counts(),
    }


def skips_of_two_dims(bad_rank: int) -> list[tuple[bool, float, int]]:
    """A bad gradient on one rank, where two dims of the mesh split one parameter: moved, steps, skipped of each."""
    placements = [[Shard(0), Shard(1)], [Shard(0), Shard(2)], [Shard(1), Shard(2)], [Shard(2), Shard(0)]]
    kinds = iter(placements)
    both = pair(
        [(4, 40, 36)] * len(placements),
        torch.float32,
        lambda value: distribute_tensor(value, mesh(2, torch.distributed.get_world_size() // 2), next(kinds)),
        lr=1e-2,
    )
    before = [whole(q.detach()) for q in both.sharded]
    for p, q in zip(both.plain, both.sharded, strict=True):
        q.grad = gradient = like(q, random_gradients([p])[0])
        if torch.distributed.get_rank() == bad_rank:
            gradient.to_local().view(-1)[0] = math.inf
    both.many.step()
    moved = [not torch.equal(whole(q.detach()), old) for q, old in zip(both.sharded, before, strict=True)]
    counts = [each.skipped for each in both.many.diagnostics().values()]
    taken = [float(both.many.state[q]["step"]) for q in both.sharded]
    return list(zip(moved, taken, counts, strict=True))


def error_of(kind: str) -> str:
    """What a step says to a gradient that it must not take."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    value = torch.randn(40, 40)
    placed = [Replicate()] if kind == "partial" else [Shard(0)]
    params: list[Any] = [nn.Parameter(distribute_tensor(value.clone(), mesh(ranks), placed)) for _ in range(2)]
    optimizer = Adafactor([("first", params[0]), ("second", params[1])], lr=1e-2)
    before = [p.to_local().clone() for p in params]
    for p in params:
        p.grad = distribute_tensor(torch.ones(40, 40), mesh(ranks), placed)
    if kind == "partial":
        params[1].grad = DTensor.from_local(torch.ones(40, 40), mesh(ranks), [Partial()])
    elif kind == "other placement":
        params[1].grad = distribute_tensor(torch.ones(40, 40), mesh(ranks), [Shard(1)])
    elif kind == "one rank":
        params[1].grad = params[1].grad if rank == 1 else None
    try:
        optimizer.step()
    except ValueError as error:
        assert all(torch.equal(p.to_local(), old) for p, old in zip(params, before, strict=True))
        return str(error)
    return "no error"


def sequence_parallel() -> str:
    """A norm under sequence parallelism, whose gradient is a sum over the mesh until it is redistributed."""
    ranks = torch.distributed.get_world_size()
    model = nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 40))
    parallelize_module(model[0], mesh(ranks), SequenceParallel())
    optimizer = Adafactor(model[0].named_parameters(), lr=1e-2)
    model[0](torch.randn(2, 4 * ranks, 40)).to_local().square().sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        norm: list[Any] = list(model[0].parameters())
        for p in norm:
            p.grad = p.grad.redistribute(p.device_mesh, p.placements)
        optimizer.step()
        return str(error)
    return "no error"


def mixtures() -> Agreement:
    """Plain and sharded parameters in one group, several meshes, frozen ones, some without a gradient."""
    ranks = torch.distributed.get_world_size()
    kinds = iter(
        [
            lambda value: value,
            lambda value: distribute_tensor(value, mesh(ranks), [Shard(0)]),
            lambda value: distribute_tensor(value, mesh(2, ranks // 2), [Shard(1), Shard(0)]),
            lambda value: distribute_tensor(value, mesh(2, ranks // 2)["b"], [Shard(0)]),
            lambda value: distribute_tensor(value, mesh(ranks), [Replicate()]),
            lambda value: distribute_tensor(value, mesh(ranks), [Shard(0)]),
            lambda value: distribute_tensor(value, mesh(ranks), [Shard(0)]),
        ]
    )
    both = pair([(40, 50)] * 7, torch.float64, lambda value: next(kinds)(value), lr=1e-2, beta1=0.9)
    both.plain[5].requires_grad_(False)
    both.sharded[5].requires_grad_(False)
    for t in range(3):
        gradients: list[Tensor | None] = [*random_gradients(both.plain)]
        gradients[5] = None
        gradients[6] = None if t == 1 else gradients[6]
        collectives = both.step(gradients)
    return agreement(both, collectives)


def full_precision() -> list[float]:
    ranks = torch.distributed.get_world_size()
    both = pair(
        [(70, 45), (9,)],
        torch.bfloat16,
        lambda value: distribute_tensor(value, mesh(ranks), [Shard(0)]),
        lr=1e-3,
        weight_bits=32,
        clip_threshold=None,
        factor="none",
    )
    both.step(random_gradients(both.plain))
    ours, theirs = both.many.full_precision_weights(), both.one.full_precision_weights()
    return [distance(whole(ours[name]), theirs[name]) for name in theirs]


def noticed_writes() -> list[float]:
    """Steps scaled by RMS(p), with weights changed in between behind the kernels' back."""
    ranks = torch.distributed.get_world_size()
    both = pair(
        [(256, 256)],
        torch.float32,
        lambda value: distribute_tensor(value, mesh(ranks), [Shard(0)]),
        lr=1e-2,
        scale_parameter=True,
    )
    found = []
    for change in (lambda p: p.mul_(3), lambda p: p.data.mul_(0.1), lambda p: p.copy_(p + 1), lambda p: None):
        with torch.no_grad():
            change(both.plain[0])
            change(both.sharded[0])
        both.step(random_gradients(both.plain))
        found.append(distance(whole(both.sharded[0].detach()), both.plain[0].detach()))
    return found


def versions() -> bool:
    """Whether autograd notices that a step has written to a weight it had saved."""
    ranks = torch.distributed.get_world_size()
    p = nn.Parameter(distribute_tensor(torch.randn(40, 40), mesh(ranks), [Shard(0)]))
    optimizer = Adafactor([p], lr=1e-2)
    loss = (p * p).sum()
    p.grad = distribute_tensor(torch.randn(40, 40), mesh(ranks), [Shard(0)])
    optimizer.step()
    p.grad = None
    try:
        loss.backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


def pieces_of_the_gpu_kernels(kwargs: dict[str, Any]) -> list[str]:
    """Rows, and matrices of a stack, split over the ranks, one of which has nothing of the fourth; what differs."""
    torch.manual_seed(0)
    values = [torch.randn(shape).bfloat16() for shape in [(9,), (33, 64), (3, 40, 33), (1, 33)]]
    plain = [nn.Parameter(value.clone()) for value in values]
    sharded = [nn.Parameter(distribute_tensor(value.clone(), mesh(2), [Shard(0)])) for value in values]
    one = Adafactor([(f"w{k}", p) for k, p in enumerate(plain)], backend="reference", **kwargs)
    many = Adafactor([(f"w{k}", p) for k, p in enumerate(sharded)], backend="triton", **kwargs)
    pair, wrong = Pair(plain, sharded, one, many), []
    for t in range(2):
        gradients = [torch.randn(p.shape).bfloat16() for p in plain]
        if t:
            gradients[1][32, 3] = gradients[2][2, 3, 4] = math.inf  # on one of the ranks
        pair.step(gradients)
        for k, (p, q) in enumerate(zip(plain, sharded, strict=True)):
            whole = q.full_tensor().detach()  # type: ignore[attr-defined]
            if (whole != p).float().mean() > 0.01:  # a number at the edge may fall to the other side
                wrong.append(f"w{k} after step {t + 1}")
            for name, theirs in one.state[p].items():
                ours = many.state[q][name]
                ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
                if theirs.dtype == torch.float32 and (ours - theirs).abs().max() > 1e-5 * theirs.abs().max():
                    wrong.append(f"{name} of w{k} after step {t + 1}")
    counted = [[report.skipped for report in opt.diagnostics().values()] for opt in (one, many)]
    return wrong + [f"skipped: {counted}"] * (counted != [[0, 1, 1, 0]] * 2)
