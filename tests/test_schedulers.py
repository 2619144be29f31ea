"""Every scheduler of torch and of transformers: the lr of each step is the one that AdamW gets, and it is what acts."""

import inspect
import warnings

import pytest
import torch
import transformers
from torch.optim import lr_scheduler, swa_utils
from transformers.trainer_utils import SchedulerType

from adafactor import Adafactor

STEPS = 24
half = lambda step: 0.5 ** (step // 5)  # noqa: E731

TORCH = {
    "LambdaLR": {"lr_lambda": half},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "StepLR": {"step_size": 7},
    "MultiStepLR": {"milestones": [3, 9, 20]},
    "ConstantLR": {},
    "LinearLR": {"total_iters": 12},
    "ExponentialLR": {"gamma": 0.8},
    "SequentialLR": {
        "schedulers": lambda o: [lr_scheduler.LinearLR(o, 0.1, total_iters=6), lr_scheduler.CosineAnnealingLR(o, 18)],
        "milestones": [6],
    },
    "ChainedScheduler": {
        "schedulers": lambda o: [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)],
    },
    "CosineAnnealingLR": {"T_max": 10},
    "PolynomialLR": {"total_iters": 20, "power": 2.0},
    "CosineAnnealingWarmRestarts": {"T_0": 5, "T_mult": 2},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 5, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 1e-2, "total_steps": STEPS + 1, "cycle_momentum": False},
    "ReduceLROnPlateau": {"patience": 2, "factor": 0.5, "cooldown": 1},
    "SWALR": {"swa_lr": 1e-4, "anneal_epochs": 8},
}


def of_torch(name, optimizer):
    kind = getattr(lr_scheduler, name, None) or getattr(swa_utils, name)
    arguments = dict(TORCH[name])
    if "schedulers" in arguments:
        arguments["schedulers"] = arguments["schedulers"](optimizer)
        if name == "ChainedScheduler":
            arguments["optimizer"] = optimizer
    return kind(**arguments) if name == "ChainedScheduler" else kind(optimizer, **arguments)


SPECIFIC = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 8},
    "reduce_lr_on_plateau": {"patience": 2},
    "greedy": {"patience": 2},
}


def of_transformers(name, optimizer):
    plain = name in ("reduce_lr_on_plateau", "greedy")
    counts = {} if plain else {"num_warmup_steps": 4, "num_training_steps": STEPS}
    return transformers.get_scheduler(name, optimizer, **counts, scheduler_specific_kwargs=SPECIFIC.get(name))


def courses(schedule, kind, in_backward=False, **arguments):
    """The lr of each group at each step, and how far the weights of each group went."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(40, 40))]}, {"params": [torch.nn.Parameter(torch.ones(8))]}]
    optimizer = kind(groups, **arguments)
    optimizer.param_groups[1]["lr"] = 3e-3
    scheduler = schedule(optimizer)
    if in_backward:
        optimizer.step_in_backward()
    seen, went = [], []
    for step in range(STEPS):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        before = [group["params"][0].detach().clone() for group in groups]
        torch.stack([group["params"][0].sum() for group in groups]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after = [group["params"][0].detach() for group in groups]
        went.append([float((b - a).mean()) for b, a in zip(before, after, strict=True)])
        metric = (1.0 / (step + 1) if step < 6 else 1.0,)
        steps_by_metric = "metrics" in inspect.signature(scheduler.step).parameters
        scheduler.step(*metric if steps_by_metric else ())
    return seen, went


CASES = [(of_torch, name) for name in TORCH] + [(of_transformers, str(name.value)) for name in SchedulerType]


@pytest.mark.parametrize(("source", "name"), CASES, ids=[name for _, name in CASES])
def test_the_lr_of_every_step_is_adamw_s_and_acts(source, name):
    def schedule(optimizer):
        return source(name, optimizer)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step", category=UserWarning)
        theirs, _ = courses(schedule, torch.optim.AdamW, lr=1e-2)
        for in_backward in (False, True):
            ours, went = courses(schedule, Adafactor, in_backward, lr=1e-2)
            assert ours == theirs
            assert len({lr for lrs in ours for lr in lrs}) > 2 or name == "constant"
            # Gradients are all ones, and so is U: weights go as far as lr says.
            torch.testing.assert_close(torch.tensor(went), torch.tensor(ours), rtol=1e-4, atol=2e-7)


def test_no_scheduler_of_torch_is_left_out():
    known = set(lr_scheduler.__all__) - {"LRScheduler"} | {"SWALR"}
    assert known == set(TORCH)


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_schedulers_that_want_to_move_momentum_say_so(name):
    optimizer = Adafactor([torch.nn.Parameter(torch.ones(4))], lr=1e-2, beta1=0.9)
    with pytest.raises(ValueError, match="cycle_momentum"):
        getattr(lr_scheduler, name)(optimizer, **TORCH[name] | {"cycle_momentum": True})
