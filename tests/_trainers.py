"""What the tests of trainers share. Nothing here is itself a test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from adafactor import _in_backward_guards

accelerate_state = pytest.importorskip("accelerate.state", reason="needs the package accelerate")
transformers = pytest.importorskip("adafactor.integrations.transformers", reason="needs the package transformers")

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "momentum_dtype": "bfloat16"}
IN_BACKWARD = SETTINGS | {"step_in_backward": "accelerate"}
# Eleven batches of four in groups of three: the last one of an epoch is shorter.
BATCHES, GROUPS = 11, [(0, 3), (3, 6), (6, 9), (9, 11)]


@pytest.fixture(autouse=True)
def everything_is_put_back() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.disable()
    for handle in list(_in_backward_guards.live):
        handle.remove()
    accelerate_state.AcceleratorState._reset_state(True)
    accelerate_state.GradientState._reset_state()


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Weights, statistics and counts."""
    seen = {name: p.detach().clone() for name, p in model.named_parameters()}
    for key, state in optimizer.state_dict()["state"].items():
        seen |= {f"{key}.{name}": value.clone() for name, value in state.items()}
    return seen
