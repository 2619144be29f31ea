"""``adafactor train``: checkpoints, resuming bit for bit, and what goes wrong without costing anything."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from _cli import TINY, assert_same_run, at_step, losses, weights, write_files
from adafactor.cli import _pictures, main
from adafactor.cli._contenders import CONTENDERS
from adafactor.cli._errors import UserError
from adafactor.cli._files import write_atomic


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a tiny run's time; ``test_cli_compare.py`` draws them."""
    monkeypatch.setattr(_pictures, "draw", lambda results, rows, unit: {})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A directory of 20 files that differ."""
    return write_files(tmp_path / "text", 20)


def train(text: Path, out: Path, *options: str, steps: int = 20) -> list[str]:
    """The arguments of a tiny run."""
    return ["train", "--data", str(text), "--out", str(out), "--steps", str(steps), *TINY, *options]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr, which must be the only one of its kind."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("adafactor: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("optimizer", list(CONTENDERS))
def test_a_stopped_run_resumes_to_the_same_bits(
    optimizer: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(train(text, whole, "--optimizer", optimizer)) == 0
    with monkeypatch.context() as patched:
        at_step(10, lambda: signal.raise_signal(signal.SIGINT), patched)
        assert main(train(text, stopped, "--optimizer", optimizer)) == 130
    assert "stopped at step 10; continue with: adafactor train --out" in one_line(capsys)
    assert main(["train", "--out", str(stopped), "--resume"]) == 0
    assert_same_run(whole, stopped)


def test_bfloat16_weights_resume_to_the_same_bits(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(train(text, whole, "--dtype", "bfloat16")) == 0
    with monkeypatch.context() as patched:
        at_step(7, lambda: signal.raise_signal(signal.SIGTERM), patched)
        assert main(train(text, stopped, "--dtype", "bfloat16")) == 128 + signal.SIGTERM
    assert main(["train", "--out", str(stopped), "--resume"]) == 0
    assert_same_run(whole, stopped)
    assert {w.dtype for w in weights(stopped).values()} == {torch.bfloat16}


@pytest.mark.parametrize("step", [0, 13], ids=["before the first step", "between checkpoints"])
def test_sigkill_leaves_a_run_that_resumes_to_the_same_bits(step: int, text: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(train(text, whole)) == 0
    script = f"""
import os, signal, sys
from adafactor.cli import _loop, main
step = _loop.Trainer.step
def and_then(self):
    if self.steps_done == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self)
_loop.Trainer.step = and_then
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", script, *train(text, killed, "--checkpoint-every", "5")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    with (killed / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 14, "lo')  # the line that was being written
    assert main(["train", "--out", str(killed), "--resume"]) == 0
    assert_same_run(whole, killed)


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_report(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(train(text, out)) == 0
    before = losses(out)
    (out / "report.html").unlink()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert (out / "report.html").exists()
    assert losses(out) == before


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert main(train(text, whole)) == 0
    kept: list[str] = []

    def fill() -> None:
        kept.append(hashlib.sha256((full / "checkpoint.pt").read_bytes()).hexdigest())
        patched.setattr(os, "fsync", refuse)

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        at_step(11, fill, patched)
        assert main(train(text, full, "--checkpoint-every", "5")) == 2
    assert "No space left on device" in one_line(capsys)
    assert hashlib.sha256((full / "checkpoint.pt").read_bytes()).hexdigest() == kept[0]
    assert not list(full.glob(".*.tmp"))
    assert main(["train", "--out", str(full), "--resume"]) == 0
    assert_same_run(whole, full)


def test_a_write_cut_short_by_the_system_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_atomic(path, b"good")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: File too large; the previous file is unchanged"):
            write_atomic(path, bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_checkpoint(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train(text, tmp_path / "none", "--resume")) == 2
    assert "there is no checkpoint at" in one_line(capsys)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", ["truncated", "emptied", "overwritten", "of something else"])
def test_a_damaged_checkpoint(damage: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(train(text, out, steps=2)) == 0
    path = out / "checkpoint.pt"
    content = path.read_bytes()
    if damage == "of something else":
        torch.save({"model": {}}, path)
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "emptied": b"", "overwritten": b"x" * 999}[damage])
    before = {p: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert str(path) in one_line(capsys)
    assert {p: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize(
    "option", [["--width", "32"], ["--optimizer", "adamw"], ["--lr", "0.5"], ["--steps", "30"], ["--seed", "1"]]
)
def test_a_checkpoint_of_another_run(
    option: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(train(text, out, steps=2)) == 0
    before = {p: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", *option]) == 2
    line = one_line(capsys)
    assert f"has {option[0]} " in line
    assert f"not {option[1]}" in line
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_the_options_of_a_resumed_run_may_be_repeated(text: Path, tmp_path: Path) -> None:
    assert main(train(text, tmp_path / "run", "--seed", "3", steps=2)) == 0
    assert main(train(text, tmp_path / "run", "--seed", "3", "--resume", steps=2)) == 0


def test_text_that_changed_since_the_checkpoint(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(train(text, out, steps=2)) == 0
    (text / "0.txt").write_text("something else\n" * 50)
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "has changed since" in one_line(capsys)


def test_another_run_is_not_overwritten(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(train(text, out, steps=2)) == 0
    before = {p: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    assert main(train(text, out, steps=3)) == 2
    assert "continue it with --resume, or choose another --out" in one_line(capsys)
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_a_loss_that_is_no_number_costs_no_checkpoint(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(train(text, out, "--optimizer", "adamw", "--lr", "1e30", "--checkpoint-every", "1")) == 2
    assert "use a smaller --lr" in one_line(capsys)
    assert all(w.isfinite().all() for w in weights(out).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "-1"], "--lr must be a positive number, got -1"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--lr", "1", "--optimizer", "adafactor-paper"], "adafactor-paper makes its own learning rate"),
        (["--optimizer", "sgd"], "no optimizer called 'sgd'; choose from adafactor,"),
        (["--steps", "0"], "--steps must be from 1 to"),
        (["--seed", "-1"], "--seed must be from 0 to"),
        (["--width", "17"], "--width must be a multiple of 2 * heads = 4"),
        (["--depth", "0"], "--depth must be at least 1, got 0"),
        (["--dtype", "float8"], "--dtype must be one of float32, bfloat16, got 'float8'"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["--stepz", "1"], "No such option: --stepz"),
        (["--width", "1000000", "--heads", "1"], "out of memory"),
    ],
)
def test_a_bad_option_is_one_line(
    options: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train(text, tmp_path / "run", *options)) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_results_on_stdout_are_json_and_nothing_else(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(train(text, out, "--json", "--optimizer", "lion")) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((out / "results.json").read_text())
    (lion,) = results["optimizers"]
    assert lion["val_loss"] == losses(out)[-1][3]
    assert lion["state_bytes"] == 4 * lion["parameters"]
    assert {p.name for p in out.iterdir()} == {"checkpoint.pt", "metrics.jsonl", "results.json", "report.html"}
