"""The shapes that ``adafactor bench`` steps: those of known models, or sizes from the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adafactor.cli._errors import UserError
from adafactor.cli._known_models import MODELS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeSet:
    """The parameters of one model, or ``scale`` of them, by shape alone."""

    name: str
    shapes: tuple[Shape, ...]
    scale: float = 1.0

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(map(math.prod, self.shapes))

    def scaled(self, scale: float) -> ShapeSet:
        """A share of the tensors, spread evenly over their sizes, in their order.

        Raises:
            UserError: the share is less than one tensor.
        """
        keep = round(len(self.shapes) * scale)
        if scale == 1:
            return self
        if keep < 1:
            raise UserError(
                f"--scale {scale:g} leaves no tensor of {self.name}, which has {len(self.shapes)}; raise it"
            )
        by_size = sorted(range(len(self.shapes)), key=lambda i: (math.prod(self.shapes[i]), i))
        kept = sorted(by_size[int((k + 0.5) * len(by_size) / keep)] for k in range(keep))
        return ShapeSet(f"{scale:g} of {self.name}", tuple(self.shapes[i] for i in kept), scale)


def _t5_encoder() -> Iterator[Shape]:
    """The matrices and norms of T5-base's encoder: what this project's timings have always been taken on."""
    yield 32128, 768
    for _ in range(12):
        yield from [(768, 768)] * 4
        yield from ((3072, 768), (768, 3072), (768,), (768,))


def _model(name: str) -> Callable[[], Iterator[Shape]]:
    return lambda: (tuple(p.shape) for p in MODELS[name]().parameters())


PRESETS: dict[str, Callable[[], Iterator[Shape]]] = {
    "t5-encoder": _t5_encoder,
    "t5-base": _model("t5-base"),
    "t5-large": _model("t5-large"),
    "gpt2": _model("gpt2"),
    "llama-3-8b": _model("llama-3-8b"),
    "resnet": _model("resnet-50"),
    "sdxl-unet": _model("sdxl-unet"),
    "many-small": lambda: iter([(64, 64)] * 5000),
    "one-huge": lambda: iter([(32128, 4096)]),
}


def parse(text: str, scale: float) -> list[ShapeSet]:
    """One set for each preset named, and one for all the sizes given, such as ``4096x4096,768``.

    Raises:
        UserError: an entry is neither, or ``scale`` leaves nothing.
    """
    if not 0 < scale <= 1:
        raise UserError(f"--scale must be above 0 and at most 1, got {scale:g}")
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    presets = list(dict.fromkeys(entry for entry in entries if entry in PRESETS))
    sizes = [entry for entry in entries if entry not in PRESETS]
    for entry in sizes:
        if not re.fullmatch(r"[1-9]\d{0,11}(x[1-9]\d{0,11})*", entry):
            raise UserError(
                f"--shapes: {entry!r} is neither a size such as 4096x4096 nor one of {', '.join(PRESETS)}; choose one"
            )
    sets = [ShapeSet(name, tuple(PRESETS[name]())) for name in presets]
    if sizes:
        name = ",".join(sizes) if len(sizes) <= 3 else f"{len(sizes)} tensors"
        sets.append(ShapeSet(name, tuple(tuple(map(int, entry.split("x"))) for entry in sizes)))
    if not sets:
        raise UserError(f"--shapes names none; give sizes such as 4096x4096,768 or choose from {', '.join(PRESETS)}")
    return [found.scaled(scale) for found in sets]
