"""``benchmarks/rounding.py``: it measures what it says, at a tiny size, and the page says what was recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adafactor.cli import _text
from adafactor.cli._loop import Setup

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").exists():
    pytest.skip("benchmarks/ is not part of the sdist", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))
import rounding  # noqa: E402

SETUP = Setup(steps=12, batch_size=4, seed=1, width=32, depth=1, heads=2, context=16, device="cpu", threads=1)
LR = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> _text.Corpus:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {j}: {j * j % 97}\n" for j in range(800)))
    return _text.load(path)


@pytest.fixture(scope="module")
def start(corpus: _text.Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return rounding.pretrained(SETUP, corpus, tmp_path_factory.mktemp("start") / "runs" / "start.pt")


@pytest.fixture(scope="module")
def cells(corpus: _text.Corpus, start: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    return {name: rounding.run(name, SETUP, LR, start, corpus) for name in rounding.MODES}


def test_all_start_alike_and_nearest_alone_loses_its_updates(cells: dict[str, dict[str, Any]]) -> None:
    assert len({cell["curve"][0][1] for cell in cells.values()}) == 1
    exact, drawn, bits24, nearest = (cells[name] for name in ("float32", "stochastic", "24-bit", "nearest"))
    assert exact["arrived"] == pytest.approx(1.0, abs=1e-9)
    assert exact["unchanged"] == 0.0
    assert bits24["arrived"] == pytest.approx(1.0, abs=0.01)
    assert bits24["unchanged"] < nearest["unchanged"] / 2
    assert drawn["arrived"] == pytest.approx(1.0, abs=0.1)  # five standard deviations of what is drawn
    assert nearest["arrived"] < 0.5
    assert nearest["unchanged"] > 0.8
    assert [bool(cell["warnings"]) for cell in cells.values()] == [False, False, False, True]
    per_parameter = [round(cell["bytes_per_parameter"] - nearest["bytes_per_parameter"], 6) for cell in cells.values()]
    assert per_parameter == [2, 0, 1, 0]


def test_following_the_updates_leaves_the_training_as_it_is(
    corpus: _text.Corpus, start: dict[str, torch.Tensor], cells: dict[str, dict[str, Any]]
) -> None:
    for name in ("stochastic", "24-bit"):
        trainer = rounding.Continuation(rounding.MODES[name], SETUP, LR, corpus, start)
        for _ in range(SETUP.steps):
            trainer.step()
        assert trainer.evaluate() == cells[name]["val_loss"]


def test_the_table_and_the_picture_of_unfinished_work(cells: dict[str, dict[str, Any]]) -> None:
    lines = rounding.table([cells["stochastic"], cells["nearest"]]).splitlines()
    assert len(lines) == 4
    assert "| bfloat16, nearest | 2." in lines[-1]
    assert rounding.picture([cells["float32"]]).startswith(b"\x89PNG")


def test_a_stopped_start_continues_and_a_finished_one_is_not_run_again(
    corpus: _text.Corpus, start: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "start.pt"
    first = rounding.pretrained(SETUP, corpus, path)
    monkeypatch.setattr(rounding.Trainer, "step", lambda trainer: pytest.fail("trained again"))
    again = rounding.pretrained(SETUP, corpus, path)
    assert all(torch.equal(start[name], first[name]) and torch.equal(first[name], again[name]) for name in start)


@pytest.mark.skipif(not rounding.RESULTS.exists(), reason="nothing recorded")
def test_the_page_says_what_was_recorded() -> None:
    recorded = json.loads(rounding.RESULTS.read_text())
    assert rounding.table(recorded["cells"]) in (ROOT / "docs" / "rounding.md").read_text()
    gaps = rounding.gaps(recorded["cells"])
    assert all(len(own) == 3 for own in gaps.values())
    assert all(abs(gap) < rounding.TOLERANCE for name in ("stochastic", "24-bit") for gap in gaps[name])
    assert all(gap > rounding.TOLERANCE for gap in gaps["nearest"])
