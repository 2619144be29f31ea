"""Tiny runs of ``train`` and ``compare``, for the files that test them. Nothing here is itself a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adafactor.cli._loop import Trainer

if TYPE_CHECKING:
    import pytest

TINY = ["--width", "16", "--depth", "1", "--heads", "2", "--context", "16", "--batch-size", "4", "--threads", "1"]


def write_files(directory: Path, count: int) -> Path:
    """Text files that differ."""
    directory.mkdir()
    for i in range(count):
        (directory / f"{i}.txt").write_text("".join(f"line {j} of file {i}: {j * i % 97}\n" for j in range(60)))
    return directory


def assert_refused(capsys: pytest.CaptureFixture[str], message: str, out: Path) -> None:
    """One line on stderr says so, and nothing was begun."""
    output = capsys.readouterr()
    assert output.err.startswith("adafactor: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert not out.exists()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["trainer"]["model"]


def losses(out: Path) -> list[tuple[Any, ...]]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["lr"], row.get("val_loss")) for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    """Identical weights, bit for bit, identical optimizer state, and the same lines of metrics but for the times."""
    left, right = (torch.load(out / "checkpoint.pt", weights_only=True)["trainer"] for out in (a, b))
    for key in ("model", "optimizer", "generator", "steps_done"):
        assert_identical(left[key], right[key])
    assert losses(a) == losses(b)


def assert_identical(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b


def at_step(number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Call ``act`` right after training step ``number``, in this process for good without ``monkeypatch``."""
    step = Trainer.step

    def and_then(self: Trainer) -> None:
        step(self)
        if self.steps_done == number:
            act()

    (monkeypatch.setattr if monkeypatch else setattr)(Trainer, "step", and_then)
