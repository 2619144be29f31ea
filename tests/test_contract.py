"""The torch.optim contract: closures, groups, schedulers, hooks, parameters that change under the optimizer."""

import copy
import warnings

import numpy as np
import pytest
import torch
import transformers
from torch.optim import lr_scheduler
from transformers.optimization import AdafactorSchedule, get_cosine_schedule_with_warmup

import adafactor
from adafactor import Adafactor
from adafactor.compat import TransformersAdafactor


def parameter(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def give_gradient(p, seed=1):
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)


def stepped(optimizer, *params, steps=1):
    for seed in range(steps):
        for p in params:
            give_gradient(p, seed)
        optimizer.step()
    return [p.detach().clone() for p in params]


def test_a_closure_may_call_backward():
    p = parameter(40, 40)
    optimizer = Adafactor([p], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


def test_maximize_ascends_by_the_same_step_and_leaves_the_gradient_alone():
    up, down = (torch.nn.Parameter(torch.zeros(40, 40)) for _ in range(2))
    stepped(Adafactor([up], lr=1e-2, maximize=True, beta1=0.9), up, steps=2)
    left = up.grad
    give_gradient(up, 1)
    assert torch.equal(up.grad, left)
    stepped(Adafactor([down], lr=1e-2, beta1=0.9), down, steps=2)
    assert torch.equal(up, -down)


def test_every_hyperparameter_works_per_group():
    alone = {
        "rate": {"lr": 0.1, "weight_decay": 0.1},
        "paper": {"lr": None, "decay_rate": -0.5, "clip_threshold": 0.5},
        "momentum": {"lr": 0.01, "beta1": 0.9, "nesterov": True, "eps": (1e-20, 0.5), "scale_parameter": True},
        "structure": {"lr": 0.01, "factor": "none", "beta2": 0.9, "beta1": 0.5, "momentum_dtype": torch.bfloat16},
    }
    alone["structure"]["rounding"] = "nearest"  # the random bits are the ordinal's
    together = [parameter(40, 40, seed=i) for i in range(len(alone))]
    groups = [{"params": [p], **arguments} for p, arguments in zip(together, alone.values(), strict=True)]
    stepped(Adafactor(groups, lr=123.0), *together, steps=3)
    for i, (p, arguments) in enumerate(zip(together, alone.values(), strict=True)):
        q = parameter(40, 40, seed=i)
        stepped(Adafactor([q], **arguments), q, steps=3)
        assert torch.equal(p, q)


def test_a_group_added_later_starts_at_its_own_step_one():
    first, later, alone = parameter(40, 40), parameter(8, seed=5), parameter(8, seed=5)
    optimizer = Adafactor([first], lr=1e-2)
    stepped(optimizer, first, steps=3)
    optimizer.add_param_group({"params": [later], "lr": 0.5})
    stepped(optimizer, first, later)
    stepped(Adafactor([alone], lr=0.5), alone)
    assert torch.equal(later, alone)
    assert [int(optimizer.state[p]["step"]) for p in (first, later)] == [4, 1]


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be a number >= 0.0, got -1.0"),
        ({"factor": lambda name, shape: 3}, ValueError, "factor gave 3 for parameter 'param 1'"),
        ({"weight_bits": 23}, ValueError, "weight_bits must be one of None, 24, 32, got 23"),
    ],
    ids=["range", "factor", "later"],
)
def test_a_group_that_is_refused_changes_nothing(group, error, message):
    p = parameter(40, 40)
    optimizer = Adafactor([p], lr=1e-2)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter(4, 4)], **group})
    assert len(optimizer.param_groups) == 1
    assert list(optimizer.state) == [p]
    stepped(optimizer, p)
    optimizer.state_dict()


def test_user_dictionaries_are_not_written_to():
    group = {"params": [parameter(4)]}
    Adafactor([group], lr=1.0)
    assert group.keys() == {"params"}


# Learning rates


def test_a_tensor_lr_is_the_same_as_a_number():
    p, q = parameter(40, 40), parameter(40, 40)
    lr = torch.tensor(0.0625)
    tensor, number = Adafactor([p], lr=lr, weight_decay=0.5), Adafactor([q], lr=0.0625, weight_decay=0.5)
    stepped(tensor, p)
    stepped(number, q)
    lr.mul_(0.5)
    number.param_groups[0]["lr"] *= 0.5
    stepped(tensor, p)
    stepped(number, q)
    assert torch.equal(p, q)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "transformers": lambda o: get_cosine_schedule_with_warmup(o, 2, 10),
}


@pytest.mark.parametrize("build", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_drive_the_step(build):
    # Without weight decay and momentum, and with V fixed by a constant gradient, the displacement is lr times U.
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = Adafactor([p], lr=0.25)
    scheduler = build(optimizer)
    for _ in range(5):
        before, lr = p.detach().clone(), optimizer.param_groups[0]["lr"]
        p.grad = torch.ones_like(p)
        optimizer.step()
        torch.testing.assert_close(before - p, torch.full_like(p, lr), rtol=1e-12, atol=1e-15)
        scheduler.step()


def test_reduce_on_plateau_and_its_checkpoint():
    p = parameter(4)
    optimizer = Adafactor([p], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for loss in (1.0, 1.0, 1.0):
        stepped(optimizer, p)
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_without_an_lr_the_group_shows_the_relative_step():
    p = parameter(4)
    optimizer = Adafactor([p])
    assert optimizer.param_groups[0]["lr"] == 1e-2
    stepped(optimizer, p, steps=3)
    assert optimizer.param_groups[0]["lr"] == min(1e-2, 3**-0.5)
    optimizer.state[p]["step"].fill_(40_000)
    warm = Adafactor([parameter(4)], warmup_init=True)
    assert warm.param_groups[0]["lr"] == 1e-6
    [q] = warm.param_groups[0]["params"]
    stepped(warm, q, steps=2)
    assert warm.param_groups[0]["lr"] == 2e-6


def test_a_schedule_on_the_relative_step_warns_once_and_names_the_fix():
    p = parameter(4)
    optimizer = Adafactor([p])
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    with pytest.warns(UserWarning, match="built with lr=None.*build the optimizer with an lr") as caught:
        stepped(optimizer, p)
    assert caught[0].filename == __file__
    scheduler.step()
    stepped(optimizer, p)  # warnings are errors here: a second one would raise


def test_adafactor_schedule_reports_the_relative_step_without_a_warning():
    p = parameter(4)
    optimizer = Adafactor([p])
    scheduler = AdafactorSchedule(optimizer)
    assert scheduler.get_lr() == [0.0]
    for t in (1, 2, 3):
        stepped(optimizer, p)
        scheduler.step()
        assert scheduler.get_last_lr() == [min(1e-2, t**-0.5)]
        optimizer.zero_grad()
        scheduler.step()


def test_relative_step_false_without_scale_parameter_warns_where_it_was_written():
    with pytest.warns(UserWarning, match="scale_parameter") as caught:
        Adafactor([parameter(4)], lr=1e-3, relative_step=False)
    assert caught[0].filename == __file__
    Adafactor([parameter(4)], lr=1e-3, relative_step=False, scale_parameter=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relative_step": False}, "give an lr"),
        ({"lr": 1e-3, "warmup_init": True}, "relative_step=True"),
        ({"beta2": 0.9, "decay_rate": -0.5}, "give one of them"),
        ({"beta2": 0.9, "beta2_cap": 0.99}, "give one of them"),
        ({"decay_rate": 0.8}, "0.8 in other packages is -0.8"),
        ({"backend": "cuda"}, "'auto', 'reference'"),
        ({"lr": torch.ones(2)}, "one element"),
        ({"lr": "1e-3"}, "lr must be a number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_contradictions_are_refused_with_the_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        Adafactor([parameter(4)], **arguments)


def test_modifiers_of_what_is_off_are_idle():
    p, q = parameter(40, 40), parameter(40, 40)
    idle = {
        "nesterov": True,
        "momentum_mode": "unscaled",
        "momentum_dtype": torch.int8,
        "weight_decay_mode": "independent",
    }
    stepped(Adafactor([p], lr=1e-2, eps=(1e-30, 7.0), **idle), p, steps=3)
    stepped(Adafactor([q], lr=1e-2), q, steps=3)
    assert torch.equal(p, q)


# Gradients and parameters it does not take


def test_a_complex_parameter_is_refused_by_name():
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'spectrum' has dtype complex64.*view_as_real"):
        Adafactor([("spectrum", p)])


def test_an_integer_parameter_is_refused_by_name():
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ValueError, match="'param 0' has dtype int64"):
        Adafactor([p])


def test_frozen_parameters_and_missing_gradients_are_left_alone():
    frozen, unused, used = parameter(4), parameter(4), parameter(4)
    frozen.requires_grad_(False)
    optimizer = Adafactor([frozen, unused, used], lr=1.0, weight_decay=0.5)
    before = [p.detach().clone() for p in (frozen, unused)]
    stepped(optimizer, used)
    assert frozen not in optimizer.state
    assert [int(optimizer.state[p]["step"]) for p in (unused, used)] == [0, 1]
    assert all(torch.equal(p, start) for p, start in zip((frozen, unused), before, strict=True))


# Parameters that change under the optimizer


def test_a_swapped_parameter_starts_anew_and_the_old_one_is_forgotten():
    old, new, alone = parameter(40, 40), parameter(8, seed=3), parameter(8, seed=3)
    optimizer = Adafactor([old], lr=1e-2, beta1=0.9)
    stepped(optimizer, old)
    optimizer.param_groups[0]["params"][0] = new
    assert optimizer.state_dict()["state"].keys() <= {0}
    stepped(optimizer, new)
    stepped(Adafactor([alone], lr=1e-2, beta1=0.9), alone)
    assert torch.equal(new, alone)
    assert list(optimizer.state) == [new]


def test_swapped_tensors_keep_working():
    p, q = parameter(40, 40), parameter(8)
    optimizer = Adafactor([p], lr=1e-2)
    stepped(optimizer, p)
    torch.utils.swap_tensors(p, q)
    p.grad = torch.ones(8)
    with pytest.raises(ValueError, match=r"'param 0' now has shape \(8,\).*del optimizer\.state"):
        optimizer.step()
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].shape == (8,)


def test_a_model_cast_after_construction_keeps_its_statistics():
    model = torch.nn.Linear(40, 40)
    optimizer = Adafactor(model.parameters(), lr=1e-2, beta1=0.9)
    stepped(optimizer, *model.parameters(), steps=2)
    kept = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    model.bfloat16()
    for p in model.parameters():
        give_gradient(p)
    optimizer._rebuild()
    for p, state in kept.items():
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
    optimizer.step()
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert all(int(optimizer.state[p]["step"]) == 3 for p in model.parameters())
    model.double()
    stepped(optimizer, *model.parameters())
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float64 for p in model.parameters())


def test_a_meta_model_gets_its_state_at_first_use():
    with torch.device("meta"):
        model = torch.nn.Linear(40, 40)
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    assert not optimizer.state
    real = torch.nn.Linear(40, 40)
    for p, q in zip(model.parameters(), real.parameters(), strict=True):
        torch.utils.swap_tensors(p, q)
    stepped(optimizer, *model.parameters())
    assert [int(state["step"]) for state in optimizer.state.values()] == [1, 1]
    assert optimizer.explain().state_bytes == sum(tensor.nbytes for tensor in adafactor.plan(model, lr=1e-2))


def test_lazy_modules_get_their_state_at_first_use():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: "Lazy modules are a new feature"
        model = torch.nn.LazyLinear(40)
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    model(torch.ones(2, 40)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lazy = torch.nn.LazyLinear(40)
    with pytest.raises(ValueError, match="no shape yet"):
        Adafactor(lazy.parameters(), factor=lambda name, shape: None)


def test_momentum_switched_on_later_gets_its_state():
    p = parameter(40, 40)
    optimizer = Adafactor([p], lr=1e-2)
    stepped(optimizer, p)
    optimizer.param_groups[0]["beta1"] = 0.9
    stepped(optimizer, p)
    assert optimizer.state[p]["exp_avg"].shape == p.shape
    assert int(optimizer.state[p]["step"]) == 2
    optimizer.param_groups[0]["beta1"] = 2.0
    with pytest.raises(ValueError, match="beta1"):
        stepped(optimizer, p)


def test_deepcopy_of_model_and_optimizer_stays_linked():
    model = torch.nn.Linear(40, 40)
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin_model, twin)):
        torch.manual_seed(0)
        m(torch.randn(4, 40)).square().sum().backward()
        o.step()
    assert torch.equal(model.weight, twin_model.weight)
    assert model.weight is not twin_model.weight


# Around the step


def test_step_hooks_and_zero_grad():
    p, seen = parameter(4), []
    optimizer = Adafactor([p], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    stepped(optimizer, p)
    optimizer.zero_grad()
    assert seen == ["pre", "post"]
    assert p.grad is None


def test_grad_scaler_skips_overflow_and_unscales():
    p, q = parameter(40, 40), parameter(40, 40)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = Adafactor([p], lr=1e-2)
    scaler.scale(p.square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    reference = Adafactor([q], lr=1e-2)
    q.square().sum().backward()
    reference.step()
    assert torch.equal(p, q)
    p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert torch.equal(p, q)


def test_writes_are_seen_by_autograd():
    p = parameter(40, 40)
    optimizer = Adafactor([p], lr=1e-2)
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_training_step_does_not_recompile_when_lr_changes():
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    model = torch.nn.Linear(40, 40)
    optimizer = Adafactor(model.parameters(), lr=1e-2)

    @torch.compile(backend=backend)
    def train():
        model(torch.ones(2, 40)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    train()
    count = len(compiled)
    for lr in (3e-3, 2e-3, 1e-3):
        optimizer.param_groups[0]["lr"] = lr
        train()
    assert len(compiled) == count
    assert int(optimizer.state[model.weight]["step"]) == 5


# What users ask


def test_explain_and_diagnostics():
    linear = torch.nn.Linear(64, 32)
    model = torch.nn.Sequential(linear, torch.nn.Conv2d(64, 32, 3))
    optimizer = Adafactor(model.named_parameters(), lr=1e-2, clip_threshold=0.5)
    rows = {row.name: row for row in optimizer.explain()}
    assert list(rows) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert rows["0.weight"][2:6] == ("float32", "32 x 64", True, 4 * (32 + 64) + 4)
    assert rows["1.weight"].view == "32 x 576"
    assert rows["0.bias"].view == "full"
    assert "32 x 576" in str(optimizer.explain())

    for p in model.parameters():
        give_gradient(p)
    linear.bias.grad = torch.full((32,), float("nan"))
    optimizer.step()
    seen = optimizer.diagnostics()
    assert (seen["0.bias"].updates, seen["0.bias"].skipped) == (0, 1)
    weight = seen["0.weight"]
    assert (weight.updates, weight.skipped, weight.clipped) == (1, 0, 1.0)
    assert weight.step_size == pytest.approx((1e-2,))
    gradient = torch.as_tensor(linear.weight.grad).double()
    R, C = gradient.square().mean(1, keepdim=True), gradient.square().mean(0, keepdim=True)
    U = gradient / (R * C / R.mean()).sqrt()
    assert weight.update_rms == pytest.approx((U.square().mean().sqrt().item(),), rel=1e-6)


def test_diagnostics_of_parameters_with_the_same_name_are_kept_apart():
    a, b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    optimizer = Adafactor([{"params": a.named_parameters()}, {"params": b.named_parameters()}], lr=1.0)
    assert list(optimizer.diagnostics()) == ["weight", "bias", "weight#2", "bias#2"]


def test_memory_report_is_the_plan_added_up():
    model = torch.nn.Sequential(torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 64)).bfloat16()
    report = adafactor.memory.report(model, lr=1e-3, beta1=0.9, momentum_dtype=torch.bfloat16)
    ours, adamw = report.rows[:2]
    optimizer = Adafactor(model.parameters(), lr=1e-3, beta1=0.9, momentum_dtype=torch.bfloat16)
    assert ours.state == optimizer.explain().state_bytes
    assert ours.weights == ours.gradients == 2 * report.parameters
    assert report.parameters == 1000 * 64 + 64 * 64 + 64
    assert ours.total == ours.weights + ours.gradients + ours.state + ours.temporaries
    torch_adamw = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch_adamw.step()
    measured = sum(value.nbytes for state in torch_adamw.state.values() for value in state.values())
    assert adamw.state == measured
    assert "bytes/parameter" in str(report)


def test_peak_allocated_counts_bytes():
    def run():
        a = torch.zeros(1000, 1000)
        b = torch.zeros(500, 1000)
        del a
        return b, torch.zeros(100, 1000)

    assert 6_000_000 <= adafactor.memory.peak_allocated(run) < 6_001_000


def test_peak_allocated_leaves_out_releases_of_what_was_there_before():
    """Of these the profiler has the sizes of tensors that an earlier profile saw, and that have ended since."""
    kept: list[torch.Tensor] = []
    adafactor.memory.peak_allocated(lambda: kept.extend(torch.zeros(100) for _ in range(100)))
    kept.clear()
    kept.extend(torch.zeros(100) for _ in range(200))

    def run():
        kept.clear()
        return torch.zeros(1000)

    assert adafactor.memory.peak_allocated(run) == 4000


def test_numpy_numbers_are_numbers_and_are_stored_plain():
    p, q = parameter(40, 40), parameter(40, 40)
    given = Adafactor([p], lr=np.float32(0.5), beta1=np.float64(0.5), seed=np.int64(3), nesterov=np.bool_(True))
    stepped(given, p)
    stepped(Adafactor([q], lr=0.5, beta1=0.5, seed=3, nesterov=True), q)
    assert torch.equal(p, q)
    assert {type(given.param_groups[0][name]) for name in ("lr", "beta1", "seed", "nesterov")} == {float, int, bool}
    given.param_groups[0]["lr"] = np.float32(0.25)
    stepped(given, p)


def test_switching_the_relative_step_off_without_an_lr_is_refused_by_name():
    p = parameter(4)
    optimizer = Adafactor([p])
    optimizer.param_groups[0]["relative_step"] = False
    with pytest.raises(ValueError, match="relative_step=False in a group that was built otherwise"):
        stepped(optimizer, p)


def test_backend_belongs_to_the_optimizer():
    with pytest.raises(ValueError, match="backend='reference' belongs to the optimizer"):
        Adafactor([{"params": [parameter(4)], "backend": "reference"}])


def test_parameters_that_share_memory_are_refused():
    p = parameter(40, 40)
    with pytest.raises(ValueError, match="'b' shares its memory with 'a'"):
        Adafactor([("a", p), ("b", torch.nn.Parameter(p.data))])


def test_an_optimizer_built_in_inference_mode_steps():
    p = parameter(40, 40)
    with torch.inference_mode():
        optimizer = Adafactor([p], lr=1e-2)
    stepped(optimizer, p)


def test_counts_do_not_depend_on_the_default_dtype():
    p = parameter(4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = Adafactor([p], lr=1e-6)
        stepped(optimizer, p, steps=300)
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.diagnostics()["param 0"].updates == 300


def test_diagnostics_keep_the_last_update_through_a_skipped_gradient():
    p = parameter(4)
    optimizer = Adafactor([p], lr=1e-2)
    stepped(optimizer, p)
    before = optimizer.diagnostics()["param 0"]
    p.grad = torch.full((4,), float("nan"))
    optimizer.step()
    assert optimizer.diagnostics()["param 0"] == before._replace(skipped=1)


def test_sums_that_overflow_skip_the_step_as_a_whole():
    # One entry alone in its row and column, 1e19 times smaller than the rest: RMS(U)^2 overflows float32.
    gradient = torch.full((40, 40), 1e18)
    gradient[0], gradient[:, 0] = 0.0, 0.0
    gradient[0, 0] = 0.1
    p = parameter(40, 40)
    optimizer = Adafactor([p], lr=1e-2)
    start = p.detach().clone()
    p.grad = gradient
    optimizer.step()
    assert optimizer.diagnostics()["param 0"][:2] == (0, 1)
    assert torch.equal(p, start)
    assert int(optimizer.state[p]["step"]) == 0


def test_a_group_lr_that_transformers_ignores_is_ignored_aloud():
    p, q = parameter(4), parameter(4)
    with pytest.warns(UserWarning, match="ignored, as transformers does"):
        ours = TransformersAdafactor([{"params": [p], "lr": 1e-3}])
    theirs = transformers.Adafactor([{"params": [q], "lr": 1e-3}])
    for _ in range(2):
        p.grad = q.grad = torch.ones(4)
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
