"""What must neither crash the process nor corrupt anything silently, now that raw pointers leave Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from _cases import assert_same_bits, snapshot
from adafactor import Adafactor
from adafactor.backends import cpu

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


def problem(**kwargs: Any) -> tuple[torch.nn.Parameter, Adafactor]:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 50, generator=generator))
    p.grad = torch.randn(40, 50, generator=generator)
    return p, Adafactor([p], **kwargs)


def test_scratch_is_on_the_cpu_wherever_tensors_are_made_by_default():
    (p, optimizer), (twin, other) = problem(beta1=0.9), problem(beta1=0.9)
    other.step()
    with torch.device("meta"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer, p), snapshot(other, twin))


MISSING = {
    "gradient": lambda p, state: p.grad.untyped_storage().resize_(0),
    "weights": lambda p, state: p.untyped_storage().resize_(0),
    "R": lambda p, state: state["exp_avg_sq_row"].untyped_storage().resize_(0),
    "momentum": lambda p, state: state["exp_avg"].untyped_storage().resize_(0),
}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("what", MISSING)
def test_tensors_whose_memory_was_freed_raise(what: str, steps: int):
    """As sharding libraries free weights and gradients between uses."""
    p, optimizer = problem(lr=0.01, beta1=0.9)
    for _ in range(steps):
        optimizer.step()
    MISSING[what](p, optimizer.state[p])
    with pytest.raises(RuntimeError, match="out of bounds for storage of size 0"):
        optimizer.step()


def test_a_gradient_without_memory_raises():
    p, optimizer = problem(lr=0.01)
    p.grad = torch._efficientzerotensor((40, 50))  # pyright: ignore[reportPrivateImportUsage]
    with pytest.raises(RuntimeError, match="ZeroTensor"):
        optimizer.step()


def test_weights_that_are_a_negated_view():
    p = torch.nn.Parameter(torch._neg_view(torch.ones(40, 50)))  # pyright: ignore[reportPrivateImportUsage]
    p.grad = torch.ones(40, 50)
    Adafactor([p], lr=0.5, clip_threshold=None).step()
    assert torch.equal(p, torch.full((40, 50), -1.5))


def test_nothing_to_do():
    cpu.step([])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_mended_behind_autograds_back_move_on(bad: float):
    """The sum of p^2 that was left behind was not finite, so no step was taken that could have noticed the change."""
    p, optimizer = problem()
    good = p.detach().clone()
    with torch.no_grad():
        p[3, 4] = bad
    optimizer.step()
    assert optimizer.diagnostics()["param 0"].skipped == 1
    p.data.copy_(good)
    optimizer.step()
    twin, other = problem()
    other.step()
    assert_same_bits(snapshot(optimizer, p), snapshot(other, twin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_and_gradients_at_odd_addresses(dtype: torch.dtype):
    """As a file that is mapped into memory may have them."""

    def odd(x: Tensor) -> Tensor:
        memory = bytearray(x.numel() * x.itemsize + 1)
        return torch.frombuffer(memory, dtype=dtype, offset=1, count=x.numel()).view(x.shape).copy_(x)

    for shape in [(77,), (40, 50), (300, 301)]:
        taken = []
        for place in (torch.clone, odd):
            generator = torch.Generator().manual_seed(0)
            p = torch.nn.Parameter(place(torch.randn(shape, generator=generator).to(dtype)))
            p.grad = place(torch.randn(shape, generator=generator).to(dtype))
            optimizer = Adafactor([p], beta1=0.9, backend="cpu")
            optimizer.step()
            taken.append(snapshot(optimizer, p))
        assert_same_bits(taken[1], taken[0], str(shape))


def renamed(optimizer: Adafactor, p: Tensor) -> None:
    """The first parameter goes, so "param 1" is now "param 0"."""
    optimizer.param_groups[0]["params"].pop(0)


def reseeded(optimizer: Adafactor, p: Tensor) -> None:
    optimizer.param_groups[0]["seed"] = 7


@pytest.mark.parametrize("change", [renamed, reseeded])
def test_what_was_packed_for_a_parameter_follows_its_plan(change: Callable[[Adafactor, Tensor], None]):
    def run(backend: str) -> Tensor:
        ps = [torch.nn.Parameter(torch.ones(31, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = Adafactor(ps, lr=1e-3, backend=backend)
        for t in range(4):
            for p in ps:
                p.grad = torch.ones(31, dtype=torch.bfloat16)
            if t == 2:
                change(optimizer, ps[1])
                optimizer.state_dict()  # plans anew
            optimizer.step()
        return ps[1]

    assert torch.equal(run("cpu"), run("reference"))


def test_what_was_kept_for_a_parameter_fits_its_new_view():
    """It was one matrix and is now forty: as many sums are kept."""
    views = {"param 0": ((0,), (1,), (2,)), "param 1": ((), (0,), (1, 2))}
    ps = [torch.nn.Parameter(torch.ones(40, 40, 40)) for _ in range(2)]
    optimizer = Adafactor(ps, factor=lambda name, shape: views[name])
    for p in ps:
        p.grad = torch.ones(40, 40, 40)
    optimizer.step()
    optimizer.param_groups[0]["params"].pop(0)
    del optimizer.state[ps[1]]
    optimizer.state_dict()
    optimizer.step()
    kept = optimizer._slots[ps[1]].task.kept.param_sq
    assert kept is not None
    assert kept.shape == (41,)  # and a fingerprint


def test_a_nan_in_the_momentum_reaches_the_weights_whatever_its_bits():
    """CUDA's NaN is 0x7FFFFFFF, which random bits would carry to -0."""
    for bits in (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001):
        for dtype in (torch.bfloat16, torch.float16):
            p = torch.nn.Parameter(torch.ones(77, dtype=dtype))
            p.grad = torch.ones(77, dtype=dtype)
            optimizer = Adafactor([p], lr=0.1, beta1=0.9)
            optimizer.state[p]["exp_avg"][5:9] = torch.from_numpy(np.array([bits], np.uint32).view(np.float32))
            optimizer.step()
            assert p.isnan().nonzero().flatten().tolist() == [5, 6, 7, 8], (hex(bits), dtype)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system cannot fork")
def test_a_forked_process_with_one_thread_steps():
    """As torch has it: with more threads than one, its own operations hang in a forked process, too."""
    script = """
import os, torch
from adafactor import Adafactor
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(600, 700))
p.grad = torch.ones(600, 700)
optimizer = Adafactor([p], lr=0.1)
optimizer.step()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    optimizer.step()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=100)
