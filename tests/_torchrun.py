"""What the processes of ``test_cli_shard.py`` do: torchrun starts this file. Nothing here is itself a test."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from _cli import at_step
from adafactor.cli import _checkpoint, _models, _pictures, _ranks, _text, _tokens, main
from adafactor.cli._contenders import CONTENDERS
from adafactor.cli._loop import Setup, Trainer

SIZES = {"steps": 20, "batch_size": 8, "width": 18, "depth": 1, "heads": 3, "context": 16}  # 18 rows on 4: uneven
TINY = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
STOPPED_AT = 10
MODELS = [("fsdp", "t5"), ("ddp", "mt5"), ("fsdp", "bert"), ("hsdp", "palm")]
TRAININGS = [("fsdp", name) for name in CONTENDERS]
TRAININGS += [(shard, name) for shard in ("hsdp", "ddp") for name in ("adafactor", "adafactor-paper", "adamw")]

_runs, _attempt = 0, os.environ.get("TORCHELASTIC_RESTART_COUNT", "")


def trained(corpus: _text.Corpus, contender: str, model: str = "gpt", **setup: Any) -> dict[str, Any]:
    """What a few steps come to; the weights on the first process only."""
    chosen, family, sizes = CONTENDERS[contender], _models.find(model), SIZES
    if family.tokenizer:
        sizes = {"steps": 20, "batch_size": 8, "context": 16, "vocabulary": 300}
        corpus = _tokens.tokenized(corpus, _ranks.made_once(partial(_tokens.train, family, 300, corpus)))
    trainer = Trainer(Setup(**sizes, model=model, **setup), chosen, chosen.lr, corpus)
    losses = []
    for _ in range(6):
        trainer.step()
        losses.append(trainer.metrics()["loss"])
    return {"losses": losses, "val_loss": trainer.evaluate(), "weights": trainer.state_dict()["model"]}


def together(text: Path, out: Path) -> None:
    """Every way to shard, then mistakes, then a bug on one process."""
    corpus, found = _text.load(text), {}
    ranks = _ranks.count("fsdp", "cpu")
    _ranks.join("cpu")
    for shard, name in TRAININGS:
        found[shard, name] = trained(corpus, name, threads=ranks, shard=shard, ranks=ranks)
    share = _ranks.rows(torch.arange(SIZES["batch_size"])).tolist()
    if _ranks.first():
        torch.save(found, out / "found.pt")
    options = ["--data", str(text), "--out", str(out / "none"), *TINY]
    _tell(
        out,
        {
            "share": share,
            "batch": _said("train", *options, "--shard", "fsdp", "--batch-size", "6"),
            "no shard": _said("compare", *options),
            "usage": _said("train", *options, "--shard", "fsdp", "--steps", "many"),
            "taken": _said("train", "--data", str(text), "--out", str(out), *TINY, "--shard", "ddp"),
        },
    )
    if os.environ["RANK"] == "1":
        at_step(3, _fail)
    _again()
    sys.exit(main(["train", *options, "--shard", "ddp"]))


def models(text: Path, out: Path) -> None:
    """Models of every kind, each sharded in one way."""
    corpus, found = _text.load(text), {}
    _ranks.join("cpu")
    for shard, model in MODELS:
        found[model] = trained(corpus, _models.find(model).optimizer, model, threads=2, shard=shard, ranks=2)
    if _ranks.first():
        torch.save(found, out / "models.pt")


def killed(text: Path, out: Path) -> None:
    """One dies; after torchrun's restart they go on, and at last train until they are stopped."""
    options = ["--data", str(text), *TINY, "--shard", "fsdp"]
    if _attempt == "0":
        if os.environ["RANK"] == "0":
            at_step(STOPPED_AT, _kill_at_half_a_checkpoint)
        sys.exit(main(["train", *options, "--out", str(out / "killed"), "--checkpoint-every", "5"]))
    resume = ["train", "--resume", "--shard", "fsdp", "--out"]
    here = out / f"directory of {os.environ['RANK']}"
    here.mkdir()
    os.chdir(here)
    _tell(
        out,
        {
            "whole": _said("train", *options, "--out", str(out / "whole")),
            "killed": _said(*resume, str(out / "killed")),
            "alone": _said(*resume, str(out / "alone")),
            "truncated": _said(*resume, str(out / "truncated")),
            "compare": _said("compare", *options, "--out", "compared", "--json", "--optimizers", "adamw,lion"),
        },
    )
    _again()
    sys.exit(main(["train", *options, "--out", str(out / "stopped"), "--steps", "1000000"]))


def _kill_at_half_a_checkpoint() -> None:
    def half(path: Path, content: memoryview) -> None:
        path.with_name(f".{path.name}.tmp").write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    _checkpoint.write_atomic = half


def _fail() -> None:
    raise RuntimeError("a bug on one process")


def _again() -> None:
    """Forget the last run in this process: the next one meets the others as after a restart."""
    global _runs
    _runs += 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _ranks.leave()
    _ranks._store.cache_clear()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = f"{_attempt}.{_runs}"


def _said(*arguments: str) -> tuple[int, str, str]:
    """A run's exit code, and what this process wrote to stdout and stderr."""
    _again()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def _tell(out: Path, results: dict[str, Any]) -> None:
    """Leave ``results`` for the test."""
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)  # a test that hangs says where
    _pictures.draw = lambda results, rows, unit: {}
    {"together": together, "killed": killed, "models": models}[sys.argv[1]](*map(Path, sys.argv[2:]))
