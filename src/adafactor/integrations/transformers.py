"""Hugging Face `Trainer`: `enable()` puts this package behind `optim="adafactor"`; TRL's trainers are `Trainer`s."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

from transformers import Trainer

from adafactor._optimizer import Adafactor
from adafactor.compat import TransformersAdafactor

_NAME = "get_optimizer_cls_and_kwargs"
_original: Any = None  # what stood there, while ours does


def enable() -> None:
    """Let `TrainingArguments(optim="adafactor")` mean this package's; `disable()` undoes it.

    The steps are those of transformers' Adafactor as `Trainer` builds it: the learning rate is `learning_rate`, neither
    relative nor scaled. `optim_args`, which `Trainer` ignores for its own, takes every argument of `Adafactor`:
    `"beta1=0.9,momentum_dtype=bfloat16,eps=(1e-30,1e-3),step_in_backward=accelerate"`.
    """
    global _original
    if _original is None:
        _original = vars(Trainer)[_NAME]
        setattr(Trainer, _NAME, staticmethod(_optimizer_cls_and_kwargs))


def disable() -> None:
    """Let `optim="adafactor"` mean transformers' own again."""
    global _original
    if _original is not None:
        setattr(Trainer, _NAME, _original)
        _original = None


def _optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
    if args.optim != "adafactor":
        return _original.__func__(args, model)
    arguments = {"lr": args.learning_rate, "scale_parameter": False, "relative_step": False}
    arguments |= _parsed(args.optim_args)
    if arguments.get("step_in_backward") is not None:
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm must be 0 with step_in_backward, got {args.max_grad_norm}: gradients are applied and "
                "freed before their norm is known; updates are clipped instead (clip_threshold, on by default)"
            )
        if args.fp16:
            raise ValueError(
                "fp16=True scales gradients, and step_in_backward would apply them as they are; use bf16=True, or "
                "leave step_in_backward out"
            )
    return TransformersAdafactor, arguments


def _parsed(text: str | None) -> dict[str, Any]:
    """`"beta1=0.9,eps=(1e-30,1e-3)"` as keyword arguments; what is no literal of Python's is a string."""
    known = [name for name in inspect.signature(Adafactor).parameters if name != "params"]
    arguments = {}
    for part in re.split(r",(?![^(]*\))", text) if text else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in known:
            raise ValueError(
                f"optim_args must be name=value,name=value with arguments of Adafactor, got {part.strip()!r}; it has "
                + ", ".join(known)
            )
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments
