"""Ways in which other Adafactors go silently wrong. Each test is named after what it prevents."""

import copy
import sys

import pytest
import torch
from torch.nn.utils import clip_grad_norm_  # by name, before any handle exists
from torch.utils.checkpoint import checkpoint

from adafactor import Adafactor, compat, plan, recipes


def steps(optimizer, gradients):
    [p] = optimizer.param_groups[0]["params"]
    for gradient in gradients:
        p.grad = gradient.to(p.dtype)
        optimizer.step()
    return p.detach()


def gradients(shape, count, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for _ in range(count)]


# 16-bit weights


@pytest.mark.filterwarnings("ignore:rounding='nearest' loses updates")
def test_small_updates_are_not_swallowed_by_bf16_weights():
    # The spacing of bf16 at 0.02 is 1.2e-4; these steps are 1e-6 each.
    weights = torch.full((64, 64), 0.02, dtype=torch.bfloat16)
    moved = {}
    for rounding in ("stochastic", "nearest"):
        p = torch.nn.Parameter(weights.clone())
        steps(Adafactor([p], lr=1e-6, rounding=rounding), [torch.ones(64, 64)] * 200)
        moved[rounding] = (weights.double() - p.double()).mean().item()
    assert moved["nearest"] == 0.0
    # 200 independent roundings of 4,096 weights, each off by at most a spacing: six standard deviations of the mean.
    assert moved["stochastic"] == pytest.approx(200e-6, abs=6 * 0.5 * 1.3e-4 * (200 / 4096) ** 0.5)


def test_nearest_rounding_at_a_learning_rate_that_it_swallows_is_warned_of():
    p = torch.nn.Parameter(torch.full((40, 50), 0.02).bfloat16())
    with pytest.warns(UserWarning, match=r"rounding='nearest'.*lr=1e-05.*100 %.*rounding='stochastic'.*weight_bits=24"):
        Adafactor([p], lr=1e-5, rounding="nearest")
    for fine in ({"lr": 1e-2}, {"lr": 0.0}, {"lr": 1e-5, "weight_bits": 24}, {"lr": 0.1, "scale_parameter": True}):
        Adafactor([p], rounding="nearest", **fine)
    Adafactor([torch.nn.Parameter(p.detach().float())], lr=1e-5, rounding="nearest")


def test_weight_decay_is_not_lost_below_bf16_resolution():
    weights = torch.ones(64, 64, dtype=torch.bfloat16)
    p = torch.nn.Parameter(weights.clone())
    optimizer = Adafactor([p], lr=1e-3, weight_decay=0.1)
    steps(optimizer, [torch.zeros(64, 64)] * 100)
    expected = (1 - 1e-4) ** 100
    assert p.double().mean().item() == pytest.approx(expected, abs=6 * 0.5 * 2**-8 * (100 / 4096) ** 0.5)


@pytest.mark.parametrize("path", ["plain", "momentum", "full", "weight decay", "stack"])
def test_every_path_of_the_step_rounds_stochastically(path):
    shape = {"full": (4096,), "stack": (4, 32, 32)}.get(path, (64, 64))
    arguments = {"momentum": {"beta1": 0.5}, "weight decay": {"weight_decay": 1e-9}}.get(path, {})
    p = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    steps(Adafactor([p], lr=1e-5, **arguments), [torch.ones(shape)] * 20)
    assert 0.0 < (p != 1).float().mean().item() < 0.5


def test_replicas_do_not_drift_and_the_global_random_numbers_are_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    replicas = []
    for other_work in (0, 3):
        torch.rand(other_work)
        p = torch.nn.Parameter(torch.linspace(-1, 1, 4096).view(64, 64).bfloat16())
        replicas.append(steps(Adafactor([p], lr=1e-4), gradients((64, 64), 50)))
    assert torch.equal(*replicas)
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    steps(Adafactor([p], lr=1e-4), gradients((64, 64), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_of_one_shape_do_not_share_their_noise():
    params = [torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = Adafactor(params, lr=1e-3)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    up = [(p != 1).flatten() for p in params]
    # The step is a fifth of a spacing: alike by chance for 1 - 2 q (1 - q) of the elements.
    share = torch.stack(up).float().mean().item()
    alike = (up[0] == up[1]).float().mean().item()
    assert 0.1 < share < 0.5
    assert alike == pytest.approx(1 - 2 * share * (1 - share), abs=6 * 0.5 / 64)


def test_bf16_second_moments_would_freeze_and_ours_do_not():
    # The power of the gradient falls from 1 to 0.01; an average kept in bf16 stays near 0.94.
    p = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.bfloat16))
    optimizer = Adafactor([p], lr=1e-3)
    count = 4000
    powers = torch.linspace(0, -2, count).mul(2.302585).exp()
    steps(optimizer, [torch.full((32, 32), power.sqrt().item()) for power in powers])
    state = optimizer.state[p]
    expected = 0.0
    for t, power in enumerate(powers.double().sqrt().to(torch.bfloat16).double().square().tolist(), start=1):
        beta2 = 1 - t**-0.8
        expected = beta2 * expected + (1 - beta2) * power
    assert state["exp_avg_sq_row"].dtype == torch.float32
    torch.testing.assert_close(
        state["exp_avg_sq_row"].double(), torch.full((32,), expected).double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("beta1", [0.9, 0.99])
def test_bf16_momentum_reaches_its_mean(beta1):
    # Rounded to nearest, the average of a constant 1 stops at 0.98 and 0.80.
    p = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Adafactor([p], lr=1e-6, beta1=beta1, momentum_dtype=torch.bfloat16, momentum_mode="unscaled")
    count = round(20 / (1 - beta1))
    steps(optimizer, [torch.ones(64, 64)] * count)
    mean = optimizer.state[p]["exp_avg"].double().mean().item()
    # An average of roundings of spacing 2^-8: their variance adds up to at most 1 / (1 - beta1^2) of one rounding's.
    sigma = 0.5 * 2**-8 / (1 - beta1**2) ** 0.5 / 64
    assert mean == pytest.approx(1, abs=6 * sigma + beta1**count)


@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_small_gradients_do_not_make_small_updates(dtype, scale):
    # torch.optim.Adafactor's update has an RMS of 0.0013 in bf16 at gradients of 1e-5.
    p = torch.nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    optimizer = Adafactor([p], lr=1.0, clip_threshold=None)
    steps(optimizer, gradients((256, 256), 1, scale))
    [rms] = optimizer.diagnostics()["param 0"].update_rms
    # V of a random matrix is its factored estimate, not g^2: RMS(U) is 1 up to the spread of row and column means.
    large = Adafactor([torch.nn.Parameter(torch.zeros(256, 256))], lr=1.0, clip_threshold=None)
    steps(large, gradients((256, 256), 1))
    [expected] = large.diagnostics()["param 0"].update_rms
    assert expected == pytest.approx(1, abs=2e-2)
    assert rms == pytest.approx(expected, rel=2e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e-8, 1e-4, 1.0, 6e4, 1e12, 1e17])
def test_gradients_of_any_size_neither_underflow_nor_overflow(scale):
    p = torch.nn.Parameter(torch.zeros(64, 64))
    gradient = gradients((64, 64), 1, scale)[0]
    gradient[7] = 0.0  # an unseen row beside large gradients: mean(R) / R_i alone would overflow
    optimizer = Adafactor([p], lr=1.0)
    steps(optimizer, [gradient] * 2)
    assert p.isfinite().all()
    assert not p[7].any()
    if scale >= 1e-12:
        assert p.square().mean().sqrt().item() == pytest.approx(2 * (63 / 64) ** 0.5, rel=0.05)


def test_unseen_embedding_rows_stay_finite_where_the_product_r_c_underflows():
    table = torch.nn.Embedding(1000, 64)
    start = table.weight.detach().clone()
    optimizer = Adafactor(table.parameters(), lr=1e-2)
    seen = torch.tensor([3, 500, 999])
    for _ in range(5):
        optimizer.zero_grad()
        (1e-8 * table(seen)).sum().backward()
        optimizer.step()
    state = optimizer.state[table.weight]
    assert (state["exp_avg_sq_row"][0] * state["exp_avg_sq_col"][0]) == 0  # so it does underflow
    unseen = torch.ones(1000, dtype=torch.bool).index_fill_(0, seen, False)
    assert torch.equal(table.weight[unseen], start[unseen])
    assert (table.weight[seen] < start[seen]).all()
    assert table.weight.isfinite().all()


def test_zero_gradients_and_zero_rows_with_the_eps_of_other_packages():
    # eps=(1e-30, 1e-3) makes torch.optim.Adafactor write NaN into every row without a gradient.
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
        gradient = gradients((64, 64), 1)[0]
        gradient[5:] = 0
        steps(Adafactor([p], **compat.torch(eps=(1e-30, 1e-3))), [gradient, torch.zeros(64, 64)])
        assert p.isfinite().all()
        assert torch.equal(p[5:], torch.ones(59, 64, dtype=dtype))


def test_a_mixed_dtype_group_does_not_share_the_first_parameter_s_eps():
    def displacement(dtypes):
        params = [torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype)) for dtype in dtypes]
        optimizer = Adafactor(params, lr=1.0)
        for p in params:
            p.grad = gradients((64, 64), 1, 1e-3)[0].to(p.dtype)
        optimizer.step()
        return params[-1].detach()

    assert torch.equal(displacement([torch.bfloat16, torch.float32]), displacement([torch.float32, torch.float32]))


# Checkpoints


def test_loading_does_not_cast_statistics_to_the_parameter_s_dtype():
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Adafactor([p], lr=1e-3, beta1=0.9)
    steps(optimizer, gradients((64, 64), 3))
    saved = copy.deepcopy(optimizer.state_dict()["state"][0])
    fresh = Adafactor([p], lr=1e-3, beta1=0.9)
    fresh.load_state_dict(optimizer.state_dict())
    for key, value in fresh.state[p].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, saved[key])


def test_remainders_and_one_byte_momentum_are_saved_and_not_cast():
    p = torch.nn.Parameter(torch.ones(64, 300, dtype=torch.bfloat16))
    kwargs = {"lr": 1e-3, "beta1": 0.9, "momentum_dtype": torch.int8, "weight_bits": 32}
    optimizer = Adafactor([p], **kwargs)
    steps(optimizer, gradients((64, 300), 3))
    saved = copy.deepcopy(optimizer.state_dict()["state"][0])
    fresh = Adafactor([p], **kwargs)
    fresh.load_state_dict(optimizer.state_dict())
    dtypes = {"exp_avg_code": torch.int8, "weight_low": torch.uint8, "weight_lowest": torch.uint8}
    assert fresh.state[p].keys() == saved.keys() > dtypes.keys()
    for key, value in fresh.state[p].items():
        assert value.dtype == dtypes.get(key, torch.float32)
        assert value.count_nonzero()
        assert torch.equal(value, saved[key])


@pytest.mark.parametrize("kwargs", [{}, {"weight_bits": 24}, {"beta1": 0.9, "momentum_dtype": "int8"}], ids=str)
def test_the_rounding_stream_continues_after_a_resume(kwargs):
    def run(interrupted):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = Adafactor([p], lr=1e-4, seed=3, **kwargs)
        steps(optimizer, gradients((64, 64), 5))
        if interrupted:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = Adafactor([p], lr=1e-4, **kwargs)
            optimizer.load_state_dict(saved)
        return steps(optimizer, gradients((64, 64), 5, seed=1))

    assert torch.equal(run(True), run(False))


# What a step applies to


def test_tied_weights_step_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(64, 64)
            self.head = torch.nn.Linear(64, 64, bias=False)
            self.head.weight = self.table.weight

    model = Tied()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    model.head(model.table(torch.arange(64))).square().sum().backward()
    optimizer.step()
    assert [int(state["step"]) for state in optimizer.state.values()] == [1]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = Adafactor([model.table.weight, model.head.weight], lr=1e-2)
    optimizer.step()
    assert [int(state["step"]) for state in optimizer.state.values()] == [1]


def test_one_parameter_s_scale_does_not_leak_into_the_next():
    # fairseq multiplies lr by RMS(p) again and again: four equal parameters get 1e-3, 1e-4, 1e-5, 1e-6.
    params = [torch.nn.Parameter(torch.full((8, 8), 0.1)) for _ in range(4)]
    optimizer = Adafactor(params, lr=1e-2, scale_parameter=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for seen in optimizer.diagnostics().values():
        assert seen.step_size == pytest.approx((1e-3,))
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_tall_and_wide_matrices_use_the_right_normaliser():
    gradient = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    tall = steps(Adafactor([torch.nn.Parameter(torch.zeros(96, 32))], lr=1.0), [gradient])
    wide = steps(Adafactor([torch.nn.Parameter(torch.zeros(32, 96))], lr=1.0), [gradient.T])
    torch.testing.assert_close(tall, wide.T, rtol=1e-6, atol=0)


def test_convolutions_factor_over_channels_not_over_kernels():
    # Over the last two axes a (512, 512, 3, 3) kernel would keep 1.5 M statistics.
    [ours] = plan({"conv": (512, 512, 3, 3)})
    [theirs] = plan({"conv": (512, 512, 3, 3)}, **compat.transformers())
    assert ours.nbytes == 4 * (512 + 512 * 9) + 4
    assert theirs.nbytes == 4 * (512 * 512 * 6) + 4


# Stepping in backward


def layers(count=3, width=8, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(count)))


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(before, model):
    return all(torch.equal(value, before[name]) for name, value in weights_of(model).items())


CLIPPING = {
    "norm": lambda params: torch.nn.utils.clip_grad_norm_(params, 1.0),
    "norm, imported by name": lambda params: clip_grad_norm_(params, 1.0),
    "norm, from its module": lambda params: torch.nn.utils.clip_grad.clip_grad_norm_(params, max_norm=1.0),
    "norm, in two parts": lambda params: torch.nn.utils.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0)),
    "value": lambda params: torch.nn.utils.clip_grad_value_(params, 1.0),
    "value, from its module": lambda params: torch.nn.utils.clip_grad.clip_grad_value_(params, 1.0),
}


@pytest.mark.parametrize("clip", CLIPPING.values(), ids=CLIPPING)
def test_clipping_gradients_that_are_gone_is_not_a_silent_no_op(clip):
    model, other = layers(), layers()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    with optimizer.step_in_backward(2):
        for micro_batch in range(2):
            model(torch.ones(2, 8)).sum().backward()
            if micro_batch == 0:
                before = torch.clone(model[0].bias.grad)
                clip(model.parameters())  # gradients that are still there are clipped
                assert not torch.equal(model[0].bias.grad, before)
        with pytest.raises(ValueError, match=r"freed the gradients of 6 of these 6.*clip_threshold.*max_grad_norm=0"):
            clip(model.parameters())
        with pytest.raises(ValueError, match=r"1 of these 1 parameters"):
            clip(model[0].weight)
        with pytest.raises(ValueError, match=r"6 of these 12"):
            clip([*other.parameters(), *model.parameters()])
        other(torch.ones(2, 8)).sum().backward()
        clip(other.parameters())
        optimizer.step()
        model(torch.ones(2, 8)).sum().backward()  # a new iteration
        clip(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    clip(model.parameters())


def test_accumulation_does_not_step_each_micro_batch():
    model = layers()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    optimizer.step_in_backward(3)
    before = weights_of(model)
    for micro_batch in range(3):
        assert same(before, model)
        model(torch.ones(2, 8)).sum().backward()
        assert all((p.grad is None) == (micro_batch == 2) for p in model.parameters())
    assert not same(before, model)
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_a_count_of_micro_batches_that_does_not_add_up_is_an_error():
    model = layers()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    handle = optimizer.step_in_backward(2)

    def backward():
        model(torch.ones(2, 8)).sum().backward()

    before = weights_of(model)
    backward()
    with pytest.raises(ValueError, match=r"after 1 backward passes with accumulation_steps=2.*accumulation_steps = 1"):
        optimizer.step()
    assert same(before, model)
    backward()
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"backward pass 3 .* accumulation_steps=2.*after every 2"):
        backward()
    assert same(before, model)
    with pytest.raises(ValueError, match=r"'param 5' was stepped in backward and has a gradient again"):
        optimizer.step()
    assert same(before, model)
    optimizer.zero_grad()
    optimizer.step()
    handle.accumulation_steps = 1
    backward()
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["handle first", "module first", "after forward"])
def test_in_backward_does_not_step_before_ddp_has_reduced(order, process_group, monkeypatch):
    model, other = layers(), layers()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    unconcerned = Adafactor(other.parameters(), lr=1e-2)
    all_reduce = torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda g, **options: all_reduce(g.neg_(), **options))
    if order == "handle first":
        handle = optimizer.step_in_backward()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        with torch.no_grad():
            parallel(torch.ones(2, 8))
        loss = parallel(torch.ones(2, 8)).sum()
    else:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        loss = parallel(torch.ones(2, 8)).sum() if order == "after forward" else None
        handle = optimizer.step_in_backward()
    with unconcerned.step_in_backward():  # another model's handle
        loss = parallel(torch.ones(2, 8)).sum() if loss is None else loss
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    plain = layers()
    plain(torch.ones(2, 8)).sum().backward()
    Adafactor(plain.parameters(), lr=1e-2, maximize=True).step()  # what "the other processes" made of the gradients
    assert same(weights_of(plain), model)

    another = torch.nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"two DistributedDataParallel modules.*delete a module"):
        another(torch.ones(2, 8))
    handle.remove()
    with pytest.raises(ValueError, match=r"two DistributedDataParallel modules.*delete a module"):
        optimizer.step_in_backward()
    assert optimizer._in_backward is None
    for module in (parallel, another):
        setattr(module, "cycle", [module])  # noqa: B010, only the garbage collector frees it
    del parallel, another, module, loss
    optimizer.step_in_backward()  # the modules are garbage, not in the way
    before = weights_of(model)
    model(torch.ones(2, 8)).sum().backward()
    assert not same(before, model)


def test_a_hook_that_never_fires_is_noticed():
    model = layers()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    optimizer.step_in_backward()
    before = weights_of(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # as if by a backward that calls no hooks
    with pytest.raises(ValueError, match="'param 0' has a gradient, but no backward pass"):
        optimizer.step()
    assert same(before, model)
    optimizer.zero_grad()
    silent, after = (next(model[index].parameters()) for index in (0, 1))  # one only: step() takes it
    lost = after.register_hook(lambda gradient: silent._post_accumulate_grad_hooks.clear())
    model(torch.ones(2, 8)).sum().backward()
    assert [p is silent for p in model.parameters() if p.grad is not None] == [True]
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    lost.remove()
    model(torch.ones(2, 8)).sum().backward()  # it is hooked again
    assert all(p.grad is None for p in model.parameters())


class Shared(torch.nn.Module):
    """One weight inside of a checkpoint and outside of it, before or after."""

    def __init__(self, reentrant, where="after", run=checkpoint):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.own = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.reentrant, self.where, self.run = reentrant, where, run

    def forward(self, x):
        x = self.shared(x) if self.where == "before" else self.own(x)
        x = self.run(lambda x: self.shared(torch.tanh(x)), x, use_reentrant=self.reentrant)
        return self.shared(x) if self.where == "after" else x


def iterations(model, optimizer, count=3, accumulation=1):
    for seed in range(count * accumulation):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        loss = model(x).square().sum()
        if seed % accumulation == 0:
            optimizer.zero_grad()
        loss.backward()
        if seed % accumulation == accumulation - 1:
            optimizer.step()
    return weights_of(model)


def test_tied_weights_are_stepped_once_in_backward_after_their_last_use():
    results = []
    for in_backward in (False, True):
        model = Shared(False, "before")
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        if in_backward:
            optimizer.step_in_backward()
        results.append(iterations(model, optimizer))
        used = optimizer.state[model.shared.weight]
        assert int(used["step"]) == 3
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_weight_shared_with_a_reentrant_checkpoint_is_not_stepped_by_half_a_gradient(where, accumulation):
    model = Shared(True, where)
    expected = iterations(model, Adafactor(model.parameters(), lr=1e-2), 3, accumulation)
    model = Shared(True, where)
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    optimizer.step_in_backward(accumulation)
    before = weights_of(model)
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        model(torch.ones(2, 8, requires_grad=True)).square().sum().backward()
    assert same(before, model)
    assert model.shared.weight.grad is not None
    optimizer.zero_grad()
    assert all(
        torch.equal(value, expected[name]) for name, value in iterations(model, optimizer, 3, accumulation).items()
    )
    x = torch.ones(2, 8, requires_grad=True)
    model(x).square().sum().backward()  # counted, whoever steps
    if accumulation == 2:
        with pytest.raises(ValueError, match="after 1 backward passes"):
            optimizer.step()
        return
    with pytest.raises(ValueError, match="backward pass 2"):
        model(x).square().sum().backward()
    before = weights_of(model)
    with pytest.raises(ValueError, match="stopped by an error"):
        optimizer.step()
    assert same(before, model)
    optimizer.zero_grad()
    iterations(model, optimizer, 1)


class SomebodyElsesCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, *gradients):
        [x] = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, gradients[0])
        return None, x.grad


def elsewhere(function, x, use_reentrant):
    return SomebodyElsesCheckpoint.apply(function, x)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_somebody_else_s_reentrant_checkpoint_is_recognised(accumulation):
    model = Shared(True, "before", elsewhere)
    expected = iterations(model, Adafactor(model.parameters(), lr=1e-2), 3, accumulation)
    model = Shared(True, "before", elsewhere)
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    optimizer.step_in_backward(accumulation)
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        found = iterations(model, optimizer, 3, accumulation)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_somebody_else_s_reentrant_checkpoint_after_a_step_is_an_error():
    model = Shared(True, "after", elsewhere)
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    optimizer.step_in_backward()
    with (
        pytest.warns(UserWarning, match="use_reentrant=False"),
        pytest.raises(ValueError, match=r"'param 1' got a second gradient in one backward pass.*use_reentrant=False"),
    ):
        iterations(model, optimizer, 1)


def test_gradients_that_a_grad_scaler_has_scaled_are_not_applied():
    model, other = layers(), layers()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with optimizer.step_in_backward(2):
        before = weights_of(model)
        with pytest.raises(ValueError, match=r"GradScaler has scaled.*bfloat16 needs no scaler.*enabled=False"):
            scaler.scale(model(torch.ones(2, 8)).sum()).backward()
        with pytest.raises(ValueError, match="GradScaler has scaled"):
            torch.autograd.backward(scaler.scale([model(torch.ones(2, 8)).sum()]))
        with pytest.raises(ValueError, match="GradScaler has scaled"):
            (scaler.scale(checkpoint(model, torch.ones(2, 8), use_reentrant=False).sum()) / 2).backward()
        assert same(before, model)
        optimizer.zero_grad()
        scaler.scale(other(torch.ones(2, 8)).sum()).backward()  # another model's affair
        switched_off = torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(2):
            switched_off.scale(model(torch.ones(2, 8)).sum()).backward()
        switched_off.step(optimizer)
        assert not same(before, model)
    scaler.scale(model(torch.ones(2, 8)).sum()).backward()
    scaler.step(optimizer)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_a_grad_scaler_around_a_reentrant_checkpoint_is_noticed():
    model = Shared(True, "none", elsewhere)
    optimizer = Adafactor(model.shared.parameters(), lr=1e-2)
    optimizer.step_in_backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(ValueError, match="GradScaler has scaled"):
        scaler.scale(model(torch.ones(2, 8, requires_grad=True)).sum()).backward()


def test_the_work_per_hook_does_not_grow_with_the_model():
    def calls(count):
        model = layers(count)
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        seen = 0

        def count_calls(frame, event, argument):
            nonlocal seen
            seen += event in ("call", "c_call")

        with optimizer.step_in_backward():
            for measured in (False, True):
                loss = model(torch.ones(2, 8)).sum()
                sys.setprofile(count_calls if measured else None)
                loss.backward()
                sys.setprofile(None)
                optimizer.step()
        return seen

    few, many = calls(10), calls(40)
    assert many < 4.1 * few


# Learning rates


def test_an_lr_is_never_ignored():
    # pytorch-optimizer and sd-scripts ignore lr, and per-group lrs, while relative_step is on.
    def displacement(**arguments):
        p = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = Adafactor([{"params": [p], **arguments}], relative_step=True)
        return steps(optimizer, gradients((64, 64), 1)).abs().mean().item()

    assert displacement(lr=1e-3) == pytest.approx(10 * displacement(lr=1e-4), rel=1e-5)
    with pytest.raises(ValueError, match="give an lr"):
        Adafactor([torch.nn.Parameter(torch.zeros(2))], relative_step=False)


def test_an_adamw_learning_rate_means_what_it_means_to_adamw():
    # scaled by RMS(p) = 0.02, the same lr would take steps fifty times smaller
    p = torch.nn.Parameter(torch.full((64, 64), 0.02))
    moved = steps(Adafactor([p], **recipes.adamw_like(1e-3)), [torch.ones(64, 64)]) - 0.02
    first = 0.9 * (1 - 0.9) + (1 - 0.9)  # beta1 M + (1 - beta1) U; momentum starts at zero
    assert moved.abs().mean().item() == pytest.approx(1e-3 * first, rel=1e-3)


def test_a_constant_schedule_is_not_decayed_behind_the_user_s_back():
    # torch.optim.Adafactor takes min(lr, 1/sqrt(t)) of every lr.
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = Adafactor([p], lr=0.9)
    steps(optimizer, [torch.ones(4)] * 9)
    assert optimizer.diagnostics()["param 0"].step_size == pytest.approx((0.9,))


def test_lr_is_reported_as_it_was_used():
    params = [torch.nn.Parameter(torch.full((4,), value)) for value in (1.0, 0.5)]
    optimizer = Adafactor([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.25, "scale_parameter": True}])
    for p in params:
        p.grad = torch.ones(4)
    for _ in range(3):
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.25]


def test_momentum_of_scaled_and_unscaled_updates_are_told_apart():
    # With a falling lr, an average of alpha U still moves at the old rate; an average of U follows at once.
    moved = {}
    for mode in ("scaled", "unscaled"):
        p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = Adafactor([p], lr=1.0, beta1=0.5, momentum_mode=mode)
        steps(optimizer, [torch.ones(4)] * 20)
        before = p.detach().clone()
        optimizer.param_groups[0]["lr"] = 1e-6
        steps(optimizer, [torch.ones(4)])
        moved[mode] = (before - p).mean().item()
    assert moved["scaled"] == pytest.approx(0.5, rel=1e-5)
    assert moved["unscaled"] == pytest.approx(1e-6, rel=1e-5)


def test_the_two_t5_recipes_are_two_recipes():
    # transformers documents lr 1e-3 unscaled; T5X uses lr 1e-3 times RMS(p).
    documented = compat.transformers(lr=1e-3, scale_parameter=False, relative_step=False)
    assert documented["scale_parameter"] is False
    assert recipes.t5_finetune()["scale_parameter"] is True
    assert recipes.t5_finetune()["lr"] == documented["lr"] == 1e-3


# Non-finite gradients


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
def test_a_bad_gradient_poisons_neither_weights_nor_statistics(bad):
    p = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = Adafactor([p], beta1=0.9)
    steps(optimizer, gradients((64, 64), 2))
    kept = copy.deepcopy((p.detach(), optimizer.state[p]))
    gradient = torch.ones(64, 64)
    gradient[3, 4] = bad
    steps(optimizer, [gradient])
    assert torch.equal(p, kept[0])
    assert all(torch.equal(optimizer.state[p][key], value) for key, value in kept[1].items())
    assert optimizer.diagnostics()["param 0"][:2] == (2, 1)


# Memory


def test_nothing_the_size_of_a_parameter_is_allocated():
    from adafactor.memory import peak_allocated

    p = torch.nn.Parameter(torch.zeros(4000, 3000, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = Adafactor([p], lr=1e-3)
    assert peak_allocated(optimizer.step) <= (4 << 20) + 64 * 7000


# The formula


def test_scaling_the_gradient_by_k_scales_v_by_k_squared():
    # An encyclopedia entry divides by mean(R)^2 where mean(R) is right; its V would not scale at all.
    def V(scale):
        p = torch.nn.Parameter(torch.zeros(40, 50, dtype=torch.float64))
        optimizer = Adafactor([p], lr=1.0)
        steps(optimizer, [scale * gradient.double() for gradient in gradients((40, 50), 3)])
        R, C = optimizer.state[p]["exp_avg_sq_row"], optimizer.state[p]["exp_avg_sq_col"]
        torch.testing.assert_close(R.mean(), C.mean(), rtol=1e-14, atol=0)
        return torch.outer(R, C) / R.mean()

    torch.testing.assert_close(V(10.0), 100 * V(1.0), rtol=1e-12, atol=0)
