"""The optimizers by name: what each is, the learning rate it gets, and where that number comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch

from adafactor import Adafactor, recipes
from adafactor.cli._baselines import Lion, NesterovAdamW
from adafactor.cli._errors import UserError

GAP_NOISE = 0.04  # how far the gap between two tuned optimizers moved from seed to seed in the sweep, at most
Named = Iterable[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True)
class Contender:
    """One optimizer as ``compare`` and ``train`` run it.

    Args:
        name: what the command line calls it.
        title: what tables and pictures call it.
        phrase: what a sentence calls it, so that nobody is credited for another's Nesterov step.
        description: one line for the report.
        lr: the peak of the schedule; None when it makes its own rate and no schedule applies.
        grid: the learning rates ``benchmarks/sweep.py`` tried.
        swept_loss: what the sweep measured at ``lr``: nats per byte at the default setup, mean of three seeds.
        make: builds it from named parameters and a learning rate.
    """

    name: str
    title: str
    phrase: str
    description: str
    lr: float | None
    grid: tuple[float, ...]
    swept_loss: float
    make: Callable[[Named, float | None], torch.optim.Optimizer]

    @property
    def lr_origin(self) -> str:
        """Where ``lr`` comes from."""
        if self.lr is None:
            return "not tuned: the paper's defaults have no learning rate to tune"
        tried = ", ".join(f"{lr:g}" for lr in self.grid)
        return f"tuned: best of {tried} over three seeds at the default size (benchmarks/sweep.py)"


_ALL = (
    Contender(
        "adafactor",
        "Adafactor",
        "Adafactor with Nesterov momentum",
        "momentum 0.9 kept in bfloat16, Nesterov steps, scaled by the RMS of each weight matrix",
        5e-2,
        (2.5e-2, 5e-2, 1e-1),
        1.699,
        lambda named, lr: Adafactor(
            named, **recipes.adamw_like(lr, nesterov=True, scale_parameter=True, momentum_dtype="bfloat16")
        ),
    ),
    Contender(
        "adafactor-paper",
        "Adafactor (paper)",
        "Adafactor with the paper's defaults",
        "the paper's defaults: no momentum, relative step, scaled by the RMS of each weight matrix",
        None,
        (),
        1.891,
        lambda named, lr: Adafactor(named, **recipes.paper()),
    ),
    Contender(
        "adamw",
        "AdamW",
        "plain AdamW",
        "torch.optim.AdamW(fused=True), betas (0.9, 0.999)",
        3e-3,
        (1.5e-3, 3e-3, 6e-3),
        1.755,
        lambda named, lr: torch.optim.AdamW(named, cast(float, lr), weight_decay=0.0, fused=True),
    ),
    Contender(
        "adamw-nesterov",
        "AdamW + Nesterov",
        "AdamW with the same Nesterov step",
        "AdamW with the Nesterov step of Adafactor's recipe, betas (0.9, 0.999)",
        3e-3,
        (1.5e-3, 3e-3, 6e-3),
        1.700,
        lambda named, lr: NesterovAdamW(named, cast(float, lr)),
    ),
    Contender(
        "lion",
        "Lion",
        "Lion",
        "the sign of an average, betas (0.9, 0.99)",
        1e-3,
        (5e-4, 1e-3, 2e-3),
        1.816,
        lambda named, lr: Lion(named, cast(float, lr)),
    ),
)
CONTENDERS = {contender.name: contender for contender in _ALL}


def find(name: str, option: str) -> Contender:
    """The contender called ``name``.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in CONTENDERS:
        raise UserError(f"{option}: there is no optimizer called {name!r}; choose from {', '.join(CONTENDERS)}")
    return CONTENDERS[name]


def checked_lr(contender: Contender, lr: float | None, option: str = "--lr") -> float | None:
    """``lr``, or the contender's own when it is None.

    Raises:
        UserError: ``lr`` is not a positive number, or the contender makes its own rate.
    """
    if lr is None:
        return contender.lr
    if contender.lr is None:
        raise UserError(f"{option}: {contender.name} makes its own learning rate; leave {option} out for it")
    if not 0 < lr < float("inf"):
        raise UserError(f"{option} must be a positive number, got {lr:g} for {contender.name}")
    return lr
