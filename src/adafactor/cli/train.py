"""``adafactor train``: one optimizer, with checkpoints that a stopped run continues from bit for bit."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from adafactor.cli import _checkpoint, _models, _ranks, _results, _text, _tokens
from adafactor.cli import _options as options
from adafactor.cli._checkpoint import Run
from adafactor.cli._contenders import CONTENDERS, checked_lr, find
from adafactor.cli._errors import Interrupted, UserError
from adafactor.cli._files import JsonLines, new_run_directory
from adafactor.cli._loop import Diverged, Setup, StopSignal, Trainer, resolved_device
from adafactor.cli._loop import train as run_training
from adafactor.cli._report import show
from adafactor.cli._screen import Screen, note
from adafactor.cli._screen import size as in_bytes


def train(
    invocation: typer.Context,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(_models.FAMILIES)}.")] = Setup.model,
    size: Annotated[
        str | None,
        typer.Option(
            help=f"Of {', '.join(_models.SIZED)}: tiny, or one that was published, such as base.", show_default="tiny"
        ),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(CONTENDERS)}.", show_default="the one of the model's recipe")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="the optimizer's: tuned, or published")
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
    context: Annotated[
        int | None,
        typer.Option(
            help="Bytes or tokens that the model reads at once.",
            show_default="128, and 512 for published sizes",
            rich_help_panel="Model",
        ),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens, for {', '.join(_models.SIZED)}; the tokenizer is trained on the text.",
            show_default="the size's",
            rich_help_panel="Model",
        ),
    ] = None,
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
    """Train a language model from scratch with one optimizer.

    gpt is the small byte-level model of `compare`, palm the same in PaLM's form.
    t5, mt5 and bert are transformers' models, with their own objectives: spans
    taken out of a text, and masked tokens; their tokenizer is trained on the text
    first. Each trains with the Adafactor settings of its recipe, in whose place
    --optimizer puts others. The weights of t5, mt5 and bert are also written for
    `from_pretrained`, in the run directory's model/.

    Checkpoints are replaced as a whole, so a run that was killed, or that Ctrl-C
    ended, continues with --resume. On a CPU it reaches the same weights, bit for
    bit, as one that never stopped.

    With --shard several processes train as one. Any number of them continues
    what any other left; the same number, to the same bits.

      adafactor train --model t5 --out runs/t5
      adafactor train --model bert --size mini --data my_texts/
      adafactor train --steps 2000 --out runs/long
      adafactor train --out runs/long --resume
      torchrun --nproc-per-node 2 --no-python adafactor train --shard fsdp
    """
    if checkpoint_every < 1:
        raise UserError(f"--checkpoint-every must be at least 1, got {checkpoint_every}")
    path = out / _checkpoint.NAME
    given = _given(invocation)
    content = None
    if resume:
        run, content = _checkpoint.load(path)
        run = replace(run, setup=replace(run.setup, shard=shard, ranks=_ranks.count(shard, run.setup.device)))
        _refuse_changes(run, out, given)
    else:
        ranks = _ranks.count(shard, resolved_device(device))
        family = _models.find(model)
        _refuse_sizes(model, given)
        if context is None:
            context = _models.LONG if family.sizes and size not in (None, "tiny") else Setup.context
        place = (dtype, device, threads, shard, ranks)
        setup = Setup(steps, batch_size, seed, width, depth, heads, context, *place, model, size, vocabulary)
        contender = find(optimizer or family.optimizer, "--optimizer")
        run = Run(setup, contender.name, checked_lr(contender, lr), data and str(data.resolve()))
    setup, family = run.setup, _models.find(run.setup.model)
    _ranks.join(setup.device)
    if content is None:
        new_run_directory(out, "continue it with --resume, or choose another --out")
    corpus = _text.load(data or (run.data and Path(run.data)) or None)
    if family.tokenizer is not None:
        assert setup.vocabulary is not None
        if content is None:
            note(f"Training a tokenizer of {setup.vocabulary:,} tokens on {in_bytes(corpus.train.bytes)} of text")
            run = replace(run, tokenizer=_ranks.made_once(partial(_tokens.train, family, setup.vocabulary, corpus)))
        corpus = _tokens.tokenized(corpus, run.tokenizer)
    trainer = Trainer(setup, find(run.optimizer, "--optimizer"), run.lr, corpus)

    def save() -> None:
        _checkpoint.save(path, run, trainer)

    if content is None:
        save()  # before anything else, so that a kill at any moment leaves something to continue from
    else:
        _checkpoint.restore(path, content, trainer)
    with JsonLines(out / "metrics.jsonl", keep=trainer.steps_done if resume else None) as metrics:
        with StopSignal() as stop, Screen(1, setup.steps) as screen:
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

    if run.tokenizer:
        weights = trainer.state_dict()["model"]
        if _ranks.first():
            _models.export(out / "model", family, trainer.task, weights, run.tokenizer)
    result = _results.summarize(trainer, rows, None)  # takes another step
    found = _results.collect("train", setup, corpus, [result], [], side_by_side=False)
    show(out, found, {run.optimizer: rows}, as_json)
    if run.tokenizer:
        note(f"Model, for transformers' from_pretrained: {out / 'model'}")


def _given(invocation: typer.Context) -> dict[str, Any]:
    """The options that stand on the command line."""
    sources = ((name, invocation.get_parameter_source(name)) for name in invocation.params)
    return {name: invocation.params[name] for name, source in sources if source and source.name == "COMMANDLINE"}


def _refuse_sizes(model: str, given: dict[str, Any]) -> None:
    """What gives the size of models that come in none does not go with one that does."""
    for name in ("width", "depth", "heads"):
        if model in _models.SIZED and name in given:
            raise UserError(
                f"--{name} is for models without sizes; {model} has --size {', '.join(_models.find(model).sizes)}"
            )


def _refuse_changes(run: Run, out: Path, given: dict[str, Any]) -> None:
    """A resumed run keeps its options: one that asks for others is an error that names it."""
    stored = {**asdict(run.setup), "optimizer": run.optimizer, "lr": run.lr}
    resolved = replace(run.setup, **{name: given[name] for name in ("device", "threads") if name in given})
    wanted = given | {"device": resolved.device, "threads": resolved.threads}
    for name in given:
        if name in stored and stored[name] != wanted[name]:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"--resume: the run in {out} has {option} {stored[name]}, not {wanted[name]}; leave {option} out, or "
                "start a new run in another --out"
            )
