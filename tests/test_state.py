"""Checkpoints: our own, those of other packages, and what does not fit."""

import copy
import io
import pickle

import pytest
import torch
import transformers

from adafactor import Adafactor, compat, plan

SHAPES = [(), (7,), (40, 48), (3, 40, 48), (40, 6, 3, 3)]


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def train(optimizer, generator, steps=3):
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


def weights(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def clone_of(optimizer):
    return [torch.nn.Parameter(p) for p in weights(optimizer)]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def assert_float32(optimizer):
    for p in optimizer.state:
        expected = torch.float64 if p.dtype == torch.float64 else torch.float32
        assert {key: value.dtype for key, value in optimizer.state[p].items()} == {
            spec.name: torch.float32 if spec.name == "step" else expected for spec in optimizer._slots[p].plan.state
        }


MODES = {
    "paper": {},
    "momentum": {"lr": 1e-2, "beta1": 0.9, "weight_decay": 0.1},
    "fixed beta2": {"lr": 1e-2, "beta2": 0.99, "nesterov": True, "beta1": 0.9},
    "function": {"lr": 1e-2, "factor": lambda name, shape: ((), (1,), (0,)) if len(shape) == 2 else None},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_resuming_gives_the_same_bits_as_never_stopping(dtype, mode):
    generator = torch.Generator().manual_seed(1)
    straight = Adafactor(parameters(dtype), **mode)
    train(straight, generator)

    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = Adafactor(clone_of(straight), **mode)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_float32(resumed)

    train(straight, torch.Generator().manual_seed(2))
    train(resumed, torch.Generator().manual_seed(2))
    assert_equal(weights(resumed), weights(straight))
    assert resumed.param_groups[0]["lr"] == straight.param_groups[0]["lr"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_continues_like_the_original(copied):
    original = Adafactor(parameters(torch.bfloat16), beta1=0.9, momentum_dtype=torch.bfloat16)
    train(original, torch.Generator().manual_seed(1))
    twin = copied(original)
    for optimizer in (original, twin):
        train(optimizer, torch.Generator().manual_seed(2))
    assert_equal(weights(twin), weights(original))
    assert [row.state_bytes for row in twin.explain()] == [row.state_bytes for row in original.explain()]


def test_a_fresh_checkpoint_is_complete_and_plain():
    saved = Adafactor(parameters(), factor=lambda name, shape: None).state_dict()
    assert saved["state"].keys() == set(range(len(SHAPES)))

    def plain(value):
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    assert all(plain(value) for key, value in saved["param_groups"][0].items())


# Other packages


def transformers_optimizer(params, **arguments):
    return transformers.Adafactor(params, **arguments), compat.transformers(**arguments)


def torch_optimizer(params, **arguments):
    return torch.optim.Adafactor(params, **arguments), compat.torch(**arguments)


FOREIGN = {
    "transformers": (transformers_optimizer, {}),
    "transformers with momentum": (
        transformers_optimizer,
        {"lr": 1e-2, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1},
    ),
    "torch": (torch_optimizer, {"lr": 0.3, "weight_decay": 0.1}),
}


@pytest.mark.parametrize(("build", "arguments"), FOREIGN.values(), ids=FOREIGN)
def test_another_package_s_checkpoint_continues_exactly_where_it_left_off(build, arguments):
    theirs, translated = build(parameters(torch.float64), **arguments)
    train(theirs, torch.Generator().manual_seed(1))
    ours = Adafactor(clone_of(theirs), **translated)
    ours.load_state_dict(theirs.state_dict())
    assert_float32(ours)
    assert ours.param_groups[0]["updates"] == 3
    before = weights(ours)
    for optimizer in (ours, theirs):
        train(optimizer, torch.Generator().manual_seed(2))
    for p, q, start in zip(weights(ours), weights(theirs), before, strict=True):
        assert (p - q).abs().max() <= 1e-12 * (q - start).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("build", "arguments"), FOREIGN.values(), ids=FOREIGN)
def test_another_package_s_checkpoint_loads_into_a_16_bit_model_in_full_precision(build, arguments, dtype):
    theirs, translated = build(parameters(torch.float32), **arguments)
    train(theirs, torch.Generator().manual_seed(1))
    ours = Adafactor([torch.nn.Parameter(p.to(dtype)) for p in weights(theirs)], **translated, rounding="nearest")
    ours.load_state_dict(theirs.state_dict())
    assert_float32(ours)

    # The step from there is a float32 step, rounded once.
    exact = Adafactor([torch.nn.Parameter(p.float()) for p in weights(ours)], **translated)
    exact.load_state_dict(ours.state_dict() | {"param_groups": exact.state_dict()["param_groups"]})
    generator = torch.Generator().manual_seed(2)
    for p, q in zip(ours.state, exact.state, strict=True):
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        q.grad = p.grad.float()
    ours.step()
    exact.step()
    assert_equal(weights(ours), [p.to(dtype) for p in weights(exact)])


def test_loaded_groups_of_another_package_never_overwrite_our_hyperparameters():
    theirs, _ = transformers_optimizer(parameters(), lr=0.5, relative_step=False, clip_threshold=9.0, beta1=None)
    train(theirs, torch.Generator().manual_seed(1))
    ours = Adafactor(clone_of(theirs), **compat.transformers(lr=1e-3, relative_step=False))
    before = {key: value for key, value in ours.param_groups[0].items() if key not in ("params", "updates")}
    ours.load_state_dict(theirs.state_dict())
    assert {key: value for key, value in ours.param_groups[0].items() if key in before} == before


def test_the_lr_that_a_scheduler_had_reached_comes_with_the_checkpoint_of_another_package():
    theirs, _ = transformers_optimizer(parameters(), lr=0.5, relative_step=False)
    past = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.5)
    train(theirs, torch.Generator().manual_seed(1))
    past.step()
    saved = theirs.state_dict()
    ours = Adafactor(clone_of(theirs), **compat.transformers(lr=0.5, relative_step=False))
    schedule = torch.optim.lr_scheduler.ExponentialLR(ours, 0.5)
    ours.load_state_dict(saved)
    schedule.load_state_dict(past.state_dict())
    assert ours.param_groups[0]["lr"] == 0.25
    assert schedule.get_last_lr() == [0.25]
    schedule.step()
    assert ours.param_groups[0]["lr"] == 0.125

    relative = Adafactor(clone_of(theirs), **compat.transformers())
    torch.optim.lr_scheduler.ConstantLR(relative)
    relative.load_state_dict(saved)
    steps = max(int(state["step"]) for state in relative.state.values())
    assert relative.param_groups[0]["lr"] == relative.param_groups[0]["rho"] == min(1e-2, steps**-0.5)


def test_full_statistics_become_factored():
    # A gradient of rank one squared: its factored V is its full V, so both continue alike.
    start = torch.randn(40, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outer = torch.rand(40, 1, dtype=torch.float64) * torch.rand(1, 48, dtype=torch.float64) + 0.1
    outer = outer.sum(1, keepdim=True) * outer.sum(0, keepdim=True)
    saved = {
        "state": {0: {"step": 5, "exp_avg_sq": outer}},
        "param_groups": [{"params": [0], "eps_scale": 1e-3, "clip_threshold": 1.0, "min_dim_size_to_factor": 100}],
    }
    factored, full = (
        Adafactor([torch.nn.Parameter(start.clone())], lr=1e-2, factor=factor) for factor in ("auto", "none")
    )
    for optimizer in (factored, full):
        optimizer.load_state_dict(saved)
    [state] = factored.state.values()
    torch.testing.assert_close(state["exp_avg_sq_row"], outer.mean(1), rtol=1e-15, atol=0)
    torch.testing.assert_close(state["exp_avg_sq_col"], outer.mean(0), rtol=1e-15, atol=0)
    for optimizer in (factored, full):
        for p in optimizer.state:
            p.grad = outer.sqrt()
        optimizer.step()
    torch.testing.assert_close(weights(factored)[0], weights(full)[0], rtol=1e-13, atol=0)


def timm_groups(**group):
    return [{"params": [0], "clip_threshold": 1.0, "eps_scale": 1e-3, "min_dim_size_to_factor": 16, **group}]


def test_timm_layout():
    # timm factors convolutions over their first two axes and keeps the kernel positions.
    row, col = torch.rand(40, 3, 3), torch.rand(20, 3, 3)
    saved = {"state": {0: {"step": 4, "RMS": torch.tensor(1.0), "exp_avg_sq_row": row, "exp_avg_sq_col": col}}}
    optimizer = Adafactor([torch.nn.Parameter(torch.randn(40, 20, 3, 3))], **compat.timm())
    optimizer.load_state_dict(saved | {"param_groups": timm_groups()})
    [state] = optimizer.state.values()
    assert_equal([state["exp_avg_sq_row"], state["exp_avg_sq_col"]], [row, col])
    assert state["step"] == 4
    other = Adafactor([torch.nn.Parameter(torch.randn(40, 20, 3, 3))])
    with pytest.raises(ValueError, match=r"'param 0'.*compat\.timm\("):
        other.load_state_dict(saved | {"param_groups": timm_groups()})


def test_timm_big_vision_layout():
    # It keeps the averaged axes with size 1, and names the larger axis' average "r".
    row, col, momentum = torch.rand(20, 1), torch.rand(1, 40), torch.rand(20, 40)
    state = {"step": torch.tensor(4.0), "exp_avg_sq_r": row, "exp_avg_sq_c": col, "exp_avg": momentum}
    group = {"params": [0], "clipping_threshold": None, "beta2_cap": 0.999, "min_dim_size_to_factor": 16}
    saved = {"state": {0: state}, "param_groups": [group]}
    optimizer = Adafactor([torch.nn.Parameter(torch.randn(20, 40))], **compat.timm_bv(1e-3))
    optimizer.load_state_dict(saved)
    [loaded] = optimizer.state.values()
    assert_equal([loaded["exp_avg_sq_row"], loaded["exp_avg_sq_col"]], [row[:, 0], col[0]])
    assert loaded["exp_avg"].dtype == torch.bfloat16
    scaled = Adafactor([torch.nn.Parameter(torch.randn(20, 40))], **compat.timm_bv(1e-3) | {"momentum_mode": "scaled"})
    with pytest.raises(ValueError, match="'unscaled', not 'scaled'"):
        scaled.load_state_dict(saved)


# What does not fit


def saved_with(shapes=SHAPES, **arguments):
    optimizer = Adafactor([torch.nn.Parameter(torch.randn(s)) for s in shapes], **arguments)
    train(optimizer, torch.Generator().manual_seed(1), steps=1)
    return optimizer.state_dict()


def without(saved, *path):
    saved = copy.deepcopy(saved)
    inner = saved
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return saved


REFUSED = {
    "a statistic is missing": (
        without(saved_with(), "state", 2, "exp_avg_sq_col"),
        "no 'exp_avg_sq_col' for.*'param 2'",
    ),
    "a parameter is missing": (without(saved_with(), "state", 3), "no state for parameter 3"),
    "another shape": (saved_with([*SHAPES[:2], (41, 48), *SHAPES[3:]]), r"\(41,\) in the checkpoint, not \(40,\)"),
    "fewer parameters": (saved_with(SHAPES[:3]), "match the size"),
    "another optimizer": (torch.optim.SGD(parameters(), lr=1.0, momentum=0.9).state_dict(), "'momentum'"),
}


@pytest.mark.parametrize("name", [name for name, (_, message) in REFUSED.items() if message])
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_lost(name):
    saved, message = REFUSED[name]
    optimizer = Adafactor(parameters(), lr=1e-2)
    train(optimizer, torch.Generator().manual_seed(1))
    twin = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    for either in (optimizer, twin):
        train(either, torch.Generator().manual_seed(2))
    assert_equal(weights(optimizer), weights(twin))


def test_momentum_is_neither_invented_nor_dropped():
    with_momentum, _ = transformers_optimizer(parameters(), lr=1.0, relative_step=False, beta1=0.9)
    without_momentum, _ = transformers_optimizer(parameters())
    for theirs in (with_momentum, without_momentum):
        train(theirs, torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="the checkpoint has momentum for parameter 'param 0'"):
        Adafactor(parameters(), **compat.transformers()).load_state_dict(with_momentum.state_dict())
    with pytest.raises(ValueError, match=r"this optimizer has momentum for .* build the optimizer with beta1=None"):
        Adafactor(parameters(), **compat.transformers(beta1=0.9)).load_state_dict(without_momentum.state_dict())


def test_a_view_that_others_do_not_have_is_an_error_that_names_the_compat_call():
    theirs, _ = transformers_optimizer(parameters())
    train(theirs, torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"'param 4'.*adafactor\.compat\.transformers\("):
        Adafactor(parameters()).load_state_dict(theirs.state_dict())


def test_load_state_dict_runs_hooks_on_the_real_thing():
    optimizer, seen = Adafactor(parameters()), []
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: seen.append(type(saved["state"][2]["exp_avg_sq_row"])))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(type(o.state[o.param_groups[0]["params"][2]])))
    optimizer.load_state_dict(state_dict=saved_with())
    assert seen == [torch.Tensor, dict]


def test_our_checkpoint_brings_its_hyperparameters_and_its_plan():
    saved = saved_with(beta1=0.5, lr=0.25, factor="none")
    optimizer = Adafactor(parameters(), lr=1.0)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["beta1"], group["factor"]) == (0.25, 0.5, "none")
    expected = plan(parameters(), beta1=0.5, lr=0.25, factor="none")
    assert [row.state_bytes for row in optimizer.explain()] == [tensor.nbytes for tensor in expected]


# Other writers of checkpoints


@pytest.mark.parametrize(
    ("full", "flat"),  # torch itself cannot load a full and flattened state
    [(False, False), (True, False), (False, True)],
    ids=["nested", "full", "flattened"],
)
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, {}), (torch.bfloat16, {"weight_bits": 24, "momentum_dtype": "int8"})],
    ids=["float32", "few bits"],
)
def test_a_partly_frozen_model_survives_distributed_checkpoints(full, flat, dtype, kept):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)).to(dtype)
    model[0].weight.requires_grad_(False)
    views = {1: None, 2: ((), (0,), (1,))}
    optimizer = Adafactor(model.parameters(), lr=1e-2, beta1=0.9, factor=lambda name, shape: views[len(shape)], **kept)
    generator = torch.Generator().manual_seed(0)

    def train_once():
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()

    train_once()
    options = StateDictOptions(full_state_dict=full, flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights_then = copy.deepcopy(model.state_dict())
    train_once()
    expected = copy.deepcopy(model.state_dict())

    generator.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            torch.randn(p.shape, generator=generator)
    model.load_state_dict(weights_then)
    optimizer = Adafactor(model.parameters(), lr=1.0, beta1=0.5, factor=lambda name, shape: views[len(shape)], **kept)
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    train_once()
    assert_equal(model.state_dict().values(), expected.values())


def test_a_checkpoint_is_complete_whatever_happened_to_the_parameters():
    params = parameters()
    optimizer = Adafactor(params, lr=1e-2)
    train(optimizer, torch.Generator().manual_seed(1))
    del optimizer.state[params[0]]
    optimizer.param_groups[0]["params"][2] = torch.nn.Parameter(torch.randn(40, 48))
    saved = optimizer.state_dict()
    assert saved["state"].keys() == set(range(len(SHAPES)))
    Adafactor(parameters()).load_state_dict(saved)


def test_a_checkpoint_of_an_optimizer_that_never_stepped_starts_anew():
    theirs, translated = transformers_optimizer(parameters())
    ours = Adafactor(parameters(), **translated)
    train(ours, torch.Generator().manual_seed(1))
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["updates"] == 0
    assert all(int(state["step"]) == 0 for state in ours.state.values())


def test_a_checkpoint_of_another_model_is_refused_even_where_the_sizes_agree():
    theirs, translated = transformers_optimizer([torch.nn.Parameter(torch.randn(24, 20, 3, 3))])
    train(theirs, torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="'exp_avg_sq_row' of parameter 'param 0' has shape"):
        Adafactor([torch.nn.Parameter(torch.randn(20, 24, 3, 3))], **translated).load_state_dict(theirs.state_dict())


def test_what_is_not_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="'state' and 'param_groups'"):
        Adafactor(parameters()).load_state_dict({})


def test_pickle_with_a_factor_function_keeps_the_views_and_asks_for_new_ones():
    optimizer = Adafactor(parameters(), lr=1e-2, factor=lambda name, shape: None)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert [row.view for row in twin.explain()] == ["full"] * len(SHAPES)
    with pytest.raises(ValueError, match=r"factor must be one of.*'a function that was not saved'"):
        twin.add_param_group({"params": parameters()})
    twin.add_param_group({"params": parameters(), "factor": "auto"})


def test_what_others_keep_in_the_state_stays():
    params = parameters()
    optimizer = Adafactor(params, lr=1e-2)
    optimizer.state[params[0]]["slow"] = torch.ones(3)
    optimizer.state["lookahead"] = 7
    train(optimizer, torch.Generator().manual_seed(1))
    optimizer.diagnostics()
    twin = Adafactor(parameters(), lr=1e-2)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.state["lookahead"] == 7
    assert torch.equal(twin.state[twin.param_groups[0]["params"][0]]["slow"], torch.ones(3))
