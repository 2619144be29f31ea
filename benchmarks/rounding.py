"""What the storage of weights costs in training: float32; bfloat16 rounded stochastically, kept in 24 bits, to nearest.

Trains ``adafactor compare``'s default model, rounds it to bfloat16 once, and trains it on from there at a small
learning rate: every way of storing the weights starts with the same numbers and sees the same batches. The forward and
backward passes are computed in float32 from the stored weights in all of them; the gradients that reach the optimizer
have the dtype of the weights. Finished trainings are kept in ``benchmarks/results/rounding.json`` and not run again.

    python benchmarks/rounding.py                   # about 15 minutes with two processes of one thread
    python benchmarks/rounding.py --table           # only print what is there, and draw its picture
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import signal
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import functional_call
from torch.nn import Parameter

from adafactor import Adafactor, recipes
from adafactor.cli import _checkpoint, _text
from adafactor.cli._contenders import CONTENDERS
from adafactor.cli._files import write_atomic, write_json
from adafactor.cli._loop import Setup, StopSignal, Trainer, train
from adafactor.cli._model import ByteTransformer, NextByte
from adafactor.cli._pictures import STYLE, label_ends
from adafactor.cli._results import machine
from adafactor.cli._trace_draw import ADAFACTOR, ADAM, INK, MUTED, png

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rounding.json"
PICTURE = ROOT / "docs" / "pictures" / "rounding.png"
START = ROOT / "runs" / "rounding-start.pt"
LR, STEPS, SEEDS = 1e-5, 1600, (1, 2, 3)  # seed 0 drew the batches of the start
MEASURED = 40  # steps of a training whose updates are followed into the weights
TOLERANCE = 0.005  # of float32's validation loss


@dataclass(frozen=True)
class Mode:
    """One way of storing the weights."""

    title: str
    dtype: str
    options: dict[str, Any]
    color: str
    line: str


MODES = {
    "float32": Mode("float32", "float32", {}, INK, "-"),
    "stochastic": Mode("bfloat16, stochastic", "bfloat16", {}, ADAFACTOR, "--"),
    "24-bit": Mode("bfloat16, weight_bits=24", "bfloat16", {"weight_bits": 24}, "#e08a00", ":"),
    "nearest": Mode("bfloat16, nearest", "bfloat16", {"rounding": "nearest"}, ADAM, "-"),
}


class Float32Compute(ByteTransformer):
    """The model computed in float32, whatever dtype its weights are stored in."""

    def loss(self, tokens: Tensor) -> Tensor:
        weights = {name: p.float() for name, p in self.named_parameters()}
        logits = functional_call(self, weights, tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Continuation(Trainer):
    """Trains on from given weights with the weights stored as ``mode`` says."""

    def __init__(self, mode: Mode, setup: Setup, lr: float, corpus: _text.Corpus, start: dict[str, Tensor]) -> None:
        self._start = start
        options = recipes.diffusion_finetune(seed=setup.seed, **mode.options)
        contender = replace(CONTENDERS["adafactor"], make=lambda named, lr: Adafactor(named, **options | {"lr": lr}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            super().__init__(replace(setup, dtype=mode.dtype), contender, lr, corpus)
        self.warnings = [str(warning.message) for warning in caught]

    def fresh_model(self) -> ByteTransformer:
        model = Float32Compute(cast(NextByte, self.task).config, self.setup.seed)
        model.load_state_dict(self._start)
        return model


class Arrivals:
    """Follows updates into the stored weights: compares what a step changes with what it changes in float32.

    Args:
        optimizer: with parameters that have names.
        every: steps from one that is measured to the next.
    """

    def __init__(self, optimizer: Adafactor, every: int) -> None:
        self._every, self._steps = every, 0
        self._elements = self._unchanged = 0
        self._arrived = self._wanted = 0.0
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def shares(self) -> dict[str, float]:
        """Of the updates that are not zero: how many left their weight as it was, and how much of their length came.

        The second is the projection of the changes of the weights on the updates: 1 where nothing is lost on average.
        """
        return {"unchanged": self._unchanged / self._elements, "arrived": self._arrived / self._wanted}

    def _before(self, optimizer: Any, *_: Any) -> None:
        if self._steps % self._every == 0:
            self._old, self._target = optimizer.full_precision_weights(), in_float32(optimizer)

    def _after(self, optimizer: Any, *_: Any) -> None:
        if self._steps % self._every == 0:
            for name, new in optimizer.full_precision_weights().items():
                old = self._old[name].double()
                wanted, change = self._target[name].double() - old, new.double() - old
                self._elements += int((wanted != 0).sum())
                self._unchanged += int(((wanted != 0) & (change == 0)).sum())
                self._arrived += float((wanted * change).sum())
                self._wanted += float(wanted.square().sum())
        self._steps += 1


def in_float32(optimizer: Adafactor) -> dict[str, Tensor]:
    """What the optimizer's next step would make of its weights if they were stored in float32."""
    group = optimizer.param_groups[0]
    weights = {name: Parameter(w.float()) for name, w in optimizer.full_precision_weights().items()}
    for name, p in zip(group["param_names"], group["params"], strict=True):
        weights[name].grad = p.grad.float()
    copy = Adafactor(weights.items(), lr=1.0)
    copy.load_state_dict(optimizer.state_dict())
    copy.step()
    return {name: p.detach() for name, p in weights.items()}


class Rows(list[dict[str, Any]]):
    """Metrics that are kept in memory only."""

    def sync(self) -> None:
        pass


def pretrained(setup: Setup, corpus: _text.Corpus, path: Path) -> dict[str, Tensor]:
    """The weights all trainings start from, rounded to bfloat16; ``path`` keeps them, and a stopped run continues."""
    contender = CONTENDERS["adafactor"]
    run = _checkpoint.Run(setup, contender.name, contender.lr, None)
    trainer = Trainer(setup, contender, contender.lr, corpus)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (stored := _checkpoint.load(path))[0] == run:
        _checkpoint.restore(path, stored[1], trainer)
    show = progress("start", setup)
    train(trainer, Rows(), StopSignal(), show, lambda: _checkpoint.save(path, run, trainer), save_every=100)
    return {name: p.detach().bfloat16().float() for name, p in trainer.model.named_parameters()}


def progress(title: str, setup: Setup) -> Any:
    """Prints a line at every evaluation."""

    def show(line: dict[str, Any]) -> None:
        if "val_loss" in line:
            print(f"{title}  step {line['step']}/{setup.steps}  validation {line['val_loss']:.4f}", flush=True)

    return show


def run(name: str, setup: Setup, lr: float, start: dict[str, Tensor], corpus: _text.Corpus) -> dict[str, Any]:
    """One training."""
    began = time.perf_counter()
    trainer = Continuation(MODES[name], setup, lr, corpus, start)
    optimizer = cast(Adafactor, trainer.optimizer)
    arrivals = Arrivals(optimizer, max(1, setup.steps // MEASURED))
    rows = Rows([{"step": 0, "val_loss": trainer.evaluate()}])
    train(trainer, rows, StopSignal(), progress(f"{name}, seed {setup.seed}", setup))
    parameters = list(trainer.model.parameters())
    stored = sum(p.nbytes for p in parameters) + optimizer.explain().state_bytes
    return {
        "mode": name,
        "seed": setup.seed,
        "val_loss": rows[-1]["val_loss"],
        "curve": [[row["step"], row["val_loss"]] for row in rows if "val_loss" in row],
        **arrivals.shares(),
        "bytes_per_parameter": stored / sum(p.numel() for p in parameters),
        "warnings": trainer.warnings,
        "seconds": round(time.perf_counter() - began),
    }


def run_in_process(name: str, setup: Setup, lr: float, start: dict[str, Tensor]) -> dict[str, Any]:
    return run(name, setup, lr, start, _text.load(None))


def by_mode(cells: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The finished trainings of each mode in the order of their seeds."""
    ordered = sorted(cells, key=lambda cell: cell["seed"])
    found = {name: [cell for cell in ordered if cell["mode"] == name] for name in MODES}
    return {name: cells for name, cells in found.items() if cells}


def gaps(cells: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of every mode: the difference to float32's validation loss, relative to it, for every seed that both have."""
    exact = {cell["seed"]: cell["val_loss"] for cell in cells if cell["mode"] == "float32"}
    return {
        name: [c["val_loss"] / exact[c["seed"]] - 1 for c in own if c["seed"] in exact]
        for name, own in by_mode(cells).items()
    }


def table(cells: list[dict[str, Any]]) -> str:
    """The table of ``docs/rounding.md``."""
    lines = [
        "| weights | bytes per parameter, with state | validation loss | to float32 | updates that change nothing "
        "| of the updates arrives |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in by_mode(cells).items():
        losses, gap = [cell["val_loss"] for cell in own], gaps(cells)[name]
        loss = f"{statistics.fmean(losses):.4f} ± {(max(losses) - min(losses)) / 2:.4f}"
        to_exact = f"{statistics.fmean(gap):+.2%}".replace("%", " %").replace("-", "−") if gap else ""
        unchanged, arrived = (statistics.fmean(cell[key] for cell in own) for key in ("unchanged", "arrived"))
        row = (f"{own[0]['bytes_per_parameter']:.2f}", loss, "" if name == "float32" else to_exact)
        lines.append(f"| {MODES[name].title} | {' | '.join(row)} | {100 * unchanged:.1f} % | {100 * arrived:.1f} % |")
    return "\n".join(lines)


def picture(cells: list[dict[str, Any]]) -> bytes:
    """Validation loss over steps: the mean of the seeds, and the band they stay in."""
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(9, 5), dpi=160, layout="constrained")
        ax = figure.subplots()
        ends = []
        for name, own in by_mode(cells).items():
            mode = MODES[name]
            steps = [step for step, _ in own[0]["curve"]]
            seeds = list(zip(*([loss for _, loss in cell["curve"]] for cell in own), strict=True))
            means = [statistics.fmean(losses) for losses in seeds]
            ax.fill_between(steps, list(map(min, seeds)), list(map(max, seeds)), color=mode.color, alpha=0.15, lw=0)
            ax.plot(steps, means, mode.line, color=mode.color, lw=2.2)
            ends.append((steps[-1], means[-1], f"{mode.title} {means[-1]:.4f}", mode.color))
        label_ends(ax, ends)
        ax.set_xlim(left=0)
        ax.set_xlabel("step")
        title = f"Validation loss, nats per byte: mean and range of {len(seeds[0])} seeds"
        ax.set_title(title, loc="left", fontsize=11, color=MUTED, pad=12)
        return png(figure)


def commit() -> str:
    """The commit this runs from, marked where files have changed since."""
    git = ["git", "-C", str(ROOT)]
    changed = subprocess.run([*git, "status", "--porcelain", "src", "benchmarks/*.py"], capture_output=True, text=True)
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return head.stdout.strip() + (" and changes" if changed.stdout.strip() else "")


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there, and draw it")
    return parser.parse_args(arguments)


def label(options: argparse.Namespace, setup: Setup, corpus: _text.Corpus) -> dict[str, Any]:
    """What decides the numbers; trainings of another label are not mixed with these."""
    start = {"steps": Setup.steps, "lr": CONTENDERS["adafactor"].lr, "optimizer": "adafactor"}
    fixed = {key: value for key, value in asdict(setup).items() if key not in ("seed", "threads", "dtype")}
    return {"start": start, "setup": fixed, "lr": options.lr, "data": corpus.describe()}


def main() -> None:
    options = options_of(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes end with this one
    stored: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"cells": []}
    if not options.table:
        complete(options, stored)
    print(table(stored["cells"]))
    write_atomic(options.picture, picture(stored["cells"]))


def complete(options: argparse.Namespace, stored: dict[str, Any]) -> None:
    """Run what is missing, and write every training as it finishes."""
    setup = Setup(steps=options.steps, device="cpu", threads=options.threads)
    corpus = _text.load(None)
    fixed, cells = label(options, setup, corpus), stored["cells"]
    if cells and {key: stored[key] for key in fixed} != fixed:
        raise SystemExit(f"{options.out} was made with other settings or another text; choose another --out")
    done = {(cell["mode"], cell["seed"]) for cell in cells}
    todo = [(name, seed) for seed in options.seeds for name in MODES if (name, seed) not in done]
    if not todo:
        return
    command = shlex.join(["python", "benchmarks/rounding.py", *sys.argv[1:]])
    stored |= fixed | {"command": command, "commit": commit(), "machine": machine("cpu")}
    start = pretrained(Setup(device="cpu", threads=options.threads), corpus, START)
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run_in_process, name, replace(setup, seed=s), options.lr, start) for name, s in todo]
        try:
            for n, job in enumerate(as_completed(jobs), 1):
                cells.append(job.result())
                cells.sort(key=lambda cell: (list(MODES).index(cell["mode"]), cell["seed"]))
                write_json(options.out, stored)
                last = {key: value for key, value in job.result().items() if key != "curve"}
                print(f"{n} of {len(todo)}: {last}", flush=True)
        except BaseException:  # the pool would wait for every training that it has queued
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


if __name__ == "__main__":
    main()
