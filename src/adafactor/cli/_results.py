"""From finished trainings to numbers and the sentences that may be said about them."""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adafactor
from adafactor import memory
from adafactor._distributed import local
from adafactor.cli import _ranks
from adafactor.cli._contenders import CONTENDERS, GAP_NOISE
from adafactor.cli._loop import VALIDATION_WINDOWS, Diverged, Setup, Trainer
from adafactor.cli._text import Corpus

Result = dict[str, Any]


def allocated(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind ``tensors``, of this process's part of them."""
    storages = (local(t).untyped_storage() for t in tensors if t is not None)
    return sum({(s.device, s.data_ptr()): s.nbytes() for s in storages if s.nbytes()}.values())


def memory_of_step(trainer: Trainer) -> dict[str, int]:
    """Allocated bytes at the peak of one more training step, by component."""
    optimizer, parameters = trainer.optimizer, list(trainer.model.parameters())
    optimizer.zero_grad(set_to_none=True)
    batch = trainer.next_batch().to(trainer.device)

    def step() -> None:
        trainer.backward(batch)
        optimizer.step()

    weights = allocated(parameters)
    state = allocated(v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    above = memory.peak_allocated(step, trainer.device)
    gradients = allocated(p.grad for p in parameters)
    return {
        "weights": weights,
        "gradients": gradients,
        "state": state,
        "activations": max(0, above - gradients),
        "peak": weights + state + above,
    }


def summarize(trainer: Trainer, rows: list[dict[str, Any]], diverged_at: int | None) -> Result:
    """One optimizer's line of the table and what is behind it, from its metrics and one more step."""
    setup, contender = trainer.setup, trainer.contender
    parameters = sum(p.numel() for p in trainer.model.parameters())
    bytes_by_component = memory_of_step(trainer)
    state = (v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    state_bytes = sum(v.numel() * v.element_size() for v in state)  # of the whole model, however it is sharded
    finished = diverged_at is None
    return {
        "name": contender.name,
        "title": contender.title,
        "description": contender.description,
        "lr": trainer.lr,
        "lr_origin": contender.lr_origin if trainer.lr == contender.lr else "given on the command line",
        "schedule": contender.schedule.words,
        "clip_norm": contender.clip_norm,
        "diverged_at": diverged_at,
        "val_loss": rows[-1]["val_loss"] if finished else None,
        "train_loss": rows[-1]["loss"] if finished else None,
        "parameters": parameters,
        "state_bytes": state_bytes,
        "state_bytes_per_parameter": state_bytes / parameters,
        "memory": bytes_by_component,
        "train_seconds": trainer.seconds,
        **timing(setup, _median(rows, "step_ms"), _median(rows, "optimizer_ms")),
    }


def _median(rows: list[dict[str, Any]], column: str) -> float | None:
    return statistics.median(row[column] for row in rows) if rows else None


def timing(setup: Setup, step_ms: float | None, optimizer_ms: float | None) -> dict[str, float | None]:
    """The columns that follow from the times of a step and of the optimizer in it; None where there was no step."""
    if step_ms is None or optimizer_ms is None:
        return dict.fromkeys(("step_ms", "optimizer_ms", "optimizer_share", "tokens_per_second"))
    return {
        "step_ms": step_ms,
        "optimizer_ms": optimizer_ms,
        "optimizer_share": optimizer_ms / step_ms,
        "tokens_per_second": setup.tokens_per_step / step_ms * 1e3,
    }


def time_side_by_side(trainers: list[Trainer], results: list[Result]) -> bool:
    """Replace the times of each one's own run by times taken in turns, so that what else the machine does meets all.

    Every trainer takes another step, then every one the next, for 25 rounds (or 15 seconds, but at least 5 rounds);
    the medians count. The trainers are of no other use afterwards. False, and nothing replaced, when one diverges now.
    """
    until = time.monotonic() + 15
    try:
        for turn in range(25):
            if turn >= 5 and _ranks.largest(time.monotonic() > until):
                break
            for trainer in trainers:
                trainer.step()
    except Diverged:
        return False
    by_name = {trainer.contender.name: trainer for trainer in trainers}
    for result in results:
        if trainer := by_name.get(result["name"]):
            measured = trainer.metrics()
            result |= timing(trainer.setup, measured["step_ms"], measured["optimizer_ms"])
    return True


def collect(
    kind: str, setup: Setup, corpus: Corpus, results: list[Result], missing: list[str], side_by_side: bool
) -> dict[str, Any]:
    """The whole of results.json.

    Args:
        kind: the command.
        setup: of all trainings.
        corpus: of all trainings, as the model reads it.
        results: of those that finished or diverged.
        missing: names of those that did neither.
        side_by_side: the times are those of ``time_side_by_side``.
    """
    task = setup.task(corpus.pieces)
    return {
        "format": 2,
        "kind": kind,
        "headline": headline(results, corpus.unit),
        "notes": notes(results, setup, missing),
        "timing": "side by side" if side_by_side else "each on its own",
        "optimizers": results,
        "setup": asdict(setup)
        | {
            "tokens_per_step": setup.tokens_per_step,
            "predictions": task.predicted,
            "validation_predictions": task.predicted * len(corpus.validation_windows(VALIDATION_WINDOWS, task.window)),
            "parameters": results[0]["parameters"],
            "description": task.description,
            "objective": task.objective,
        },
        "data": corpus.describe(),
        "machine": machine(setup.device),
        "command": _ranks.command(sys.argv[1:]),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def machine(device: str) -> dict[str, Any]:
    """What the times were measured on; no names of hosts or users."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adafactor": adafactor.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def ranked(results: list[Result]) -> list[Result]:
    """Those that finished, the lowest validation loss first."""
    return sorted((r for r in results if r["val_loss"] is not None), key=lambda r: r["val_loss"])


def headline(results: list[Result], unit: str = "byte") -> str:
    """The finding in one sentence, computed from the numbers; the fairest baseline at hand is the one named.

    Args:
        results: of all optimizers.
        unit: what is predicted.
    """
    by_name = {r["name"]: r for r in ranked(results)}
    if not by_name:
        return "No optimizer finished: every loss stopped being a number."
    ours = by_name.get("adafactor") or by_name.get("adafactor-paper")
    baselines = ("adamw-nesterov", "adamw", "lion") if ours and ours["name"] == "adafactor" else ("adamw", "lion")
    theirs = next((by_name[name] for name in baselines if name in by_name), None)
    if ours is None or theirs is None:
        best = next(iter(by_name.values()))
        verb = "is best: it reaches" if len(by_name) > 1 else "reaches"
        return (
            f"{_sentence_case(best)} {verb} {best['val_loss']:.3f} nats per {unit} with "
            f"{best['state_bytes_per_parameter']:.2f} bytes of optimizer state per parameter."
        )
    a, b = round(ours["val_loss"], 3), round(theirs["val_loss"], 3)
    other = CONTENDERS[theirs["name"]].phrase
    if abs(a - b) < GAP_NOISE:
        relation = f"is level with {other} ({a:.3f} and {b:.3f} nats per {unit})"
    else:
        relation = (
            f"ends {abs(a - b):.3f} nats per {unit} {'below' if a < b else 'above'} {other} ({a:.3f} and {b:.3f})"
        )
    slower = (ours["step_ms"] or math.nan) / (theirs["step_ms"] or math.nan)
    speed = f" and {slower:.1f} times its time per step" if slower > 1.1 or slower < 0.9 else ""
    return f"{_sentence_case(ours)} {relation}, with {_share(ours, theirs)} its optimizer state{speed}."


def _sentence_case(result: Result) -> str:
    phrase = CONTENDERS[result["name"]].phrase
    return phrase[0].upper() + phrase[1:]


def _share(ours: Result, theirs: Result) -> str:
    share = ours["state_bytes"] / theirs["state_bytes"]
    return f"{share:.1%} of" if share < 0.1 else f"{share:.0%} of" if share < 1.5 else f"{share:.1f} times"


def notes(results: list[Result], setup: Setup, missing: list[str]) -> list[str]:
    """What a reader has to know to read the numbers rightly."""
    by_name = {r["name"]: r for r in ranked(results)}
    said = [f"Interrupted: {', '.join(missing)} did not finish."] if missing else []
    said += [
        f"{r['title']} diverged: its loss stopped being a number at step {r['diverged_at']}."
        for r in results
        if r["diverged_at"] is not None
    ]
    if setup.shard:
        said.append(
            f"{setup.ranks} processes trained together (--shard {setup.shard}): the peak and the parts of memory are "
            "those of one of them, the optimizer's state is the whole model's."
        )
    if len(by_name) > 1:
        said.append(
            f"One seed ({setup.seed}). In the sweep behind the defaults, the gap between two optimizers moved by up "
            f"to {GAP_NOISE:g} nats per byte from seed to seed; a smaller gap says nothing."
        )
    ours, plain, fair = (by_name.get(name) for name in ("adafactor", "adamw", "adamw-nesterov"))
    if ours and plain and not fair:
        swept = {name: CONTENDERS[name].swept_loss for name in ("adafactor", "adamw-nesterov", "adamw")}
        said.append(
            "Adafactor's recipe takes Nesterov steps and plain AdamW does not; what they gain is not Adafactor's merit."
            f" In the sweep, AdamW with the same step reached {swept['adamw-nesterov']:.3f}, Adafactor "
            f"{swept['adafactor']:.3f} and plain AdamW {swept['adamw']:.3f}. To see it here, add adamw-nesterov to "
            "--optimizers."
        )
    if ours and plain and fair:
        said.append(
            "Hold Adafactor's recipe against AdamW + Nesterov, not against AdamW: both take the same Nesterov step, "
            f"and that step alone takes AdamW from {plain['val_loss']:.3f} to {fair['val_loss']:.3f}."
        )
    if paper := by_name.get("adafactor-paper"):
        said.append(
            "Adafactor (paper) sets its own rate; the schedule does not apply to it. It needs "
            f"{paper['state_bytes_per_parameter']:.2f} bytes of state per parameter, and was made for far longer runs."
        )
    return said
