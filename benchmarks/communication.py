"""What a step of sharded Adafactor sends, from the plans alone: models of 1 to 540 billion parameters under FSDP2.

Nothing is trained and nothing is measured here; `tests/test_communication.py` holds the same plan against the bytes of
a small model's real step.

    python benchmarks/communication.py        # prints the table of docs/distributed.md
"""

from __future__ import annotations

from collections.abc import Iterator

from adafactor.cli._known_models import MODELS
from adafactor.memory import report

RANKS = (8, 512, 6144)
NAMES = {
    "Llama-3.2-1B": "llama-3.2-1b",
    "Llama-3-8B": "llama-3-8b",
    "T5-11B": "t5-11b",
    "Llama-3-70B": "llama-3-70b",
    "Llama-3.1-405B": "llama-3.1-405b",
    "PaLM-540B": "palm-540b",
}


def rows() -> Iterator[tuple[str, ...]]:
    """Model, parameters, the buffer, its share of FSDP2's own traffic, and rank 0's state at each number of ranks."""
    for name, known in NAMES.items():
        model = MODELS[known]()
        first = report(model, ranks=RANKS[0])
        parameters, buffer = first.parameters, first.crossing
        # A ring all-reduce sends the buffer twice, whatever the number of ranks. FSDP2 gathers the bfloat16 weights
        # twice, for forward and backward, and scatters the gradients once: 6 bytes per parameter.
        share = 2 * buffer / (6 * parameters)
        states = (report(model, ranks=ranks).rows[0].state for ranks in RANKS)
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
