"""The shapes that ``adafactor bench`` steps: those of known models, or sizes from the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adafactor.cli._errors import UserError

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


def _t5_base() -> Iterator[Shape]:
    """T5 v1.0 base: the embedding is shared by both stacks and the output, 222,903,552 parameters."""
    yield 32128, 768
    for attentions in (1, 2):  # the encoder's blocks have one, the decoder's two
        yield 32, 12  # relative positions, in the first block of each stack
        for _ in range(12):
            yield from [(768, 768)] * (4 * attentions)
            yield from ((3072, 768), (768, 3072))
            yield from [(768,)] * (attentions + 1)
        yield (768,)


def _gpt2() -> Iterator[Shape]:
    """GPT-2 small, matrices stored (in, out): 124,439,808 parameters."""
    yield from ((50257, 768), (1024, 768))
    for _ in range(12):
        yield from [(768,)] * 2
        yield from ((768, 2304), (2304,), (768, 768), (768,))
        yield from [(768,)] * 2
        yield from ((768, 3072), (3072,), (3072, 768), (768,))
    yield from [(768,)] * 2


def _resnet() -> Iterator[Shape]:
    """ResNet-50, convolutions and batch norms: 25,557,032 parameters."""

    def convolution(out: int, into: int, kernel: int) -> Iterator[Shape]:
        yield from ((out, into, kernel, kernel), (out,), (out,))

    yield from convolution(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(width, into, 1)
            yield from convolution(width, width, 3)
            yield from convolution(4 * width, width, 1)
            if block == 0:
                yield from convolution(4 * width, into, 1)
            into = 4 * width
    yield from ((1000, 2048), (1000,))


def _sdxl_unet() -> Iterator[Shape]:
    """Stable Diffusion XL's UNet, from its architecture: 2,567,463,684 parameters."""
    time, text = 1280, 2048
    widths, depths = (320, 640, 1280), (0, 2, 10)

    def layer(out: int, into: int, *kernel: int) -> Iterator[Shape]:
        yield from ((out, into, *kernel), (out,))

    def residual(into: int, out: int) -> Iterator[Shape]:
        yield from [(into,)] * 2
        yield from layer(out, into, 3, 3)
        yield from layer(out, time)
        yield from [(out,)] * 2
        yield from layer(out, out, 3, 3)
        if into != out:
            yield from layer(out, into, 1, 1)

    def transformer(width: int, depth: int) -> Iterator[Shape]:
        if depth == 0:
            return
        yield from [(width,)] * 2
        yield from layer(width, width)
        for _ in range(depth):
            for source in (width, text):  # attention to itself, then to the text
                yield from ((width, width), (width, source), (width, source))
                yield from layer(width, width)
            yield from layer(8 * width, width)  # gated, so twice the inner width
            yield from layer(width, 4 * width)
            yield from [(width,)] * 6
        yield from layer(width, width)

    yield from layer(widths[0], 4, 3, 3)
    yield from layer(time, widths[0])
    yield from layer(time, time)
    yield from layer(time, 2816)  # pooled text and image sizes
    yield from layer(time, time)
    skips, into = [widths[0]], widths[0]
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for _ in range(2):
            yield from residual(into, width)
            yield from transformer(width, depth)
            into = width
            skips.append(into)
        if level < 2:
            yield from layer(width, width, 3, 3)
            skips.append(width)
    yield from residual(into, into)
    yield from transformer(into, depths[-1])
    yield from residual(into, into)
    for level, (width, depth) in enumerate(zip(widths[::-1], depths[::-1], strict=True)):
        for _ in range(3):
            yield from residual(into + skips.pop(), width)
            yield from transformer(width, depth)
            into = width
        if level < 2:
            yield from layer(width, width, 3, 3)
    yield from [(into,)] * 2
    yield from layer(4, into, 3, 3)


PRESETS: dict[str, Callable[[], Iterator[Shape]]] = {
    "t5-encoder": _t5_encoder,
    "t5-base": _t5_base,
    "gpt2": _gpt2,
    "resnet": _resnet,
    "sdxl-unet": _sdxl_unet,
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
