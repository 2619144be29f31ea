"""The picture of `adafactor trace`: two walks over filled contours, the losses, and V beside the gradient.

One ``Stage`` lays the figure out and holds every curve as a ``Track``, so that the PNG, the GIF and the HTML page show
the same picture: the PNG draws all tracks to their end, the other two draw them step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import NullLocator

from adafactor.cli._surfaces import Surface
from adafactor.cli._trace_draw import (
    ADAFACTOR,
    ADAM,
    INK,
    LINE,
    MUTED,
    chosen_steps,
    contour_colours,
    dense,
    label_ends,
    log_limits,
    num,
    place_label,
    powers_of_ten,
    tick_text,
)
from adafactor.cli._trace_walk import Row, Walk

PANEL, GAP, LEFT, RIGHT = 5.0, 0.62, 0.72, 0.95  # inches
WIDTH = LEFT + 2 * PANEL + GAP + RIGHT
CHART, FOOT, BETWEEN, HEAD = 1.9, 0.62, 0.85, 1.55  # inches, from the strip at the bottom upwards
FLOOR = 1e-8  # what is smaller is drawn on this line of a logarithmic axis
DOTS_UP_TO = 160  # steps; beyond that the dots of a path run together


@dataclass(frozen=True)
class Track:
    """One curve that grows with the steps: its point k is drawn once step k is done (``first`` = 0 is the start)."""

    axes: Axes
    x: np.ndarray
    y: np.ndarray
    colour: str
    width: float
    first: int = 0
    path: bool = False
    dashed: bool = False


class Stage:
    """The figure without its curves, and the curves as tracks.

    Args:
        note: one line under the title.
        strip: inches kept free at the bottom, for a table.
        dpi: pixels per inch of everything that is made from it.
    """

    def __init__(self, surface: Surface, ours: Walk, adam: Walk, note: str, strip: float = 0.0, dpi: int = 110):
        self.surface, self.ours, self.adam, self.strip = surface, ours, adam, strip
        self.base = strip + FOOT + CHART + BETWEEN  # of the contour panels
        self.height = self.base + PANEL + HEAD
        self.fig = Figure(figsize=(WIDTH, self.height), dpi=dpi, facecolor="white")
        self.canvas = FigureCanvasAgg(self.fig)
        self.tracks: list[Track] = []
        self.text(LEFT, self.height - 0.40, f"How Adafactor walks: {surface.title}", 17, weight="bold")
        self.text(LEFT, self.height - 0.70, f"f(x, y) = {surface.formula}", 10.5)
        self.text(LEFT, self.height - 0.94, note, 10, color=MUTED)
        self._contours([self._axes(0, self.base, PANEL, PANEL), self._axes(1, self.base, PANEL, PANEL)])
        self._losses(self._axes(0, strip + FOOT, PANEL - 0.6, CHART))
        self._second_moments(self._axes(1, strip + FOOT, PANEL, CHART))

    def _axes(self, column: int, bottom: float, width: float, height: float) -> Axes:
        x = LEFT + column * (PANEL + GAP)
        ax = self.fig.add_axes((x / WIDTH, bottom / self.height, width / WIDTH, height / self.height))
        ax.tick_params(labelsize=9, colors=MUTED, length=3)
        for side in ax.spines.values():
            side.set_color(LINE)
        return ax

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> Text:
        """Write at (x, y) inches from the bottom left."""
        return self.fig.text(x / WIDTH, y / self.height, text, fontsize=size, **{"color": INK, **style})

    # --- the contour panels ---

    def _view(self) -> tuple[float, float, float, float]:
        """The square to draw: the surface's own, grown to hold both paths."""
        low, high = self.surface.domain
        points = np.array([*self.ours.points, *self.adam.points])
        (x0, y0), (x1, y1) = points.min(0), points.max(0)
        pad = 0.06 * max(x1 - x0, y1 - y0)
        x0, x1 = min(low, x0 - pad), max(high, x1 + pad)
        y0, y1 = min(low, y0 - pad), max(high, y1 + pad)
        half = max(x1 - x0, y1 - y0) / 2
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
        return cx - half, cx + half, cy - half, cy + half

    def _contours(self, panels: list[Axes]) -> None:
        x0, x1, y0, y1 = self._view()
        X, Y = np.meshgrid(np.linspace(x0, x1, 401), np.linspace(y0, y1, 401))
        Z = self.surface.f(X, Y)
        high = float(Z.max())
        low = max(float(np.quantile(Z, 0.002)), high * 1e-7)
        levels, norm, colours = np.geomspace(low, high, 17), LogNorm(low, high), contour_colours()
        filled = None
        for ax, walk, colour in zip(panels, (self.ours, self.adam), (ADAFACTOR, ADAM), strict=True):
            filled = ax.contourf(X, Y, np.clip(Z, low, high), levels=levels, norm=norm, cmap=colours)
            ax.contour(X, Y, Z, levels=levels, colors="white", linewidths=0.6, alpha=0.55)
            ax.set(xlim=(x0, x1), ylim=(y0, y1), aspect="equal")
            ax.set_xlabel("x", fontsize=10, color=INK, labelpad=1)
            self._landmarks(ax, walk)
            self._heading(ax, walk, colour)
            P = np.array(walk.points)
            self.tracks.append(Track(ax, P[:, 0], P[:, 1], colour, 1.2, path=True))
        panels[0].set_ylabel("y", fontsize=10, color=INK, labelpad=-4)
        panels[1].tick_params(labelleft=False)
        self._colour_bar(filled, low, high)

    def _heading(self, ax: Axes, walk: Walk, colour: str) -> None:
        ax.text(0, 1.05, walk.name, transform=ax.transAxes, fontsize=13, weight="bold", color=colour, va="bottom")
        n = len(walk.rows)
        far = min(math.dist(walk.end, m) for m in self.surface.minima)
        said = f"after {n} step{'s' * (n > 1)}: f = {num(walk.f_end)}, {num(far)} from the nearest minimum"
        said = f"{walk.describe()};  {said}"
        ax.text(0, 1.015, said, transform=ax.transAxes, fontsize=9, color=MUTED, va="bottom")

    def _landmarks(self, ax: Axes, walk: Walk) -> None:
        """The minima, the start, and which way plain gradient descent would go from there."""
        x0, x1 = ax.get_xlim()
        for m in self.surface.minima:
            ax.plot(*m, marker="*", ms=13, color="white", mec=INK, mew=1.0, zorder=6)
        p, g = np.array(walk.rows[0].p), np.array(walk.rows[0].g)
        ax.plot(*p, marker="o", ms=8, color="white", mec=INK, mew=1.4, zorder=9)
        crowd = np.concatenate([dense(walk.points, 0.01 * (x1 - x0)), np.array(self.surface.minima)])
        length = float(np.hypot(*g))
        if length > 0:
            tip = p - g / length * 0.16 * (x1 - x0)
            arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.3, "shrinkA": 5, "shrinkB": 0, "mutation_scale": 11}
            ax.annotate("", xy=tuple(tip), xytext=tuple(p), arrowprops=arrow, zorder=5, annotation_clip=False)
            crowd = np.concatenate([crowd, np.linspace(p, tip, 40)])
            crowd = np.concatenate([crowd, place_label(ax, "−gradient", tip, crowd)])
        crowd = np.concatenate([crowd, place_label(ax, f"start ({p[0]:g}, {p[1]:g})", p, crowd)])
        place_label(ax, "minimum", min(self.surface.minima, key=lambda m: math.dist(m, walk.end)), crowd)

    def _colour_bar(self, filled: Any, low: float, high: float) -> None:
        x = LEFT + 2 * PANEL + GAP + 0.14
        cax = self.fig.add_axes((x / WIDTH, self.base / self.height, 0.14 / WIDTH, PANEL / self.height))
        bar = self.fig.colorbar(filled, cax=cax)
        ticks = powers_of_ten(low, high)
        bar.set_ticks(ticks, labels=[tick_text(t) for t in ticks])
        cax.yaxis.set_minor_locator(NullLocator())
        cax.tick_params(labelsize=9, colors=MUTED, length=3)
        cax.spines["outline"].set_edgecolor(LINE)
        cax.set_title("f", fontsize=10, color=INK, pad=5)

    # --- the charts below ---

    def _losses(self, ax: Axes) -> None:
        self._chart(ax, "f after each step", len(self.ours.rows))
        ends, everything = [], []
        for walk, colour in ((self.ours, ADAFACTOR), (self.adam, ADAM)):
            y = np.maximum(walk.losses, FLOOR)
            self.tracks.append(Track(ax, np.arange(len(y)), y, colour, 1.6))
            ends.append((float(y[-1]), walk.name, colour))
            everything.append(y)
        log_limits(ax, np.concatenate(everything))
        label_ends(ax, ends)

    def _second_moments(self, ax: Axes) -> None:
        rows = self.ours.rows
        self._chart(ax, "Adafactor:  √V (solid) remembers |g| (dashed)", len(rows))
        t = np.arange(1, len(rows) + 1)
        ends, everything = [], []
        for k, (axis, colour) in enumerate((("x", "#a8500f"), ("y", "#6a2fa0"))):
            v = np.maximum(np.sqrt([r.V[k] for r in rows]), FLOOR)
            g = np.maximum(np.abs([r.g[k] for r in rows]), FLOOR)
            self.tracks.append(Track(ax, t, g, colour, 1.2, first=1, dashed=True))
            self.tracks.append(Track(ax, t, v, colour, 1.7, first=1))
            ends.append((float(v[-1]), f"√V  {axis}", colour))
            everything += [v, g]
        log_limits(ax, np.concatenate(everything))
        label_ends(ax, ends)

    def _chart(self, ax: Axes, title: str, steps: int) -> None:
        ax.set_yscale("log")
        ax.set_xlim(0, steps)
        ax.set_title(title, fontsize=10.5, color=INK, loc="left", pad=6)
        ax.set_xlabel("step", fontsize=10, color=INK, labelpad=1)
        ax.grid(True, color="#e6e6ea", lw=0.7)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)

    # --- what goes on top ---

    def lines(self, animated: bool = False) -> list[tuple[Track, Line2D]]:
        """Add the curves, drawn to their end: for each track a line, and on short paths a dot per step."""
        made: list[tuple[Track, Line2D]] = []
        for track in self.tracks:
            style: dict[str, Any] = {"color": track.colour, "zorder": 8, "animated": animated}
            line = Line2D(track.x, track.y, lw=track.width, ls=(0, (4, 2)) if track.dashed else "-", **style)
            made.append((track, line))
            if len(track.x) == 1:
                line.set(marker="o", markersize=4)
            if track.path:
                case = patheffects.Stroke(linewidth=track.width + 1.8, foreground="white")
                line.set_path_effects([case, patheffects.Normal()])
                if len(track.x) <= DOTS_UP_TO:
                    made.append((track, Line2D(track.x, track.y, ls="", marker="o", ms=3.6, mew=0, **style)))
        for track, line in made:
            track.axes.add_line(line)
        return made

    def table(self, rows: list[tuple[str, str, Row]], animated: bool = False) -> list[list[Text]]:
        """Write rows, given as (label, colour, row), into the strip; returns their cells."""
        width, top = WIDTH - LEFT - 0.35, self.strip - 0.12
        for name, at, _ in COLUMNS:
            self.text(LEFT + at * width, top, name, 9.5, ha="right", weight="bold")
        y = (top - 0.1) / self.height
        self.fig.add_artist(Line2D([LEFT / WIDTH, (LEFT + width) / WIDTH], [y, y], color=LINE, lw=0.8))
        cells = []
        for i, (label, colour, row) in enumerate(rows):
            texts = table_texts(label, row)
            style: dict[str, Any] = {"ha": "right", "family": "DejaVu Sans Mono", "color": colour, "animated": animated}
            places = [(LEFT + at * width, top - 0.27 - 0.215 * i) for _, at, _ in COLUMNS]
            cells.append([self.text(x, y, text, 9, **style) for (x, y), text in zip(places, texts, strict=True)])
        return cells


def _pair(values: list[float]) -> str:
    return "  ".join(f"{num(v):>7}" for v in values) if values else "—"


COLUMNS: list[tuple[str, float, Callable[[Row], str]]] = [
    ("step", 0.035, lambda r: str(r.t)),
    ("point p  (x, y)", 0.175, lambda r: _pair(r.p)),
    ("gradient g", 0.305, lambda r: _pair(r.g)),
    ("R, row means", 0.435, lambda r: _pair(r.R)),
    ("C, column means", 0.575, lambda r: _pair(r.C)),
    ("V = RC / mean(R)", 0.72, lambda r: _pair(r.V)),
    ("U = g / √V", 0.86, lambda r: _pair(r.U)),
    ("step taken", 1.0, lambda r: _pair(r.step)),
]


def table_texts(label: str, row: Row) -> list[str]:
    """One row of the table; the label stands where the step number would."""
    return [label, *(cell(row) for _, _, cell in COLUMNS[1:])]


def still(surface: Surface, ours: Walk, adam: Walk, note: str, count: int = 7) -> Figure:
    """The whole picture, with Adafactor's numbers for chosen steps in a table below."""
    stage = Stage(surface, ours, adam, note, strip=2.1)
    stage.lines()
    stage.table([(str(t), INK, ours.rows[t - 1]) for t in chosen_steps(len(ours.rows), count)])
    return stage.fig
