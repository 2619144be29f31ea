"""Walk two optimizers over a surface and write down everything they do, from their own state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adafactor import Adafactor
from adafactor.cli._errors import UserError
from adafactor.cli._surfaces import Surface

CLIP_THRESHOLD = 1.0  # d
LAYOUTS = {"1x2": (1, 2), "2x1": (2, 1)}


@dataclass(frozen=True)
class Row:
    """One step. Pairs are (x, y); for Adafactor R has one entry per row and C one per column of the point."""

    t: int
    f: float
    p: list[float]  # before the step
    g: list[float]
    R: list[float]
    C: list[float]
    M: list[float]  # momentum; empty without it
    V: list[float]  # Adafactor: R C / mean(R); Adam: the bias-corrected average of g^2
    U: list[float]  # Adafactor: g / sqrt(V), before clipping; Adam: m / (sqrt(V) + eps), bias-corrected
    clip: float  # what U is divided by: max(1, RMS(U) / d); always 1 for Adam
    step: list[float]  # p after - p before

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Walk:
    """All steps of one optimizer, and where they ended."""

    name: str
    settings: dict[str, Any]
    rows: list[Row]
    end: list[float]
    f_end: float

    @property
    def points(self) -> list[list[float]]:
        """Every point visited, the start and the end included."""
        return [*(r.p for r in self.rows), self.end]

    def describe(self) -> str:
        """Its settings in a few words."""
        lr, beta1 = self.settings["lr"], self.settings.get("beta1")
        said = "relative step" if lr is None else f"lr {lr:g}"
        return said if beta1 is None else f"{said}, beta1 {beta1:g}"

    @property
    def losses(self) -> list[float]:
        return [*(r.f for r in self.rows), self.f_end]


def factored_v(state: dict[str, Any], shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R [rows], C [columns] and V = R C / mean(R) [rows, columns], from an Adafactor parameter's state."""
    R = state["exp_avg_sq_row"].detach().reshape(shape[0]).clone()
    C = state["exp_avg_sq_col"].detach().reshape(shape[1]).clone()
    return R, C, (R / R.mean())[:, None] * C[None, :]


def _adafactor_row(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
    R, C, V = factored_v(state, p.shape)
    U = g / V.sqrt()
    rms = math.sqrt(float(U.square().mean()))
    M = _flat(state["exp_avg"]) if "exp_avg" in state else []
    return {
        "R": R.tolist(),
        "C": C.tolist(),
        "M": M,
        "V": _flat(V),
        "U": _flat(U),
        "clip": max(1.0, rms / CLIP_THRESHOLD),
    }


def _adam_row(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
    t = float(state["step"])
    V = state["exp_avg_sq"] / (1 - 0.999**t)
    M = state["exp_avg"] / (1 - 0.9**t)
    return {"R": [], "C": [], "M": _flat(M), "V": _flat(V), "U": _flat(M / (V.sqrt() + 1e-8)), "clip": 1.0}


def _flat(x: torch.Tensor) -> list[float]:
    return x.detach().reshape(-1).tolist()


def _walk(
    name: str,
    settings: dict[str, Any],
    make: Callable[[torch.nn.Parameter], torch.optim.Optimizer],
    inspect: Callable[..., dict[str, Any]],
    surface: Surface,
    start: tuple[float, float],
    layout: str,
    steps: int,
    progress: Callable[[], None],
) -> Walk:
    # float64, so that what is shown is the algorithm and not its rounding
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64).reshape(LAYOUTS[layout]))
    optimizer = make(p)

    def loss() -> torch.Tensor:
        x, y = p.reshape(-1).unbind()
        return surface.f(x, y)

    rows = []
    for t in range(1, steps + 1):
        before = p.detach().clone()
        optimizer.zero_grad()
        f = loss()
        f.backward()
        assert p.grad is not None
        g = p.grad.detach().clone()
        optimizer.step()
        after = p.detach()
        value = float(f.detach())
        if not (bool(torch.isfinite(g.square()).all()) and bool(torch.isfinite(after).all()) and math.isfinite(value)):
            fix = "start nearer the minimum" if t == 1 else "lower --lr"
            raise UserError(
                f"--start {start[0]:g} {start[1]:g} on {surface.name}: {name} must stay where f and its gradient "
                f"squared are finite, but step {t} does not (f = {value:g}); {fix}"
            )
        seen = inspect(before, g, optimizer.state[p])
        rows.append(Row(t=t, f=value, p=_flat(before), g=_flat(g), step=_flat(after - before), **seen))
        progress()
    return Walk(name, settings, rows, _flat(p), float(loss().detach()))


def walk_both(
    surface: Surface,
    start: tuple[float, float],
    layout: str,
    steps: int,
    lr: float,
    relative_step: bool = False,
    beta1: float | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Walk, Walk]:
    """Adafactor and Adam from the same start, the same number of steps; ``progress()`` is called after each.

    Raises:
        UserError: a path reaches a point where the function or its gradient squared is not finite.
    """
    ours: dict[str, Any] = {"lr": None if relative_step else lr, "beta1": beta1, "clip_threshold": CLIP_THRESHOLD}
    adafactor = _walk(
        "Adafactor",
        ours,
        lambda p: Adafactor([p], **ours, factor="last2", min_dim_size_to_factor=0),
        _adafactor_row,
        surface,
        start,
        layout,
        steps,
        progress,
    )
    theirs = {"lr": lr, "betas": [0.9, 0.999], "eps": 1e-8}
    adam = _walk(
        "Adam",
        theirs,
        lambda p: torch.optim.Adam([p], lr=lr, betas=(0.9, 0.999), eps=1e-8),
        _adam_row,
        surface,
        start,
        layout,
        steps,
        progress,
    )
    return adafactor, adam
