"""What ``adafactor bench`` says: the table, the sentence, the picture, and report.html that needs no other file."""

from __future__ import annotations

import base64
import datetime
import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adafactor.cli import _html
from adafactor.cli._bench_entries import ADAMW, BASELINES, EIGHT_BIT, LR, MOMENTUM, SGD
from adafactor.cli._bench_gate import RATES, SHAPES, Verdict
from adafactor.cli._files import write_atomic, write_json
from adafactor.cli._pictures import STYLE
from adafactor.cli._results import machine
from adafactor.cli._screen import size
from adafactor.cli._trace_draw import ADAFACTOR, INK, MUTED, png

_OTHER, _FLOOR = "#8493a8", "#3f8f4f"
_OURS = {"adafactor": ADAFACTOR, MOMENTUM.name: "#ec8a97"}
MOST_DIFFERENCES = 12
Found = dict[str, Any]


def collect(
    cases: list[Found], verdicts: list[Verdict], missing: list[str], unfinished: list[str], settings: dict[str, Any]
) -> Found:
    """The whole of results.json.

    Args:
        cases: the tables of ``measure``.
        verdicts: of the gate, all of them passed.
        missing: packages with an Adafactor that are not installed.
        unfinished: titles of the tables that a signal prevented.
        settings: options that hold for every table.
    """
    versions = {row["package"]: row["version"] for case in cases for row in case["optimizers"]}
    return {
        "format": 1,
        "kind": "bench",
        "headline": headline(cases),
        "notes": notes(cases, missing, unfinished, settings["repeats"]),
        "cases": cases,
        "gate": [asdict(verdict) for verdict in verdicts],
        "settings": settings | {"lr": LR},
        "machine": machine(settings["device"]),
        "versions": {name: version for name, version in versions.items() if version},
        "command": shlex.join(["adafactor", *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def headline(cases: list[Found]) -> str:
    """The finding of the first table in one sentence."""
    if not cases:
        return "Nothing was timed."
    case = cases[0]
    rows = {row["name"]: row for row in case["optimizers"] if row["to_adamw"]}
    others = [
        row for name, row in rows.items() if name not in _OURS and name not in (ADAMW.name, SGD.name, EIGHT_BIT.name)
    ]
    said = []
    if ours := next((rows[name] for name in _OURS if name in rows), None):
        floor = f" and {times(ours['to_sgd'])} as long as one of fused SGD" if ours["to_sgd"] else ""
        said.append(f"a step of {ours['title']} takes {times(ours['to_adamw'])} as long as one of fused AdamW{floor}")
    if others:
        best = min(others, key=lambda row: row["to_adamw"]["median"])
        which = "the fastest other Adafactor here" if len(others) > 1 else "another Adafactor"
        said.append(f"{which}, {best['title']}, takes {times(best['to_adamw'])} as long as AdamW")
    return f"On {case['title']}: {'; '.join(said)}." if said else f"On {case['title']}: no ratio to fused AdamW."


def times(spread: dict[str, float]) -> str:
    return f"{number(spread['median'])} times"


def number(value: float) -> str:
    """Three digits, two below 1: ``0.42``, ``1.37``, ``19.2``, ``104``."""
    return f"{value:.{max(0, min(2, 2 - math.floor(math.log10(max(value, 0.01)))))}f}"


def notes(cases: list[Found], missing: list[str], unfinished: list[str], repeats: int) -> list[str]:
    """What a reader has to know to read the numbers rightly."""
    said = []
    for case in cases:
        if case["interrupted"]:
            said.append(f"Interrupted: {case['title']} has {case['rounds']} of {repeats} rounds.")
    if unfinished:
        said.append(f"Interrupted: not measured are {'; '.join(unfinished)}.")
    for case in cases:
        said += [f"{row['title']} on {case['title']}: {row['note']}" for row in case["optimizers"] if row["note"]]
        short = {row["title"]: row["rounds"] for row in case["optimizers"] if 0 < row["rounds"] < case["rounds"]}
        if short:
            sat = ", ".join(f"{title} after {rounds}" for title, rounds in short.items())
            said.append(f"On {case['title']} the slow ones sat out the later rounds: {sat} of {case['rounds']}.")
    said += [_bandwidth(case) for case in cases]
    if missing:
        said.append(f"Not installed, so not timed: {', '.join(missing)} (pip install {' '.join(missing)}).")
    if any(case["dtype"] != "float32" for case in cases):
        said.append(
            "In 16 bits some keep their state in 16 bits as well, AdamW among them, and all but ours round weights to "
            "nearest, which is less work and loses small updates."
        )
    return said


def _bandwidth(case: Found) -> str:
    """How near to the memory's speed those come whose traffic is known."""
    copied, shares = case["copy_bytes_per_second"], []
    for row in case["optimizers"]:
        moved = row["moved_bytes_per_parameter"]
        if moved and row["step_ms"]:
            rate = moved * case["parameters"] / (row["step_ms"]["median"] / 1e3)
            shares.append(f"{row['title']} moves {moved} bytes per parameter at {rate / copied:.0%} of that")
    return (
        f"On {case['title']} a plain copy moves {copied / 1e9:.3g} GB/s" + f"; {', '.join(shares)}" * bool(shares) + "."
    )


def table(case: Found) -> Table:
    """One case: how slow, next to what, with how much memory."""
    made = Table(box=SIMPLE_HEAD, header_style="bold", padding=0, show_edge=False, title_justify="left")
    made.title = (
        f"{case['title']}: {case['parameters']:,} parameters in {case['tensors']:,} tensor{'s' * (case['tensors'] > 1)}"
    )
    made.add_column("Optimizer\n", no_wrap=True)
    for heading in (
        "Time to\nAdamW's",
        "middle\nhalf",
        "to\nSGD's",
        "\na step",
        "\nState",
        "bytes/\nparam.",
        "tempo-\nraries",
    ):
        made.add_column(heading, justify="right", no_wrap=True)
    for row in case["optimizers"]:
        style = "bold" if row["name"] in _OURS else None
        if row["step_ms"] is None:
            made.add_row(row["title"], "failed", style=style)
            continue
        adamw, sgd = row["to_adamw"], row["to_sgd"]
        made.add_row(
            row["title"],
            number(adamw["median"]) if adamw else "",
            f"{number(adamw['low'])}-{number(adamw['high'])}" if adamw and row["name"] != ADAMW.name else "",
            number(sgd["median"]) if sgd else "",
            milliseconds(row["step_ms"]["median"]),
            size(row["state_bytes"]),
            f"{row['state_bytes_per_parameter']:.3g}",
            size(row["temporary_bytes"]),
            style=style,
        )
    return made


def milliseconds(value: float) -> str:
    return f"{value / 1e3:.2f} s" if value >= 1e4 else f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def differences(verdict: Verdict) -> Table:
    """Where ours and the float64 computation part."""
    made = Table(box=SIMPLE_HEAD, header_style="bold", padding=0, show_edge=False, title_justify="left")
    made.title = f"{verdict.title}, {verdict.dtype}, {verdict.threads} thread{'s' * (verdict.threads > 1)}"
    made.add_column("what")
    for heading in ("shape", "step", "got", "in float64", "differs by", "allowed"):
        made.add_column(heading, justify="right", no_wrap=True)
    for d in verdict.differences[:MOST_DIFFERENCES]:
        values = (d.got, d.expected, abs(d.got - d.expected), d.allowed)
        made.add_row(d.what, d.shape, str(d.step), *(f"{v:.5g}" for v in values))
    if len(verdict.differences) > MOST_DIFFERENCES:
        made.add_row(f"and {len(verdict.differences) - MOST_DIFFERENCES} more")
    return made


def publish(directory: Path, found: Found) -> None:
    """Write results.json, bench.png and report.html.

    Raises:
        UserError: a file cannot be written.
    """
    picture = draw(found["cases"])
    write_json(directory / "results.json", found)
    write_atomic(directory / "bench.png", picture)
    write_atomic(directory / "report.html", render(found, picture))


def show(directory: Path, found: Found, console: Console) -> None:
    """Print the tables and the sentences."""
    for case in found["cases"]:
        console.print()
        console.print(table(case))
    for line in (found["headline"], *found["notes"]):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"\nReport: {directory / 'report.html'}", soft_wrap=True)


def draw(cases: list[Found]) -> bytes:
    """A panel per table: bars of the time of a step as a multiple of fused AdamW's, fused SGD's as a line."""
    drawn = [
        [row for row in case["optimizers"] if row["to_adamw"] and row["name"] not in (b.name for b in BASELINES)]
        for case in cases
    ]
    columns = 1 if len(cases) == 1 else 2
    lines = -(-len(cases) // columns)
    with matplotlib.rc_context(cast(Any, STYLE)):
        tall = max((len(rows) for rows in drawn), default=1)
        figure = Figure(figsize=(9 if columns == 1 else 13, lines * (1.5 + 0.42 * tall)), dpi=160)
        figure.set_layout_engine("constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for ax, case, rows in zip(axes, cases, drawn, strict=False):
            _panel(ax, case, rows)
        for ax in axes[len(cases) :]:
            ax.set_axis_off()
        return png(figure)


def _panel(ax: Any, case: Found, rows: list[Found]) -> None:
    ax.set_title(case["title"], loc="left", fontsize=12, fontweight="bold", color=INK, pad=24)
    titles = [row["title"] for row in rows]
    medians = [row["to_adamw"]["median"] for row in rows]
    ax.barh(titles, medians, color=[_OURS.get(row["name"], _OTHER) for row in rows], height=0.62)
    for i, (row, median) in enumerate(zip(rows, medians, strict=True)):
        low, high = row["to_adamw"]["low"], row["to_adamw"]["high"]
        ax.plot([low, high], [i, i], color=INK, lw=1.2, alpha=0.7)
        ax.annotate(
            f"{number(median)}×", (max(high, median), i), (6, 0), textcoords="offset points", va="center", fontsize=10,
            fontweight="bold", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )  # fmt: skip
    floor = next((r["to_adamw"] for r in case["optimizers"] if r["name"] == SGD.name), None)
    marks = [(1.0, "AdamW, fused", INK, "left" if floor and floor["median"] < 1 else "right")]
    if floor:
        marks.append(
            (floor["median"], f"SGD {number(floor['median'])}×", _FLOOR, "right" if marks[0][3] == "left" else "left")
        )
    right = 1.14 * max([1.2, *(row["to_adamw"]["high"] for row in rows)])
    ax.set_xlim(0, right)
    for x, text, color, side in marks:
        ax.axvline(x, color=color, lw=1.4, ls="-" if x == 1.0 else (0, (4, 3)), zorder=0.9 if x == 1.0 else 3)
        ax.annotate(
            text, (x, 1), (3 if side == "left" else -3, 4), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha=side, va="bottom", fontsize=9.5, color=color,
        )  # fmt: skip
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_xlabel("time of a step, as a multiple of fused AdamW's", color=MUTED)


def render(found: Found, picture: bytes) -> str:
    """report.html: one file, the picture inside, no script, nothing fetched."""
    more = {
        "picture": base64.b64encode(picture).decode(),
        "ours": _OURS,
        "gate_steps": len(RATES),
        "gate_shapes": len(SHAPES),
    }
    return _html.render("bench.html", found | more, number=number, milliseconds=milliseconds)
