"""The optimizers by name: what each is, the learning rate it gets, and where that number comes from."""

from __future__ import annotations

import math
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
class Schedule:
    """What a peak learning rate is multiplied by.

    Args:
        words: the same in words, for the report.
        factor: of step 1, 2, ..., ``steps``, and ``steps``.
    """

    words: str
    factor: Callable[[int, int], float]


def warm_up(share: float, down: Callable[[float], float]) -> Callable[[int, int], float]:
    """Up in a straight line over a share of the steps, then ``down`` of the share of the rest that is over."""

    def factor(step: int, steps: int) -> float:
        warm = max(1, round(share * steps))
        return step / warm if step <= warm else down((step - warm) / (steps - warm + 1))

    return factor


COSINE = Schedule(
    "linear warm-up over 5% of the steps, then a cosine to 0",
    warm_up(0.05, lambda x: 0.5 + 0.5 * math.cos(math.pi * x)),
)
LINEAR = Schedule("linear warm-up over 1% of the steps, then linear to 0", warm_up(0.01, lambda x: 1 - x))
RELATIVE = Schedule("its own: min(1e-2, 1/√t), times the RMS of each weight matrix", lambda step, steps: 1.0)


@dataclass(frozen=True)
class Contender:
    """One optimizer as ``compare`` and ``train`` run it.

    Args:
        name: what the command line calls it.
        title: what tables and pictures call it.
        phrase: what a sentence calls it, so that nobody is credited for another's Nesterov step.
        description: one line for the report.
        lr: the peak of the schedule; None when it makes its own rate.
        make: builds it from named parameters and a learning rate.
        grid: the learning rates ``benchmarks/sweep.py`` tried.
        swept_loss: what the sweep measured at ``lr``: nats per byte at the default setup, mean of three seeds.
        source: where settings that nobody tuned here were published.
        schedule: what ``lr`` is multiplied by.
        clip_norm: what the gradient's global norm is clipped at; None for not at all.
    """

    name: str
    title: str
    phrase: str
    description: str
    lr: float | None
    make: Callable[[Named, float | None], torch.optim.Optimizer]
    grid: tuple[float, ...] = ()
    swept_loss: float | None = None
    source: str = ""
    schedule: Schedule = COSINE
    clip_norm: float | None = 1.0

    @property
    def lr_origin(self) -> str:
        """Where ``lr`` comes from."""
        if self.source:
            return f"published: {self.source}"
        tried = ", ".join(f"{lr:g}" for lr in self.grid)
        return f"tuned: best of {tried} over three seeds at the default size (benchmarks/sweep.py)"


def _with_decay(named: Named, decay: float) -> list[dict[str, object]]:
    """Two param groups: weight decay for matrices, none for biases and norms."""
    named = list(named)
    matrices = [(name, p) for name, p in named if p.ndim > 1]
    rest = [(name, p) for name, p in named if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": rest}]


_ALL = (
    Contender(
        "adafactor",
        "Adafactor",
        "Adafactor with Nesterov momentum",
        "momentum 0.9 kept in bfloat16, Nesterov steps, scaled by the RMS of each weight matrix",
        5e-2,
        lambda named, lr: Adafactor(
            named, **recipes.adamw_like(lr, nesterov=True, scale_parameter=True, momentum_dtype="bfloat16")
        ),
        (2.5e-2, 5e-2, 1e-1),
        1.699,
    ),
    Contender(
        "adafactor-paper",
        "Adafactor (paper)",
        "Adafactor with the paper's defaults",
        "the paper's defaults: no momentum, relative step, scaled by the RMS of each weight matrix",
        None,
        lambda named, lr: Adafactor(named, **recipes.paper()),
        swept_loss=1.891,
        source="Algorithm 6 of arXiv 1804.04235; it has no learning rate to tune",
        schedule=RELATIVE,
    ),
    Contender(
        "adamw",
        "AdamW",
        "plain AdamW",
        "torch.optim.AdamW(fused=True), betas (0.9, 0.999)",
        3e-3,
        lambda named, lr: torch.optim.AdamW(named, cast(float, lr), weight_decay=0.0, fused=True),
        (1.5e-3, 3e-3, 6e-3),
        1.755,
    ),
    Contender(
        "adamw-nesterov",
        "AdamW + Nesterov",
        "AdamW with the same Nesterov step",
        "AdamW with the Nesterov step of Adafactor's recipe, betas (0.9, 0.999)",
        3e-3,
        lambda named, lr: NesterovAdamW(named, cast(float, lr)),
        (1.5e-3, 3e-3, 6e-3),
        1.700,
    ),
    Contender(
        "lion",
        "Lion",
        "Lion",
        "the sign of an average, betas (0.9, 0.99)",
        1e-3,
        lambda named, lr: Lion(named, cast(float, lr)),
        (5e-4, 1e-3, 2e-3),
        1.816,
    ),
    Contender(
        "adafactor-t5",
        "Adafactor (T5)",
        "Adafactor with T5's settings",
        "T5's pretraining: no momentum, relative step, scaled by the RMS of each weight matrix",
        None,
        lambda named, lr: Adafactor(named, **recipes.t5_pretrain()),
        source="T5X's pretrain.gin: 1/sqrt(max(t, 10^4))",
        schedule=RELATIVE,
        clip_norm=None,
    ),
    Contender(
        "adafactor-bert",
        "Adafactor (BERT)",
        "Adafactor with BERT's settings",
        "BERT's momentum, rate and weight decay 0.01, with Adafactor's second moment in Adam's place",
        1e-4,
        lambda named, lr: Adafactor(_with_decay(named, 0.01), **recipes.adamw_like(lr, nesterov=False)),
        source="BERT's, appendix A.2 of arXiv 1810.04805, which trained with Adam",
        schedule=LINEAR,
    ),
    Contender(
        "adafactor-palm",
        "Adafactor (PaLM)",
        "Adafactor with PaLM's settings",
        "PaLM's: momentum 0.9, not factored, scaled by the RMS of each weight matrix, weight decay lr^2",
        None,
        lambda named, lr: Adafactor(named, **recipes.palm(lr=None)),
        source="section 5 of arXiv 2204.02311: 1e-2 for 10,000 steps, then 1/sqrt(t)",
        schedule=RELATIVE,
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
