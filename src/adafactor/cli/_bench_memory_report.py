"""What ``adafactor bench --memory`` says: the table, the sentences, the picture and report.html."""

from __future__ import annotations

import base64
import datetime
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adafactor.cli import _html
from adafactor.cli._bench_entries import LR
from adafactor.cli._bench_memory import Subject
from adafactor.cli._bench_memory_modes import OPTIMIZERS
from adafactor.cli._bench_memory_trace import KEPT
from adafactor.cli._files import write_atomic, write_json
from adafactor.cli._pictures import COMPONENTS, STYLE
from adafactor.cli._results import machine
from adafactor.cli._screen import size
from adafactor.cli._trace_draw import INK, MUTED, png

Found = dict[str, Any]
PARTS = (*COMPONENTS, ("temporaries", "#e9ecf0"))


def collect(rows: list[Found], unfinished: list[str], subject: Subject, threads: int) -> Found:
    """The whole of results.json.

    Args:
        rows: of every mode that was measured, or failed.
        unfinished: titles of the modes that a signal prevented.
        subject: what was trained.
        threads: on the CPU.
    """
    return {
        "format": 1,
        "kind": "bench --memory",
        "headline": headline(rows),
        "notes": notes(rows, unfinished, subject),
        "rows": rows,
        "model": asdict(subject.config),
        "settings": {
            "backend": subject.backend,
            "device": subject.device,
            "compiler": subject.compiler,
            "threads": threads,
            "batch_size": 1,
            "lr": LR,
        },
        "machine": machine(subject.device),
        "command": shlex.join(["adafactor", *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def headline(rows: list[Found]) -> str:
    """The smallest mode of ours beside AdamW in mixed precision."""
    by_name = {row["name"]: row for row in rows if not row["note"]}
    ours, theirs = by_name.get("bfloat16-in-backward"), by_name.get("adamw-mixed")
    if ours is None:
        return "The step in backward was not measured."
    beside = f", with AdamW in mixed precision {_of(theirs)}" if theirs else ""
    return (
        f"Weights, gradients and optimizer state of a transformer of {ours['parameters'] / 1e6:.1f} M parameters take "
        f"{_of(ours)} bytes per parameter at their peak with Adafactor in bfloat16, stepping in backward{beside}."
    )


def _of(row: Found) -> str:
    return f"{row['kept_bytes_per_parameter']:.2f}"


def notes(rows: list[Found], unfinished: list[str], subject: Subject) -> list[str]:
    """What a reader has to know to read the numbers rightly."""
    said = [f"Interrupted: not measured are {'; '.join(unfinished)}."] if unfinished else []
    said += [f"{row['title']}: {row['note']}" for row in rows if row["note"]]
    by_name = {row["name"]: row for row in rows if not row["note"]}
    planned = sum(row["planned_state_bytes"] is not None for row in by_name.values())
    if planned:
        said.append(f"The state that adafactor.plan says is what was allocated, to the byte, in all {planned} modes.")
    if row := by_name.get("bfloat16-in-backward"):
        said.append(
            f"g, the gradients alive at once, is {row['gradients_in_largest']:.2f} of the largest one with the step in "
            f"backward: {row['gradients_share']:.1%} of all."
        )
    whole, blocks = by_name.get("compiled-whole"), by_name.get("compiled-blocks")
    if whole and blocks:
        said.append(
            f"Compiled as a whole ({subject.compiler}), {whole['gradients_share']:.0%} of the gradients are alive at "
            f"once, for backward is one function then; compiled block by block, {blocks['gradients_share']:.1%}: those "
            "of one block."
        )
    if row := by_name.get("tied-embedding"):
        said.append(
            f"A tied embedding is stepped last, and {row['gradients_in_largest']:.1f} gradients of its size are alive "
            "then: the output layer's, which waits through all of backward, the embedding's own, and their sum."
        )
    if row := by_name.get("ddp-in-backward"):
        said.append(
            "Under DistributedDataParallel gradients are complete only in its buckets (1 MiB each here), which stay. "
            f"With step_in_backward() the largest stays, and {row['gradients_share']:.1%} of all are alive at "
            "once."
        )
    said.append(
        f"A batch of one window of {subject.config.context} bytes: activations grow with the batch, the rest does not."
    )
    return said


def table(rows: list[Found]) -> Table:
    """Bytes per parameter of what grows with the model, and the peak of all."""
    made = Table(box=SIMPLE_HEAD, header_style="bold", padding=0, show_edge=False, title_justify="left")
    made.title = "Bytes per parameter at their peak: weights + gradients + state"
    made.add_column("Mode\n", no_wrap=True)
    for heading in ("\nExpected", "\nsum", "\nweights", "gradi-\nents", "\nstate", "Peak\nof all"):
        made.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        style = None if row["name"].startswith("adamw") else "bold"
        if row["note"]:
            made.add_row(row["title"], "failed", style=style)
            continue
        each = (f"{row['kept_per_parameter'][kind]:.3f}" for kind in KEPT)
        peak = size(row["peak_bytes"])
        made.add_row(row["title"], expected(row), f"{row['kept_bytes_per_parameter']:.3f}", *each, peak, style=style)
        if row["name"] == OPTIMIZERS[-1].name:
            made.add_section()
    return made


def expected(row: Found) -> str:
    """``4.00``, or ``2.00 + g`` where gradients are freed in backward; empty where nothing is."""
    if row["expected"] is None:
        return ""
    return f"{row['expected']:.2f}" + " + g" * row["gradients_on_top"]


def publish(directory: Path, found: Found) -> None:
    """Write results.json, memory.png and report.html.

    Raises:
        UserError: a file cannot be written.
    """
    picture = draw(found["rows"])
    write_json(directory / "results.json", found)
    write_atomic(directory / "memory.png", picture)
    write_atomic(directory / "report.html", render(found, picture))


def show(directory: Path, found: Found, console: Console) -> None:
    """Print the table and the sentences."""
    console.print()
    console.print(table(found["rows"]))
    for line in (found["headline"], *found["notes"]):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"\nReport: {directory / 'report.html'}", soft_wrap=True)


def draw(rows: list[Found]) -> bytes:
    """Left, what grows with the model, by parameter; right, the peak of the step."""
    rows = [row for row in rows if not row["note"]]
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(11, 1.6 + 0.4 * len(rows)), dpi=160, layout="constrained")
        kept, peak = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
        _bars(kept, rows, [{k: row["kept_per_parameter"][k] for k in KEPT} for row in rows], "{:.2f}")
        _bars(peak, rows, [_peak(row) for row in rows], "{:,.0f}")
        kept.invert_yaxis()
        kept.tick_params(axis="y", labelcolor=INK)
        if last := _last_optimizer(rows):
            kept.annotate(
                "below: bfloat16, where gradients live longer", (1, last + 0.5), (-4, -4), color=MUTED, fontsize=9.5,
                xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="top",
            )  # fmt: skip
        kept.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 4, 10]))
        kept.set_xlabel("bytes per parameter, weights + gradients + state at their peak")
        peak.set_xlabel("MB at the peak of the whole step")
        handles = [Patch(color=color) for _, color in PARTS]
        labels = ["weights", "gradients", "optimizer state", "activations", "temporaries"]
        figure.legend(handles, labels, loc="outside upper left", ncols=5, frameon=False, fontsize=10, handlelength=1)
        return png(figure)


def _peak(row: Found) -> dict[str, float]:
    """MB by part; what is none of them, a few kB of tables, goes with the temporaries."""
    parts = {k: v / 1e6 for k, v in row["peak"].items()}
    return parts | {"temporaries": parts["temporaries"] + parts["other"]}


def _last_optimizer(rows: list[Found]) -> int | None:
    """The row after which those begin that are about gradients."""
    return next((i for i, row in enumerate(rows[:-1]) if row["name"] == OPTIMIZERS[-1].name), None)


def _bars(ax: Axes, rows: list[Found], parts: list[dict[str, float]], text: str) -> None:
    left = [0.0] * len(rows)
    titles = [row["title"] for row in rows]
    for kind, color in PARTS:
        widths = [part.get(kind, 0.0) for part in parts]
        ax.barh(titles, widths, left=left, color=color, height=0.62, edgecolor="white", linewidth=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, end in enumerate(left):
        ax.annotate(
            text.format(end), (end, i), (5, 0), textcoords="offset points", va="center", fontsize=10, fontweight="bold"
        )
    if last := _last_optimizer(rows):
        ax.axhline(last + 0.5, color=MUTED, lw=0.8, ls=(0, (2, 3)))
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, 1.18 * max(left, default=1.0))


def render(found: Found, picture: bytes) -> str:
    """report.html: one file, the picture inside, no script, nothing fetched."""
    more = {"picture": base64.b64encode(picture).decode(), "kept": KEPT}
    return _html.render("bench-memory.html", found | more, expected=expected)
