"""The options ``compare`` and ``train`` share, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adafactor.cli._ranks import KINDS

_TRAINING, _MODEL, _OUTPUT = "Training", "Model", "Output"

Data = Annotated[
    Path | None,
    typer.Option(
        help="A file or a directory to train on. Files are split between training and validation by content.",
        show_default="the source of Python's standard library",
        rich_help_panel=_TRAINING,
    ),
]
Steps = Annotated[int, typer.Option(help="Training steps.", rich_help_panel=_TRAINING)]
BatchSize = Annotated[int, typer.Option(help="Windows of text per step.", rich_help_panel=_TRAINING)]
Seed = Annotated[int, typer.Option(help="Decides the initial weights and the batches.", rich_help_panel=_TRAINING)]
Dtype = Annotated[str, typer.Option(help="Weights: float32 or bfloat16.", rich_help_panel=_TRAINING)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_TRAINING)]
Threads = Annotated[
    int,
    typer.Option(
        help="CPU threads, of all processes together.", show_default="torch's choice", rich_help_panel=_TRAINING
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        help=f"Under torchrun, how its processes share the model: {', '.join(KINDS)}.", rich_help_panel=_TRAINING
    ),
]

Width = Annotated[int, typer.Option(help="Features per position.", rich_help_panel=_MODEL)]
Depth = Annotated[int, typer.Option(help="Blocks.", rich_help_panel=_MODEL)]
Heads = Annotated[int, typer.Option(help="Attention heads per block.", rich_help_panel=_MODEL)]
Context = Annotated[int, typer.Option(help="Bytes a prediction can look back on.", rich_help_panel=_MODEL)]

Json = Annotated[
    bool,
    typer.Option("--json", help="Print results.json on stdout, everything else on stderr.", rich_help_panel=_OUTPUT),
]
