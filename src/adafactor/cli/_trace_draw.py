"""What the pictures of `adafactor trace` share: colours, numbers as text, labels that keep clear of each other."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

ADAFACTOR, ADAM = "#c8102e", "#1f4fd8"
INK, MUTED, LINE = "#1c1c22", "#5f6068", "#b9bac2"


def num(v: float) -> str:
    """Three significant digits, plain where that is short, with a real minus sign."""
    if v == 0 or not math.isfinite(v):
        return "0" if v == 0 else str(v)
    if 1e-3 <= abs(v) < 1e5:
        text = f"{v:.{max(0, 2 - math.floor(math.log10(abs(v))))}f}"
    else:
        mantissa, exponent = f"{v:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def chosen_steps(n: int, count: int) -> list[int]:
    """At most ``count`` step numbers from 1 to n: the first ones, then ever wider apart, and always the last."""
    if n <= count:
        return list(range(1, n + 1))
    head = max(1, count // 2)
    tail = np.geomspace(head + 1, n, count - head).round().astype(int).tolist()
    return sorted({*range(1, head + 1), *tail})


def contour_colours() -> LinearSegmentedColormap:
    """Viridis without its darkest end, lightened: even steps of lightness, quiet behind a path."""
    rgb = mpl.colormaps["viridis"](np.linspace(0.12, 1.0, 256))[:, :3]
    return LinearSegmentedColormap.from_list("quiet viridis", 1 - (1 - rgb) * 0.62)


def tick_text(t: float) -> str:
    """A power of ten, as short as it gets."""
    return f"{t:g}" if 1e-3 <= t <= 1e4 else f"1e{round(math.log10(t))}"


def powers_of_ten(low: float, high: float, most: int = 9) -> list[float]:
    """The powers of ten from low to high, every k-th so that there are at most ``most``."""
    exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**k for k in exponents if k % math.ceil(max(1, len(exponents)) / most) == 0]


def log_limits(ax: Axes, y: np.ndarray) -> None:
    """Fit a logarithmic y axis to positive values, with a little room and few ticks."""
    low, high = float(y.min()), float(y.max())
    room = max((high / low) ** 0.06, 1.15)
    ax.set_ylim(low / room, high * room)
    if math.log10(high / low) > 1.5:
        ax.yaxis.set_major_locator(LogLocator(10, numticks=6))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())


def label_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name two curves, given as (last y, name, colour), at their right ends, pushed apart where they meet."""
    low, high = np.log(ax.get_ylim())
    at = [float((np.log(y) - low) / (high - low)) for y, _, _ in ends]
    lower, upper = np.argsort(at)
    if at[upper] - at[lower] < (apart := 0.13):
        middle = min(max((at[upper] + at[lower]) / 2, apart / 2), 1 - apart / 2)
        at[lower], at[upper] = middle - apart / 2, middle + apart / 2
    for height, (_, name, colour) in zip(at, ends, strict=True):
        ax.text(1.012, height, name, transform=ax.transAxes, fontsize=9.5, color=colour, va="center", clip_on=False)


def place_label(ax: Axes, text: str, at: Any, crowd: np.ndarray) -> np.ndarray:
    """Write beside a point, on the side with the fewest points of the crowd; returns points that fill the label."""
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    size = x1 - x0
    half = np.array([0.0082 * len(text), 0.015]) * size
    gap = np.array([0.034, 0.026]) * size
    near = [(1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 1), (-0.8, 1), (0.8, -1), (-0.8, -1)]
    places = near + [(x, 2.3 * y) for x, y in near if y]

    def centre(place: tuple[float, float]) -> np.ndarray:
        return np.asarray(at) + np.array(place) * (half + gap)

    def cost(place: tuple[float, float]) -> float:
        c = centre(place)
        outside = np.maximum(0, [x0 - c[0] + half[0], c[0] + half[0] - x1, y0 - c[1] + half[1], c[1] + half[1] - y1])
        return (
            1e4 * float(outside.sum()) / size
            + 5 * (abs(place[1]) > 1)
            + float((np.abs(crowd - c) < half + 0.012 * size).all(1).sum())
        )

    c = centre(min(places, key=cost))
    halo = [patheffects.withStroke(linewidth=2.6, foreground="white")]
    ax.text(float(c[0]), float(c[1]), text, ha="center", va="center", fontsize=9.5, color=INK, path_effects=halo,
            zorder=9)  # fmt: skip
    return c + half * np.stack(np.meshgrid(np.linspace(-1, 1, 30), np.linspace(-1, 1, 5)), -1).reshape(-1, 2)


def dense(points: list[list[float]], spacing: float) -> np.ndarray:
    """The points of a path and, where two are further apart than ``spacing``, points between them."""
    parts = []
    for a, b in zip(np.array(points[:-1]), np.array(points[1:]), strict=True):
        parts.append(np.linspace(a, b, 1 + min(200, math.ceil(float(np.hypot(*(b - a))) / spacing)), endpoint=False))
    return np.concatenate([*parts, np.array(points[-1:])])


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, as many pixels as its own dpi says."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    return buffer.getvalue()
