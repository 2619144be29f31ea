"""What ``adafactor plan`` says: the answer, the table, the picture and report.html."""

from __future__ import annotations

import base64
import datetime
import shlex
import sys
from pathlib import Path
from typing import Any, cast

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adafactor import __version__
from adafactor.cli import _html
from adafactor.cli._files import write_atomic, write_json
from adafactor.cli._pictures import COMPONENTS, STYLE
from adafactor.cli._plan_modes import LEAST, enough_ranks
from adafactor.cli._plan_source import Source
from adafactor.cli._screen import size
from adafactor.cli._trace_draw import INK, MUTED, png

Found = dict[str, Any]
PARTS = (*COMPONENTS[:3], ("unsharded", "#5b8fb9"), ("temporaries", "#cfd6df"))
_LABELS = {"state": "optimizer state", "unsharded": "unsharded by FSDP2"}


def collect(source: Source, cases: list[Found], device_memory: float, activations: float, train: str) -> Found:
    """The whole of results.json.

    Args:
        source: the model.
        cases: the tables of ``measure``.
        device_memory: GB of a device.
        activations: GB of them that the batch takes.
        train: what the names of the parameters that are trained begin with.
    """
    room = 1e9 * (device_memory - activations)
    trained = sum(p.numel() for p in source.model.parameters() if p.requires_grad)
    notes = list(source.notes)
    if train:
        notes.append(f"{trained:,} of {cases[0]['parameters']:,} parameters are trained; the rest is frozen.")
    answers = [_answer(source, case, device_memory, activations) for case in cases]
    if not any(row["fits"] for case in cases for row in case["rows"]):
        fewest = enough_ranks(source.model, room)
        notes.append(
            f"Over {fewest} ranks ({LEAST.title}) it fits."
            if fewest
            else "No number of ranks up to 1,024 makes it fit: FSDP2 holds too much of it whole."
        )
    if any(case["ranks"] > 1 for case in cases):
        notes.append(
            "Over several ranks, each numbered block of the model is a fully_shard group and the rest is the root's, "
            "whose weights and gradients every rank holds whole for a while."
        )
    if not activations:
        notes.append("Activations are not in these numbers; --activations counts them.")
    return {
        "format": 1,
        "kind": "plan",
        "headline": answers[0][0],
        "answers": [" ".join(both) for both in answers],
        "notes": notes,
        "model": source.title,
        "origin": source.origin,
        "parameters": cases[0]["parameters"],
        "trained": trained,
        "device_memory": round(1e9 * device_memory),
        "activations": round(1e9 * activations),
        "cases": cases,
        "versions": {"adafactor": __version__, "torch": torch.__version__},
        "command": shlex.join(["adafactor", *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _answer(source: Source, case: Found, device_memory: float, activations: float) -> tuple[str, str]:
    """Does it fit, and with what; and AdamW?"""
    rows, ranks = case["rows"], case["ranks"]
    ours, theirs = ([row for row in rows if row["ours"] is side] for side in (True, False))
    where = f"on {device_memory:g} GB" if ranks == 1 else f"on {ranks:,} devices of {device_memory:g} GB"
    less = f", {activations:g} GB of them for activations" if activations else ""
    left = "" if activations else " for activations"
    fitting = sorted((row for row in ours if row["fits"]), key=lambda row: row["total"])
    least = min(ours, key=lambda row: row["total"])
    leaves = f"{size(least['total'])}, which leaves {size(least['left'])}{left}"
    if not fitting:
        said = f"no; Adafactor's least is {least['title']!r}, {size(least['total'])}"
    elif len(fitting) == 1:
        said = f"yes, with Adafactor's {least['title']!r} ({leaves})"
    else:
        said = (
            f"yes, with {len(fitting)} of Adafactor's {len(ours)} modes, from {fitting[-1]['title']!r} "
            f"({size(fitting[-1]['total'])}) down to {least['title']!r} ({leaves})"
        )
    small = min(theirs, key=lambda row: row["total"])
    others = [repr(row["title"]) for row in theirs if row["fits"]]
    if not others:
        beside = f"The least of AdamW and Lion is {small['title']!r}, {size(small['total'])}."
    elif len(others) == len(theirs):
        beside = "AdamW and Lion fit, too, in every mode."
    else:
        beside = f"Of AdamW and Lion {', '.join(others)} fit{'s' * (len(others) == 1)}, too."
    return f"{source.title} {where}{less}: {said}.", beside


def parts_of(case: Found) -> list[str]:
    """The components that any mode has."""
    return [kind for kind, _ in PARTS if any(row[kind] for row in case["rows"])]


def _digits(value: float) -> str:
    """Three of them, and never more than four after the point: ``128``, ``17.1``, ``2.10``, ``0.0126``."""
    size = abs(value)
    if size == 0:
        return "0"
    places = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3 if size >= 0.09995 else 4
    return f"{value:.{places}f}"


def table(found: Found, case: Found) -> Table:
    """Every mode's bytes by component, and whether they fit."""
    scale, unit = _unit(case)
    made = Table(box=SIMPLE_HEAD, header_style="bold", padding=0, show_edge=False, title_justify="left")
    on = f", {unit} on each of {case['ranks']:,} ranks" if case["ranks"] > 1 else f", {unit}"
    made.title = f"{escape(found['model'])}, {found['parameters']:,} parameters{on}"
    made.add_column("\nMode", no_wrap=True)
    short = {"gradients": "gradi-\nents", "unsharded": "unshar-\nded", "temporaries": "tempo-\nraries"}
    for kind in parts_of(case):
        made.add_column(short.get(kind, f"\n{kind}"), justify="right", no_wrap=True)
    made.add_column("\ntotal", justify="right", no_wrap=True)
    room = (found["device_memory"] - found["activations"]) / scale
    made.add_column(f"left of\n{_digits(room)}", justify="right", no_wrap=True)
    heading = None
    for row in case["rows"]:
        if row["group"] != heading:
            heading = row["group"]
            made.add_section()
            made.add_row(heading, style="bold")
        cells = (_digits(row[kind] / scale) for kind in (*parts_of(case), "total"))
        made.add_row(
            f"  {row['short']}", *cells, f"[{'green' if row['fits'] else 'red'}]{_digits(row['left'] / scale)}[/]"
        )
    return made


def _unit(case: Found) -> tuple[float, str]:
    return (1e9, "GB") if max(row["total"] for row in case["rows"]) >= 1e9 else (1e6, "MB")


def publish(directory: Path, found: Found) -> None:
    """Write results.json, plan.png and report.html.

    Raises:
        UserError: a file cannot be written.
    """
    picture = draw(found)
    write_json(directory / "results.json", found)
    write_atomic(directory / "plan.png", picture)
    write_atomic(directory / "report.html", render(found, picture))


def show(found: Found, directory: Path | None, console: Console) -> None:
    """Print the tables and the sentences."""
    for case in found["cases"]:
        console.print(table(found, case))
        console.print()
    for line in (*found["answers"], *found["notes"]):
        console.print(line, soft_wrap=True, markup=False)
    if directory:
        console.print(f"\nReport: {directory / 'report.html'}", soft_wrap=True)


def draw(found: Found) -> bytes:
    """A panel per number of ranks: a bar for every mode, by component, and a line where the device ends."""
    cases = found["cases"]
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(10, 1.0 + len(cases) * (0.9 + 0.31 * len(cases[0]["rows"]))), dpi=160)
        figure.set_layout_engine("constrained")
        for ax, case in zip(figure.subplots(len(cases), 1, squeeze=False).flat, cases, strict=True):
            _panel(ax, found, case)
        kinds = list(dict.fromkeys(kind for case in cases for kind in parts_of(case)))
        handles = [Patch(color=dict(PARTS)[kind]) for kind in kinds]
        labels = [_LABELS.get(kind, kind) for kind in kinds]
        figure.legend(handles, labels, loc="outside upper left", ncols=5, frameon=False, fontsize=10, handlelength=1)
        return png(figure)


def _panel(ax: Axes, found: Found, case: Found) -> None:
    rows, device = case["rows"], found["device_memory"]
    largest, (scale, unit) = max(row["total"] for row in rows), _unit(case)
    on = f", on each of {case['ranks']:,} ranks" if case["ranks"] > 1 else ""
    ax.set_title(f"{found['model']}{on}", loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
    left = [0.0] * len(rows)
    for kind, color in PARTS:
        widths = [row[kind] / scale for row in rows]
        ax.barh(range(len(rows)), widths, left=left, color=color, height=0.68, edgecolor="white", linewidth=0.5)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, row in enumerate(rows):
        ax.annotate(
            size(row["total"]), (left[i], i), (5, 0), textcoords="offset points", va="center", fontsize=9.5,
            fontweight="bold" if row["fits"] else "normal", color=INK if row["fits"] else MUTED,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1.0}, zorder=4,
        )  # fmt: skip
        if i + 1 < len(rows) and row["group"] != rows[i + 1]["group"]:
            ax.axhline(i + 0.5, color=MUTED, lw=0.8, ls=(0, (2, 3)))
        if row["ours"] and (i + 1 == len(rows) or row["group"] != rows[i + 1]["group"]):
            ax.annotate(
                row["group"], (1, i), (-4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="center", fontsize=10, fontweight="bold", color=INK, zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1.0},
            )  # fmt: skip
    marks = [(device, f"{size(device)}, a device")]
    if found["activations"]:
        marks = [(device - found["activations"], f"{size(device)} less {size(found['activations'])} of activations")]
    right = 1.14 * largest
    for end, text in marks:
        if end > 1.6 * largest:  # far beyond: the bars would shrink to nothing
            text, end = f"{text}, is further to the right", right
        else:
            right = max(right, 1.1 * end)
            ax.axvline(end / scale, color=INK, lw=1.3, ls=(0, (4, 3)), zorder=3)
        side = "right" if end > 0.5 * right else "left"
        ax.annotate(
            text, (end / scale, 1), (3 if side == "left" else -3, 4), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha=side, va="bottom", fontsize=9.5, color=INK,
        )  # fmt: skip
    ax.set_xlim(0, right / scale)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks(range(len(rows)), [row["short"] for row in rows])
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_xlabel(f"{unit} at the peak of a step, less activations; bold where it fits")


def render(found: Found, picture: bytes) -> str:
    """report.html: one file, the picture inside, no script, nothing fetched."""
    more = {
        "picture": base64.b64encode(picture).decode(),
        "labels": {kind: _LABELS.get(kind, kind) for kind, _ in PARTS},
    }
    return _html.render("plan.html", found | more, parts_of=parts_of)
