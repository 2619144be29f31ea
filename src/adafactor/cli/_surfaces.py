"""The 2-D test surfaces `adafactor trace` walks on: function, minima, what to draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Number = Any  # a float, a numpy array or a torch tensor: the formulas use only + - * and integer powers


@dataclass(frozen=True)
class Surface:
    """A function of two numbers, with minimum value 0, and sensible settings for walking on it.

    Args:
        f: the function; takes and returns floats, numpy arrays or torch tensors alike.
        minima: every point where f = 0.
        domain: (low, high) of the square that is drawn; it grows when a path leaves it.
        lr: default learning rate, for Adafactor and Adam alike.
        steps: default number of steps.
    """

    name: str
    title: str
    formula: str
    f: Callable[[Number, Number], Number]
    minima: tuple[tuple[float, float], ...]
    domain: tuple[float, float]
    lr: float
    steps: int


def bowl(x: Number, y: Number) -> Number:
    """Ten times steeper in y than in x, so that the gradient does not point at the minimum."""
    return 0.5 * (x**2 + 10 * y**2)


def rosenbrock(x: Number, y: Number) -> Number:
    """Rosenbrock 1960: a flat, curved valley between steep walls."""
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def beale(x: Number, y: Number) -> Number:
    """Beale 1958: almost flat around its minimum, very steep in the corners."""
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def himmelblau(x: Number, y: Number) -> Number:
    """Himmelblau 1972: four minima, all of value 0."""
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


HIMMELBLAU_MINIMA = (
    (3.0, 2.0),
    (-2.8051180869527448, 3.1313125182505730),
    (-3.7793102533777469, -3.2831859912861694),
    (3.5844283403304918, -1.8481265269644034),
)

SURFACES: dict[str, Surface] = {
    s.name: s
    for s in (
        Surface("bowl", "quadratic bowl", "½ (x² + 10 y²)", bowl, ((0.0, 0.0),), (-5.0, 5.0), 0.2, 60),
        Surface(
            "rosenbrock", "Rosenbrock", "(1 − x)² + 100 (y − x²)²", rosenbrock, ((1.0, 1.0),), (-1.0, 7.0), 0.1, 1500
        ),
        Surface(
            "beale",
            "Beale",
            "(1.5 − x + xy)² + (2.25 − x + xy²)² + (2.625 − x + xy³)²",
            beale,
            ((3.0, 0.5),),
            (-4.8, 4.8),
            0.5,
            300,
        ),
        Surface(
            "himmelblau",
            "Himmelblau",
            "(x² + y − 11)² + (x + y² − 7)²",
            himmelblau,
            HIMMELBLAU_MINIMA,
            (-5.5, 5.5),
            0.2,
            60,
        ),
    )
}
