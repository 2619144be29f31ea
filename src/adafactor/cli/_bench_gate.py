"""The correctness gate of ``adafactor bench``: ours against the same steps in float64, before anything is timed.

Before every step the float64 copy takes over the weights and the momentum, which it can hold exactly; its statistics
run free. Afterwards

- statistics agree to 1e-5: a float32 sum of n positive numbers, n <= 300 here, is off by some sqrt(n) x 2^-24, 1e-6;
- weights agree to 3e-5 of the step, since R, C and three means enter it under a root, and to their own rounding: one
  spacing of float32, and one of the 16-bit format for stochastic rounding, which takes one of the two neighbours;
- rounding in 16 bits has no bias along the step: the mean over N elements of a number within one spacing, whose
  variance is at most 1/4, stays within 5 / (2 sqrt(N)). Updates that are lost or turned around show here, also those
  that are smaller than a spacing.

The learning rate alternates between the one that is timed and a large one, whose steps span many spacings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adafactor import Adafactor
from adafactor.cli._bench_entries import LR, Entry
from adafactor.cli._errors import UserError

SHAPES = ((), (1,), (7,), (127,), (3, 5), (1, 40), (33, 47), (123, 31), (300, 130), (40, 3, 3, 3), (3, 37, 41), (0, 8))
RATES = (LR, 0.3) * 3
STATISTICS = 1e-5
STEP = 3e-5


@dataclass(frozen=True)
class Difference:
    """The worst element of one tensor after one step."""

    what: str
    shape: str
    step: int
    got: float
    expected: float
    allowed: float


@dataclass(frozen=True)
class Verdict:
    """What the gate found for one optimizer, dtype and number of threads.

    Attributes:
        differences: everything that was not within its tolerance.
        worst: the largest error as a share of its tolerance; None where something was not even a number.
    """

    title: str
    dtype: str
    threads: int
    differences: tuple[Difference, ...]
    worst: float | None


def check(entry: Entry, backend: str, dtype: torch.dtype, device: str) -> Verdict:
    """Run ``entry`` and its float64 counterpart side by side on small shapes, odd ones among them.

    Raises:
        UserError: the backend does not take these parameters.
    """
    generator = torch.Generator().manual_seed(0)
    named = [
        (f"{i}", torch.nn.Parameter(_weights(shape, generator).to(device, dtype))) for i, shape in enumerate(SHAPES)
    ]
    exact = [(name, torch.nn.Parameter(p.detach().to(torch.float64, copy=True))) for name, p in named]
    oracle = Adafactor(exact, **{**entry.config, "momentum_dtype": "float32", "backend": "reference"})
    gate = _Gate(dtype)
    try:
        optimizer = entry.build(named, backend)
        for step, lr in enumerate(RATES, 1):
            for _, p in named:
                p.grad = _gradient(p.shape, generator).to(device, dtype)
            for group in (*optimizer.param_groups, *oracle.param_groups):
                group["lr"] = lr
            before = [
                _take_over(p, q, optimizer.state[p], oracle.state[q])
                for (_, p), (_, q) in zip(named, exact, strict=True)
            ]
            optimizer.step()
            oracle.step()
            for (_, p), (_, q), old in zip(named, exact, before, strict=True):
                gate.compare(step, p, q, old, optimizer.state[p], oracle.state[q])
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"--backend {backend}: {error}") from error
    gate.compare_bias()
    name = str(dtype).removeprefix("torch.")
    worst = gate.worst if math.isfinite(gate.worst) else None
    return Verdict(entry.title, name, torch.get_num_threads(), tuple(gate.differences), worst)


def _weights(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Vectors start at zero, as biases do: their step is scaled by eps2."""
    return 0.05 * (len(shape) != 1) * torch.randn(tuple(shape), generator=generator)


def _gradient(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Rows of very different sizes; now and then one of zeros, as for a word that was not seen."""
    gradient = 1e-2 * torch.randn(tuple(shape), generator=generator)
    if len(shape) > 1:
        sizes = torch.randn(shape[0], generator=generator).exp()
        sizes[torch.rand(shape[0], generator=generator) < 0.05] = 0
        gradient *= sizes.view(-1, *[1] * (len(shape) - 1))
    return gradient


def _take_over(p: Tensor, q: Tensor, state: dict[str, Any], exact: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Bring the float64 copy to where ours is; what both then have: weights and momentum, in float64."""
    q.grad = p.grad.double() if p.grad is not None else None
    with torch.no_grad():
        q.copy_(p)
        if "exp_avg" in exact:
            exact["exp_avg"].copy_(state["exp_avg"])
            return q.detach().clone(), exact["exp_avg"].clone()
    return q.detach().clone(), None


class _Gate:
    """Gathers differences, and the rounding errors along the steps."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.narrow = dtype, dtype.itemsize < 4
        self.differences: list[Difference] = []
        self.worst = self.bias = 0.0
        self.elements = 0

    def compare(
        self,
        step: int,
        p: Tensor,
        q: Tensor,
        old: tuple[Tensor, Tensor | None],
        state: dict[str, Any],
        exact: dict[str, Any],
    ) -> None:
        """One parameter after a step, ours (p) and the float64 one (q); ``old`` is what they had before."""
        shape = "x".join(map(str, p.shape)) or "scalar"
        weights, momentum = old
        got, expected = p.detach().double(), q.detach()
        moved = weights - expected
        reach = moved.abs() if momentum is None else moved.abs() + momentum.abs()
        rounding = spacing(torch.maximum(got.abs(), expected.abs()), self.dtype)
        allowed = STEP * reach + spacing(expected, torch.float32) + (rounding if self.narrow else 0)
        self._note("weights", shape, step, got, expected, allowed)
        if self.narrow:
            along = moved.sign() * (got - expected) / rounding
            self.bias += float(along.sum())
            self.elements += int(moved.count_nonzero())
        for name, value in exact.items():
            if name not in state:
                self.differences.append(Difference(f"{name} is missing", shape, step, 0.0, 0.0, 0.0))
                continue
            mine = state[name].double()
            allowed = STATISTICS * value.double().abs() if name != "step" else torch.zeros_like(mine)
            if momentum is not None and name == "exp_avg":
                room = spacing(torch.maximum(mine.abs(), value.abs()), state[name].dtype)
                allowed = STEP * (value.abs() + momentum.abs()) + spacing(value, torch.float32) + room
            self._note(name, shape, step, mine, value.double(), allowed)

    def compare_bias(self) -> None:
        """The mean of all rounding errors, in spacings, along the steps."""
        if self.elements:
            limit = torch.tensor(5 / (2 * math.sqrt(self.elements)), dtype=torch.float64)
            mean = torch.tensor(self.bias / self.elements, dtype=torch.float64)
            self._note("rounding's bias", "all", len(RATES), mean, torch.zeros_like(mean), limit)

    def _note(self, what: str, shape: str, step: int, got: Tensor, expected: Tensor, allowed: Tensor) -> None:
        if not got.numel():
            return
        got, expected, allowed = (t.reshape(-1) for t in (got, expected.expand_as(got), allowed.expand_as(got)))
        error = (got - expected).abs()
        share = torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=math.inf)
        worst = int(share.argmax())
        self.worst = max(self.worst, float(share[worst]))
        if share[worst] > 1:
            numbers = (float(t[worst]) for t in (got, expected, allowed))
            self.differences.append(Difference(what, shape, step, *numbers))


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from |x| to the next number of ``dtype``, in float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.smallest_normal))  # |x| in [0.5, 1) 2^exponent
    return info.eps * torch.exp2(exponent.double() - 1)
