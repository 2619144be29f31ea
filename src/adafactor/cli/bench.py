"""``adafactor bench``: how long a step takes and what it allocates, ours beside every Adafactor that is installed."""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from adafactor import Adafactor
from adafactor.cli import _bench_memory as memory_bench
from adafactor.cli import _bench_memory_report as memory_report
from adafactor.cli import _bench_report as report
from adafactor.cli import _options as options
from adafactor.cli._bench_case import DTYPES, Case, check_memory
from adafactor.cli._bench_entries import ENTRIES, Entry, choose
from adafactor.cli._bench_gate import Verdict, check
from adafactor.cli._bench_measure import measure
from adafactor.cli._bench_memory import Subject
from adafactor.cli._bench_memory_modes import LIFETIMES, OPTIMIZERS
from adafactor.cli._bench_shapes import PRESETS, parse
from adafactor.cli._errors import CheckFailed, Interrupted, UserError
from adafactor.cli._files import new_run_directory, write_json
from adafactor.cli._loop import StopSignal, resolved_device
from adafactor.cli._model import ModelConfig

_WHAT, _HOW, _MEMORY, _OUTPUT = "What to time", "How to time it", "Measuring memory instead", "Output"
_ONLY_TIMES = ("shapes", "dtype", "optimizers", "momentum", "scale", "repeats", "budget")
_ONLY_MEMORY = ("width", "depth", "heads", "context", "compiler")


def bench(
    given: typer.Context,
    shapes: Annotated[
        str,
        typer.Option(
            help=f"Models out of {', '.join(PRESETS)}, or sizes such as 4096x4096,768.", rich_help_panel=_WHAT
        ),
    ] = "t5-encoder",
    dtype: Annotated[
        str,
        typer.Option(help=f"Weights and gradients: {', '.join(DTYPES)}; both is the first two.", rich_help_panel=_WHAT),
    ] = "both",
    optimizers: Annotated[
        str | None,
        typer.Option(
            help=f"Which, out of: {', '.join(ENTRIES)}. Fused AdamW and SGD are always timed.",
            show_default="all that are installed",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    momentum: Annotated[
        bool, typer.Option("--momentum", help="Ours with momentum in bfloat16, too.", rich_help_panel=_WHAT)
    ] = False,
    backend: Annotated[str, typer.Option(help="Of our Adafactor.", rich_help_panel=_WHAT)] = "auto",
    scale: Annotated[
        float, typer.Option(help="A share of the tensors, spread evenly over their sizes.", rich_help_panel=_WHAT)
    ] = 1.0,
    threads: Annotated[
        str | None,
        typer.Option(help="CPU threads: 4, or 1,2,4.", show_default="torch's choice", rich_help_panel=_HOW),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_HOW)] = "auto",
    repeats: Annotated[int, typer.Option(help="Rounds; their median counts.", rich_help_panel=_HOW)] = 15,
    budget: Annotated[
        float,
        typer.Option(
            help="Seconds per table after which a slow optimizer sits out; not before 3 rounds.", rich_help_panel=_HOW
        ),
    ] = 20.0,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Train a transformer in every mode: bytes by component.", rich_help_panel=_MEMORY
        ),
    ] = False,
    width: options.Width = 512,
    depth: options.Depth = 16,
    heads: options.Heads = 8,
    context: options.Context = 16,
    compiler: Annotated[
        str, typer.Option(help="Backend of torch.compile: aot_eager or inductor.", rich_help_panel=_MEMORY)
    ] = "aot_eager",
    out: Annotated[
        Path | None,
        typer.Option(help="The run directory.", show_default="runs/bench-<time>", rich_help_panel=_OUTPUT),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Time an optimizer step: ours, every other Adafactor installed here, fused AdamW and fused SGD.

    Times are ratios within one run: to fused AdamW, and to fused SGD, the floor
    of one pass over the memory. Beside them stand the optimizer's state and the
    peak of a step's temporary memory. First ours is checked against the same
    steps in float64; if it is wrong, no times are printed, and the exit code is 1.

    Lists are separated by commas; every combination of --shapes, --dtype and
    --threads is a table. The run directory gets report.html (one file, opens
    without a network), bench.png and results.json.

    With --memory, nothing is timed: a transformer takes real training steps, and
    the peaks of weights, gradients, state, activations and temporaries are read
    from the allocator's own records. --width, --depth, --heads and --context are
    its size; every mode of the optimizer is a row, AdamW's are beside them.

      adafactor bench
      adafactor bench --shapes gpt2,many-small --dtype bfloat16 --threads 1,4
      adafactor bench --shapes 4096x4096,4096x14336,4096 --momentum
      adafactor bench --shapes sdxl-unet --dtype bfloat16 --scale 0.25
      adafactor bench --memory
    """
    place = resolved_device(device)
    _check_given(given, memory)
    if memory:
        subject = Subject(_model(width, depth, heads, context), place, backend, _checked_compiler(compiler))
        _bench_memory(subject, _parse_threads(threads), out, as_json)
        return
    sets, dtypes, counts = parse(shapes, scale), _parse_dtypes(dtype), _parse_threads(threads)
    if not 1 <= repeats <= 10**6:
        raise UserError(f"--repeats must be from 1 to {10**6}, got {repeats}")
    if not 0 < budget < float("inf"):
        raise UserError(f"--budget must be a positive number of seconds, got {budget:g}")
    _check_backend(backend, place)
    entries, missing = choose(optimizers, momentum)
    cases = [Case(*parts, place, backend) for parts in itertools.product(sets, dtypes, counts)]
    for case in cases:
        check_memory(case, entries)
    directory = _run_directory(out)

    console = Console(stderr=True, highlight=False)
    settings = {"backend": backend, "device": place, "scale": scale, "repeats": repeats, "budget": budget}
    before = torch.get_num_threads()
    found: list[dict[str, Any]] = []
    try:
        verdicts = _gate(cases, entries, console)
        with StopSignal() as stop:
            for case in cases:
                with _progress(console, case.title) as on_turn:
                    measured = measure(case, entries, repeats, budget, stop, on_turn)
                if measured:
                    found.append(measured)
                    write_json(directory / "results.json", report.collect(found, verdicts, missing, [], settings))
                    console.print(f"{case.title}: {measured['rounds']} rounds", soft_wrap=True)
                if stop.received:
                    break
    finally:
        torch.set_num_threads(before)
    if stop.received and not found:
        raise Interrupted(stop.received, "interrupted before the first round was over; nothing to report")

    unfinished = [case.title for case in cases[len(found) :]]
    results = report.collect(found, verdicts, missing, unfinished, settings)
    report.publish(directory, results)
    report.show(directory, results, Console(stderr=as_json, highlight=False))
    if as_json:
        sys.stdout.write(json.dumps(results, indent=2, allow_nan=False) + "\n")
    if stop.received:
        raise Interrupted(stop.received, f"interrupted; the report covers {'; '.join(c['title'] for c in found)}")


def _bench_memory(subject: Subject, threads: list[int], out: Path | None, as_json: bool) -> None:
    """The whole of ``adafactor bench --memory``."""
    if len(threads) > 1:
        raise UserError(f"--threads must be one number with --memory, got {','.join(map(str, threads))}")
    _check_backend(subject.backend, subject.device)
    memory_bench.check_room(subject)
    directory = _run_directory(out)
    console = Console(stderr=True, highlight=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads[0])
    rows: list[dict[str, Any]] = []
    every = (*OPTIMIZERS, *LIFETIMES)
    try:
        with StopSignal() as stop, _progress(console, "memory") as on_turn:
            for mode in every:
                on_turn(mode.title, len(rows) / len(every))
                rows.append(memory_bench.measure_or_note(mode, subject))
                if stop.received:
                    break
    finally:
        torch.set_num_threads(before)
    unfinished = [mode.title for mode in every[len(rows) :]]
    results = memory_report.collect(rows, unfinished, subject, threads[0])
    memory_report.publish(directory, results)
    memory_report.show(directory, results, Console(stderr=as_json, highlight=False))
    if as_json:
        sys.stdout.write(json.dumps(results, indent=2, allow_nan=False) + "\n")
    if unfinished and stop.received:
        raise Interrupted(stop.received, f"interrupted; the report covers {'; '.join(row['title'] for row in rows)}")


def _run_directory(out: Path | None) -> Path:
    directory = out or Path("runs", f"bench-{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    new_run_directory(directory, "choose another --out")
    return directory


def _check_given(given: typer.Context, memory: bool) -> None:
    """Refuse options that the other half of the command understands."""
    for name in _ONLY_TIMES if memory else _ONLY_MEMORY:
        source = given.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(
                f"--{name} is for timing steps, and --memory times none; leave out one of them (--width, --depth, "
                "--heads and --context are the size of --memory's transformer)"
                if memory
                else f"--{name} is for --memory, and has no meaning without it; add --memory or leave --{name} out"
            )


def _model(width: int, depth: int, heads: int, context: int) -> ModelConfig:
    try:
        return ModelConfig(width, depth, heads, context)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def _checked_compiler(name: str) -> str:
    if name not in ("aot_eager", "inductor"):
        raise UserError(f"--compiler must be aot_eager or inductor, got {name!r}")
    return name


def _gate(cases: list[Case], entries: list[Entry], console: Console) -> list[Verdict]:
    """Check ours in every dtype and number of threads.

    Raises:
        CheckFailed: it is wrong; what differs has been printed.
    """
    verdicts = []
    for dtype, threads in dict.fromkeys((case.dtype, case.threads) for case in cases):
        torch.set_num_threads(threads)
        ours = [entry for entry in entries if entry.config]
        verdicts += [check(entry, cases[0].backend, DTYPES[dtype], cases[0].device) for entry in ours]
    failed = [verdict for verdict in verdicts if verdict.differences]
    if failed:
        for verdict in failed:
            console.print(report.differences(verdict))
        wrong = ", ".join(dict.fromkeys(f"{verdict.title} in {verdict.dtype}" for verdict in failed))
        raise CheckFailed(f"no times: ours differs from the same steps in float64, as listed above ({wrong})")
    return verdicts


def _check_backend(backend: str, device: str) -> None:
    try:
        Adafactor([torch.nn.Parameter(torch.zeros(1, device=device))], backend=backend).explain()
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"--{error}") from error


def _parse_dtypes(text: str) -> list[str]:
    names = [name.strip() for name in text.replace("both", "float32,bfloat16").split(",") if name.strip()]
    for name in names:
        if name not in DTYPES:
            raise UserError(f"--dtype must be out of {', '.join(DTYPES)} or both, got {name!r}")
    if not names:
        raise UserError(f"--dtype names none; choose from {', '.join(DTYPES)} or both")
    return list(dict.fromkeys(names))


def _parse_threads(text: str | None) -> list[int]:
    if text is None:
        return [torch.get_num_threads()]
    counts = [int(part) if part.strip().isascii() and part.strip().isdigit() else 0 for part in text.split(",")]
    if not all(1 <= count <= 512 for count in counts):
        raise UserError(f"--threads must be numbers from 1 to 512, such as 4 or 1,2,4, got {text!r}")
    return list(dict.fromkeys(counts))


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on the terminal, and whose turn it is; nothing where no one looks."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(), TextColumn("{task.fields[turn]}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0, turn="")
        yield lambda turn, share: bar.update(task, completed=share, turn=turn)
