"""Checkpoints of ``adafactor train``: written whole or not at all, read with care."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adafactor.cli import _ranks
from adafactor.cli._errors import UserError
from adafactor.cli._files import write_atomic
from adafactor.cli._loop import Setup, Trainer

NAME = "checkpoint.pt"
_KIND = "adafactor train, layout 1"


@dataclass(frozen=True)
class Run:
    """What a run is, apart from how far it got: a checkpoint continues only the same run."""

    setup: Setup
    optimizer: str
    lr: float | None
    data: str | None
    tokenizer: str = ""  # JSON; none where the model reads bytes


def save(path: Path, run: Run, trainer: Trainer) -> None:
    """Replace the checkpoint at ``path``. Every process takes part, and none returns before it stands.

    Raises:
        UserError: the system refused; the previous checkpoint is unchanged.
    """
    content = {
        "kind": _KIND,
        "run": asdict(run),
        "corpus": trainer.corpus.describe(),
        "trainer": trainer.state_dict(),
    }
    if _ranks.first():
        buffer = io.BytesIO()  # torch.save to a path hides why a write failed
        torch.save(content, buffer)
        write_atomic(path, buffer.getbuffer())
    _ranks.wait()


def load(path: Path) -> tuple[Run, dict[str, Any]]:
    """The run a checkpoint belongs to, and the checkpoint.

    Raises:
        UserError: there is none, it is damaged, or it is something else.
    """
    if not path.exists():
        raise UserError(f"--resume: there is no checkpoint at {path}; start without --resume")
    try:
        written = io.BytesIO(path.read_bytes())  # torch.load raises OSError for some damaged files too
    except OSError as error:
        raise UserError(f"--resume: cannot read {path}: {error.strerror or error}") from error
    try:
        content = torch.load(written, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different type for every way a file can be damaged
        raise UserError(
            f"--resume: {path} is damaged or not a checkpoint ({type(error).__name__}); "
            "restore it from a copy or start anew in another --out"
        ) from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise UserError(f"--resume: {path} was not written by this version of adafactor train; choose another --out")
    stored = content["run"]
    return Run(**stored | {"setup": Setup(**stored["setup"])}), content


def restore(path: Path, content: dict[str, Any], trainer: Trainer) -> None:
    """Put ``trainer`` where the checkpoint left off.

    Raises:
        UserError: the text has changed since, or the checkpoint is of another model or optimizer.
    """
    for side in ("train", "validation"):
        if content["corpus"][side]["sha256"] != trainer.corpus.describe()[side]["sha256"]:
            raise UserError(f"--resume: the text of {path} was {content['corpus']['source']} and has changed since")
    try:
        trainer.load_state_dict(content["trainer"])
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--resume: {path} does not fit this model and optimizer: {reason}") from error
