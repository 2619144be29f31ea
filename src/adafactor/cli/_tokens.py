"""Tokenizers: trained on the text of the run, and the text as their tokens."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch

from adafactor.cli._errors import UserError
from adafactor.cli._models import Family
from adafactor.cli._text import Corpus, Part

_AT_ONCE = 20_000  # lines that are encoded together


def train(family: Family, vocabulary: int, corpus: Corpus) -> str:
    """A tokenizer of at most ``vocabulary`` tokens, trained on the training text, as JSON.

    Raises:
        UserError: the text has more different characters than that, or no words.
    """
    assert family.tokenizer is not None
    try:
        made = family.tokenizer(_lines(corpus.train), vocabulary)
    except Exception as error:  # tokenizers has no type of its own
        reason = str(error).strip() or type(error).__name__
        raise UserError(
            f"--vocabulary {vocabulary}: no tokenizer of that size can be trained on {corpus.source}: {reason}; give "
            "another size or more text"
        ) from error
    if made.get_vocab_size() > vocabulary:
        raise UserError(
            f"--vocabulary {vocabulary}: the characters of {corpus.source} alone make {made.get_vocab_size()} tokens; "
            "give a larger one"
        )
    return made.to_str()


def tokenized(corpus: Corpus, tokenizer: str) -> Corpus:
    """The text as tokens of a tokenizer from ``train``."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer)
    sides = {"train": _encoded(made, corpus.train), "validation": _encoded(made, corpus.validation)}
    digest = hashlib.sha256(tokenizer.encode()).hexdigest()
    return replace(corpus, pieces=made.get_vocab_size(), tokenizer=digest, **sides)


def _lines(part: Part) -> list[str]:
    """Lines without the white space around them, which these tokenizers do not see; empty ones are left out."""
    text = part.data.numpy().tobytes().decode("utf-8", "replace")
    return [line for found in text.splitlines() if (line := found.strip())]


def _encoded(made: Any, part: Part) -> Part:
    tokens, lines = [], _lines(part)
    for first in range(0, len(lines), _AT_ONCE):
        encoded = made.encode_batch_fast(lines[first : first + _AT_ONCE], add_special_tokens=False)
        tokens.append(torch.tensor([token for line in encoded for token in line.ids], dtype=torch.int32))
    return replace(part, data=torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int32))
