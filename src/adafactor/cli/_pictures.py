"""The pictures of a run: loss over steps, loss over time, memory by component."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from adafactor.cli._results import Result
from adafactor.cli._trace_draw import ADAFACTOR, ADAM, INK, MUTED

Rows = list[dict[str, Any]]

COLORS = {
    "adafactor": ADAFACTOR,
    "adafactor-paper": "#ec8a97",
    "adamw": ADAM,
    "adamw-nesterov": "#7d9bf0",
    "lion": "#3f8f4f",
    "adafactor-t5": "#b5368c",
    "adafactor-bert": "#d0632a",
    "adafactor-palm": "#8a5a2b",
}
COMPONENTS = (("weights", "#3b4a5e"), ("gradients", "#8493a8"), ("state", "#e08a00"), ("activations", "#cfd6df"))
GRID = "#e4e5ea"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def draw(results: list[Result], rows: dict[str, Rows], unit: str) -> dict[str, bytes]:
    """Every picture by its file's name, as PNG; losses are in nats per ``unit``."""
    return {
        "loss-over-steps.png": _picture(partial(_loss_over_steps, of=unit), results, rows),
        "loss-over-time.png": _picture(partial(_loss_over_time, of=unit), results, rows),
        "memory.png": _picture(_memory, results, rows),
    }


def _picture(paint: Callable[[Figure, list[Result], dict[str, Rows]], None], results: list[Result], rows: Any) -> bytes:
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(9, 5), dpi=160, layout="constrained")
        paint(figure, results, rows)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _loss_over_steps(figure: Figure, results: list[Result], rows: dict[str, Rows], of: str) -> None:
    _loss(figure, results, rows, "step", {result["name"]: 1.0 for result in results}, of)


def _loss_over_time(figure: Figure, results: list[Result], rows: dict[str, Rows], of: str) -> None:
    seconds = {result["name"]: (result["step_ms"] or 0.0) / 1e3 for result in results}
    _loss(figure, results, rows, "seconds of training, at the time per step of the table", seconds, of)


def _loss(
    figure: Figure, results: list[Result], rows: dict[str, Rows], label: str, unit: dict[str, float], of: str
) -> None:
    """Both losses of every optimizer, in nats per ``of``; a step is as wide as ``unit`` says."""
    ax = figure.subplots()
    ends: list[tuple[float, float, str, str]] = []
    low, high = math.inf, -math.inf
    for result in results:
        name, color = result["name"], COLORS[result["name"]]
        steps, losses = _column(rows[name], "loss", unit[name])
        ax.plot(steps, losses, color=color, lw=0.9, alpha=0.3)
        steps, measured = _column(rows[name], "val_loss", unit[name])
        ax.plot(steps, measured, color=color, lw=2.2, marker="o", ms=4.5)
        if measured:
            low, high = min(low, *measured, *losses), max(high, *measured)
            ends.append((steps[-1], measured[-1], f"{result['title']} {measured[-1]:.3f}", color))
    if ends:
        ax.set_ylim(low - 0.03 * (high - low) - 0.01, high + 0.06 * (high - low) + 0.01)
    label_ends(ax, ends)
    ax.set_xlim(left=0)
    ax.set_xlabel(label)
    title = f"Loss, nats per {of}: thick with dots on validation text, thin on training text"
    ax.set_title(title, loc="left", fontsize=11, color=MUTED, pad=12)


def _column(rows: Rows, column: str, unit: float) -> tuple[list[float], list[float]]:
    pairs = [(row["step"] * unit, row[column]) for row in rows if column in row]
    return [x for x, _ in pairs], [y for _, y in pairs]


def label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each curve beside its end, pushed apart where they would overlap."""
    bottom, top = ax.get_ylim()
    gap = (top - bottom) * 0.052
    ends = sorted(ends, key=lambda end: end[1])
    heights = [y for _, y, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    right = max((x for x, *_ in ends), default=1.0)
    for (x, y, text, color), height in zip(ends, heights, strict=True):
        ax.annotate(
            text,
            (x, y),
            (right * 1.025, height),
            textcoords="data",
            color=color,
            fontsize=11,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "lw": 0.6,
                "alpha": 0.5,
                "shrinkA": 0,
                "shrinkB": 4,
                "relpos": (0, 0.5),  # from the left end of the text, so that no line crosses another's name
            },
        )


def _memory(figure: Figure, results: list[Result], rows: dict[str, Rows]) -> None:
    figure.set_size_inches(9, 1.5 + 0.5 * len(results))
    per_parameter, peak = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    titles = [result["title"] for result in results]
    for ax, parts, unit in ((per_parameter, COMPONENTS[:3], None), (peak, COMPONENTS, 1e6)):
        left = [0.0] * len(results)
        for component, color in parts:
            sizes = [r["memory"][component] / (unit or r["parameters"]) for r in results]
            ax.barh(titles, sizes, left=left, color=color, height=0.6, edgecolor="white", linewidth=0.8)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        for i, (result, end) in enumerate(zip(results, left, strict=True)):
            text = f"state {result['state_bytes_per_parameter']:.2f}" if unit is None else f"{end:.1f}"
            ax.annotate(text, (end, i), (5, 0), textcoords="offset points", va="center", fontsize=10, fontweight="bold")
        ax.grid(axis="y", visible=False)
        ax.set_xlim(0, max(left) * 1.22)
    per_parameter.invert_yaxis()
    per_parameter.tick_params(axis="y", labelcolor=INK)
    per_parameter.set_xlabel("bytes per parameter: grows with the model")
    peak.set_xlabel("MB at the peak of one step")
    handles = [Patch(color=color) for _, color in COMPONENTS]
    labels = ["weights", "gradients", "optimizer state", "activations and temporaries"]
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=10, handlelength=1)
