"""The picture of `adafactor trace --matrix`: g squared, its average, R and C beside V, and what V misses."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from adafactor.cli._trace_draw import INK, LINE, MUTED, num, powers_of_ten, tick_text
from adafactor.cli._trace_matrix import Factoring

PANEL, STRIP, SPACE = 4.9, 0.19, 0.07  # inches: a matrix, the thickness of R and C, between them and V
LEFT, GAP, RIGHT = 0.85, 1.05, 0.95
FOOT, BETWEEN, HEAD = 1.62, 1.36, 1.45
WIDTH, HEIGHT = LEFT + 2 * PANEL + GAP + RIGHT, FOOT + 2 * PANEL + BETWEEN + HEAD
MAGNITUDES, RATIOS = "viridis", "RdBu_r"
LIMIT = 64.0  # of the ratio's colours


class _Page:
    """A figure in inches, and panels that know the bytes along their sides."""

    def __init__(self, found: Factoring, dpi: int) -> None:
        self.found = found
        self.fig = Figure(figsize=(WIDTH, HEIGHT), dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.fig)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        ax = self.fig.add_axes((x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT))
        for side in ax.spines.values():
            side.set_color(LINE)
        ax.tick_params(length=0, labelsize=8, colors=INK, pad=2)
        return ax

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        self.fig.text(x / WIDTH, y / HEIGHT, text, fontsize=size, parse_math=False, **{"color": INK, **style})

    def panel(self, column: int, row: int, values: np.ndarray, title: str, said: str, **show: Any) -> Any:
        """A matrix with its bytes at the bottom and the left, unless a strip stands there."""
        x = LEFT + column * (PANEL + GAP)
        y = FOOT + (1 - row) * (PANEL + BETWEEN)
        top = y + PANEL + (STRIP + SPACE) * row  # the lower headings stand above C
        self.text(x, top + 0.30, title, 12.5, weight="bold")
        self.text(x, top + 0.10, said, 9.5, color=MUTED)
        ax = self.axes(x, y, PANEL, PANEL)
        image = ax.imshow(values, aspect="auto", interpolation="nearest", **show)
        strip = (column, row) == (0, 1)
        self.bytes(ax, rows=not strip, columns=True)
        ax.set_xlabel("next byte", fontsize=9, color=MUTED, labelpad=2)
        if not strip:
            ax.set_ylabel("byte before it", fontsize=9, color=MUTED, labelpad=2)
        return image

    def bytes(self, ax: Axes, rows: bool, columns: bool) -> None:
        labels = self.found.labels
        ax.set_xticks(range(len(labels)) if columns else [], labels if columns else [])
        ax.set_yticks(range(len(labels)) if rows else [], labels if rows else [])

    def bar(self, image: Any, row: int, ticks: list[float], labels: list[str], title: str) -> None:
        y = FOOT + (1 - row) * (PANEL + BETWEEN)
        cax = self.axes(LEFT + 2 * PANEL + GAP + 0.16, y, 0.16, PANEL)
        bar = self.fig.colorbar(image, cax=cax, extend="neither")
        bar.set_ticks(ticks, labels=labels)
        cax.yaxis.set_minor_locator(NullLocator())
        cax.tick_params(labelsize=9, colors=MUTED, length=3, pad=3)
        cax.spines["outline"].set_edgecolor(LINE)
        cax.set_title(title, fontsize=9.5, color=INK, pad=6)


def heat_maps(found: Factoring, dpi: int = 110) -> Figure:
    """Four matrices on one page, R and C along V's sides; magnitudes share one logarithmic scale."""
    page, n = _Page(found, dpi), len(found.labels)
    both = np.concatenate([found.ema.ravel(), found.V.ravel()])
    low, high = float(np.quantile(both, 0.005)), float(both.max())
    low = max(low, high * 1e-8)
    show: dict[str, Any] = {"cmap": MAGNITUDES, "norm": LogNorm(low, high, clip=True)}

    page.text(LEFT, HEIGHT - 0.42, "What the factoring keeps, and what it loses", 17, weight="bold")
    about = f"The weight of a bigram model ({n} × {n}: one row per byte, one column per byte that follows it), "
    about += f"after {found.steps} step{'s' * (found.steps > 1)} on"
    page.text(LEFT, HEIGHT - 0.70, f"{about} {shorten(found.source)}", 10, color=MUTED)

    page.panel(0, 0, found.g2, "g²", "the gradient of the last batch, squared", **show)
    full = f"its running average, kept in full as in Adam: {found.ema.size} numbers"
    image = page.panel(1, 0, found.ema, "average of g²", full, **show)
    ticks = powers_of_ten(low, high)
    page.bar(image, 0, ticks, [tick_text(t) for t in ticks], "g², R, C, V")

    lift = STRIP + SPACE
    kept = f"rebuilt from R ({n} row means, left) and C ({n} column means, above)"
    page.panel(0, 1, found.V, "V = R C / mean(R)", kept, **show)
    row_strip = page.axes(LEFT - lift, FOOT, STRIP, PANEL)
    row_strip.imshow(found.R[:, None], aspect="auto", interpolation="nearest", **show)
    page.bytes(row_strip, rows=True, columns=False)
    row_strip.set_ylabel("byte before it", fontsize=9, color=MUTED, labelpad=2)
    row_strip.set_xlabel("R", fontsize=11, color=INK, weight="bold", labelpad=3)
    column_strip = page.axes(LEFT, FOOT + PANEL + SPACE, PANEL, STRIP)
    column_strip.imshow(found.C[None, :], aspect="auto", interpolation="nearest", **show)
    page.bytes(column_strip, rows=False, columns=False)
    page.text(LEFT + PANEL + 0.07, FOOT + PANEL + SPACE + 0.03, "C", 11, weight="bold")

    said = "blue: V too small, step too long;  red: V too large, step too short"
    ratio = np.clip(found.ratio, 1 / LIMIT, LIMIT)
    image = page.panel(1, 1, ratio, "V / average of g²", said, cmap=RATIOS, norm=LogNorm(1 / LIMIT, LIMIT))
    ticks = [1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64]
    page.bar(image, 1, ticks, ["≤ 1/64", "1/16", "1/4", "1", "4", "16", "≥ 64"], "ratio")
    ax = image.axes
    for worst in found.extremes().values():
        at = (worst["column"] - 0.5, worst["row"] - 0.5)
        ax.add_patch(Rectangle(at, 1, 1, fill=False, ec=INK, lw=1.6, clip_on=False, zorder=5))

    for i, (head, line) in enumerate(caption(found)):
        page.text(LEFT, 0.78 - 0.25 * i, head, 10.5, weight="bold")
        page.text(LEFT + 0.62, 0.78 - 0.25 * i, line, 10.5)
    return page.fig


def caption(found: Factoring) -> list[tuple[str, str]]:
    """What is kept and lost in words and numbers, as (heading, line)."""
    numbers, worst = found.numbers(), found.extremes()
    low, high = worst["too_small"], worst["too_large"]
    kept, all_of = numbers["numbers_kept"], numbers["numbers_full"]

    def quoted(pair: dict[str, Any]) -> str:
        return f"‹{pair['before']}› then ‹{pair['next']}›"

    return [
        (
            "Kept",
            f"by {kept:.0f} numbers instead of {all_of:.0f}: every row mean and every column mean, exactly; "
            f"{numbers['variance_kept']:.0%} of the variance; "
            f"{numbers['share_of_steps_within_factor_2']:.0%} of all step lengths within a factor of 2.",
        ),
        (
            "Lost",
            f"what single pairs do: the relative error |V − average| / |average| is {numbers['relative_error']:.0%}. "
            f"Framed: {quoted(low)}, V {num(1 / low['V_over_ema'])} times too small;",
        ),
        ("", f"{quoted(high)}, {num(high['V_over_ema'])} times too large. A step is off by the root of that."),
    ]


def shorten(text: str, most: int = 60) -> str:
    """The end of a long path says more than its beginning."""
    return text if len(text) <= most else "…" + text[-most + 1 :]
