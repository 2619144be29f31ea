"""The run directory's last files: results.json, the pictures, and report.html that needs no other file."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from adafactor.cli import _html, _pictures, _ranks
from adafactor.cli._files import write_atomic, write_json
from adafactor.cli._screen import table

_TEXTS = {  # of each picture: what it shows, and how to read it
    "loss-over-steps.png": (
        "Loss of every optimizer over the steps",
        "Every optimizer saw the same batches in the same order; the thin lines are averages over several.",
    ),
    "loss-over-time.png": (
        "The same losses over seconds of training",
        "The same curves over steps times the table's time per step: what a slower optimizer step costs.",
    ),
    "memory.png": (
        "Memory by component for every optimizer",
        "Left, what grows with the model. Right, the peak of one step of this run, where activations weigh more than "
        "they do in a large model.",
    ),
}


def publish(directory: Path, results: dict[str, Any], rows: dict[str, _pictures.Rows]) -> list[Path]:
    """Write everything; the paths, the report first.

    Raises:
        UserError: a file cannot be written.
    """
    pictures = _pictures.draw(results["optimizers"], rows, results["data"]["unit"])
    files = {"results.json": None, **pictures, "report.html": render(results, pictures)}
    for name, content in files.items():
        if content is None:
            write_json(directory / name, results)
        else:
            write_atomic(directory / name, content)
    return [directory / name for name in reversed(files)]


def show(directory: Path, results: dict[str, Any], rows: dict[str, _pictures.Rows], as_json: bool) -> None:
    """Publish, and print the table; with ``as_json`` on stderr, and the results on stdout."""
    if _ranks.first():
        report, *_ = publish(directory, results, rows)
        console = Console(stderr=as_json, highlight=False)
        console.print()
        console.print(table(results["optimizers"], results["data"]["unit"]))
        console.print(f"\n{results['headline']}\n\nReport: {report}", soft_wrap=True)
        if as_json:
            sys.stdout.write(json.dumps(results, indent=2, allow_nan=False) + "\n")
    _ranks.wait()


def render(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """report.html: one file, pictures inside, no script, nothing fetched."""
    embedded = [
        {"png": base64.b64encode(content).decode(), "alt": _TEXTS[name][0], "caption": _TEXTS[name][1]}
        for name, content in pictures.items()
    ]
    losses = [r["val_loss"] for r in results["optimizers"] if r["val_loss"] is not None]
    more = {"pictures": embedded, "colors": _pictures.COLORS, "best": min(losses, default=None)}
    return _html.render("report.html", results | more)
