"""``train`` and ``compare`` under torchrun: several processes give what one gives, fail as one, and leave checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adafactor.cli import _pictures, _ranks, _text, main
from adafactor.cli._contenders import CONTENDERS
from adafactor.cli._errors import UserError
from adafactor.cli._loop import Setup, Trainer

SIZES = {"width": 18, "depth": 1, "heads": 3, "context": 16, "batch_size": 8}  # 18 rows on 4 processes: uneven
TINY = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
STEPS = 20

# Several runs in one start of torchrun: each meets as after a restart, under names of its own.
AGAIN = """
import contextlib, io, json, os, signal, sys
from pathlib import Path
import torch
from adafactor.cli import _checkpoint, _loop, _pictures, _ranks, _text, main
from adafactor.cli._contenders import CONTENDERS

_pictures.draw = lambda results, rows: {}
out, text = map(Path, sys.argv[1:3])
rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
runs = 0

def again():
    global runs
    runs += 1
    _ranks.leave()
    _ranks._store.cache_clear()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = f"{attempt}.{runs}"

def said(*arguments):
    "The exit code and what was said of a run."
    again()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()

def finish(results):
    Path(out, f"rank{rank}.json").write_text(json.dumps(results))
    _ranks.leave()
"""

EVERY_TRAINING = (
    AGAIN
    + """
corpus, found = _text.load(text, 16), {}
sizes = json.loads(sys.argv[3])
for shard in _ranks.KINDS:
    again()
    ranks = _ranks.start(shard, "cpu")
    for contender in CONTENDERS.values():
        setup = _loop.Setup(**sizes, threads=ranks, shard=shard, ranks=ranks)
        trainer = _loop.Trainer(setup, contender, contender.lr, corpus)
        for _ in range(setup.steps):
            trainer.step()
        loss = trainer.evaluate()
        found[shard, contender.name] = trainer.metrics()["loss"], loss, trainer.state_dict()["model"]
if rank == 0:
    torch.save(found, out / "found.pt")
options = ["--data", str(text), "--out", str(out / "none")]
finish([
    said("train", *options, "--shard", "fsdp", "--batch-size", "6"),
    said("compare", *options),
    said("train", *options, "--shard", "fsdp", "--optimizer", "sgd"),
])
"""
)


def torchrun(processes: int, script: str, directory: Path, *arguments: Path | str, restarts: int = 0) -> list[str]:
    """A start of torchrun as a command; what its processes say goes to ``directory/log``."""
    path = directory / "script.py"
    path.write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    logs = ["--redirects", "3", "--log-dir", str(directory / "log"), "--max-restarts", str(restarts)]
    return [*launcher, *logs, str(path), *map(str, arguments)]
