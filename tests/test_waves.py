"""The reference as a GPU gets it: parameters that are treated alike are stepped together, by the same definition.

The CPU stands in for the GPU: it is taken out of the devices whose values can be read without waiting.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from _cases import (
    FEW_SHAPES,
    MODES,
    Shape,
    Snapshot,
    assert_agrees_in_float64,
    assert_same_bits,
    lr_at,
    oracle_walk,
    parameter,
    problem,
    shape_id,
    snapshot,
)
from adafactor import Adafactor
from adafactor.backends import Task, cpu, reference, waves
from adafactor.memory import peak_allocated

FEW_BITS: dict[str, dict[str, Any]] = {
    "bfloat16 momentum": {"lr": 0.01, "beta1": 0.9, "momentum_dtype": torch.bfloat16},
    "one-byte momentum": {"beta1": 0.9, "momentum_dtype": torch.int8},
    "one-byte momentum to nearest": {"beta1": 0.9, "momentum_dtype": torch.int8, "rounding": "nearest"},
    "24 bits": {"weight_bits": 24},
    "32 bits": {"weight_bits": 32, "lr": 0.01, "weight_decay": 0.1},
    "lr a tensor": {"lr": torch.tensor(0.01)},
    "lr a tensor, relative": {"lr": torch.tensor([0.01]), "relative_step": True, "warmup_init": True},
}
CASES = [(torch.bfloat16, mode) for mode in (*MODES, *FEW_BITS)]
CASES += [(dtype, mode) for dtype in (torch.float32, torch.float64) for mode in ("paper", "nesterov, unscaled")]
CASES += [(torch.float64, "one RMS per tensor"), (torch.float16, "paper"), (torch.float16, "bfloat16 momentum")]
EMPTY: list[Shape] = [(0,), (5, 0)]


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor may vmap run an operation for each parameter, as it does where it knows no better."""
    monkeypatch.setattr(cpu, "missing", lambda: "switched off by a test")
    monkeypatch.setattr(reference, "HOST", ())
    allowed = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    yield
    functorch._set_vmap_fallback_enabled(allowed)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters the waves have had."""
    seen: list[int] = []
    whole = waves._step

    def noted(wave: Sequence[Task]) -> None:
        seen.append(len(wave))
        whole(wave)

    monkeypatch.setattr(waves, "_step", noted)
    return seen


class Operations(TorchDispatchMode):
    """Counts what would be launches. What depends on values on the device, and so has to wait for it, is an error."""

    WAIT = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2"})
    FREE = ("empty", "new_empty", "_record_function")

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAIT, name
        if name in ("index", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} by a mask"
        is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        self.count[name] += not is_view and not name.startswith(self.FREE)
        return func(*args, **(kwargs or {}))


Problem = tuple[str, Tensor, list[Tensor | None]]  # name, p0 and gradients


def several(shapes: Sequence[Shape], each: int, dtype: torch.dtype) -> list[Problem]:
    """So many parameters of every shape. Their gradients are of unlike sizes, one is missing, one is not finite."""
    found = []
    for shape in shapes:
        p0, drawn = problem(shape, steps=4, dtype=torch.float64)
        for copy in range(each):
            grads: list[Tensor | None] = [(g * 4.0 ** (copy - 1)).to(dtype) for g in drawn]
            if copy == 0:
                grads[1] = None  # so that its time is its own
            if copy == 1 and p0.numel():
                grads[2] = torch.full_like(drawn[2], math.nan).to(dtype)
            found.append((f"{shape}/{copy}", (p0 * (1 + copy)).to(dtype), grads))
    return found


def walk_together(problems: Sequence[Problem], **kwargs: Any) -> tuple[list[Snapshot], Adafactor]:
    """All in one optimizer."""
    params = [parameter(p0) for _, p0, _ in problems]
    optimizer = Adafactor([(name, p) for (name, _, _), p in zip(problems, params, strict=True)], **kwargs)
    for t in range(len(problems[0][2])):
        for p, (_, _, grads) in zip(params, problems, strict=True):
            p.grad = grads[t]
        optimizer.step()
    reports = [slot.task.report.values for slot in optimizer._slots.values()]
    taken = [snapshot(optimizer, p) | {"report": report} for p, report in zip(params, reports, strict=True)]
    return taken, optimizer


@pytest.mark.parametrize(("dtype", "mode"), CASES, ids=[f"{str(dtype)[6:]} {mode}" for dtype, mode in CASES])
def test_a_wave_has_the_bits_of_one_parameter_after_the_other(dtype: torch.dtype, mode: str, sizes: list[int]):
    kwargs = MODES.get(mode) or FEW_BITS.get(mode, {})
    drawn = several(FEW_SHAPES + EMPTY if mode == "paper" else [(31,), (3, 40, 33), (33, 4, 3, 3)], 3, dtype)
    together, optimizer = walk_together(drawn, **kwargs)
    assert max(sizes) == 3
    assert {row.backend for row in optimizer.explain()} == {"reference"}
    sizes.clear()
    for ours, one in zip(together, drawn, strict=True):
        [alone], _ = walk_together([one], **kwargs)
        assert_same_bits(ours, alone, one[0])
    assert not sizes


@pytest.mark.parametrize("mode", ["paper", "momentum, unscaled", "warm-up"])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=shape_id)
def test_a_wave_agrees_with_the_oracle(shape: Shape, mode: str, sizes: list[int]):
    kwargs = MODES[mode]
    p0, grads = problem(shape)
    params = [parameter(p0) for _ in range(2)]
    optimizer = Adafactor(params, **kwargs)
    taken: list[list[Snapshot]] = [[], []]
    for index, g in enumerate(grads):
        if "lr" in kwargs:
            optimizer.param_groups[0]["lr"] = lr_at(kwargs, index)
        params[0].grad = params[1].grad = g
        optimizer.step()
        for p, seen in zip(params, taken, strict=True):
            seen.append(snapshot(optimizer, p))
    assert sizes == [2] * len(grads)
    for seen in taken:
        assert_agrees_in_float64(shape, kwargs, seen, oracle_walk(p0, grads, **kwargs))


class NoDtypeViews(TorchFunctionMode):
    """As torch before 2.13, whose vmap refuses `Tensor.view(dtype)`."""

    refused = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.view and isinstance(args[1], torch.dtype) and functorch.is_batchedtensor(args[0]):
            self.refused += 1
            raise RuntimeError("Batching rule not implemented for aten::view.dtype")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["paper", "bfloat16 momentum", "24 bits", "32 bits"])
def test_an_older_vmap_gives_the_same_bits(mode: str):
    drawn, kwargs = several([(3, 40, 33)], 2, torch.bfloat16), MODES.get(mode) or FEW_BITS.get(mode, {})
    with NoDtypeViews() as older:
        taken, _ = walk_together(drawn, **kwargs)
    assert older.refused
    for ours, theirs in zip(taken, walk_together(drawn, **kwargs)[0], strict=True):
        assert_same_bits(ours, theirs)


def test_only_what_is_treated_alike_shares_a_wave(sizes: list[int]):
    def params(*shapes: Shape, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]

    lr = torch.tensor(0.1)
    groups: list[dict[str, Any]] = [
        {"params": params((40, 33), (31,), (40, 33), (33, 40), (31,), (31,))},
        {"params": params((31,), (31,), dtype=torch.bfloat16)},
        {"params": params((31,), (31,)), "lr": 0.2},
        {"params": params((31,), (31,)), "clip_threshold": 0.5},
        {"params": params((31,), (31,)), "lr": lr},
        {"params": params((31,), (31,)), "lr": lr.clone()},
    ]
    optimizer = Adafactor(groups, lr=0.1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert sizes == [2, 3, 2, 2, 2, 2, 2]


def test_a_wave_is_no_larger_than_a_block(monkeypatch: pytest.MonkeyPatch, sizes: list[int]):
    monkeypatch.setattr(reference, "BLOCK", 1000)
    monkeypatch.setattr(reference, "ACCELERATED", 2)
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(600,)] * 7 + [(1001,)] * 3 + [(32, 100)] * 2]
    optimizer = Adafactor(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert sizes == [3, 3]
    assert all(optimizer.state[p]["step"] == 1 for p in params)


def test_strides_do_not_change_a_bit():
    """Parameters and gradients with any strides, each with its own."""
    p0, grads = problem((33, 40, 3, 3), steps=2, dtype=torch.float32)
    last = torch.channels_last
    params = [parameter(p0), parameter(p0.contiguous(memory_format=last)), parameter(p0)]
    strides = [p.stride() for p in params]
    optimizer = Adafactor(params, beta1=0.9)
    for g in grads:
        params[0].grad, params[1].grad = g, g.contiguous(memory_format=last)
        params[2].grad = g.mT.contiguous().mT
        optimizer.step()
    assert [p.stride() for p in params] == strides
    for p in params[1:]:
        assert_same_bits(snapshot(optimizer, p), snapshot(optimizer, params[0]))


def test_inference_mode():
    with torch.inference_mode():
        params = [torch.nn.Parameter(torch.ones(40, 33)) for _ in range(2)]
        optimizer = Adafactor(params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all((p < 1).all() for p in params)


# Launches, waiting, memory

TEN: list[Shape] = [(32, 32), (31,), (40, 33), (4, 32, 32), (33, 4, 3, 3), (), (7,), (64, 32), (32, 64), (100,)]


@pytest.mark.parametrize(
    ("kwargs", "most"),
    [({}, 1800), ({"lr": 0.01, "beta1": 0.9, "momentum_dtype": torch.int8, "weight_decay": 0.1}, 2500)],
    ids=["paper", "one-byte momentum"],
)
def test_the_operations_of_a_step_are_few_and_wait_for_nothing(kwargs: dict[str, Any], most: int):
    """300 bfloat16 parameters of ten shapes; one after the other they take 26 times as many."""
    optimizer = Adafactor([parameter(p0) for _, p0, _ in several(TEN, 30, torch.bfloat16)], **kwargs)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with Operations() as together:
        optimizer.step()
    ten = [slot.task for slot in optimizer._slots.values()][::30]
    for task in ten:
        task.g = torch.ones_like(task.p)
    with Operations() as alone, torch.no_grad():
        reference.step(ten)
    assert together.count.total() <= most
    assert 30 * alone.count.total() >= 26 * together.count.total()


NESTEROV = {"lr": 0.01, "scale_parameter": True, "beta1": 0.9, "nesterov": True, "weight_decay": 0.1}
TEMPORARIES: list[tuple[Shape, int, torch.dtype, dict[str, Any]]] = [
    ((256, 256), 4, torch.bfloat16, {}),
    ((256, 256), 4, torch.float32, NESTEROV),
    ((32, 32), 256, torch.bfloat16, NESTEROV | {"momentum_dtype": torch.int8, "weight_bits": 32}),
    ((32, 32), 256, torch.float16, NESTEROV | {"momentum_dtype": torch.int8}),
    ((1024,), 256, torch.bfloat16, NESTEROV | {"weight_bits": 32}),
    ((1024,), 256, torch.float32, NESTEROV | {"momentum_dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(
    ("shape", "number", "dtype", "kwargs"),
    [pytest.param(*case, id=f"{shape_id(case[0])} {str(case[2])[6:]} {'+'.join(case[3])}") for case in TEMPORARIES],
)
def test_temporaries_stay_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, number: int, dtype: torch.dtype, kwargs: dict[str, Any]
):
    """84 bytes per element of a wave, of which these parameters need two."""
    monkeypatch.setattr(reference, "ACCELERATED", 4)
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(number)]
    optimizer = Adafactor(params, **kwargs)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    wave = reference.block_size(params[0].device)
    assert sum(p.numel() for p in params) == 2 * wave
    assert peak_allocated(optimizer.step) <= 84 * wave
