"""The rows of ``adafactor plan``: ways to train with Adafactor, beside AdamW's and Lion's, and what each takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from adafactor import memory
from adafactor.cli._errors import UserError

Row = dict[str, Any]
MOST_RANKS = 1 << 20
IN_BACKWARD, _SUFFIX = "Adafactor, stepping in backward", ", in backward"


@dataclass(frozen=True)
class Mode:
    """A row.

    Args:
        name: what the JSON calls it.
        title: what the table and the picture call it.
        description: how one gets it.
        optimizer: the row of ``memory.report``.
        config: the arguments of ``Adafactor``.
        dtype: of the weights and gradients.
        in_backward: with ``step_in_backward``.
    """

    name: str
    title: str
    description: str
    optimizer: str = "Adafactor"
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    dtype: torch.dtype = torch.bfloat16
    in_backward: bool = False

    @property
    def ours(self) -> bool:
        return self.optimizer == "Adafactor"

    @property
    def group(self) -> str:
        """The heading that the table has it under."""
        return IN_BACKWARD if self.in_backward else "Adafactor" if self.ours else "AdamW and Lion"


_INT8 = {"beta1": 0.9, "momentum_dtype": "int8"}
# What is kept of a parameter beside its gradient, from the most to the least.
_PLAIN = (
    Mode("float32", "float32", "float32 weights", dtype=torch.float32),
    Mode(
        "24-bit-int8-momentum",
        "24-bit, int8 momentum",
        "weight_bits=24, beta1=0.9, momentum_dtype=int8",
        config={"weight_bits": 24, **_INT8},
    ),
    Mode(
        "bfloat16-momentum",
        "bfloat16 momentum",
        "beta1=0.9, momentum_dtype=bfloat16",
        config={"beta1": 0.9, "momentum_dtype": "bfloat16"},
    ),
    Mode("32-bit", "32-bit weights", "weight_bits=32: the bits of float32", config={"weight_bits": 32}),
    Mode("int8-momentum", "int8 momentum", "beta1=0.9, momentum_dtype=int8", config=_INT8),
    Mode("24-bit", "24-bit weights", "weight_bits=24", config={"weight_bits": 24}),
    Mode("bfloat16", "bfloat16", "bfloat16 weights, stochastic rounding, no momentum"),
)
MODES = (
    Mode("adamw-float32", "AdamW, float32", "fused, all in float32", "AdamW", dtype=torch.float32),
    Mode(
        "adamw-mixed",
        "AdamW, mixed precision",
        "bfloat16 weights and gradients, float32 master weights and moments",
        "AdamW, mixed precision",
    ),
    Mode("adamw-bfloat16", "AdamW, bfloat16", "fused, all in bfloat16", "AdamW"),
    Mode("adamw-8bit", "AdamW, 8-bit", "bitsandbytes', bfloat16 weights", "AdamW, 8-bit"),
    Mode("lion", "Lion, bfloat16", "all in bfloat16", "Lion"),
    *_PLAIN,
    *(
        Mode(
            f"{mode.name}-in-backward",
            f"{mode.title}{_SUFFIX}",
            f"{mode.description}; step_in_backward()",
            config=mode.config,
            dtype=mode.dtype,
            in_backward=True,
        )
        for mode in _PLAIN
    ),
)
LEAST = MODES[-1]


def measure(model: nn.Module, ranks: int, room: float) -> dict[str, Any]:
    """One table: every mode's bytes on each of ``ranks`` devices, and how much of ``room`` they leave.

    Raises:
        UserError: the model has parameters that Adafactor does not take.
    """
    rows, others = [], dict[torch.dtype, memory.Report]()
    for mode in MODES:
        if mode.ours:
            report = planned(model, mode, ranks)
        else:
            if mode.dtype not in others:
                others[mode.dtype] = planned(model, mode, ranks)
            report = others[mode.dtype]
        parts = asdict(next(row for row in report.rows if row.optimizer == mode.optimizer))
        total = sum(nbytes for kind, nbytes in parts.items() if kind != "optimizer")
        rows.append(
            {
                "name": mode.name,
                "title": mode.title,
                "short": mode.title.removesuffix(_SUFFIX),
                "group": mode.group,
                "description": mode.description,
                "ours": mode.ours,
                **parts,
                "total": total,
                "bytes_per_parameter": total / report.parameters,
                "left": round(room - total),
                "fits": total <= room,
            }
        )
        last = report
    return {"ranks": ranks, "parameters": last.parameters, "crossing": last.crossing, "rows": rows}


def planned(model: nn.Module, mode: Mode, ranks: int) -> memory.Report:
    """The report of a mode; the model keeps its dtype.

    Raises:
        UserError: the model has parameters that Adafactor does not take.
    """
    try:
        model.to(mode.dtype)
        return memory.report(model, ranks=ranks, in_backward=mode.in_backward, **mode.config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"SOURCE: {error}") from error


def enough_ranks(model: nn.Module, room: float) -> int | None:
    """The fewest ranks, a power of two up to 1,024, over which the least mode fits; None where none does."""
    for power in range(11):
        if planned(model, LEAST, 1 << power).rows[0].total <= room:
            return 1 << power
    return None
