"""One table of ``adafactor bench``: its parameters, and whether they fit into memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from adafactor.cli import _loop
from adafactor.cli._bench_entries import ADAMW, MOMENTUM, Entry
from adafactor.cli._bench_shapes import ShapeSet
from adafactor.cli._errors import UserError
from adafactor.cli._screen import size

DTYPES = _loop.DTYPES | {"float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """What one table is about.

    Args:
        shapes: the parameters.
        dtype: of the weights and the gradients.
        threads: on the CPU.
        device: "cpu" or "cuda".
        backend: of ours.
    """

    shapes: ShapeSet
    dtype: str
    threads: int
    device: str
    backend: str

    @property
    def title(self) -> str:
        at = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""
        return f"{self.shapes.name}, {self.dtype}{at}"

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return self.shapes.parameters * DTYPES[self.dtype].itemsize


def temporaries(entry: Entry, shapes: ShapeSet) -> int:
    """Roughly, the bytes that a step of ``entry`` allocates; only decides whether it is tried."""
    return 4 * (entry.copies * shapes.largest + entry.whole_copies * shapes.parameters)


def planned(case: Case, entries: list[Entry]) -> int:
    """Bytes of weights, gradients, AdamW's state and our momentum, and a twentieth for what is small."""
    state = {ADAMW.name: 2 * case.weights, MOMENTUM.name: 2 * case.shapes.parameters}
    return round(1.05 * (2 * case.weights + sum(state.get(entry.name, 0) for entry in entries)))


def check_memory(case: Case, entries: list[Entry]) -> None:
    """Refuse what the machine cannot hold before it starts to swap or kill.

    Raises:
        UserError: it needs more than is free.
    """
    free, needed = available(case.device), planned(case, entries)
    if free is not None and needed > free:
        shapes = case.shapes
        cures = (
            ["smaller --shapes"] if len(shapes.shapes) == 1 else [f"--scale {_share(shapes.scale * free / needed):g}"]
        )
        cures += ["--dtype bfloat16"] * (case.dtype == "float32")
        raise UserError(
            f"--shapes: {shapes.name} in {case.dtype} needs {size(needed)} for weights, gradients and AdamW's state, "
            f"and {size(free)} are free; choose {' or '.join(cures)}"
        )


def _share(value: float) -> float:
    """Two digits, rounded down."""
    return max(math.floor(100 * value), 1) / 100


def available(device: str) -> int | None:
    """Bytes that can still be allocated; None where nobody says."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
        group = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(int((group / "memory.max").read_text()) - int(used["anon"]))
    except (OSError, ValueError, KeyError):  # another system, or "max": no limit
        pass
    return min(limits, default=None)
