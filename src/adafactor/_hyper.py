"""Hyperparameters: their defaults, their ranges and every contradiction between them.

A param group holds plain values only (numbers and strings), so that any checkpoint writer can store it.
`resolve` turns what a user wrote into such a group; `Hyper.of` reads a group back, checked.
"""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

PARAMETER_DTYPES = ("float32", "bfloat16", "float16", "float64")
MOMENTUM_DTYPES = ("float32", "bfloat16", "int8")
BACKENDS = ("auto", "reference", "cpu", "triton")
FACTOR_RULES = ("auto", "last2", "first2", "largest2", "none")  # or a function of (name, shape)
RELATIVE_STEP_CAP = 1e-2  # the paper's rho_t never exceeds this when no lr is given
SMALLEST_EPS1 = 1e-37  # float32 has no normal number below 1.2e-38

Lr = float | torch.Tensor


def dtype_name(dtype: torch.dtype | str) -> str:
    """`torch.bfloat16` -> `"bfloat16"`; names pass through."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


@dataclass(frozen=True)
class Hyper:
    """One param group's hyperparameters, except lr, which a scheduler may change at any time.

    Defaults are those of `Adafactor`, whose docstring explains each of them.
    """

    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float | None = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    weight_decay: float = 0.0
    scale_parameter: bool = True
    relative_step: bool = True
    warmup_init: bool = False
    beta2: float | None = None
    beta2_cap: float | None = None
    momentum_mode: str = "scaled"
    momentum_dtype: str = "float32"
    nesterov: bool = False
    weight_decay_mode: str = "lr"
    factor: str = "auto"
    min_dim_size_to_factor: int = 32
    rms_scope: str = "matrix"
    maximize: bool = False
    rounding: str = "stochastic"
    weight_bits: int | None = None
    seed: int = 0

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Hyper:
        """The hyperparameters of a resolved param group."""
        values = tuple(group[name] for name in _NAMES)
        try:
            return _hyper(*values)
        except TypeError:  # a value that cannot be hashed: a list, say
            return cls(*values)

    @property
    def momentum(self) -> bool:
        return bool(self.beta1)

    def __post_init__(self) -> None:
        if not isinstance(self.eps, (tuple, list)) or len(self.eps) != 2:
            raise ValueError(f"eps must be a pair (eps1, eps2), got {self.eps!r}; the default is (1e-30, 1e-3)")
        eps1 = _number("eps[0]", self.eps[0], low=SMALLEST_EPS1, fix="unseen rows need it in float32; use 1e-30")
        plain = {
            "eps": (eps1, _number("eps[1]", self.eps[1], low=0.0)),
            "clip_threshold": _number("clip_threshold", self.clip_threshold, above=0.0, optional=True),
            "decay_rate": _number("decay_rate", self.decay_rate, high=0.0, fix="0.8 in other packages is -0.8 here"),
            "beta1": _number("beta1", self.beta1, low=0.0, below=1.0, optional=True),
            "beta2": _number("beta2", self.beta2, low=0.0, below=1.0, optional=True),
            "beta2_cap": _number("beta2_cap", self.beta2_cap, low=0.0, below=1.0, optional=True),
            "weight_decay": _number("weight_decay", self.weight_decay, low=0.0),
            "min_dim_size_to_factor": _integer("min_dim_size_to_factor", self.min_dim_size_to_factor, low=0),
            "seed": _integer("seed", self.seed),
            "momentum_dtype": dtype_name(self.momentum_dtype),
        }
        for name in ("scale_parameter", "relative_step", "warmup_init", "nesterov", "maximize"):
            _choice(name, getattr(self, name), (True, False))
            plain[name] = bool(getattr(self, name))
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        _choice("momentum_mode", self.momentum_mode, ("scaled", "unscaled"))
        _choice("momentum_dtype", self.momentum_dtype, MOMENTUM_DTYPES)
        _choice("weight_decay_mode", self.weight_decay_mode, ("lr", "scaled_lr", "independent", "lr_squared"))
        _choice("rms_scope", self.rms_scope, ("matrix", "tensor"))
        _choice("rounding", self.rounding, ("stochastic", "nearest"))
        _choice("weight_bits", self.weight_bits, (None, 24, 32))
        if not isinstance(self.factor, str) or not self.factor.startswith("["):  # the views that a function chose
            _choice("factor", self.factor, FACTOR_RULES)
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.warmup_init and not self.relative_step:
            raise ValueError("warmup_init=True is a form of relative_step, which is off; add relative_step=True")
        if self.beta2 is not None and self.decay_rate != Hyper.decay_rate:
            raise ValueError(f"beta2={self.beta2} and decay_rate={self.decay_rate} both set beta2_t; give one of them")
        if self.beta2 is not None and self.beta2_cap is not None:
            raise ValueError(f"beta2={self.beta2} and beta2_cap={self.beta2_cap} both set beta2_t; give one of them")


_NAMES = tuple(field.name for field in fields(Hyper))
_hyper = lru_cache(maxsize=1024, typed=True)(Hyper)  # every step asks for every group's

# What Adafactor's arguments are before `resolve`: lr decides about scale_parameter and relative_step.
DEFAULTS: dict[str, Any] = {
    "lr": None,
    **{field.name: field.default for field in fields(Hyper)},
    "scale_parameter": None,
    "relative_step": None,
}


def resolve(group: dict[str, Any]) -> None:
    """Make a param group as the user wrote it complete, in place: plain values only, nothing left to be decided.

    `group["rho"]` is None where lr is an input. Without an lr it is the relative step of the last update, of which
    `group["lr"]` is a copy for loggers and schedulers to read; `group["updates"]` counts the updates behind it, those
    that were skipped for a non-finite gradient included.
    """
    for name in ("backend", "step_in_backward"):
        if name in group:
            raise ValueError(f"{name}={group[name]!r} belongs to the optimizer, not to a param group")
    lr, relative, scale = group["lr"], group["relative_step"], group["scale_parameter"]
    for name in ("relative_step", "scale_parameter"):
        _choice(name, group[name], (None, True, False))
    if lr is None and relative is not None and not relative:
        raise ValueError("lr=None means the paper's relative step, which relative_step=False switches off; give an lr")
    group["lr"] = check_lr(lr)
    if relative is not None and not relative and scale is None:
        warnings.warn(
            "relative_step=False without scale_parameter: the step is not scaled by RMS(p) here, as it would be in "
            "transformers; say scale_parameter=False or True to choose",
            stacklevel=caller_level(),
        )
    group["relative_step"] = lr is None if relative is None else bool(relative)
    group["scale_parameter"] = lr is None if scale is None else bool(scale)
    hyper = Hyper.of(group)
    group.update({name: getattr(hyper, name) for name in _NAMES})
    group["updates"] = 0
    group["rho"] = None
    if lr is None:
        group["rho"] = group["lr"] = 1e-6 if hyper.warmup_init else RELATIVE_STEP_CAP


def check_lr(lr: Any) -> Lr | None:
    """The same lr as None, a float or a tensor with one element."""
    if lr is None:
        return None
    if not isinstance(lr, torch.Tensor):
        return _number("lr", lr, low=0.0)
    if lr.numel() != 1 or lr.is_complex():
        raise ValueError(f"lr must be a real number or a tensor with one element, got shape {tuple(lr.shape)}")
    if lr.device.type == "cpu":  # elsewhere, reading its value would wait for the device
        _number("lr", lr.item(), low=0.0)
    return lr


def check_backend(backend: Any) -> None:
    _choice("backend", backend, BACKENDS)


def _number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    optional: bool = False,
    fix: str = "",
) -> float | None:
    if value is None and optional:
        return None
    bounds = [f">= {low}" * (low > -math.inf), f"<= {high}" * (high < math.inf)]
    bounds += [f"> {above}" * (above > -math.inf), f"< {below}" * (below < math.inf)]
    rule = " and ".join(filter(None, bounds)) or "finite"
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and low <= number <= high and above < number < below):
        rule += " or None" * optional
        raise ValueError(f"{name} must be a number {rule}, got {value!r}" + f"; {fix}" * bool(fix))
    return number


def _integer(name: str, value: Any, low: float = -math.inf) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer{f' >= {low}' * (low > -math.inf)}, got {value!r}")
    return int(value)


def _choice(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def caller_level() -> int:
    """The stacklevel of the first frame outside this package and torch: that line gets the warning."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("adafactor.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level
