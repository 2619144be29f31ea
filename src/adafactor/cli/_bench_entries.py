"""What ``adafactor bench`` times: ours, every other Adafactor, and the two baselines."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from adafactor import Adafactor
from adafactor.cli._errors import UserError

LR = 1e-3
OURS: dict[str, Any] = {"lr": LR, "scale_parameter": True}
Named = Sequence[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True)
class Entry:
    """One optimizer of the table. All of them: lr 1e-3, no weight decay, no momentum unless the title says so.

    Args:
        name: what the command line calls it.
        title: what the table and the picture call it.
        description: how it was built, and where it does less or more than ours.
        package: the distribution that has it.
        make: builds it from named parameters and the backend asked for, which only ours looks at.
        config: the arguments of ``Adafactor``; empty where it is not ours.
        copies: float32 copies of the largest tensor that its step makes, as a rule; for the memory check.
        whole_copies: such copies of all weights.
        passes: how often a step reads or writes memory the size of the weights, in their dtype, if it has to be known.
    """

    name: str
    title: str
    description: str
    package: str
    make: Callable[[Named, str], torch.optim.Optimizer]
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    copies: int = 0
    whole_copies: int = 0
    passes: int | None = None

    @property
    def installed(self) -> bool:
        return find_spec(self.package.replace("-", "_")) is not None

    @property
    def version(self) -> str | None:
        """Of its package; None where nobody wrote it down."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def build(self, named: Named, backend: str) -> torch.optim.Optimizer:
        """The optimizer. What a foreign package says while it is imported goes to stderr, its warnings nowhere."""
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.make(named, backend)


def _ours(name: str, title: str, description: str, config: dict[str, Any], passes: int | None) -> Entry:
    def make(named: Named, backend: str) -> torch.optim.Optimizer:
        return Adafactor(named, **config, backend=backend)

    return Entry(name, title, description, "adafactor", make, config, passes=passes)


def _theirs(
    name: str,
    title: str,
    package: str,
    module: str,
    kind: str,
    arguments: dict[str, Any],
    note: str = "",
    copies: int = 0,
    whole_copies: int = 0,
    passes: int | None = None,
) -> Entry:
    def make(named: Named, backend: str) -> torch.optim.Optimizer:
        # Not all of them take named parameters.
        return getattr(importlib.import_module(module), kind)([p for _, p in named], lr=LR, **arguments)

    shown = ", ".join([f"lr={LR:g}", *(f"{key}={value}" for key, value in arguments.items())])
    description = f"{module}.{kind}({shown})" + f"; {note}" * bool(note)
    return Entry(name, title, description, package, make, copies=copies, whole_copies=whole_copies, passes=passes)


ADAFACTOR = _ours("adafactor", "adafactor", "lr=0.001, scale_parameter=True", OURS, passes=4)
MOMENTUM = _ours(
    "adafactor-momentum",
    "adafactor, momentum",
    "lr=0.001, scale_parameter=True, beta1=0.9, momentum_dtype=bfloat16",
    OURS | {"beta1": 0.9, "momentum_dtype": "bfloat16"},
    passes=None,
)
ADAMW = _theirs(
    "adamw", "AdamW, fused", "torch", "torch.optim", "AdamW", {"weight_decay": 0.0, "fused": True}, passes=7
)
SGD = _theirs(
    "sgd", "SGD, fused", "torch", "torch.optim", "SGD", {"fused": True}, "one pass over the memory: nothing is faster",
    passes=3,
)  # fmt: skip
EIGHT_BIT = _theirs(
    "adamw-8bit", "AdamW, 8-bit", "bitsandbytes", "bitsandbytes.optim", "AdamW8bit", {"weight_decay": 0.0},
    "moments in one byte",
)  # fmt: skip
_ALL = (
    ADAFACTOR,
    _theirs("torch", "torch.optim", "torch", "torch.optim", "Adafactor", {}, copies=3),
    _theirs(
        "transformers",
        "transformers",
        "transformers",
        "transformers",
        "Adafactor",
        {"relative_step": False, "scale_parameter": True},
        copies=5,
    ),
    _theirs(
        "timm", "timm", "timm", "timm.optim", "Adafactor", {}, "it computes RMS(p) and does not use it beside an lr",
        copies=5,
    ),
    _theirs(
        "timm-bv",
        "timm, big_vision",
        "timm",
        "timm.optim",
        "AdafactorBigVision",
        {"momentum": None, "clipping_threshold": 1.0},
        "it knows no scaling by RMS(p), and does less for it",
        copies=4,
    ),
    _theirs(
        "pytorch-optimizer",
        "pytorch-optimizer",
        "pytorch-optimizer",
        "pytorch_optimizer",
        "AdaFactor",
        {"betas": (None, 0.999), "relative_step": False, "scale_parameter": True},
        copies=2,
        whole_copies=1,
    ),
    EIGHT_BIT,
)  # fmt: skip
ENTRIES = {entry.name: entry for entry in _ALL}
BASELINES = (ADAMW, SGD)


def choose(text: str | None, momentum: bool) -> tuple[list[Entry], list[str]]:
    """The optimizers asked for, or all that are installed, and the baselines; and the packages that are missing.

    Raises:
        UserError: a name is unknown, named twice, or not installed.
    """
    if text is None:
        chosen = [entry for entry in ENTRIES.values() if entry.installed]
        missing = list(dict.fromkeys(entry.package for entry in ENTRIES.values() if not entry.installed))
    else:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in ENTRIES:
                raise UserError(
                    f"--optimizers: there is no optimizer called {name!r}; choose from {', '.join(ENTRIES)} "
                    "(fused AdamW and SGD are always timed)"
                )
            if not ENTRIES[name].installed:
                raise UserError(f"--optimizers: {name} is not installed; pip install {ENTRIES[name].package}")
        if not names:
            raise UserError(f"--optimizers names none; choose from {', '.join(ENTRIES)}")
        if len(names) != len(set(names)):
            raise UserError(f"--optimizers names one twice: {text}")
        chosen, missing = [ENTRIES[name] for name in names], []
    if momentum:
        chosen.insert(ADAFACTOR in chosen and chosen.index(ADAFACTOR) + 1, MOMENTUM)
    return [*chosen, *BASELINES], missing
