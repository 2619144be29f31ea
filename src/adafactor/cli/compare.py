"""``adafactor compare``: the same model on the same text with several optimizers, one after the other."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from adafactor.cli import _options as options
from adafactor.cli import _ranks, _results, _text
from adafactor.cli._contenders import CONTENDERS, Contender, checked_lr, find
from adafactor.cli._errors import Interrupted, UserError
from adafactor.cli._files import JsonLines, new_run_directory, write_json
from adafactor.cli._loop import Diverged, Setup, StopSignal, Trainer, resolved_device, train
from adafactor.cli._report import show
from adafactor.cli._screen import Screen, duration


def compare(
    optimizers: Annotated[
        str, typer.Option(help=f"Which, separated by commas, out of: {', '.join(CONTENDERS)}.")
    ] = "adafactor,adafactor-paper,adamw,lion",
    lr: Annotated[
        list[str] | None,
        typer.Option(help="Another learning rate for one of them, as adamw=1e-3; may be repeated.", metavar="NAME=LR"),
    ] = None,
    data: options.Data = None,
    steps: options.Steps = Setup.steps,
    batch_size: options.BatchSize = Setup.batch_size,
    seed: options.Seed = Setup.seed,
    dtype: options.Dtype = Setup.dtype,
    device: options.Device = Setup.device,
    threads: options.Threads = Setup.threads,
    shard: options.Shard = None,
    width: options.Width = Setup.width,
    depth: options.Depth = Setup.depth,
    heads: options.Heads = Setup.heads,
    context: options.Context = Setup.context,
    out: Annotated[
        Path | None,
        typer.Option(help="The run directory.", show_default="runs/compare-<time>", rich_help_panel="Output"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Train the same small language model with several optimizers: how good, how much memory, how fast?

    Every optimizer gets the same weights to start from, the same batches and
    the same schedule, with a learning rate that was tuned for it; the report
    says which were. The default run takes two to three minutes on two cores.

    The run directory gets report.html (one file, opens without a network),
    results.json, the pictures, and for every optimizer its metrics.jsonl.

      adafactor compare
      adafactor compare --data my_project/ --steps 2000 --width 192
      adafactor compare --optimizers adafactor,adamw --lr adamw=1e-3
    """
    ranks = _ranks.count(shard, resolved_device(device))
    setup = Setup(steps, batch_size, seed, width, depth, heads, context, dtype, device, threads, shard, ranks)
    chosen = _parse_optimizers(optimizers)
    rates = _parse_rates(lr or [], chosen)
    corpus = _text.load(data).checked(setup.task().window)
    directory = out or Path("runs", f"compare-{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    _ranks.join(setup.device)
    new_run_directory(directory, "choose another --out")

    results: list[dict[str, Any]] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    trained: list[Trainer] = []
    with StopSignal() as stop, Screen(len(chosen), steps) as screen:
        for contender in chosen:
            trainer = Trainer(setup, contender, rates[contender.name], corpus)
            new_run_directory(directory / contender.name, "choose another --out")
            screen.begin(contender.title, 0)
            finished, diverged_at = True, None
            with JsonLines(directory / contender.name / "metrics.jsonl", keep=None) as metrics:
                try:
                    finished = train(trainer, metrics, stop, screen.line)
                except Diverged as end:
                    diverged_at = end.step
            if not finished:
                break
            rows[contender.name] = metrics.rows
            results.append(_results.summarize(trainer, metrics.rows, diverged_at))
            write_json(directory / contender.name / "result.json", results[-1])
            screen.end(_line(results[-1]))
            if diverged_at is None:
                trained.append(trainer)
        side_by_side = not stop.agreed() and _results.time_side_by_side(trained, results)
    received = stop.agreed()
    if received and not results:
        raise Interrupted(received, "interrupted before the first optimizer had finished; nothing to report")

    missing = [contender.name for contender in chosen if contender.name not in rows]
    found = _results.collect("compare", setup, corpus, results, missing, side_by_side)
    show(directory, found, rows, as_json)
    if received:
        raise Interrupted(received, f"interrupted; the report covers {', '.join(r['name'] for r in results)}")


def _line(result: dict[str, Any]) -> str:
    if result["val_loss"] is None:
        return f"diverged at step {result['diverged_at']}"
    return f"validation loss {result['val_loss']:.3f} after {duration(result['train_seconds'])}"


def _parse_optimizers(text: str) -> list[Contender]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--optimizers names none; choose from {', '.join(CONTENDERS)}")
    if len(names) != len(set(names)):
        raise UserError(f"--optimizers names one twice: {text}")
    return [find(name, "--optimizers") for name in names]


def _parse_rates(pairs: list[str], chosen: list[Contender]) -> dict[str, float | None]:
    rates = {contender.name: contender.lr for contender in chosen}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise UserError(f"--lr must look like adamw=1e-3, got {pair!r}") from None
        if name not in rates:
            raise UserError(f"--lr {pair}: {find(name, '--lr').name} is not among --optimizers {', '.join(rates)}")
        rates[name] = checked_lr(find(name, "--lr"), number)
    return rates
