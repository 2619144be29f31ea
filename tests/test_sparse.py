"""Sparse gradients of embeddings: the step of the dense gradient, and what it costs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from _cases import (
    MODES,
    assert_agrees_in_float64,
    assert_close,
    assert_same_bits,
    float32_bounds,
    oracle_view,
    oracle_walk,
    parameter,
    problem,
    snapshot,
    statistics,
    walk,
)
from _ranks import good, run_on_ranks
from adafactor import Adafactor, memory

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

SHAPE = (97, 40)
ROWS = [[3, 0, 96, 41], [3, 5, 7], [], list(range(97)), [12], [3, 50, 51, 52, 95]]  # touched in each step
TOUCHING_ALL = {name for name, kwargs in MODES.items() if kwargs.get("beta1") or kwargs.get("weight_decay")}
TOUCHING_ALL |= {"largest2", "function, one RMS per tensor"}  # the view's rows are the embedding's columns


def row_sparse(g: Tensor, rows: list[int], repeat: bool = True) -> Tensor:
    """The rows of `g` as an embedding's gradient; all of them in two halves, in another order."""
    places = torch.tensor(rows, dtype=torch.int64)
    values = g[places]
    if repeat:
        places, values = torch.cat([places, places.flip(0)]), torch.cat([values / 2, values.flip(0) / 2])
    return torch.sparse_coo_tensor(places[None], values, g.shape)


def sparse_problem(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A parameter, its sparse gradients, and the same as dense ones."""
    p0, grads = problem(SHAPE, dtype=dtype)
    sparse = [row_sparse(g, rows) for g, rows in zip(grads, ROWS, strict=True)]
    return p0, sparse, [g.to_dense() for g in sparse]


def backend_of(optimizer: Adafactor) -> str:
    return optimizer.explain()[0].backend


# The result


@pytest.mark.parametrize("mode", MODES)
def test_it_agrees_with_the_oracle_in_float64(mode: str) -> None:
    p0, sparse, dense = sparse_problem(torch.float64)
    assert_agrees_in_float64(SHAPE, MODES[mode], walk(p0, sparse, **MODES[mode]), oracle_walk(p0, dense, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
def test_it_agrees_with_the_oracle_in_float32(mode: str) -> None:
    kwargs = MODES[mode]
    p0, sparse, dense = sparse_problem(torch.float32)
    expected = oracle_walk(p0, dense, **kwargs)
    bounds = float32_bounds(p0, kwargs, expected)
    for t, (ours, theirs, allowed) in enumerate(zip(walk(p0, sparse, **kwargs), expected, bounds, strict=True), 1):
        assert_close(ours["p"], theirs.p, allowed["p"], f"p after step {t}")
        for letter, found in statistics(ours, oracle_view(SHAPE, kwargs)).items():
            assert_close(found, getattr(theirs, letter), allowed[letter], f"{letter} after step {t}")


@pytest.mark.parametrize("mode", MODES)
def test_only_what_moves_every_row_is_made_dense(mode: str) -> None:
    p0, sparse, _ = sparse_problem(torch.float32)
    p = parameter(p0)
    optimizer = Adafactor([p], **MODES[mode])
    p.grad = sparse[0]
    optimizer.step()
    assert (backend_of(optimizer) == "sparse") == (mode not in TOUCHING_ALL)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("bits", [None, 24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:rounding='nearest' loses:UserWarning")
def test_where_sums_are_exact_it_has_the_bits_of_the_dense_step(dtype: torch.dtype, bits: Any, rounding: str) -> None:
    """Gradients of +-1 with beta2 = 0: every sum is a whole number, and only what is rounded at random is left."""
    if dtype == torch.float16 and bits:
        pytest.skip("refused")
    signs = torch.Generator().manual_seed(1)
    p0 = torch.randn(SHAPE, generator=signs).to(dtype)
    p, q = parameter(p0), parameter(p0)
    settings = {"lr": 1e-2, "beta2": 0.0, "weight_bits": bits, "rounding": rounding, "seed": 3}
    ours = Adafactor([p], **settings)
    dense = Adafactor([q], **settings, backend="reference")
    for rows in ROWS * 2:
        g = (torch.randint(2, SHAPE, generator=signs) * 2 - 1).to(dtype)
        p.grad = row_sparse(g, rows)
        q.grad = p.grad.to_dense()
        ours.step()
        dense.step()
        assert_same_bits(snapshot(ours, p), snapshot(dense, q))
    assert backend_of(ours) == "sparse"
    assert not torch.equal(p, p0)


def test_rows_beyond_a_block_are_stepped_too() -> None:
    p0, grads = problem((3000, 64), steps=1, dtype=torch.float32)
    rows = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:2000]
    g = row_sparse(grads[0], rows.tolist())
    expected = oracle_walk(p0, [g.to_dense()], lr=1e-2)
    (allowed,) = float32_bounds(p0, {"lr": 1e-2}, expected)
    (ours,) = walk(p0, [g], lr=1e-2)
    assert_close(ours["p"], expected[0].p, allowed["p"], "p")


@pytest.mark.parametrize("kwargs", [{}, {"lr": 1e-2}, {"lr": 1e-2, "beta1": 0.9}], ids=str)
@pytest.mark.parametrize("bag", [False, True], ids=["Embedding", "EmbeddingBag"])
def test_embeddings_train_as_with_dense_gradients(bag: bool, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    build: Any = functools.partial(nn.EmbeddingBag, mode="sum") if bag else nn.Embedding
    tables = [build(60, 40, sparse=sparse, padding_idx=2) for sparse in (True, False)]
    nets = [nn.Sequential(table, nn.Linear(40, 3)).double() for table in tables]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [Adafactor(net.named_parameters(), **kwargs) for net in nets]
    for _ in range(5):
        tokens = torch.randint(9, (4, 6))
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(tokens).square().mean().backward()
            optimizer.step()
    assert tables[0].weight.grad.is_sparse
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert_close(ours.detach(), theirs.detach(), 1e-12, "weights")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_is_skipped(bad: float) -> None:
    p = parameter(problem(SHAPE, dtype=torch.bfloat16)[0])
    optimizer = Adafactor([p], weight_bits=24)
    for value in (1.0, bad, 2.0):
        before = snapshot(optimizer, p)
        g = torch.ones(SHAPE, dtype=torch.bfloat16)
        g[5, 7] = value
        p.grad = row_sparse(g, [5, 9])
        optimizer.step()
        if value is bad:
            assert_same_bits(snapshot(optimizer, p), before)
        else:
            assert not torch.equal(p, before["p"])
    found = optimizer.diagnostics()["param 0"]
    assert (found.updates, found.skipped) == (2, 1)


def test_dense_and_sparse_gradients_may_take_turns() -> None:
    p0, sparse, dense = sparse_problem(torch.float32)
    p, q = parameter(p0), parameter(p0)
    ours, theirs = Adafactor([p]), Adafactor([q])
    for t, (one, other) in enumerate(zip(sparse, dense, strict=True)):
        p.grad, q.grad = (one if t % 2 else other), other
        ours.step()
        theirs.step()
        assert_close(p.detach(), q.detach(), 2.0**-20 * p0.abs().max(), f"p after step {t + 1}")


# RMS(p), whose sums are kept


def change_in_sight(p: Tensor) -> None:
    with torch.no_grad():
        p[60:90] *= 30  # none of which is touched after it


def change_out_of_sight(p: Tensor) -> None:
    p.data.mul_(30)


def exchange(p: Tensor) -> None:
    p.data = p.data * 30


@pytest.mark.parametrize("change", [change_in_sight, change_out_of_sight, exchange])
@pytest.mark.parametrize("bits", [None, 32])
def test_weights_that_somebody_else_changed_are_noticed(change: Any, bits: Any) -> None:
    p0, sparse, dense = sparse_problem(torch.float32)
    if bits:
        p0, sparse, dense = p0.bfloat16(), [g.bfloat16() for g in sparse], [g.bfloat16() for g in dense]
    p, q = parameter(p0), parameter(p0)
    ours, theirs = (Adafactor([each], weight_bits=bits) for each in (p, q))
    for t, (one, other) in enumerate(zip(sparse, dense, strict=True)):
        p.grad, q.grad = one, other
        ours.step()
        theirs.step()
        if t == 3:
            change(p)
            change(q)
    sizes = [each.diagnostics()["param 0"].step_size[0] for each in (ours, theirs)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


def test_a_resumed_run_has_the_bits_of_one_that_was_not() -> None:
    p0, sparse, _ = sparse_problem(torch.float32)
    p = parameter(p0)
    optimizer = Adafactor([p])
    for g in sparse[:4]:
        p.grad = g
        optimizer.step()
    q = parameter(p.detach())
    resumed = Adafactor([q])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for g in sparse[4:]:
        p.grad = q.grad = g
        optimizer.step()
        resumed.step()
    assert_same_bits(snapshot(optimizer, p), snapshot(resumed, q))


# What it costs


class Sizes(TorchDispatchMode):
    """The most elements that any operation gave back, other than the parameter itself."""

    def __init__(self, p: Tensor) -> None:
        super().__init__()
        self.place, self.largest = p.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(each, Tensor) and not each.is_sparse and each.data_ptr() != self.place:
                self.largest = max(self.largest, each.numel())
        return result


@pytest.mark.parametrize("kwargs", [{}, {"lr": 1e-2}], ids=["paper", "lr"])
def test_work_is_that_of_the_rows_touched_and_one_pass_over_the_row_statistics(kwargs: dict[str, Any]) -> None:
    p = parameter(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)))
    optimizer = Adafactor([p], **kwargs)
    for _ in range(2):
        p.grad = row_sparse(torch.ones(1000, 64), [1, 5, 900], repeat=False)
        with Sizes(p) as sizes:
            optimizer.step()
    assert sizes.largest == 1000


def test_rows_that_are_not_touched_are_neither_read_nor_written() -> None:
    p0, _, _ = sparse_problem(torch.float32)
    p0[60] = torch.nan
    p = parameter(p0)
    optimizer = Adafactor([p], lr=1e-2)
    p.grad = row_sparse(torch.ones(SHAPE), [3, 41, 96])
    optimizer.step()
    moved = (p.detach() != p0).all(1) & ~p0.isnan().all(1)
    assert moved.nonzero().flatten().tolist() == [3, 41, 96]
    assert_same_bits({"p": p.detach()[~moved]}, {"p": p0[~moved]})


@pytest.mark.parametrize("kwargs", [{}, {"lr": 1e-2}, {"lr": 1e-2, "weight_decay": 0.1}], ids=["paper", "lr", "decay"])
def test_the_peak_of_a_step_is_far_below_a_dense_gradient(kwargs: dict[str, Any]) -> None:
    p = parameter(torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)))
    optimizer = Adafactor([p], **kwargs)
    g = torch.ones(20_000, 64)
    p.grad = row_sparse(g, list(range(0, 20_000, 100)))
    optimizer.step()
    peak = memory.peak_allocated(optimizer.step)
    assert (peak < 0.15 * g.nbytes) == ("weight_decay" not in kwargs)


# In company


@pytest.mark.parametrize("passes", [1, 2])
def test_it_is_stepped_in_backward_with_the_bits_of_the_plain_step(passes: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(60, 40, sparse=True), nn.Linear(40, 3))
    twin = copy.deepcopy(net)
    plain, early = Adafactor(twin.named_parameters()), Adafactor(net.named_parameters())
    with early.step_in_backward(accumulation_steps=passes):
        for _ in range(3):
            for _ in range(passes):
                tokens = torch.randint(60, (4, 6))
                for each in (net, twin):
                    each(tokens).square().mean().backward()
            assert net[0].weight.grad is None
            plain.step()
            plain.zero_grad()
            early.step()
    assert backend_of(early) == "sparse"
    assert_same_bits(net.state_dict(), twin.state_dict())


def test_a_gradient_scaler_may_scale_it() -> None:
    torch.manual_seed(0)
    net = nn.Embedding(60, 40, sparse=True)
    twin = copy.deepcopy(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ours, plain = Adafactor(net.named_parameters()), Adafactor(twin.named_parameters())
    for _ in range(3):
        tokens = torch.randint(60, (6,))
        scaler.scale(net(tokens).square().mean()).backward()
        scaler.step(ours)
        scaler.update()
        twin(tokens).square().mean().backward()
        plain.step()
        net.zero_grad()
        twin.zero_grad()
    assert_same_bits(net.state_dict(), twin.state_dict())


@pytest.fixture
def one_rank_of_two() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_that_of_a_sharded_parameter_is_refused_by_name_before_anything_moves(one_rank_of_two: DeviceMesh) -> None:
    other, p = parameter(torch.ones(SHAPE)), nn.Parameter(distribute_tensor(torch.ones(SHAPE), one_rank_of_two))
    other.grad, p.grad = torch.ones(SHAPE), row_sparse(torch.ones(SHAPE), [1])
    optimizer = Adafactor([("head", other), ("table", p)])
    with pytest.raises(ValueError, match=r"'table' is sparse and the parameter sharded.*sparse=False"):
        optimizer.step()
    assert torch.equal(other, torch.ones(SHAPE))


def trained_on_a_rank(in_backward: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(60, 40, sparse=True), nn.Linear(40, 3))
    ddp = nn.parallel.DistributedDataParallel(net)
    optimizer = Adafactor(net.named_parameters(), lr=1e-2)
    if in_backward:
        optimizer.step_in_backward()
    for t in range(3):
        ddp(torch.tensor([1 + dist.get_rank(), 2, 3 + 5 * dist.get_rank(), t])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert backend_of(optimizer) == "sparse"
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.slow
def test_data_parallel_ranks_agree_and_in_backward_has_their_bits() -> None:
    cases = {str(in_backward): functools.partial(trained_on_a_rank, in_backward) for in_backward in (False, True)}
    results = run_on_ranks(2, cases)
    first, *others = [*good(results["False"]), *good(results["True"])]
    for other in others:
        assert_same_bits(other, first)
