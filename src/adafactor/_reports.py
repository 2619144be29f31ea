"""What `explain()` and `diagnostics()` return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from adafactor._plan import TensorPlan
from adafactor.backends import Choice, Report


class Row(NamedTuple):
    """How one parameter is treated; `state_bytes` are those on this rank."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    view: str
    factored: bool
    state_bytes: int
    backend: str
    reason: str


class Explanation(list[Row]):
    """One `Row` per parameter; prints as a table."""

    @property
    def state_bytes(self) -> int:
        return sum(row.state_bytes for row in self)

    def __str__(self) -> str:
        lines = [("parameter", "shape", "dtype", "view", "state bytes", "backend")]
        for row in self:
            shape = "x".join(map(str, row.shape)) or "scalar"
            lines.append((row.name, shape, row.dtype, row.view, f"{row.state_bytes:,}", row.backend))
        lines.append(("total", "", "", "", f"{self.state_bytes:,}", ""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join(table + sorted({f"backend {row.backend}: {row.reason}" for row in self}))


class Diagnostics(NamedTuple):
    """One parameter's last update and its counts.

    Attributes:
        updates, skipped: gradients applied, and gradients left out for being non-finite.
        clipped: the share of updates that clipping shortened.
        update_rms: RMS(U) of the last update before clipping, per matrix.
        step_size: alpha of the last update, what lr came to, per matrix.
    """

    updates: int
    skipped: int
    clipped: float
    update_rms: tuple[float, ...]
    step_size: tuple[float, ...]


def explanation_of(choices: Iterable[tuple[TensorPlan, TensorPlan, bool, Choice]]) -> Explanation:
    """Rows from (plan, that of the piece here, whether its state is allocated, backend)."""
    return Explanation(
        Row(
            plan.name,
            plan.shape,
            plan.dtype,
            plan.describe_view(),
            plan.factored,
            piece.nbytes * allocated,  # a frozen parameter has none until it is used
            choice.backend.name,
            choice.reason,
        )
        for plan, piece, allocated, choice in choices
    )


def diagnostics_of(report: Report) -> Diagnostics:
    updates, clipped, skipped = report.counts.tolist()
    return Diagnostics(
        updates=int(updates),
        skipped=int(skipped),
        clipped=clipped / updates if updates else 0.0,
        update_rms=tuple(report.update_rms.tolist()) if updates else (),
        step_size=tuple(report.step_size.tolist()) if updates else (),
    )
