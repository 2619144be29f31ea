"""The learning rates behind ``adafactor compare``: every optimizer over a grid of learning rates and seeds.

Runs the loop of ``adafactor compare`` with its default model, text and schedule, and writes
``benchmarks/results/sweep.json``. Cells that are in that file already are not run again.

    python benchmarks/sweep.py                      # about 25 minutes with two processes of two threads
    python benchmarks/sweep.py --only adamw,lion --seeds 0
    python benchmarks/sweep.py --table              # only print what is there
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adafactor import Adafactor, recipes
from adafactor.cli import _text
from adafactor.cli._contenders import CONTENDERS, Contender
from adafactor.cli._files import write_json
from adafactor.cli._loop import Diverged, Setup, StopSignal, Trainer, train

RESULTS = Path(__file__).parent / "results" / "sweep.json"
# Variants of adamw_like, momentum in float32, and the learning rates to try.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "scaled, Nesterov": ({"scale_parameter": True, "nesterov": True}, (2.5e-2, 5e-2, 1e-1)),
    "scaled": ({"scale_parameter": True, "nesterov": False}, (5e-2, 1e-1)),
    "scaled, no momentum": ({"scale_parameter": True, "beta1": None}, (2.5e-2, 5e-2)),
    "absolute, Nesterov": ({"nesterov": True}, (1.5e-3, 3e-3, 6e-3)),
    "absolute": ({"nesterov": False}, (1.5e-3, 3e-3, 6e-3)),
}
SWEPT = [name for name, c in CONTENDERS.items() if c.swept_loss is not None]
GRID: dict[str, tuple[float | None, ...]] = {name: CONTENDERS[name].grid or (None,) for name in SWEPT}
GRID |= {name: grid for name, (_, grid) in VARIANTS.items()}
Cell = tuple[str, float | None, int]


def contender(name: str) -> Contender:
    """One of the CLI's, or a variant of Adafactor's recipe."""
    if name in CONTENDERS:
        return CONTENDERS[name]
    overrides, _ = VARIANTS[name]
    return replace(
        CONTENDERS["adafactor"],
        name=name,
        make=lambda named, lr: Adafactor(named, **recipes.adamw_like(lr, **overrides)),
    )


class _Rows(list[dict[str, Any]]):
    """Metrics that are kept in memory only."""

    def sync(self) -> None:
        pass


def run(cell: Cell, setup: Setup) -> dict[str, Any]:
    """Train once; the cell with its validation loss, None where it diverged."""
    name, lr, seed = cell
    setup = replace(setup, seed=seed)
    trainer = Trainer(setup, contender(name), lr, _text.load(None))
    rows, started = _Rows(), time.perf_counter()
    try:
        train(trainer, rows, StopSignal(), on_line=lambda line: None)
        loss = rows[-1]["val_loss"]
    except Diverged:
        loss = None
    return {"optimizer": name, "lr": lr, "seed": seed, "val_loss": loss, "seconds": time.perf_counter() - started}


def table(cells: list[dict[str, Any]]) -> str:
    """Mean over the seeds and their spread, for every optimizer and learning rate; ``*`` marks each one's best."""
    losses: dict[str, dict[float | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        losses[cell["optimizer"]][cell["lr"]].append(float("nan") if cell["val_loss"] is None else cell["val_loss"])
    lines = [f"{'optimizer':28}{'lr':>8}{'seeds':>7}{'nats/byte':>11}{'spread':>8}"]
    for name, by_rate in losses.items():
        means = {lr: statistics.fmean(values) for lr, values in by_rate.items()}
        best = min(means.values())
        for lr, values in sorted(by_rate.items(), key=lambda item: item[0] or 0.0):
            rate = "own" if lr is None else f"{lr:g}"
            mark = " *" if means[lr] == best else ""
            lines.append(f"{name:28}{rate:>8}{len(values):>7}{means[lr]:>11.3f}{max(values) - min(values):>8.3f}{mark}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SWEPT), help="which of the CLI's optimizers, separated by commas")
    parser.add_argument("--variants", action="store_true", help="the variants of Adafactor's recipe instead")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--lr", type=float, nargs="*", help="these instead of the grid")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()

    setup = Setup(threads=options.threads, device="cpu")
    fixed = {k: v for k, v in asdict(setup).items() if k not in ("seed", "threads")}
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"setup": fixed, "cells": []}
    if stored["setup"] != fixed:
        parser.error(f"{RESULTS} was made with {stored['setup']}, the defaults are {fixed}; move it away first")
    cells: list[dict[str, Any]] = stored["cells"]
    if not options.table:
        done = {(cell["optimizer"], cell["lr"], cell["seed"]) for cell in cells}
        names = list(VARIANTS) if options.variants else options.only.split(",")
        grid = [(n, lr, int(s)) for s in options.seeds.split(",") for n in names for lr in options.lr or GRID[n]]
        todo = [cell for cell in grid if cell not in done]
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
            for n, finished in enumerate(as_completed([pool.submit(run, cell, setup) for cell in todo]), 1):
                cells.append(finished.result())
                cells.sort(key=lambda c: (list(GRID).index(c["optimizer"]), c["lr"] or 0.0, c["seed"]))
                write_json(RESULTS, {"setup": fixed, "cells": cells})
                print(f"{n} of {len(todo)}: {finished.result()}", flush=True)
    print(table(cells))


if __name__ == "__main__":
    main()
