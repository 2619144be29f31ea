"""``adafactor train``: one optimizer, with checkpoints that a stopped run continues from bit for bit."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from adafactor.cli import _checkpoint, _ranks, _results, _text
from adafactor.cli import _options as options
from adafactor.cli._checkpoint import Run
from adafactor.cli._contenders import CONTENDERS, checked_lr, find
from adafactor.cli._errors import Interrupted, UserError
from adafactor.cli._files import JsonLines, new_run_directory
from adafactor.cli._loop import Diverged, Setup, StopSignal, Trainer, resolved_device
from adafactor.cli._loop import train as run_training
from adafactor.cli._report import show
from adafactor.cli._screen import Screen


def train(
    invocation: typer.Context,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(CONTENDERS)}.")] = "adafactor",
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="the one tuned for the optimizer")
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
    out: Annotated[Path, typer.Option(help="The run directory.", rich_help_panel="Output")] = Path("runs/train"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out; its options are kept, all but --shard.",
            rich_help_panel="Output",
        ),
    ] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel="Output")] = 100,
    as_json: options.Json = False,
) -> None:
    """Train the small language model with one optimizer.

    Checkpoints are replaced as a whole, so a run that was killed, or that Ctrl-C
    ended, continues with --resume. On a CPU it reaches the same weights, bit for
    bit, as one that never stopped.

    With --shard several processes train as one. Any number of them continues
    what any other left; the same number, to the same bits.

      adafactor train --steps 2000 --out runs/long
      adafactor train --out runs/long --resume
      torchrun --nproc-per-node 2 --no-python adafactor train --shard fsdp
    """
    if checkpoint_every < 1:
        raise UserError(f"--checkpoint-every must be at least 1, got {checkpoint_every}")
    path = out / _checkpoint.NAME
    content = None
    if resume:
        run, content = _checkpoint.load(path)
        run = replace(run, setup=replace(run.setup, shard=shard, ranks=_ranks.count(shard, run.setup.device)))
        _refuse_changes(run, out, _given(invocation))
    else:
        ranks = _ranks.count(shard, resolved_device(device))
        setup = Setup(steps, batch_size, seed, width, depth, heads, context, dtype, device, threads, shard, ranks)
        run = Run(setup, optimizer, checked_lr(find(optimizer, "--optimizer"), lr), data and str(data.resolve()))
    _ranks.join(run.setup.device)
    if content is None:
        new_run_directory(out, "continue it with --resume, or choose another --out")
    corpus = _text.load(data or (run.data and Path(run.data)) or None, run.setup.context)
    trainer = Trainer(run.setup, find(run.optimizer, "--optimizer"), run.lr, corpus)

    def save() -> None:
        _checkpoint.save(path, run, trainer)

    if content is None:
        save()  # before anything else, so that a kill at any moment leaves something to continue from
    else:
        _checkpoint.restore(path, content, trainer)
    with JsonLines(out / "metrics.jsonl", keep=trainer.steps_done if resume else None) as metrics:
        with StopSignal() as stop, Screen(1, run.setup.steps) as screen:
            screen.begin(trainer.contender.title, trainer.steps_done)
            try:
                finished = run_training(trainer, metrics, stop, screen.line, save, checkpoint_every)
            except Diverged as end:
                cure = "the last checkpoint is unharmed; start anew in another --out and use a smaller --lr"
                raise UserError(f"{end}; {cure}") from end
        rows = metrics.rows
    if not finished:
        again = _ranks.command(["train", *(["--shard", shard] if shard else []), "--out", str(out), "--resume"])
        raise Interrupted(stop.agreed() or 0, f"stopped at step {trainer.steps_done}; continue with: {again}")

    result = _results.summarize(trainer, rows, None)
    found = _results.collect("train", run.setup, corpus, [result], [], side_by_side=False)
    show(out, found, {run.optimizer: rows}, as_json)


def _given(invocation: typer.Context) -> dict[str, Any]:
    """The options that stand on the command line."""
    sources = ((name, invocation.get_parameter_source(name)) for name in invocation.params)
    return {name: invocation.params[name] for name, source in sources if source and source.name == "COMMANDLINE"}


def _refuse_changes(run: Run, out: Path, given: dict[str, Any]) -> None:
    """A resumed run keeps its options: one that asks for others is an error that names the first of them."""
    stored = asdict(run.setup)
    wanted = asdict(replace(run.setup, **{name: value for name, value in given.items() if name in stored}))
    pairs = [(name, stored[name], wanted[name]) for name in stored]
    pairs += [(name, getattr(run, name), given.get(name, getattr(run, name))) for name in ("optimizer", "lr")]
    for name, has, asked in pairs:
        if has != asked:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"--resume: the run in {out} has {option} {has}, not {asked}; leave {option} out, or start a new run "
                "in another --out"
            )
