"""The plan: planned bytes are allocated bytes, the factoring rule by hand, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import adafactor
from _cases import SHAPES, Shape, parameter, permuted_view, shape_id
from adafactor import Adafactor
from adafactor._hyper import DEFAULTS
from adafactor._plan import View

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STATE_MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"lr": 0.01, "beta1": 0.9},
    "bfloat16 momentum": {"beta1": 0.9, "momentum_dtype": torch.bfloat16},
    "idle momentum_dtype": {"momentum_dtype": torch.bfloat16},
    "momentum 0": {"beta1": 0.0},
    "none": {"factor": "none"},
    "last2, any size": {"factor": "last2", "min_dim_size_to_factor": 0},
    "first2": {"factor": "first2", "min_dim_size_to_factor": 3, "beta1": 0.9},
    "largest2": {"factor": "largest2", "min_dim_size_to_factor": 2},
    "function": {"factor": lambda name, shape: permuted_view(shape), "beta1": 0.9},
    "one RMS per tensor": {"rms_scope": "tensor"},
}


def allocated(optimizer: Adafactor, p: torch.Tensor) -> dict[str, tuple[Shape, str, int]]:
    """Shape, dtype and bytes of storage of each state tensor."""
    state = optimizer.state[p].items()
    return {name: (tuple(t.shape), str(t.dtype)[6:], t.untyped_storage().nbytes()) for name, t in state}


# Bytes


@pytest.mark.parametrize("mode", STATE_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planned_bytes_are_allocated_bytes(dtype: torch.dtype, mode: str):
    params = [parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = Adafactor(params, **STATE_MODES[mode])
    plans = adafactor.plan(params, **STATE_MODES[mode])
    planned = [{spec.name: (spec.shape, spec.dtype, spec.nbytes) for spec in plan.state} for plan in plans]
    assert [allocated(optimizer, p) for p in params] == planned
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [allocated(optimizer, p) for p in params] == planned
    for plan, row in zip(plans, optimizer.explain(), strict=True):
        assert plan.nbytes == sum(spec.nbytes for spec in plan.state) == row.state_bytes
        assert (plan.name, plan.shape, plan.dtype, plan.factored) == (row.name, row.shape, row.dtype, row.factored)
    assert optimizer.explain().state_bytes == sum(plan.nbytes for plan in plans)
    tensors = [t for p in params for t in optimizer.state[p].values() if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors), "state tensors share memory"


BYTES = [
    ((512, 768), "float32", {}, 4 + 4 * (512 + 768)),
    ((512, 768), "bfloat16", {}, 4 + 4 * (512 + 768)),
    ((512, 768), "float64", {}, 4 + 8 * (512 + 768)),
    ((768,), "bfloat16", {}, 4 + 4 * 768),
    ((), "float16", {}, 4 + 4),
    ((0,), "float32", {}, 4),
    ((8, 512, 768), "float32", {}, 4 + 4 * 8 * (512 + 768)),
    ((64, 32, 3, 3), "float32", {}, 4 + 4 * (64 + 288)),
    ((512, 768), "bfloat16", {"beta1": 0.9}, 4 + 4 * (512 + 768) + 4 * 512 * 768),
    ((512, 768), "float32", {"beta1": 0.9, "momentum_dtype": "bfloat16"}, 4 + 4 * (512 + 768) + 2 * 512 * 768),
    ((512, 768), "float64", {"beta1": 0.9}, 4 + 8 * (512 + 768) + 8 * 512 * 768),
    ((31, 768), "float32", {}, 4 + 4 * 31 * 768),
    ((31, 768), "float32", {"min_dim_size_to_factor": 31}, 4 + 4 * (31 + 768)),
]


@pytest.mark.parametrize(("shape", "dtype", "kwargs", "nbytes"), BYTES, ids=str)
def test_bytes_by_hand(shape: Shape, dtype: str, kwargs: dict[str, Any], nbytes: int):
    [plan] = adafactor.plan([torch.empty(shape, dtype=getattr(torch, dtype), device="meta")], **kwargs)
    assert plan.nbytes == nbytes


def test_t5_base_needs_less_than_1_1_MB():
    """110 M parameters: an embedding, twelve layers, the norms."""
    shapes: dict[str, Shape] = {"embedding": (32128, 768)}
    for layer in range(12):
        shapes |= {f"{layer}.{name}": (768, 768) for name in "qkvo"}
        shapes |= {f"{layer}.wi": (3072, 768), f"{layer}.wo": (768, 3072)}
    shapes |= {f"norm.{i}": (768,) for i in range(25)}
    plans = adafactor.plan(shapes)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 109_628_160
    rows_and_columns = (32128 + 768) + 12 * (4 * (768 + 768) + 2 * (3072 + 768))
    assert sum(plan.nbytes for plan in plans) == 4 * (rows_and_columns + 25 * 768 + len(shapes)) < 1_100_000


# The factoring rule

ONE, STACK = View((), (0,), (1,)), View((0,), (1,), (2,))
RULES: list[tuple[str, int, Shape, View | None]] = [
    ("auto", 32, (), None),
    ("auto", 32, (4096,), None),
    ("auto", 32, (32, 32), ONE),
    ("auto", 32, (31, 4096), None),
    ("auto", 32, (4096, 31), None),
    ("auto", 0, (1, 1), ONE),
    ("auto", 0, (5,), None),
    ("auto", 32, (8, 64, 32), STACK),
    ("auto", 32, (1, 32, 32), STACK),
    ("auto", 32, (64, 3, 32), View((), (0,), (1, 2))),
    ("auto", 32, (4, 16, 128), View((), (0, 1), (2,))),
    ("auto", 32, (8, 64, 16), None),  # 8 | 1024 and 512 | 16
    ("auto", 32, (64, 3, 64), View((), (0,), (1, 2))),  # 64 + 192 twice: the first
    ("auto", 32, (33, 1, 1, 33), View((), (0,), (1, 2, 3))),  # three times the same
    ("auto", 32, (64, 32, 3, 3), View((), (0,), (1, 2, 3))),
    ("auto", 32, (64, 3, 7, 7), View((), (0,), (1, 2, 3))),
    ("auto", 32, (8, 512, 3, 3), None),  # 8 | 4608 and 4096 | 9
    ("auto", 9, (8, 512, 3, 3), View((), (0, 1), (2, 3))),
    ("auto", 8, (8, 512, 3, 3), View((), (0, 1), (2, 3))),  # 4096 + 9 < 8 + 4608
    ("auto", 32, (8, 8, 64, 32), View((), (0, 1), (2, 3))),
    ("auto", 32, (2, 32, 32, 32), View((), (0, 1), (2, 3))),
    ("auto", 32, (4, 4, 4, 64), View((), (0, 1, 2), (3,))),
    ("auto", 32, (0, 64, 64), None),
    ("auto", 0, (0, 5), None),
    ("last2", 32, (64, 64), ONE),
    ("last2", 32, (3, 4, 64, 64), View((0, 1), (2,), (3,))),
    ("last2", 32, (64, 64, 3, 3), None),
    ("last2", 0, (24, 20, 3, 3), View((0, 1), (2,), (3,))),
    ("last2", 0, (7,), None),
    ("last2", 65, (64, 64), None),
    ("first2", 32, (64, 48, 3, 3), View((2, 3), (0,), (1,))),
    ("first2", 32, (64, 48, 64), View((2,), (0,), (1,))),
    ("first2", 32, (3, 48, 64), STACK),  # 3 is too small: the last two
    ("first2", 32, (64, 16, 3, 3), None),
    ("first2", 32, (64, 48), ONE),
    ("first2", 32, (48, 16), None),
    ("largest2", 32, (64, 48), View((), (1,), (0,))),
    ("largest2", 32, (48, 64), ONE),
    ("largest2", 32, (64, 64), ONE),
    ("largest2", 32, (64, 3, 48), View((1,), (2,), (0,))),
    ("largest2", 32, (48, 64, 3, 3), View((2, 3), (0,), (1,))),
    ("largest2", 32, (64, 64, 64), STACK),  # ties: the later axes
    ("largest2", 32, (48, 64, 48), View((0,), (2,), (1,))),
    ("largest2", 32, (64, 48, 48), View((1,), (2,), (0,))),
    ("largest2", 32, (3, 31, 64), None),
    ("none", 0, (64, 64), None),
    ("none", 0, (8, 64, 64), None),
]


@pytest.mark.parametrize(
    ("rule", "minimum", "shape", "view"), RULES, ids=[f"{r} {m} {shape_id(s)}" for r, m, s, _ in RULES]
)
def test_factoring_rules(rule: str, minimum: int, shape: Shape, view: View | None):
    [plan] = adafactor.plan({"w": shape}, factor=rule, min_dim_size_to_factor=minimum)
    assert plan.view == view
    assert plan.factored == (view is not None)


def test_statistics_keep_the_parameters_unmerged_dims():
    def statistics(shape: Shape, view: Any) -> tuple[Shape, Shape]:
        [plan] = adafactor.plan({"w": shape}, factor=lambda name, shape: view)
        by_name = {spec.name: spec.shape for spec in plan.state}
        return by_name["exp_avg_sq_row"], by_name["exp_avg_sq_col"]

    assert statistics((5, 6, 7, 8), ((), (0,), (1, 2, 3))) == ((5,), (6, 7, 8))
    assert statistics((5, 6, 7, 8), ((), (0, 1), (2, 3))) == ((5, 6), (7, 8))
    assert statistics((5, 6, 7, 8), ((0, 1), (2,), (3,))) == ((5, 6, 7), (5, 6, 8))
    assert statistics((5, 6, 7, 8), ((2,), (3, 0), (1,))) == ((5, 7, 8), (6, 7))


def test_a_plan_says_what_it_sees():
    plans = adafactor.plan({"a": (64, 48), "b": (8, 64, 48), "c": (7,), "d": (64, 32, 3, 3), "e": ()})
    assert [plan.describe_view() for plan in plans] == ["64 x 48", "8 of 64 x 48", "full", "64 x 288", "full"]
    assert [plan.dims for plan in plans] == [(1, 64, 48), (8, 64, 48), (1, 1, 7), (1, 64, 288), (1, 1, 1)]
    assert [plan.name for plan in plans] == list("abcde")


# A function as rule


def test_a_function_is_asked_for_every_parameter_by_name_and_shape():
    asked: list[tuple[str, Shape]] = []

    def factor(name: str, shape: Shape) -> Any:
        asked.append((name, shape))
        return None if len(shape) == 1 else [[], [-1], [0]]

    model = torch.nn.Linear(3, 2)
    plans = adafactor.plan(model, factor=factor)
    assert asked == [("weight", (2, 3)), ("bias", (2,))]
    assert [plan.view for plan in plans] == [View((), (1,), (0,)), None]
    asked.clear()
    optimizer = Adafactor(model.named_parameters(), factor=factor)
    assert asked == [("weight", (2, 3)), ("bias", (2,))]
    assert [row.view for row in optimizer.explain()] == ["3 x 2", "full"]
    asked.clear()
    Adafactor(model.parameters(), factor=factor)
    assert asked == [("param 0", (2, 3)), ("param 1", (2,))]


BAD_VIEWS: list[Any] = [
    ((), (0,)),
    ((), (0,), (1,), ()),
    ((0,), (1,), (1,)),
    ((), (0,), ()),
    ((), (), (0, 1)),
    ((0,), (1,), ()),
    ((0, 1), (), ()),
    ((), (0,), (2,)),
    ((), (0,), (3,)),
    ((), (0,), (-3,)),
    ((), (0,), (1.5,)),
    ((), (0,), ("1",)),
    ((), 0, 1),
    (0, 1),
    0,
    True,
    "last2",
    "auto",
    {"rows": 0},
]


@pytest.mark.parametrize("bad", BAD_VIEWS, ids=repr)
def test_a_bad_view_names_the_parameter(bad: Any):
    with pytest.raises(ValueError, match=r"factor .*'mlp\.up'") as raised:
        adafactor.plan({"mlp.up": (40, 50)}, factor=lambda name, shape: bad)
    assert repr(bad) in str(raised.value)
    p = parameter(torch.zeros(40, 50))
    with pytest.raises(ValueError, match=r"factor .*'mlp\.up'"):
        Adafactor([("mlp.up", p)], factor=lambda name, shape: bad)


def test_a_view_of_a_scalar_or_a_vector_is_refused():
    for shape in ((), (5,)):
        with pytest.raises(ValueError, match="'w'"):
            adafactor.plan({"w": shape}, factor=lambda name, shape: ((), (0,), (0,)))
        assert adafactor.plan({"w": shape}, factor=lambda name, shape: None)[0].view is None


# What plan takes


class Model(torch.nn.Module):
    def __init__(self, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = torch.nn.Linear(40, 64, device=device, dtype=dtype)
        self.down = torch.nn.Linear(64, 40, device=device, dtype=dtype)
        self.conv = torch.nn.Conv2d(32, 48, 3, device=device, dtype=dtype)
        self.tied = self.up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modules_mappings_and_iterables_on_any_device_give_the_same_plans(dtype: torch.dtype):
    model, meta = Model("cpu", dtype), Model("meta", dtype)
    kwargs = {"lr": 0.01, "beta1": 0.9}
    plans = adafactor.plan(model, **kwargs)
    assert [plan.name for plan in plans] == [name for name, _ in model.named_parameters()]
    assert "tied.weight" in dict(model.named_parameters(remove_duplicate=False))
    assert len(plans) == 6
    for other in (
        meta,
        dict(meta.named_parameters()),
        list(meta.named_parameters()),
        meta.named_parameters(),
        {name: p.data for name, p in model.named_parameters()},
    ):
        assert adafactor.plan(other, **kwargs) == plans
    unnamed = adafactor.plan(meta.parameters(), **kwargs)
    assert [plan.name for plan in unnamed] == [f"param {i}" for i in range(len(plans))]
    assert [(p.shape, p.dtype, p.view, p.state, p.sums) for p in unnamed] == [
        (p.shape, p.dtype, p.view, p.state, p.sums) for p in plans
    ]
    if dtype == torch.float32:
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert adafactor.plan(shapes, **kwargs) == plans
        assert adafactor.plan({name: list(shape) for name, shape in shapes.items()}, **kwargs) == plans
        assert adafactor.plan([*shapes.items()], **kwargs) == plans


def test_the_optimizers_plans_are_those():
    model = Model("cpu", torch.bfloat16)
    optimizer = Adafactor(model.named_parameters(), beta1=0.9)
    assert [slot.plan for slot in optimizer._slots.values()] == adafactor.plan(model, beta1=0.9)


def test_plans_are_plain_data():
    """Frozen, hashable, and dtypes by name."""
    [plan] = adafactor.plan({"w": (64, 48)}, beta1=0.9)
    assert hash(plan) == hash(adafactor.plan({"w": (64, 48)}, beta1=0.9)[0])
    with pytest.raises(AttributeError):
        plan.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    assert plan.dtype == "float32"
    assert {type(spec.dtype) for spec in (*plan.state, *plan.sums)} == {str}


@pytest.mark.parametrize("bad", [5, "weights", None, torch.zeros(3, 4)], ids=repr)
def test_what_is_not_a_model_is_refused(bad: Any):
    with pytest.raises(ValueError, match="plan takes a module"):
        adafactor.plan(bad)


@pytest.mark.parametrize("bad", [5, "ab", (3, -1), (3, 1.5), {"params": []}], ids=repr)
def test_what_is_not_a_shape_is_refused_by_name(bad: Any):
    with pytest.raises(ValueError, match="parameter 'w' must be a tensor or a shape"):
        adafactor.plan({"w": bad})
    with pytest.raises(ValueError, match="parameter 'param 0' must be a tensor or a shape"):
        adafactor.plan([bad])


def test_frozen_parameters_have_no_plan_and_no_state_until_they_are_used():
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 5))
    model[0].requires_grad_(False)
    assert [plan.name for plan in adafactor.plan(model, beta1=0.9)] == ["1.weight", "1.bias"]
    optimizer = Adafactor(model.named_parameters(), beta1=0.9)
    assert set(optimizer.state) == set(model[1].parameters())
    rows = {row.name: row.state_bytes for row in optimizer.explain()}
    assert rows["0.weight"] == rows["0.bias"] == 0
    report = adafactor.memory.report(model, beta1=0.9).rows[0]
    assert report.weights == 4 * (40 * 40 + 40 + 5 * 40 + 5)
    assert report.gradients == 4 * (5 * 40 + 5)
    model[0].requires_grad_(True)
    assert optimizer.explain().state_bytes == sum(plan.nbytes for plan in adafactor.plan(model, beta1=0.9))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool], ids=str)
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype):
    with pytest.raises(ValueError, match=f"parameter 'w' has dtype {str(dtype)[6:]}"):
        adafactor.plan({"w": torch.zeros(3, dtype=dtype)})


# Arguments

MAKERS: dict[str, Callable[..., Any]] = {
    "Adafactor": lambda **kwargs: Adafactor([parameter(torch.zeros(2, 3))], **kwargs),
    "a param group": lambda **kwargs: Adafactor([{"params": [parameter(torch.zeros(2, 3))], **kwargs}]),
    "add_param_group": lambda **kwargs: Adafactor([parameter(torch.zeros(1))]).add_param_group(
        {"params": [parameter(torch.zeros(2, 3))], **kwargs}
    ),
    "plan": lambda **kwargs: adafactor.plan({"w": (2, 3)}, **kwargs),
}


def test_defaults_are_those_of_the_signature():
    signature = inspect.signature(Adafactor.__init__).parameters
    theirs = {name: p.default for name, p in signature.items() if name not in ("self", "params", "backend")}
    assert theirs.pop("momentum_dtype") is torch.float32
    assert {**theirs, "momentum_dtype": "float32"} == DEFAULTS
    assert list(signature)[2:12] == [
        *("lr", "eps", "clip_threshold", "decay_rate", "beta1", "weight_decay"),
        *("scale_parameter", "relative_step", "warmup_init", "beta2"),
    ]
    assert all(signature[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(signature)[11:])


@pytest.mark.parametrize("name", ["momentum", "foreach", "fused", "capturable", "betas"])
@pytest.mark.parametrize("maker", ["Adafactor", "plan"])
def test_unknown_arguments_are_refused(maker: str, name: str):
    with pytest.raises(TypeError, match=name):
        MAKERS[maker](**{name: 1})


NUMBERS = {"a string": "1", "None": None, "NaN": float("nan"), "inf": float("inf"), "True": True, "a list": [1.0]}
BAD: dict[str, list[Any]] = {
    "lr": [-1e-3, *(NUMBERS[key] for key in NUMBERS if key != "None"), 1j],
    "eps": [1e-30, (1e-30,), (1e-30, 1e-3, 1), "ab", None, 5],
    "eps[0]": [(0.0, 1e-3), (1e-38, 1e-3), (-1.0, 1e-3), (None, 1e-3), ("1", 1e-3), (float("nan"), 1e-3)],
    "eps[1]": [(1e-30, -1e-3), (1e-30, None), (1e-30, float("inf"))],
    "clip_threshold": [0, -1.0, "1", float("nan"), float("inf"), True],
    "decay_rate": [0.8, 1e-9, *NUMBERS.values()],
    "beta1": [-0.1, 1.0, 1.5, "1", float("nan"), (0.9, 0.999), True],
    "beta2": [-0.1, 1.0, 1.5, "1", float("nan"), True],
    "beta2_cap": [-0.1, 1.0, 1.5, "1", float("nan"), True],
    "weight_decay": [-0.1, *NUMBERS.values()],
    "scale_parameter": ["no", 2],
    "relative_step": ["no", 2],
    "warmup_init": ["no", 2],
    "nesterov": ["no", 2],
    "maximize": ["no", 2],
    "momentum_mode": ["ema", "", None, 1, True],
    "momentum_dtype": [torch.float16, "float64", None, 1, "fp32"],
    "weight_decay_mode": ["l2", "", None, True],
    "factor": ["rows", "", "AUTO", None, 1, True],
    "min_dim_size_to_factor": [-1, 1.5, "32", None, True],
    "rms_scope": ["row", None, False],
    "rounding": ["up", None, True],
    "weight_bits": [8, 16, "32", 0],
    "seed": [1.5, "0", None, True],
    "backend": ["cuda", "", None, 1],
}
BAD_ARGUMENTS = [
    (name, value, maker)
    for name, values in BAD.items()
    for value in values
    for maker in ("Adafactor", "a param group", "plan")
    if (name, maker) != ("backend", "a param group")  # it is the optimizer's
]


@pytest.mark.parametrize(
    ("name", "value", "maker"), BAD_ARGUMENTS, ids=[f"{name}={value!r} {maker}" for name, value, maker in BAD_ARGUMENTS]
)
def test_a_bad_value_is_named(name: str, value: Any, maker: str):
    """ValueError, with the argument and the value in its message."""
    argument, _, index = name.partition("[")
    kwargs = {"relative_step": True} if argument == "warmup_init" else {"beta1": 0.9} if argument == "nesterov" else {}
    with pytest.raises(ValueError, match=argument) as raised:
        MAKERS[maker](**kwargs, **{argument: value})
    assert name in str(raised.value)
    shown = value[int(index[0])] if index else value
    assert str(getattr(shown, "item", lambda: shown)()).removeprefix("torch.") in str(raised.value)


@pytest.mark.parametrize(
    "lr", [torch.zeros(2), torch.zeros(0), torch.tensor(1j), torch.tensor(-1.0), torch.tensor(float("nan"))], ids=repr
)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_bad_tensor_as_lr_is_named(maker: str, lr: torch.Tensor):
    with pytest.raises(ValueError, match="lr must be"):
        MAKERS[maker](lr=lr)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"relative_step": False}, "lr=None .*relative_step=False.* give an lr"),
    ({"lr": None, "relative_step": False, "scale_parameter": True}, "give an lr"),
    ({"lr": 0.1, "warmup_init": True}, "warmup_init=True .*add relative_step=True"),
    ({"beta2": 0.99, "decay_rate": -0.5}, r"beta2=0\.99 and decay_rate=-0\.5"),
    ({"beta2": 0.99, "beta2_cap": 0.999}, r"beta2=0\.99 and beta2_cap=0\.999"),
]


@pytest.mark.parametrize(("kwargs", "message"), CONTRADICTIONS, ids=[str(kwargs) for kwargs, _ in CONTRADICTIONS])
@pytest.mark.parametrize("maker", MAKERS)
def test_contradictions_are_refused_with_the_fix(maker: str, kwargs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MAKERS[maker](**kwargs)


@pytest.mark.parametrize("maker", MAKERS)
def test_modifiers_of_what_is_off_are_idle(maker: str):
    MAKERS[maker](momentum_dtype=torch.int8, momentum_mode="unscaled", nesterov=True, weight_decay_mode="independent")
    MAKERS[maker](lr=0.1, eps=(1e-30, 0.0), beta1=0.0, clip_threshold=None)


@pytest.mark.parametrize("maker", MAKERS)
def test_relative_step_false_without_scale_parameter_warns_of_transformers(maker: str):
    with pytest.warns(UserWarning, match="scale_parameter") as caught:
        MAKERS[maker](lr=0.1, relative_step=False)
    assert [warning.filename for warning in caught] == [__file__]
    MAKERS[maker](lr=0.1, relative_step=False, scale_parameter=False)
    MAKERS[maker](lr=0.1, relative_step=False, scale_parameter=True)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    p = parameter(torch.zeros(40, 50))
    optimizer = Adafactor([p], lr=0.1)
    for bad in ({"lr": -1.0}, {"factor": lambda name, shape: 5}, {"weight_bits": 23}):
        with pytest.raises(ValueError, match=r"lr|factor|weight_bits"):
            optimizer.add_param_group({"params": [parameter(torch.zeros(2, 3))], **bad})
        assert [group["params"] for group in optimizer.param_groups] == [[p]]
        assert list(optimizer.state) == [p]
    p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize(
    ("lr", "relative", "scale"),
    list(product([None, 0.1, torch.tensor(0.1)], [None, True, False], [None, True, False])),
    ids=str,
)
def test_lr_decides_about_relative_step_and_scaling(lr: Any, relative: bool | None, scale: bool | None):
    if relative is False and (lr is None or scale is None):
        return  # refused, or warned of: see above
    optimizer = Adafactor([parameter(torch.zeros(2))], lr=lr, relative_step=relative, scale_parameter=scale)
    [group] = optimizer.param_groups
    assert group["relative_step"] is ((lr is None) if relative is None else relative)
    assert group["scale_parameter"] is ((lr is None) if scale is None else scale)


def test_groups_hold_plain_values():
    optimizer = Adafactor(
        [parameter(torch.zeros(40, 50))],
        beta1=0.9,
        momentum_dtype=torch.bfloat16,
        factor=lambda name, shape: ((), (1,), (0,)),
    )
    [group] = optimizer.state_dict()["param_groups"]

    def plain(value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    assert {name: value for name, value in group.items() if not plain(value)} == {}
    assert group["momentum_dtype"] == "bfloat16"
    assert group["factor"] == "[[[], [1], [0]]]"
