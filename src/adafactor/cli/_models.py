"""What ``train --model`` trains: each model by name, with its sizes, its text, its objective and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from adafactor.cli import _model_bert, _model_t5
from adafactor.cli._errors import UserError
from adafactor.cli._model import ModelConfig, NextByte


class Task(Protocol):
    """A model of a size and what it learns; plain numbers, nothing is allocated."""

    @property
    def description(self) -> str:
        """The model in words."""
        ...

    @property
    def objective(self) -> str:
        """What it learns, in words."""
        ...

    @property
    def window(self) -> int:
        """Bytes or tokens of text that an example is made of."""
        ...

    @property
    def predicted(self) -> int:
        """How many predictions the loss of an example is the mean of."""
        ...

    def rows(self, windows: Tensor, generator: torch.Generator) -> Tensor:
        """Windows ``[B, window]`` as examples ``[B, n]``, all that is random in them drawn from ``generator``."""
        ...

    def build(self, seed: int) -> nn.Module:
        """The model: ``loss(rows)``, and ``blocks``, the parts that gather their weights one after the other."""
        ...


@dataclass(frozen=True)
class Family:
    """Models of one kind.

    Args:
        task: of a ``Setup`` and the number of different bytes or tokens in the text. It raises ValueError where the
            context does not fit the model.
        optimizer: the contender that has the settings it was published with.
        sizes: by name; none where ``--width``, ``--depth`` and ``--heads`` give the size.
        tokenizer: trains one on lines of text, for so many tokens; None where the model reads bytes.
        special: the tokenizer's special tokens, by the names that transformers has for them.
    """

    task: Callable[[Any, int], Task]
    optimizer: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[list[str], int], Any] | None = None
    special: Mapping[str, str] = field(default_factory=dict)


def _next_byte(setup: Any, pieces: int) -> Task:
    return NextByte(ModelConfig(setup.width, setup.depth, setup.heads, setup.context, setup.model))


def _spans(setup: Any, pieces: int) -> Task:
    return _model_t5.SpanCorruption(setup.model, setup.size, setup.vocabulary, setup.context, pieces)


def _masked(setup: Any, pieces: int) -> Task:
    return _model_bert.MaskedTokens(setup.size, setup.vocabulary, setup.context, pieces)


_T5 = (_model_t5.tokenizer, _model_t5.SPECIAL)
FAMILIES = {
    "gpt": Family(_next_byte, "adafactor"),
    "palm": Family(_next_byte, "adafactor-palm"),
    "t5": Family(_spans, "adafactor-t5", _model_t5.SIZES["t5"], *_T5),
    "mt5": Family(_spans, "adafactor-t5", _model_t5.SIZES["mt5"], *_T5),
    "bert": Family(_masked, "adafactor-bert", _model_bert.SIZES, _model_bert.tokenizer, _model_bert.SPECIAL),
}
LONG = 512  # tokens, what the published sizes read at once
SIZED = [name for name, family in FAMILIES.items() if family.sizes]


def find(name: str) -> Family:
    """The family called ``name``.

    Raises:
        UserError: there is none, or transformers, which has its models, is not installed.
    """
    if name not in FAMILIES:
        raise UserError(f"--model must be one of {', '.join(FAMILIES)}, got {name!r}")
    if FAMILIES[name].sizes:
        from importlib.util import find_spec

        if missing := [package for package in ("tokenizers", "transformers") if find_spec(package) is None]:
            raise UserError(f"--model {name} needs {' and '.join(missing)}: pip install 'adafactor[models]'")
    return FAMILIES[name]


def export(directory: Path, family: Family, task: Task, weights: dict[str, Tensor], tokenizer: str) -> None:
    """Write the model and its tokenizer as transformers' ``from_pretrained`` reads them.

    Args:
        directory: made where it is missing.
        family: the model's.
        task: what was trained.
        weights: the trained module's ``state_dict``, on the CPU.
        tokenizer: as JSON.

    Raises:
        UserError: the system refused.
    """
    import transformers
    from tokenizers import Tokenizer

    model = task.build(0)
    for p, w in zip(model.state_dict(keep_vars=True).values(), weights.values(), strict=True):
        p.data = w
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer), **family.special)
    transformers.utils.logging.disable_progress_bar()
    try:
        cast(Any, model).model.save_pretrained(directory)
        fast.save_pretrained(directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
