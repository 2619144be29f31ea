"""docs/failure-modes.md quotes messages: each is what the library says, and none is quoted that it does not say."""

import re
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from adafactor import Adafactor, compat

PAGE = Path(__file__).parent.parent / "docs" / "failure-modes.md"
QUOTES = dict(re.findall(r"^```text (\S+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def layers():
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))


def backward(model, scale=1.0):
    (model(torch.ones(2, 64)).square().mean() * scale).backward()


def stepping_in_backward(accumulation_steps=1):
    model = layers()
    optimizer = Adafactor(model.named_parameters(), lr=1e-3)
    return model, optimizer, optimizer.step_in_backward(accumulation_steps)


def swallowed_updates():
    weights = torch.nn.Parameter(torch.full((64, 64), 0.02).bfloat16())
    Adafactor([weights], lr=1e-6, rounding="nearest")


def float16_with_more_bits():
    Adafactor([("weight", torch.nn.Parameter(torch.zeros(64, 64).half()))], lr=1e-3, weight_bits=24)


def no_lr():
    Adafactor(layers().parameters(), relative_step=False)


def unscaled():
    Adafactor(layers().parameters(), lr=1e-3, relative_step=False)


def sign_of_decay_rate():
    Adafactor(layers().parameters(), lr=1e-3, decay_rate=0.8)


def two_decays():
    Adafactor(layers().parameters(), lr=1e-3, beta2=0.999, beta2_cap=0.99)


def warmup_without_relative_step():
    Adafactor(layers().parameters(), lr=1e-3, warmup_init=True)


def scheduled_relative_step():
    model = layers()
    optimizer = Adafactor(model.parameters())
    schedule = lr_scheduler.LinearLR(optimizer, 0.5)
    for _ in range(2):
        backward(model)
        optimizer.step()
        schedule.step()


def clipped_in_backward():
    model, _optimizer, _ = stepping_in_backward()
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def a_pass_too_many():
    model, _optimizer, _ = stepping_in_backward()
    backward(model)
    backward(model)


def a_pass_too_few():
    model, optimizer, _ = stepping_in_backward(4)
    for _ in range(3):
        backward(model)
    optimizer.step()


def scaled_in_backward():
    model, _optimizer, _ = stepping_in_backward()
    torch.amp.GradScaler("cpu").scale(model(torch.ones(2, 64)).square().mean()).backward()


def lr_after_backward():
    model, optimizer, _ = stepping_in_backward()
    backward(model)
    optimizer.param_groups[0]["lr"] = 5e-4
    optimizer.step()


def second_handle():
    _, optimizer, _ = stepping_in_backward()
    optimizer.step_in_backward()


def reentrant_checkpoint():
    model, _optimizer, _ = stepping_in_backward()
    inputs = torch.ones(2, 64, requires_grad=True)
    checkpoint(model, inputs, use_reentrant=True).square().mean().backward()


def shared_memory():
    head, embedding = torch.nn.Linear(64, 512, bias=False), torch.nn.Embedding(512, 64)
    head.weight.data = embedding.weight.data
    Adafactor([("embedding", embedding.weight), ("head", head.weight)], lr=1e-3)


def flattened_by_fsdp1():
    flat = torch.nn.Parameter(torch.zeros(4096))
    flat._is_flat_param = True  # pyright: ignore[reportAttributeAccessIssue]
    Adafactor([("_fsdp_wrapped_module._flat_param", flat)], lr=1e-3)


def partitioned_by_zero():
    part = torch.nn.Parameter(torch.zeros(0))
    part.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    Adafactor([("layers.0.weight", part)], lr=1e-3)


def complex_parameter():
    Adafactor([("weight", torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.complex64)))], lr=1e-3)


def checkpoint_of_adamw():
    model = layers()
    theirs = torch.optim.AdamW(model.parameters())
    Adafactor(model.parameters(), lr=1e-3).load_state_dict(theirs.state_dict())


def load_from_transformers(model, **arguments):
    theirs = transformers.Adafactor(model.parameters(), lr=1e-3, relative_step=False, **arguments)
    model.weight.grad = torch.ones_like(model.weight)
    theirs.step()
    Adafactor(model.named_parameters(), lr=1e-3).load_state_dict(theirs.state_dict())


def checkpoint_with_other_views():
    load_from_transformers(torch.nn.Conv2d(64, 64, 3, bias=False))


def checkpoint_with_momentum():
    load_from_transformers(torch.nn.Linear(64, 64, bias=False), beta1=0.9)


def no_counterpart():
    compat.optax(1e-3, decay_offset=100)


def schedule_of_optax():
    compat.optax(lambda step: 1e-3)


CASES = {
    case.__name__.replace("_", "-"): case
    for case in (
        swallowed_updates,
        float16_with_more_bits,
        no_lr,
        unscaled,
        sign_of_decay_rate,
        two_decays,
        warmup_without_relative_step,
        scheduled_relative_step,
        clipped_in_backward,
        a_pass_too_many,
        a_pass_too_few,
        scaled_in_backward,
        lr_after_backward,
        second_handle,
        reentrant_checkpoint,
        shared_memory,
        flattened_by_fsdp1,
        partitioned_by_zero,
        complex_parameter,
        checkpoint_of_adamw,
        checkpoint_with_other_views,
        checkpoint_with_momentum,
        no_counterpart,
        schedule_of_optax,
    )
}


def said(case):
    """The error or, without one, the warning that a user gets to see."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            case()
        except ValueError as error:
            return f"ValueError: {error}"
    [warning] = [each for each in seen if issubclass(each.category, UserWarning)]
    return f"UserWarning: {warning.message}"


@pytest.mark.parametrize("name", QUOTES)
def test_the_page_quotes_what_is_said(name):
    wrapped = textwrap.fill(said(CASES[name]), 120, break_long_words=False, break_on_hyphens=False)
    assert QUOTES[name].rstrip("\n") == wrapped


def test_every_message_here_is_on_the_page():
    assert set(QUOTES) == set(CASES)
