"""What the terminal shows: progress while training, the table at the end."""

from __future__ import annotations

import time
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from adafactor.cli import _ranks


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """``1400000`` -> ``1.40 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def note(line: str) -> None:
    """Say what takes a while, or where something is."""
    Console(stderr=True, highlight=False, quiet=not _ranks.first()).print(line, soft_wrap=True)


class Screen:
    """Shows loss, tokens per second and time left, as a live bar on a terminal and as a few lines elsewhere.

    Args:
        trainings: how many will run, one after the other.
        steps: steps of each.
    """

    def __init__(self, trainings: int, steps: int) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=not _ranks.first())
        self._trainings, self._steps = trainings, steps
        self._finished = 0
        self._val_loss: float | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, title: str, done: int) -> None:
        """A training starts, or continues after ``done`` steps."""
        self._title, self._first, self._began, self._val_loss = title, done, time.monotonic(), None
        of_all = f" ({self._finished + 1} of {self._trainings})" if self._trainings > 1 else ""
        self._task = self._progress.add_task(f"{title}{of_all}", total=self._steps, completed=done, status="")

    def line(self, metrics: dict[str, Any]) -> None:
        """A line of metrics arrived."""
        step = metrics["step"]
        per_step = (time.monotonic() - self._began) / (step - self._first)
        left = per_step * (self._steps - step + (self._trainings - self._finished - 1) * self._steps)
        evaluated = "val_loss" in metrics
        if evaluated:
            self._val_loss = metrics["val_loss"]
        parts = [
            f"loss {metrics['loss']:.3f}",
            f"validation {self._val_loss:.3f}" if self._val_loss is not None else "",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            f"{duration(left)} left",
        ]
        status = "  ".join(part for part in parts if part)
        self._progress.update(self._task, completed=step, status=status)
        if evaluated and not self.console.is_terminal:
            self.console.print(f"{self._title}  step {step}/{self._steps}  {status}", soft_wrap=True)

    def end(self, note: str) -> None:
        """The training is over; ``note`` stays on the screen."""
        self._progress.remove_task(self._task)
        self._finished += 1
        self.console.print(f"{self._title}: {note}", soft_wrap=True)


def table(results: list[dict[str, Any]], unit: str) -> Table:
    """The answer: how good in nats per ``unit``, how much memory, how fast."""
    made = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    made.add_column("Optimizer\n", no_wrap=True)
    for heading in (
        f"Validation\nnats/{unit}",
        "State\nbytes/param.",
        "Peak\nmemory",
        "Time\nper step",
        "in the\noptimizer",
    ):
        made.add_column(heading, justify="right", no_wrap=True)
    losses = [r["val_loss"] for r in results if r["val_loss"] is not None]
    for r in results:
        loss = "diverged" if r["val_loss"] is None else f"{r['val_loss']:.3f}"
        best = r["val_loss"] is not None and len(results) > 1 and r["val_loss"] == min(losses)
        timed = r["step_ms"] is not None
        made.add_row(
            r["title"],
            f"[bold green]{loss}[/]" if best else loss,
            f"{r['state_bytes_per_parameter']:.2f}",
            size(r["memory"]["peak"]),
            f"{r['step_ms']:.1f} ms" if timed else "",
            f"{r['optimizer_share']:.0%}" if timed else "",
        )
    return made
