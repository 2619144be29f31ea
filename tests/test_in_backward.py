"""Stepping in backward: the bits of the plain step, in every mode and in every kind of loop; or a clear error."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from _cases import MODES, assert_same_bits
from adafactor import Adafactor, _in_backward_guards
from adafactor.memory import peak_allocated

BACKENDS = ["reference", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_handle_outlives_its_test():
    yield
    for handle in list(_in_backward_guards.live):
        handle.remove()


class Experts(torch.nn.Module):
    """Tied embeddings, a stack of experts, a convolution, vectors, and experts of which a token sees one."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.table = torch.nn.Embedding(40, 36)
        self.norm = torch.nn.LayerNorm(36)
        self.conv = torch.nn.Conv1d(36, 36, 3, padding=1)
        self.stack = torch.nn.Parameter(torch.randn(3, 36, 36) / 6)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(36, 36) for _ in range(3))
        self.frozen = torch.nn.Linear(36, 36)
        self.unused = torch.nn.Linear(36, 36)
        self.head = torch.nn.Linear(36, 40)
        self.head.weight = self.table.weight
        self.frozen.requires_grad_(False)
        self.checkpointed = checkpointed

    def block(self, x, expert):
        x = x + self.conv(self.norm(x).mT).mT
        x = x + torch.einsum("bti,kij->btj", x, self.stack) / 10
        return x + self.frozen(torch.tanh(self.experts[expert](x)))

    def forward(self, tokens, expert):
        x = self.table(tokens)
        if self.checkpointed is None:
            x = self.block(x, expert)
        else:
            x = checkpoint(self.block, x, expert, use_reentrant=self.checkpointed)
        return self.head(x)


def build(dtype=torch.float32, seed=0, **arguments):
    torch.manual_seed(seed)
    return Experts(**arguments).to(dtype)


def loss_of(model, seed, expert=None):
    """Batch `seed`; the expert is one that other batches do not use."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (2, 8), generator=generator)
    logits = model(tokens, seed % 3 if expert is None else expert)
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens.roll(1, 1).flatten())


def train(model, optimizer, steps=4, accumulation=1, start=0, scheduler=None):
    """The usual loop. What gradients are left after `step()` is the optimizer's affair."""
    for step in range(start, start + steps):
        for micro in range(accumulation):
            (loss_of(model, step * accumulation + micro) / accumulation).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if optimizer._in_backward is None:
            optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())


def everything(model, *optimizers):
    """Weights, statistics, and what the groups and reports show."""
    seen = {name: p.detach().clone() for name, p in model.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            seen |= {f"{index}.{key}.{name}": value.clone() for name, value in state.items()}
        for number, group in enumerate(optimizer.param_groups):
            shown = [float(group["lr"] or 0), float(group["rho"] or 0), float(group["updates"])]
            seen[f"{index}.group {number}"] = torch.tensor(shown, dtype=torch.float64)
        for name, report in optimizer.diagnostics().items():
            numbers = [report.updates, report.skipped, report.clipped, *report.update_rms, *report.step_size]
            seen[f"{index}.report {name}"] = torch.tensor(numbers, dtype=torch.float64)
    return seen


def assert_as_plain(accumulation=1, dtype=torch.float32, checkpointed=None, steps=4, schedule=None, **arguments):
    results = []
    for in_backward in (False, True):
        model = build(dtype, checkpointed=checkpointed if in_backward else None)
        optimizer = Adafactor(model.parameters(), **arguments)
        scheduler = schedule(optimizer) if schedule else None
        if in_backward:
            optimizer.step_in_backward(accumulation)
        train(model, optimizer, steps, accumulation, scheduler=scheduler)
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


# The same bits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_steps_as_the_plain_step(mode, backend):
    arguments = dict(MODES[mode])
    if backend == "cpu" and arguments.get("factor") not in (None, "none"):
        backend = "auto"  # permuted axes are the reference's
    assert_as_plain(backend=backend, **arguments)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_accumulation_steps_as_the_plain_step(dtype, backend, accumulation):
    assert_as_plain(accumulation, dtype, backend=backend, lr=1e-2, beta1=0.9, weight_decay=0.1)
    assert_as_plain(accumulation, dtype, backend=backend)


def test_bfloat16_momentum_over_many_steps():
    assert_as_plain(2, torch.bfloat16, steps=30, lr=3e-3, beta1=0.9, momentum_dtype=torch.bfloat16, nesterov=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_bits", [24, 32])
def test_weights_with_more_bits_and_momentum_in_one_byte(weight_bits, backend):
    kept = {"weight_bits": weight_bits, "momentum_dtype": torch.int8}
    assert_as_plain(2, torch.bfloat16, steps=6, backend=backend, lr=1e-2, beta1=0.9, **kept)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_activation_checkpointing_that_is_not_reentrant(accumulation):
    assert_as_plain(accumulation, checkpointed=False, lr=1e-2)


SCHEDULES = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_lr_schedulers(schedule):
    assert_as_plain(2, schedule=schedule, lr=1e-2, weight_decay=0.1)


def test_a_tensor_lr():
    assert_as_plain(lr=torch.tensor(0.0625), weight_decay=0.1)


def test_groups_of_their_own_and_the_relative_step_each_shows():
    results = []
    for in_backward in (False, True):
        model = build()
        experts = list(model.experts.parameters())
        rest = [p for p in model.parameters() if all(p is not q for q in experts)]
        optimizer = Adafactor([{"params": experts}, {"params": rest, "warmup_init": True}, {"params": []}])
        if in_backward:
            optimizer.step_in_backward()
        train(model, optimizer, 5)
        results.append(everything(model, optimizer))
        assert [group["updates"] for group in optimizer.param_groups] == [5, 5, 0]
        assert optimizer.param_groups[1]["lr"] == pytest.approx(5e-6)
    assert_same_bits(*results)


def test_a_closure_may_call_backward():
    results = []
    for in_backward in (False, True):
        model = build()
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        if in_backward:
            optimizer.step_in_backward()
        for step in range(3):

            def closure(step=step, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


def test_several_optimizers_on_one_model():
    results = []
    for in_backward in ((), (0,), (0, 1)):
        model = build()
        heads = list(model.head.parameters())
        rest = [p for p in model.parameters() if all(p is not q for q in heads)]
        optimizers = [Adafactor(heads, lr=1e-2), Adafactor(rest, beta1=0.9)]
        handles = [optimizers[index].step_in_backward(2) for index in in_backward]
        for step in range(4):
            for micro in range(2):
                loss_of(model, 2 * step + micro).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        results.append(everything(model, *optimizers))
        for handle in handles:
            handle.remove()
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_an_expert_of_an_early_micro_batch_is_stepped_by_step():
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    optimizer.step_in_backward(2)
    before = [p.detach().clone() for p in model.experts[0].parameters()]
    loss_of(model, 0, expert=0).backward()
    loss_of(model, 1, expert=1).backward()
    assert all(p.grad is None for p in model.experts[1].parameters())
    assert all(torch.equal(p, start) for p, start in zip(model.experts[0].parameters(), before, strict=True))
    assert all(p.grad is not None for p in model.experts[0].parameters())
    optimizer.step()
    assert not any(torch.equal(p, start) for p, start in zip(model.experts[0].parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    used = [model.experts[0].weight, model.experts[1].weight, model.experts[2].weight]
    assert [int(optimizer.state[p]["step"]) for p in used] == [1, 1, 0]


def test_parameters_step_during_backward_and_tied_ones_after_their_last_use():
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    seen = []
    optimizer.step_in_backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.append((name, int(optimizer.state[p]["step"]), p.grad is None))
            )
    loss_of(model, 0).backward()
    assert {(name, 1, True) for name, _, _ in seen} == set(seen)
    assert seen[0][0] == "head.bias"
    assert seen[-1][0] == "table.weight"
    assert [name for name, _, _ in seen].count("table.weight") == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", ["whole", "block"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_models(part, backend):
    results = []
    for in_backward in (False, True):
        torch._dynamo.reset()
        model = build()
        compiled = model
        if part == "whole":
            compiled = torch.compile(model, backend=backend)
        else:
            model.block = torch.compile(model.block, backend=backend)
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        if in_backward:
            optimizer.step_in_backward(2)
        train(compiled, optimizer, 3, 2)
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


@pytest.mark.filterwarnings("ignore")
def test_a_training_loop_that_is_compiled_as_a_whole():
    results = []
    for in_backward in (False, True):
        torch._dynamo.reset()
        model = build()
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        if in_backward:
            optimizer.step_in_backward()

        @torch.compile(backend="eager")
        def iteration(seed, model=model, optimizer=optimizer):
            loss_of(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()

        for seed in range(3):
            iteration(seed)
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


def test_non_finite_gradients_are_skipped_parameter_by_parameter():
    results = []
    for in_backward in (False, True):
        model = build()
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        if in_backward:
            optimizer.step_in_backward()
        model.norm.weight.register_hook(lambda g: g * torch.inf)
        train(model, optimizer, 3)
        assert optimizer.diagnostics()["param 2"][:2] == (0, 3)
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


# Stopping, resuming, copying


@pytest.mark.parametrize("where", ["between", "within"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_resuming_in_the_middle_gives_the_same_bits_as_not_stopping(where, in_backward):
    arguments = {"lr": 1e-2, "beta1": 0.9, "weight_decay": 0.1}
    model = build(torch.bfloat16)
    optimizer = Adafactor(model.parameters(), **arguments)
    train(model, optimizer, 6, 2)
    whole = everything(model, optimizer)

    model = build(torch.bfloat16)
    optimizer = Adafactor(model.parameters(), **arguments)
    optimizer.step_in_backward(2)
    train(model, optimizer, 3, 2)
    if where == "within":  # the same process: half gathered gradients stay in the model
        loss_of(model, 6).div(2).backward()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loss_of(model, 7).div(2).backward()
        optimizer.step()
    saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
    weights, state = pickle.loads(saved)

    model = build(torch.bfloat16, seed=5)
    model.load_state_dict(weights)
    optimizer = Adafactor(model.parameters(), **arguments)
    if in_backward:
        optimizer.step_in_backward(2)
    optimizer.load_state_dict(state)
    done = 4 if where == "within" else 3
    train(model, optimizer, 6 - done, 2, start=done)
    resumed = everything(model, optimizer)
    reports = {name for name in whole if "report" in name}  # count from when the optimizer was built
    assert_same_bits(*({name: seen[name] for name in whole.keys() - reports} for seen in (resumed, whole)))


def test_copies_and_pickles_have_no_handle():
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    with optimizer.step_in_backward(2):
        loss_of(model, 0).backward()
        for twin_model, twin in (
            copy.deepcopy((model, optimizer)),
            pickle.loads(pickle.dumps((model, optimizer))),
        ):
            assert twin._in_backward is None
            assert all(not p._post_accumulate_grad_hooks for p in twin_model.parameters())
            twin_model.zero_grad()
            before = twin_model.table.weight.detach().clone()
            loss_of(twin_model, 1).backward()
            assert torch.equal(twin_model.table.weight, before)
            twin.step()
            assert not torch.equal(twin_model.table.weight, before)
            with twin.step_in_backward():
                loss_of(twin_model, 2).backward()
                twin.step()
        loss_of(model, 1).backward()
        optimizer.step()
    assert int(optimizer.state[model.table.weight]["step"]) == 1


@pytest.mark.parametrize("when", ["before", "between"])
def test_load_state_dict_while_it_is_on(when):
    results = []
    for in_backward in (False, True):
        model = build()
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        if in_backward:
            optimizer.step_in_backward()
        if when == "between":
            train(model, optimizer, 2)
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["lr"] = 0.25
        optimizer.load_state_dict(state)
        train(model, optimizer, 3, start=2)
        results.append(everything(model, optimizer))
        assert optimizer.param_groups[0]["lr"] == 0.25
    assert_same_bits(*results)


# Parameters that change


def test_parameters_added_and_frozen_and_thawed_later():
    results = []
    for in_backward in (False, True):
        model = build()
        late = {id(p) for p in model.experts.parameters()}
        model.table.weight.requires_grad_(False)
        optimizer = Adafactor([p for p in model.parameters() if id(p) not in late], lr=1e-2)
        if in_backward:
            optimizer.step_in_backward(2)
        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": list(model.experts.parameters()), "lr": 0.5})
                model.conv.requires_grad_(False)
            if step == 4:
                model.table.weight.requires_grad_(True)
                model.conv.requires_grad_(True)
            for micro in range(2):
                loss_of(model, 2 * step + micro, expert=step % 3).backward()
            if in_backward and step in (2, 4, 5):
                fresh = [model.experts[step % 3].weight, *([model.table.weight] if step > 3 else [])]
                assert all(p.grad is None for p in fresh)
            optimizer.step()
            model.zero_grad()
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


def test_only_new_parameters_get_gradients():
    model = build()
    optimizer = Adafactor([model.norm.weight], lr=1e-2)
    optimizer.step_in_backward()
    model.norm.bias.requires_grad_(False)
    optimizer.add_param_group({"params": [model.norm.bias]})
    model.norm.bias.requires_grad_(True)
    model.norm.bias.sum().backward()
    optimizer.step()
    assert int(optimizer.state[model.norm.bias]["step"]) == 1
    model.norm.bias.sum().backward()
    assert model.norm.bias.grad is None


def test_parameters_that_were_exchanged_are_followed():
    old, new = (torch.nn.Parameter(torch.ones(40, 40)) for _ in range(2))
    optimizer = Adafactor([old], lr=1e-2)
    optimizer.step_in_backward()
    old.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = new  # as accelerate does
    (old + new).sum().backward()
    assert old.grad is not None
    optimizer.step()
    assert int(optimizer.state[new]["step"]) == 1
    new.sum().backward()
    assert new.grad is None
    optimizer.step()
    other = torch.nn.Parameter(torch.ones(40, 40))
    del old
    torch.utils.swap_tensors(new, other)  # refuses tensors that have weak references
    new.sum().backward()
    optimizer.step()
    new.sum().backward()
    assert new.grad is None
    optimizer.step()
    assert int(optimizer.state[new]["step"]) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_cast_after_construction(backend):
    results = []
    for in_backward in (False, True):
        model = build()
        optimizer = Adafactor(model.parameters(), lr=1e-2, beta1=0.9, backend=backend)
        if in_backward:
            optimizer.step_in_backward()
        train(model, optimizer, 2)
        model.bfloat16()
        train(model, optimizer, 2, start=2)
        model.float()
        train(model, optimizer, 2, start=4)
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_moved_block_by_block(backend, monkeypatch):
    results = []
    for in_backward in (False, True):
        model = build()
        optimizer = Adafactor(model.parameters(), lr=1e-2, beta1=0.9, backend=backend)
        if in_backward:
            optimizer.step_in_backward()
        train(model, optimizer, 1)
        rebuilt = []
        monkeypatch.setattr(optimizer, "_rebuild", lambda rebuilt=rebuilt: rebuilt.append(1))
        for step in range(1, 4):
            for p in model.parameters():  # there and back: other memory, and later another dtype
                p.data = p.data.to(torch.bfloat16 if step == 2 else torch.float32, copy=True)
            train(model, optimizer, 1, start=step)
        assert not rebuilt
        monkeypatch.undo()
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


def test_lazy_and_meta_parameters():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: "Lazy modules are a new feature"
        model = torch.nn.Sequential(torch.nn.LazyLinear(40), torch.nn.ReLU(), torch.nn.LazyLinear(40))
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    optimizer.step_in_backward()
    for _ in range(3):
        model(torch.ones(2, 40)).sum().backward()
        optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    model(torch.ones(2, 40)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


# Counting


def test_zero_grad_drops_passes_that_were_not_used():
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    optimizer.step_in_backward(2)
    loss_of(model, 7).backward()
    optimizer.zero_grad()
    train(model, optimizer, 2, 2)
    other = build()
    plain = Adafactor(other.parameters(), lr=1e-2)
    train(other, plain, 2, 2)
    assert_same_bits(everything(model, optimizer), everything(other, plain))


def test_a_last_shorter_group_of_micro_batches():
    results = []
    for in_backward in (False, True):
        model = build()
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        handle = optimizer.step_in_backward(3) if in_backward else None
        train(model, optimizer, 2, 3)
        if handle:
            handle.accumulation_steps = 2
        train(model, optimizer, 1, 2, start=4)
        for micro in range(2):
            loss_of(model, micro).backward()
        if handle:
            with pytest.raises(ValueError, match="comes too late"):
                handle.accumulation_steps = 3
        optimizer.step()
        optimizer.zero_grad()
        if handle:
            handle.accumulation_steps = 3
        loss_of(model, 1).backward()
        if handle:  # known only now: everything is stepped by step()
            handle.accumulation_steps = 1
        optimizer.step()
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "2", "lightning"])
def test_accumulation_steps_out_of_range(value):
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    message = rf"accumulation_steps .*must be an integer >= 1, .*got {value!r}"
    with pytest.raises(ValueError, match=message):
        optimizer.step_in_backward(value)
    assert_nothing_is_wrapped()
    handle = optimizer.step_in_backward()
    with pytest.raises(ValueError, match=message):
        handle.accumulation_steps = value
    assert handle.accumulation_steps == 1


def test_a_step_without_gradients_does_nothing():
    model = build()
    optimizer = Adafactor(model.parameters())
    optimizer.step_in_backward()
    train(model, optimizer, 1)
    before = everything(model, optimizer)
    optimizer.step()
    assert_same_bits(everything(model, optimizer), before)


def test_after_an_exception_in_backward_zero_grad_and_step_begin_anew():
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    optimizer.step_in_backward()

    def fail(gradient):
        raise MemoryError

    loss = loss_of(model, 0)
    failing = model.norm.weight.register_hook(fail)
    with pytest.raises(MemoryError):
        loss.backward()
    failing.remove()
    with pytest.raises(ValueError, match="backward pass 2"):
        loss_of(model, 0).backward()
    optimizer.zero_grad()
    optimizer.step()
    train(model, optimizer, 1)
    assert [int(optimizer.state[p]["step"]) for p in (model.head.bias, model.norm.weight)] == [2, 1]


def test_an_lr_that_is_set_between_backward_and_step_is_warned_of():
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    optimizer.step_in_backward()
    loss_of(model, 0).backward()
    optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.warns(UserWarning, match="set lr before backward"):
        optimizer.step()
    train(model, optimizer, 2)


# Handles


TORCH_FUNCTIONS = (
    (torch.nn.utils, "clip_grad_norm_"),
    (torch.nn.utils, "clip_grad_value_"),
    (torch.nn.utils, "clip_grads_with_norm_"),
    (torch.nn.utils.clip_grad, "clip_grad_norm_"),
    (torch.nn.utils.clip_grad, "clip_grad_value_"),
    (torch.nn.utils.clip_grad, "_clip_grads_with_norm_"),
    (CheckpointFunction, "forward"),
    (torch.amp.GradScaler, "scale"),
    (torch.nn.parallel.DistributedDataParallel, "forward"),
)
ORIGINALS = [vars(owner)[name] for owner, name in TORCH_FUNCTIONS]


def wrapped():
    return [vars(o)[n] is not original for (o, n), original in zip(TORCH_FUNCTIONS, ORIGINALS, strict=True)]


def assert_nothing_is_wrapped():
    assert not any(wrapped())


def test_a_handle_is_removed_and_removing_is_idempotent():
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    assert_nothing_is_wrapped()
    handle = optimizer.step_in_backward(2)
    assert all(wrapped())
    with pytest.raises(ValueError, match="on already"):
        optimizer.step_in_backward()
    loss_of(model, 0).backward()
    gathered = torch.clone(model.norm.weight.grad)
    handle.remove()
    handle.remove()
    assert_nothing_is_wrapped()
    assert torch.equal(model.norm.weight.grad, gathered)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    loss_of(model, 1).backward()
    optimizer.step()
    assert model.norm.weight.grad is not None
    with optimizer.step_in_backward() as handle:
        assert handle.accumulation_steps == 1


def test_handles_nest_and_may_be_removed_in_any_order():
    assert_nothing_is_wrapped()
    optimizers = [Adafactor(build().parameters(), lr=1e-2) for _ in range(3)]
    first, second, third = [optimizer.step_in_backward() for optimizer in optimizers]
    first.remove()
    assert all(wrapped())
    third.remove()
    first = optimizers[0].step_in_backward()
    second.remove()
    assert all(wrapped())
    first.remove()
    assert_nothing_is_wrapped()


def test_an_exception_inside_leaves_nothing_wrapped():
    optimizer = Adafactor(build().parameters(), lr=1e-2)
    with pytest.raises(KeyError), optimizer.step_in_backward():
        raise KeyError
    assert_nothing_is_wrapped()
    assert optimizer._in_backward is None


def test_somebody_else_s_wrapper_around_ours_stays_and_works():
    optimizer = Adafactor(build().parameters(), lr=1e-2)
    handle = optimizer.step_in_backward()
    ours, calls = torch.nn.utils.clip_grad_norm_, []

    def theirs(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = theirs
    try:
        handle.remove()
        assert torch.nn.utils.clip_grad_norm_ is theirs
        p = torch.nn.Parameter(torch.ones(4))
        p.grad = torch.ones(4)
        assert torch.nn.utils.clip_grad_norm_([p], 1.0) == 2
        assert calls == [1]
    finally:
        torch.nn.utils.clip_grad_norm_ = ORIGINALS[0]


def test_a_handle_keeps_neither_model_nor_optimizer_alive():
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2)
    handle = optimizer.step_in_backward()
    train(model, optimizer, 1)
    loss_of(model, 1).backward()
    before = model.norm.weight.detach().clone()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    loss_of(model, 2).backward()
    assert torch.equal(model.norm.weight, before)
    assert model.norm.weight.grad is not None
    assert_nothing_is_wrapped()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    handle.remove()


def test_handles_do_not_pile_up():
    optimizer = Adafactor(build().parameters(), lr=1e-2)
    handles = []
    for _ in range(3):
        with optimizer.step_in_backward() as handle:
            handles.append(weakref.ref(handle))
    del handle
    gc.collect()
    assert [reference() for reference in handles] == [None] * 3


def test_two_optimizers_cannot_step_one_parameter_in_backward():
    model = build()
    first, second = (Adafactor(model.parameters(), lr=1e-2) for _ in range(2))
    first.step_in_backward()
    with pytest.raises(ValueError, match="stepped in backward by another optimizer"):
        second.step_in_backward()
    assert second._in_backward is None
    cycle = [first]
    cycle.append(cycle)  # only the garbage collector frees it
    del first, cycle
    second.step_in_backward()


# Memory


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_gradients_of_about_the_largest_layers_are_alive_at_once(checkpointed):
    count, width = 16, 512

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(count))

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            return x

    layer_bytes, peaks = 4 * width * width, {}
    for in_backward in (False, True):
        model = Stack()
        optimizer = Adafactor(model.parameters(), lr=1e-3)
        handle = optimizer.step_in_backward() if in_backward else None
        x = torch.ones(4, width)
        model(x).sum().backward()  # everything that is kept is there
        optimizer.step()
        optimizer.zero_grad()
        peaks[in_backward] = peak_allocated(lambda model=model, x=x: model(x).sum().backward())
        if handle:
            handle.remove()
    assert peaks[False] > count * layer_bytes
    assert peaks[True] < 2.5 * layer_bytes


# Where a function says which pass is the last, and where norms are asked for


@pytest.mark.parametrize("where", ["constructor", "method", "assigned"])
def test_a_function_may_say_which_pass_is_the_last(where):
    now, results = {"last": False}, []
    says = lambda: now["last"]  # noqa: E731
    for in_backward in (False, True):
        model = build()
        arguments = {"step_in_backward": says} if in_backward and where == "constructor" else {}
        optimizer = Adafactor(model.parameters(), lr=1e-2, **arguments)
        if in_backward and where != "constructor":
            handle = optimizer.step_in_backward(says if where == "method" else 7)
            if where == "assigned":
                handle.accumulation_steps = says
        for group, count in enumerate((3, 1, 2, 4)):
            for micro in range(count):
                now["last"] = micro == count - 1
                loss_of(model, 5 * group + micro).backward()
                if in_backward:
                    assert (model.norm.weight.grad is None) == now["last"]
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


def test_a_function_that_never_says_so_and_one_that_says_so_too_early():
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2, step_in_backward=lambda: False)
    before = everything(model, optimizer)
    loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match="after 2 backward passes, none of which was the last one"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert_same_bits(everything(model, optimizer), before)
    assert optimizer._in_backward is not None
    optimizer._in_backward.accumulation_steps = lambda: True
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"backward pass 2 since the last optimizer\.step"):
        loss_of(model, 1).backward()


@pytest.mark.parametrize("value", [0, True, "2", "lightning", 1.5])
def test_the_constructor_s_step_in_backward_is_checked(value):
    with pytest.raises(ValueError, match=rf"step_in_backward in the constructor.* got {value!r}"):
        Adafactor(build().parameters(), lr=1e-2, step_in_backward=value)
    assert_nothing_is_wrapped()
    group = {"params": list(build().parameters()), "step_in_backward": 1}
    with pytest.raises(ValueError, match="step_in_backward=1 belongs to the optimizer, not to a param group"):
        Adafactor([group], lr=1e-2)


def test_the_norm_of_gradients_that_are_gone_is_what_it_would_be():
    norms = {}
    for in_backward in (False, True):
        model = build(torch.bfloat16)
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        if in_backward:
            optimizer.step_in_backward(2)
        norms[in_backward] = []
        for step in range(4):
            for micro in range(2):  # an expert of the first micro-batch waits for step()
                loss_of(model, 2 * step + micro).backward()
            norms[in_backward].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)))
            if in_backward:
                assert any(p.grad is not None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    first, *rest = norms[True]
    assert first != first  # nobody had asked before
    assert rest == norms[False][1:]


@pytest.mark.parametrize("options", [{"norm_type": 1.0}, {"error_if_nonfinite": True}, {"max_norm": 1e9}], ids=repr)
def test_other_norms_of_gradients_that_are_gone_are_refused(options):
    model = build()
    optimizer = Adafactor(model.parameters(), lr=1e-2, step_in_backward=1)
    train(model, optimizer, 1)
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="nothing left to clip"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), **{"max_norm": torch.inf} | options)
