"""What a step of sharded Adafactor sends, from the plans alone: models of 1 to 540 billion parameters under FSDP2.

Nothing is trained and nothing is measured here; `tests/test_communication.py` holds the same plan against the bytes of
a small model's real step.

    python benchmarks/communication.py        # prints the table of docs/distributed.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from adafactor.memory import report

Shape = tuple[int, ...]
RANKS = (8, 512, 6144)


def llama(
    layers: int, width: int, inner: int, keys: int, vocabulary: int = 128_256, *, tied: bool = False
) -> dict[str, Shape]:
    """Llama 3: grouped queries with keys and values of `keys` features, gated feed-forward, no biases."""
    shapes: dict[str, Shape] = {"embed_tokens": (vocabulary, width)}
    for layer in range(layers):
        shapes |= {
            f"{layer}.q": (width, width),
            f"{layer}.k": (keys, width),
            f"{layer}.v": (keys, width),
            f"{layer}.o": (width, width),
            f"{layer}.gate": (inner, width),
            f"{layer}.up": (inner, width),
            f"{layer}.down": (width, inner),
            f"{layer}.input_norm": (width,),
            f"{layer}.post_norm": (width,),
        }
    shapes["norm"] = (width,)
    return shapes if tied else shapes | {"lm_head": (vocabulary, width)}


def t5_11b() -> dict[str, Shape]:
    """T5 v1.0: 128 heads of 128 on a width of 1,024; the embedding is shared by both stacks and the output."""
    width, heads, inner = 1024, 128 * 128, 65_536
    shapes: dict[str, Shape] = {"shared": (32_128, width)}
    for stack, attentions in (("encoder", ("self",)), ("decoder", ("self", "cross"))):
        shapes[f"{stack}.relative"] = (32, 128)
        for layer in range(24):
            name = f"{stack}.{layer}"
            for kind in attentions:
                shapes |= {f"{name}.{kind}.{matrix}": (heads, width) for matrix in "qkv"}
                shapes |= {f"{name}.{kind}.o": (width, heads), f"{name}.{kind}.norm": (width,)}
            shapes |= {f"{name}.wi": (inner, width), f"{name}.wo": (width, inner), f"{name}.norm": (width,)}
        shapes[f"{stack}.norm"] = (width,)
    return shapes


def palm_540b() -> dict[str, Shape]:
    """PaLM: 48 heads of 256 that share one key and one value, gated feed-forward beside attention, tied embeddings."""
    width, heads, inner = 18_432, 48 * 256, 4 * 18_432
    shapes: dict[str, Shape] = {"embedding": (256_000, width)}
    for layer in range(118):
        shapes |= {
            f"{layer}.q": (heads, width),
            f"{layer}.k": (256, width),
            f"{layer}.v": (256, width),
            f"{layer}.o": (width, heads),
            f"{layer}.gate": (inner, width),
            f"{layer}.up": (inner, width),
            f"{layer}.down": (width, inner),
            f"{layer}.norm": (width,),
        }
    return shapes | {"norm": (width,)}


MODELS: dict[str, Callable[[], dict[str, Shape]]] = {
    "Llama-3.2-1B": lambda: llama(16, 2048, 8192, 512, tied=True),
    "Llama-3-8B": lambda: llama(32, 4096, 14_336, 1024),
    "T5-11B": t5_11b,
    "Llama-3-70B": lambda: llama(80, 8192, 28_672, 1024),
    "Llama-3.1-405B": lambda: llama(126, 16_384, 53_248, 1024),
    "PaLM-540B": palm_540b,
}


def rows() -> Iterator[tuple[str, ...]]:
    """Model, parameters, the buffer, its share of FSDP2's own traffic, and rank 0's state at each number of ranks."""
    for name, build in MODELS.items():
        shapes = build()
        parameters = sum(map(math.prod, shapes.values()))
        buffer = report(shapes, ranks=RANKS[0]).crossing
        # A ring all-reduce sends the buffer twice, whatever the number of ranks. FSDP2 gathers the bfloat16 weights
        # twice, for forward and backward, and scatters the gradients once: 6 bytes per parameter.
        share = 2 * buffer / (6 * parameters)
        states = (report(shapes, ranks=ranks).rows[0].state for ranks in RANKS)
        yield name, f"{parameters:,}", size(buffer), f"{share:.2%}", *map(size, states)


def table() -> str:
    header = ("model", "parameters", "sent per step", "beside FSDP2's own", *(f"state, {n:,} ranks" for n in RANKS))
    lines = [header, ("---",) * len(header), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size(nbytes: float) -> str:
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"


if __name__ == "__main__":
    print(table())
