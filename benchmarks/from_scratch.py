"""The curves of docs/models.md: every model of ``adafactor train`` from scratch, with the settings of its recipe.

Runs ``adafactor train --model ...`` with its defaults, one after the other, and writes
``benchmarks/results/from-scratch.json`` and ``docs/pictures/models.png``. Runs that are in --runs already are not run
again; one that was interrupted goes on. Further options go to ``adafactor train``.

    python benchmarks/from_scratch.py              # about a quarter of an hour on two cores
    python benchmarks/from_scratch.py --table      # only print the table of what is there
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from adafactor.cli import main as adafactor
from adafactor.cli._files import read_json_lines, write_atomic, write_json
from adafactor.cli._models import FAMILIES
from adafactor.cli._pictures import COLORS, STYLE
from adafactor.cli._trace_draw import INK, MUTED, png

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "from-scratch.json"
PICTURE = ROOT / "docs" / "pictures" / "models.png"
# BERT's rate was made for a million steps: 500 barely begin with it.
RUNS = {**{name: ["--model", name] for name in FAMILIES}, "bert, lr 1e-3": ["--model", "bert", "--lr", "1e-3"]}


def run(name: str, runs: Path, more: list[str]) -> dict[str, Any]:
    """Train, or take what is there: the run's results and its curve."""
    out = runs / name.replace(", lr ", "-")
    if not (out / "results.json").exists():
        begun = ["--resume"] if (out / "checkpoint.pt").exists() else [*RUNS[name], *more]
        if code := adafactor(["train", "--out", str(out), *begun]):
            sys.exit(code)
    results = json.loads((out / "results.json").read_text())
    (optimizer,) = results["optimizers"]
    curve = [(row["step"], row["loss"], row.get("val_loss")) for row in read_json_lines(out / "metrics.jsonl")]
    kept = ("name", "lr", "lr_origin", "schedule", "val_loss", "parameters", "state_bytes")
    return {
        "run": name,
        "setup": results["setup"],
        "unit": results["data"]["unit"],
        **{key: optimizer[key] for key in kept},
        "curve": curve,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what each came to."""
    lines = ["| model | parameters | loss after a sixth of the steps | at the end | state, bytes per parameter |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        evaluated = [value for _, _, value in row["curve"] if value is not None]
        size = f"{row['parameters'] / 1e6:.2f} M"
        loss = f"{evaluated[0]:.3f} | {evaluated[-1]:.3f} nats per {row['unit']}"
        lines.append(f"| {row['run']} | {size} | {loss} | {row['state_bytes'] / row['parameters']:.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> bytes:
    """A small picture for each, as PNG."""
    with matplotlib.rc_context(STYLE):  # type: ignore[reportArgumentType]
        figure = Figure(figsize=(11, 5.6), dpi=140, layout="constrained")
        for ax, row in zip(figure.subplots(2, 3).flat, rows, strict=True):
            color = COLORS[row["name"]]
            ax.plot(*zip(*((s, loss) for s, loss, _ in row["curve"]), strict=True), color=color, lw=0.9, alpha=0.35)
            points = [(s, value) for s, _, value in row["curve"] if value is not None]
            ax.plot(*zip(*points, strict=True), color=color, lw=2.2, marker="o", ms=4)
            ax.annotate(
                f"{points[-1][1]:.2f}", points[-1], (0, 8), textcoords="offset points", ha="right", color=color,
                fontweight="bold",
            )  # fmt: skip
            ax.set_title(
                f"{row['run']}: {row['parameters'] / 1e6:.1f} M parameters", loc="left", fontsize=11, color=INK
            )
            ax.set_ylabel(f"nats per {row['unit']}")
            ax.set_xlim(left=0)
        figure.supxlabel("step; thick with dots on validation text, thin on training text", color=MUTED, fontsize=10)
        return png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/models"), help="where the run directories are")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options, more = parser.parse_known_args()
    if not options.table:
        rows = [run(name, options.runs, more) for name in RUNS]
        write_json(RESULTS, rows)
        write_atomic(PICTURE, draw(rows))
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
