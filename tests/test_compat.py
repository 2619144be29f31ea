"""Against the installed packages themselves: same arguments, same weights; and what has no counterpart, by name."""

import inspect

import pytest
import torch
import transformers
from transformers.optimization import AdafactorSchedule

from adafactor import Adafactor, compat
from adafactor.compat import TransformersAdafactor

SHAPES = [(), (7,), (20, 24), (64, 48), (1, 9), (3, 20, 24), (12, 8, 3, 3), (0, 4)]


def twins(dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    ours = [
        torch.nn.Parameter(scale * torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES
    ]
    return ours, [torch.nn.Parameter(p.detach().clone()) for p in ours]


def give_gradients(generator, *models, scale=1.0):
    for params in zip(*models, strict=True):
        gradient = torch.randn(params[0].shape, generator=generator, dtype=torch.float64) * scale
        for p in params:
            p.grad = gradient.to(p.dtype)


def assert_same(ours, theirs, starts, tolerance=1e-12):
    for p, q, start in zip(ours, theirs, starts, strict=True):
        if p.numel():
            displacement = (q - start).abs().max()
            assert displacement > 0
            assert (p - q).abs().max() <= tolerance * displacement, tuple(p.shape)


TRANSFORMERS = {
    "documented recipe without relative step": {"lr": 1e-3, "scale_parameter": False, "relative_step": False},
    "documented recipe with warm-up": {"scale_parameter": True, "relative_step": True, "warmup_init": True, "lr": None},
    "defaults": {},
    "external lr, scaled": {"lr": 0.3, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1},
    "all": {
        "lr": 0.05,
        "eps": (1e-20, 1e-2),
        "clip_threshold": 0.5,
        "decay_rate": -0.6,
        "beta1": 0.8,
        "weight_decay": 0.2,
        "scale_parameter": False,
        "relative_step": False,
    },
}


@pytest.mark.parametrize("arguments", TRANSFORMERS.values(), ids=TRANSFORMERS)
@pytest.mark.parametrize("schedule", [False, True], ids=["plain", "AdafactorSchedule"])
def test_changing_the_import_of_transformers_is_enough(arguments, schedule):
    # At |p| ~ 1e-4 the floor eps2 of RMS(p) acts on some tensors and not on others.
    ours, theirs = twins(scale=1e-3)
    starts = [p.detach().clone() for p in ours]
    a, b = TransformersAdafactor(ours, **arguments), transformers.Adafactor(theirs, **arguments)
    schedules = [AdafactorSchedule(optimizer) for optimizer in (a, b)] if schedule and not arguments.get("lr") else []
    generator = torch.Generator().manual_seed(2)
    for _ in range(12):
        give_gradients(generator, ours, theirs)
        for optimizer in (a, b):
            optimizer.step()
        for scheduler in schedules:
            scheduler.step()
        for optimizer in (a, b):
            optimizer.zero_grad()
    assert_same(ours, theirs, starts)


def test_signature_is_that_of_transformers():
    ours, theirs = inspect.signature(TransformersAdafactor), inspect.signature(transformers.Adafactor)
    assert [(p.name, p.default) for p in ours.parameters.values() if p.kind != p.VAR_KEYWORD] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]
    translated = inspect.signature(compat.transformers)
    assert [(p.name, p.default) for p in translated.parameters.values()] == [
        (p.name, p.default) for p in list(theirs.parameters.values())[1:]
    ]


def test_arguments_of_ours_by_name_win():
    ours, _ = twins(torch.bfloat16)
    chosen = {"weight_bits": 24, "rounding": "nearest", "seed": 7, "momentum_dtype": "int8", "factor": "auto"}
    chosen |= {"min_dim_size_to_factor": 16, "rms_scope": "matrix", "weight_decay_mode": "lr", "beta2_cap": 0.99}
    optimizer = TransformersAdafactor(ours, lr=1e-3, relative_step=False, beta1=0.9, **chosen, step_in_backward=2)
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in chosen} == chosen
    assert (group["lr"], group["scale_parameter"], group["eps"]) == (1e-3, True, (1e-30, 1e-3))
    assert optimizer._in_backward is not None
    assert optimizer._in_backward.accumulation_steps == 2
    optimizer._in_backward.remove()
    with pytest.raises(TypeError, match="unexpected keyword argument 'fused'"):
        TransformersAdafactor(ours, fused=True)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"lr": 0.9}, {"lr": 0.3, "weight_decay": 0.1, "d": 2.0, "beta2_decay": -1.0}, {"lr": 0.05, "maximize": True}],
    ids=repr,
)
def test_torch_optim_while_its_clamps_are_idle(arguments):
    ours, theirs = twins()
    ours, theirs = ours[:-1], theirs[:-1]  # torch.optim.Adafactor divides by zero on empty tensors
    starts = [p.detach().clone() for p in ours]
    a, b = Adafactor(ours, **compat.torch(**arguments)), torch.optim.Adafactor(theirs, **arguments)
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):  # lr=0.9 exceeds 1/sqrt(t) from the second step on
        give_gradients(generator, ours, theirs)
        a.step()
        b.step()
    assert_same(ours, theirs, starts)


def test_torch_signature_is_covered():
    theirs = inspect.signature(torch.optim.Adafactor).parameters
    ours = inspect.signature(compat.torch).parameters
    assert [(name, p.default) for name, p in ours.items()] == [
        (n, p.default) for n, p in theirs.items() if n != "params"
    ]


REFUSED = [
    (compat.transformers, {"lr": 1e-3}, "relative_step=False"),
    (compat.transformers, {"lr": 1e-3, "relative_step": False, "warmup_init": True}, "warmup_init"),
    (compat.transformers, {"relative_step": False}, "needs an lr"),
    (compat.timm, {"caution": True}, "caution"),
    (compat.timm, {"lr": 1e-3, "warmup_init": True}, "warmup_init"),
    (compat.timm_bv, {"decay_offset": 3}, "decay_offset"),
    (compat.timm_bv, {"corrected_weight_decay": True}, "corrected_weight_decay"),
    (compat.optax, {"decay_offset": 3}, "decay_offset"),
    (compat.optax, {"weight_decay_mask": {"a": True}}, "weight_decay_mask"),
    (compat.optax, {"learning_rate": lambda count: 1e-3}, "schedule"),
    (compat.pytorch_optimizer, {"ams_bound": True}, "ams_bound"),
    (compat.pytorch_optimizer, {"weight_decay": 0.1, "weight_decouple": False}, "weight_decouple"),
]


@pytest.mark.parametrize(
    ("translate", "arguments", "name"), REFUSED, ids=lambda value: getattr(value, "__name__", None)
)
def test_what_has_no_counterpart_is_refused_by_name(translate, arguments, name):
    with pytest.raises(ValueError, match=name):
        translate(**arguments)


def test_minimum_sizes_are_translated():
    # timm asks for more than 16, its big_vision variant and optax for at least 16 and 128.
    from adafactor import plan

    def factored(shape, arguments):
        return plan({"w": shape}, **arguments)[0].factored

    assert [factored((n, 64), compat.timm()) for n in (16, 17)] == [False, True]
    assert [factored((n, 64), compat.timm_bv(1e-3)) for n in (15, 16)] == [False, True]
    assert [factored((n, 128), compat.optax()) for n in (127, 128)] == [False, True]
    assert factored((2, 1), compat.transformers())
    assert factored((2, 1), compat.torch())
    assert factored((2, 1), compat.pytorch_optimizer())


def test_relative_step_and_eps2_are_translated():
    assert compat.timm()["relative_step"] is True
    assert compat.timm(lr=0.1)["scale_parameter"] is False
    assert compat.timm(eps_scale=0.5)["eps"] == (1e-30, 0.5)
    assert compat.pytorch_optimizer(lr=1.0)["lr"] is None
    assert compat.pytorch_optimizer(relative_step=False, betas=(0.5, 0.7)) | {} == {
        **compat.pytorch_optimizer(),
        "lr": 1e-3,
        "relative_step": False,
        "beta1": 0.5,
        "beta2_cap": 0.7,
    }
    assert compat.optax()["lr"] == 1.0
