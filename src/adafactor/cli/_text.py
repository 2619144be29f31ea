"""Text as bytes or tokens: read it, split it into training and validation by file, draw batches from it."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adafactor.cli._errors import UserError

VALIDATION_SHARE = 0.1
SIZE_LIMIT = 1 << 30  # bytes held in memory
# Tests, character tables and generated help repeat themselves; everything else was written by hand.
STDLIB_SKIPS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"})


@dataclass(frozen=True)
class Part:
    """One side of the split."""

    data: Tensor  # [bytes], uint8, or [tokens], int32
    files: int
    bytes: int
    sha256: str  # of the bytes

    @classmethod
    def of(cls, contents: list[bytes]) -> Part:
        """Join the files' contents."""
        joined = bytearray(b"".join(contents))
        data = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        return cls(data, len(contents), len(joined), hashlib.sha256(joined).hexdigest())

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """The ``length`` bytes or tokens from each of ``starts``: ``[starts, length]``, int64."""
        return self.data[starts[:, None] + torch.arange(length)].long()


@dataclass(frozen=True)
class Corpus:
    """The text of a run.

    Args:
        source: where it comes from.
        split: how its two parts were told apart, in words.
        train: what is trained on.
        validation: what is not.
        pieces: how many different bytes or tokens there can be.
        tokenizer: SHA-256 of the tokenizer; None for bytes.
    """

    source: str
    split: str
    train: Part
    validation: Part
    pieces: int = 256
    tokenizer: str | None = None

    @property
    def unit(self) -> str:
        """What one element of the text is called."""
        return "token" if self.tokenizer else "byte"

    def describe(self) -> dict[str, Any]:
        """What results and checkpoints keep of it."""
        sides = (("train", self.train), ("validation", self.validation))
        return {"source": self.source, "split": self.split, "unit": self.unit, "tokenizer": self.tokenizer} | {
            name: {"bytes": part.bytes, "length": part.data.numel(), "files": part.files, "sha256": part.sha256}
            for name, part in sides
        }

    def batch(self, size: int, length: int, generator: torch.Generator) -> Tensor:
        """``size`` training windows ``[size, length]`` at places drawn from ``generator``."""
        starts = torch.randint(self.train.data.numel() - length + 1, (size,), generator=generator)
        return self.train.windows(starts, length)

    def validation_windows(self, count: int, length: int) -> Tensor:
        """Up to ``count`` validation windows ``[count, length]``, evenly spread, disjoint, always the same."""
        count = min(count, self.validation.data.numel() // length)
        starts = torch.arange(count) * self.validation.data.numel() // count
        return self.validation.windows(starts, length)

    def checked(self, length: int) -> Corpus:
        """Itself, if there are windows of ``length`` enough.

        Raises:
            UserError: there are not.
        """
        for name, part in (("training", self.train), ("validation", self.validation)):
            if part.data.numel() < 8 * length:
                raise UserError(
                    f"--data {self.source} is too small: it leaves {part.data.numel()} {self.unit}s for {name}, and "
                    f"windows of {length} need {8 * length}; give more text or a smaller --context"
                )
        return self


def load(path: Path | None) -> Corpus:
    """Read ``path`` (a file or a directory), or the source of Python's standard library when it is None.

    Raises:
        UserError: the path is missing, unreadable, too large, or holds no text.
    """
    if path is None:
        source = f"the source of Python {sysconfig.get_python_version()}'s standard library"
        found = _walk(Path(sysconfig.get_paths()["stdlib"]), STDLIB_SKIPS)
        contents = _read_all((p for p in found if p.suffix == ".py"), source)
    elif path.is_dir():
        source = str(path)
        contents = [c for c in _read_all(_walk(path), source) if b"\0" not in c[:8192]]
    else:
        source = str(path)
        contents = _read_all(iter([path]), source)
    contents = list({hashlib.sha256(c).digest(): c for c in contents if c}.items())
    if not contents:
        raise UserError(f"--data {source} holds no text; name a file, or a directory with text files")
    if len(contents) == 1:
        split = "one file cut in two: its first 90 % trains, its last 10 % validates"
        only = contents[0][1]
        cut = round(len(only) * (1 - VALIDATION_SHARE))
        parts = [only[:cut]], [only[cut:]]
    else:
        split = "by file: no content is on both sides, duplicates count once"
        parts = _split(contents)
    return Corpus(source, split, Part.of(parts[0]), Part.of(parts[1]))


def _split(contents: list[tuple[bytes, bytes]]) -> tuple[list[bytes], list[bytes]]:
    """Give validation a tenth of the bytes, in whole files, in the order of their SHA-256.

    The order knows contents only, so a file that is added, renamed or copied moves few others and never the same text
    to both sides. Where no file is small enough, the smallest validates.
    """
    contents = sorted(contents)
    budget = VALIDATION_SHARE * sum(len(content) for _, content in contents)
    train, validation = [], []
    for _, content in contents:
        fits = len(content) <= budget
        budget -= len(content) if fits else 0
        (validation if fits else train).append(content)
    if not validation:
        train.remove(smallest := min(train, key=len))
        validation.append(smallest)
    return train, validation


def _walk(root: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files below ``root`` in a fixed order, without hidden ones and the directories named in ``skipped``."""
    for directory, subdirectories, files in os.walk(root, onerror=_unreadable):
        subdirectories[:] = sorted(d for d in subdirectories if d not in skipped and not d.startswith("."))
        yield from (p for f in sorted(files) if not f.startswith(".") and (p := Path(directory, f)).is_file())


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror or error}") from error


def _read_all(paths: Iterator[Path], source: str) -> list[bytes]:
    contents, total = [], 0
    for path in paths:
        try:
            if path.exists() and not path.is_file():
                raise UserError(f"cannot read {path}: it is neither a file nor a directory")
            total += path.stat().st_size
            if total > SIZE_LIMIT:
                raise UserError(f"--data {source} holds more than 1 GiB, which is held in memory; name a part of it")
            contents.append(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return contents
