"""``adafactor plan``: what training a model takes, and whether that fits, without a weight of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from adafactor.cli import _options as options
from adafactor.cli import _plan_report as report
from adafactor.cli._errors import UserError
from adafactor.cli._files import new_run_directory
from adafactor.cli._known_models import MODELS
from adafactor.cli._plan_modes import MOST_RANKS, measure
from adafactor.cli._plan_source import load, train_only

_MODEL, _DEVICE, _OUTPUT = "Model", "Devices", "Output"


def plan(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A known model, a config.json or a folder with one, a safetensors file or index, or module:function.",
            show_default=False,
        ),
    ],
    train: Annotated[
        str,
        typer.Option(
            metavar="PREFIX",
            help="Train only parameters whose names begin so; the others are frozen.",
            show_default="all",
            rich_help_panel=_MODEL,
        ),
    ] = "",
    device_memory: Annotated[
        float,
        typer.Option(
            metavar="GB",
            help="Memory of a device, in 10^9 bytes; a card sold with 24 GB has 25.8, less what its driver takes.",
            rich_help_panel=_DEVICE,
        ),
    ] = 24.0,
    activations: Annotated[
        float,
        typer.Option(metavar="GB", help="What the batch takes on top.", rich_help_panel=_DEVICE),
    ] = 0.0,
    ranks: Annotated[
        str,
        typer.Option(
            help="Over how many devices FSDP2 shards: 8, or 1,8,64 for a table each.", rich_help_panel=_DEVICE
        ),
    ] = "1",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Also write report.html, plan.png and results.json into this new directory.",
            show_default="none",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Will it fit? Bytes of weights, gradients, optimizer state and temporaries.

    Every mode of Adafactor is a row, beside AdamW in float32, mixed precision,
    bfloat16 and 8 bits, and Lion. Bytes are those of the peak of a step, less
    activations, on each device. Adafactor's and AdamW's state is exact to the
    byte; nothing is loaded or allocated.

    SOURCE is one of
    - a known model: KNOWN;
    - a config.json of transformers, or a folder that has one;
    - a safetensors file, its index, or a folder of them: headers are read;
    - module:function, which returns a model and runs on the meta device.

      adafactor plan llama-3-8b
      adafactor plan ./my-model/config.json --device-memory 80 --ranks 1,8
      adafactor plan sd_xl_base_1.0.safetensors --train model.diffusion_model
      adafactor plan my_package.model:build --activations 5 --out runs/plan
    """
    if not 0 < device_memory < float("inf"):
        raise UserError(f"--device-memory must be a positive number of GB, got {device_memory:g}")
    if not 0 <= activations < device_memory:
        raise UserError(
            f"--activations must be at least 0 and below --device-memory {device_memory:g}, got {activations:g}"
        )
    counts = _parse_ranks(ranks)
    console = Console(stderr=True, highlight=False)
    with console.status(escape(f"building {source} without its weights")):
        found = load(source)
    if train:
        train_only(found, train)
    if out is not None:
        new_run_directory(out, "choose another --out")
    room = 1e9 * (device_memory - activations)
    with console.status(escape(f"planning {found.title}")):
        cases = [measure(found.model, count, room) for count in counts]
        results = report.collect(found, cases, device_memory, activations, train)
    if out is not None:
        report.publish(out, results)
    report.show(results, out, Console(stderr=as_json, highlight=False))
    if as_json:
        sys.stdout.write(json.dumps(results, indent=2, allow_nan=False) + "\n")


plan.__doc__ = (plan.__doc__ or "").replace("KNOWN", ", ".join(MODELS))


def _parse_ranks(text: str) -> list[int]:
    counts = [int(part) if part.strip().isascii() and part.strip().isdigit() else 0 for part in text.split(",")]
    if not all(1 <= count <= MOST_RANKS for count in counts):
        raise UserError(f"--ranks must be numbers from 1 to {MOST_RANKS:,}, such as 8 or 1,8,64, got {text!r}")
    return list(dict.fromkeys(counts))
