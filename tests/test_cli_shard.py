"""``train`` and ``compare`` under torchrun: many processes give what one gives, end as one, and leave checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import _torchrun
from _cli import assert_same_run, at_step, losses, weights, write_files
from _torchrun import MODELS, STOPPED_AT, TINY, TRAININGS, trained
from adafactor.cli import _models, _pictures, _text, build, main
from adafactor.cli._errors import UserError


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """Most of a tiny run's time; ``test_cli_compare.py`` draws them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_pictures, "draw", lambda results, rows, unit: {})
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of ten files that differ."""
    return write_files(tmp_path_factory.mktemp("data") / "text", 10)


@contextmanager
def torchrun(processes: int, out: Path, *arguments: str | Path, restarts: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Processes that do what ``_torchrun.py`` says, ended with the block; what they print goes to files in ``out``."""
    options = [
        f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}",
        "--redirects=3",
        f"--log-dir={out / 'log'}",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, _torchrun.__file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        (out / "torchrun.log").open("wb") as log,
        subprocess.Popen([*command, *map(str, arguments)], env=environment, stdout=log, stderr=log) as running,
    ):
        try:
            yield running
        finally:
            running.terminate()


def told(out: Path) -> dict[str, list[list[Any]]]:
    """Of each run: every process's exit code, stdout and stderr."""
    by_rank = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
    return {name: [results[name] for results in by_rank] for name in by_rank[0]}


def stderr_of(out: Path, attempt: int) -> list[str]:
    """What each process of a restart wrote to stderr."""
    return [path.read_text() for path in sorted(out.glob(f"log/*/attempt_{attempt}/*/stderr.log"))]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative to the largest weight of each tensor."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max()).item() for k in b)


# --- the same as one process --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainings(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four processes left what they found."""
    out = tmp_path_factory.mktemp("trainings")
    with torchrun(4, out, "together", text, out) as running:
        assert running.wait(200) == 1, "a bug on one process ends all"
    return out


@pytest.mark.parametrize(("shard", "contender"), TRAININGS)
def test_four_processes_train_as_one(shard: str, contender: str, text: Path, trainings: Path) -> None:
    """In float32, to rounding: measured are 2e-7 of the loss and 4e-7 of the largest weight.

    Momentum in bfloat16 makes more of it. Where a last bit of float32 decides how M is rounded, M moves by up to 2^-7
    of itself, and that comes to 10 times the step of 0.05 RMS(p): below 4e-3 RMS(p). Measured are 5e-7 and 3e-4.
    """
    of_loss, of_weights = (1e-5, 1e-3) if contender == "adafactor" else (1e-6, 2e-6)
    alone = trained(_text.load(text), contender)
    found = torch.load(trainings / "found.pt")[shard, contender]
    assert found["losses"] == pytest.approx(alone["losses"], rel=of_loss)
    assert found["val_loss"] == pytest.approx(alone["val_loss"], rel=of_loss)
    assert largest_difference(found["weights"], alone["weights"]) < of_weights


@pytest.mark.slow
def test_two_processes_train_every_model_as_one(text: Path, tmp_path: Path) -> None:
    """In float32, to rounding: measured are 2e-7 of the loss and 2e-6 of the largest weight."""
    for package in ("tokenizers", "transformers"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    with torchrun(2, tmp_path, "models", text, tmp_path) as running:
        assert running.wait(200) == 0
    found = torch.load(tmp_path / "models.pt")
    for _, model in MODELS:
        alone = trained(_text.load(text), _models.find(model).optimizer, model)
        assert found[model]["losses"] == pytest.approx(alone["losses"], rel=1e-6), model
        assert found[model]["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6), model
        # A softmax does not see what is added to all its inputs: the gradient of keys' biases is rounding alone.
        alike = [
            {name: w for name, w in side["weights"].items() if not name.endswith("key.bias")}
            for side in (found[model], alone)
        ]
        assert largest_difference(*alike) < 1e-5, model


def test_every_row_of_the_batch_is_one_process_s(trainings: Path) -> None:
    assert told(trainings)["share"] == [[0, 1], [2, 3], [4, 5], [6, 7]]


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("batch", "--batch-size must be a multiple of the 4 processes, which share it, got 6"),
        ("no shard", "torchrun started 4 processes, and nothing says how they share the model; add --shard fsdp, hsdp"),
        ("usage", "Invalid value for '--steps'"),
        ("taken", "is not empty (it holds"),
    ],
)
def test_a_mistake_is_one_line_of_one_process(mistake: str, message: str, trainings: Path) -> None:
    codes, stdout, stderr = zip(*told(trainings)[mistake], strict=True)
    assert 2 in codes
    assert 0 not in codes
    assert not any(stdout)
    (line,) = "".join(stderr).splitlines()
    assert line.startswith("adafactor: ")
    assert message in line


@pytest.mark.parametrize(
    ("shard", "processes", "message"),
    [
        ("zero", None, "--shard must be one of fsdp, hsdp, ddp, got 'zero'"),
        ("fsdp", None, "--shard fsdp needs processes to share the work; start them with: torchrun --nproc-per-node 2"),
        ("hsdp", 3, "--shard hsdp keeps two sharded copies, so the processes must be even in number, got 3"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_shard_that_does_not_go(
    command: str, shard: str, processes: int | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if processes:
        for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, str(processes))
    with pytest.raises(UserError, match=re.escape(message)):
        build()([command, "--out", str(tmp_path / "run"), "--shard", shard], standalone_mode=False)
    assert not (tmp_path / "run").exists()


def test_a_bug_on_one_process_is_one_traceback_and_the_end_of_all(trainings: Path) -> None:
    stderr = stderr_of(trainings, attempt=0)
    failed = stderr.pop(1)
    assert failed.count("Traceback") == 1
    assert failed.rstrip().endswith("RuntimeError: a bug on one process")
    assert not any("Traceback" in said or "adafactor: " in said for said in stderr)


# --- ends in the middle, and what they leave ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one of two processes died, and both resumed what was left and what one had left, and then were stopped."""
    out = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patched:
        at_step(STOPPED_AT, lambda: signal.raise_signal(signal.SIGINT), patched)
        assert main(train(text, out / "alone", "adamw")) == 130
    (out / "truncated").mkdir()
    written = (out / "alone" / "checkpoint.pt").read_bytes()
    (out / "truncated" / "checkpoint.pt").write_bytes(written[: len(written) // 2])
    metrics, until = out / "stopped" / "metrics.jsonl", time.monotonic() + 200
    with torchrun(2, out, "killed", text, out, restarts=1) as running:
        while running.poll() is None and time.monotonic() < until and not (metrics.exists() and metrics.read_text()):
            if not (out / "left").exists() and stderr_of(out, attempt=1):
                shutil.copytree(out / "killed", out / "left")
            time.sleep(0.05)
        running.terminate()
        running.wait(60)
    return out


def train(text: Path, out: Path, optimizer: str) -> list[str]:
    """The arguments of a run in one process."""
    return ["train", "--data", str(text), "--out", str(out), "--optimizer", optimizer, *TINY, "--threads", "1"]


def assert_close(a: Path, b: Path, of_loss: float, of_weights: float) -> None:
    """As far apart as two ways of adding up the same: the losses, and the weights at the end."""
    ours, theirs = (np.array(losses(out), dtype=float) for out in (a, b))  # None, where nothing was evaluated, is NaN
    np.testing.assert_allclose(ours, theirs, rtol=of_loss)
    assert largest_difference(weights(a), weights(b)) < of_weights


def test_a_process_killed_while_it_writes_leaves_a_run_that_resumes_to_the_same_bits(ended: Path) -> None:
    """The other one says so, in one line, and ends."""
    assert torch.load(ended / "left" / "checkpoint.pt")["trainer"]["steps_done"] == 5
    assert (ended / "left" / ".checkpoint.pt.tmp").exists()
    assert_same_run(ended / "whole", ended / "killed")
    _, survivor = stderr_of(ended, attempt=0)
    assert survivor == "adafactor: another process is gone; `train --resume` continues from the last checkpoint\n"


def test_one_process_resumes_what_two_left(ended: Path, text: Path) -> None:
    assert main(["train", "--resume", "--out", str(ended / "left")]) == 0
    assert main(train(text, ended / "adafactor", "adafactor")) == 0
    assert_close(ended / "left", ended / "adafactor", 1e-5, 1e-3)


def test_two_processes_resume_what_one_left(ended: Path, text: Path) -> None:
    assert main(train(text, ended / "adamw", "adamw")) == 0
    assert_close(ended / "alone", ended / "adamw", 1e-6, 5e-6)


def test_a_checkpoint_that_was_cut_off_is_refused_once(ended: Path) -> None:
    codes, stdout, stderr = zip(*told(ended)["truncated"], strict=True)
    assert codes == (2, 2)
    assert not any(stdout)
    (line,) = "".join(stderr).splitlines()
    assert "checkpoint.pt is damaged or not a checkpoint" in line


def test_one_process_shows_and_writes(ended: Path) -> None:
    for run in ("whole", "killed", "alone", "compare"):
        codes, stdout, stderr = zip(*told(ended)[run], strict=True)
        assert codes == (0, 0)
        assert (stdout[1], stderr[1]) == ("", "")
        assert (stdout[0] + stderr[0]).count("Report: ") == 1
    (_, stdout, _), _ = told(ended)["compare"]
    results = json.loads(stdout)
    assert results == json.loads((ended / "directory of 0" / "compared" / "results.json").read_text())
    assert not list((ended / "directory of 1").iterdir())
    assert (results["setup"]["shard"], results["setup"]["ranks"]) == ("fsdp", 2)
    for found in results["optimizers"]:
        per_parameter = {"adamw": 8, "lion": 4}[found["name"]]
        assert found["state_bytes_per_parameter"] == pytest.approx(per_parameter, rel=0.01)
        assert found["memory"]["state"] == pytest.approx(found["state_bytes"] / 2, rel=0.1)
        assert found["memory"]["weights"] == found["memory"]["gradients"] == 2 * found["parameters"]
    assert results["notes"][0].startswith("2 processes trained together (--shard fsdp)")


def test_a_signal_stops_all_at_the_same_step_with_a_checkpoint(ended: Path) -> None:
    said = [line for text in stderr_of(ended, attempt=1) for line in text.splitlines() if "adafactor: " in line]
    again = f"torchrun --nproc-per-node 2 --no-python adafactor train --shard fsdp --out {ended / 'stopped'} --resume"
    step = torch.load(ended / "stopped" / "checkpoint.pt")["trainer"]["steps_done"]
    assert said == [f"adafactor: stopped at step {step}; continue with: {again}"]
    assert step > 0
