"""``adafactor bench --memory``: that bytes are counted right, and that the modes take what they promise."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from _cli import assert_refused
from adafactor import memory
from adafactor.cli import _bench_memory, _bench_memory_modes, _bench_memory_report, main
from adafactor.cli import bench as bench_module
from adafactor.cli._baselines import MixedPrecisionAdamW
from adafactor.cli._bench_memory import Subject, measure
from adafactor.cli._bench_memory_modes import IN_BACKWARD, LIFETIMES, OPTIMIZERS, PLAIN
from adafactor.cli._bench_memory_trace import KINDS, mark, peaks, watch_gradients
from adafactor.cli._model import VOCABULARY, ByteTransformer, ModelConfig

WIDTH, DEPTH = 256, 2
SMALL = ["--width", str(WIDTH), "--depth", str(DEPTH), "--heads", "4", "--context", "8", "--threads", "1"]
EMBEDDING, LARGEST = VOCABULARY * WIDTH, 4 * WIDTH * WIDTH
BLOCK = 12 * WIDTH * WIDTH + 2 * WIDTH
PARAMETERS = EMBEDDING + DEPTH * BLOCK + WIDTH


def bench(out: Path, *options: str) -> list[str]:
    return ["bench", "--memory", "--out", str(out), *SMALL, *options]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with all modes of a small model."""
    directory = tmp_path_factory.mktemp("memory") / "run"
    threads = torch.get_num_threads()
    assert main(bench(directory)) == 0
    assert torch.get_num_threads() == threads, "the caller's threads are the caller's"
    return directory


@pytest.fixture(scope="module")
def rows(run: Path) -> dict[str, Any]:
    found = json.loads((run / "results.json").read_text())["rows"]
    assert [row["note"] for row in found] == [None] * len(found)
    return {row["name"]: row for row in found}


# --- the modes ----------------------------------------------------------------------------------------------------


def test_every_mode_is_a_row(rows: dict[str, Any]) -> None:
    assert list(rows) == [mode.name for mode in (*OPTIMIZERS, *LIFETIMES)]
    for row in rows.values():
        assert set(row["peak"]) == set(KINDS)
        assert row["peak_bytes"] == sum(row["peak"].values()) >= sum(row["kept"].values())
        tied = row["name"] == "tied-embedding"
        assert row["parameters"] == PARAMETERS + tied * WIDTH * (_bench_memory_modes.LARGE_VOCABULARY - VOCABULARY)
        assert row["kept"]["weights"] == row["parameters"] * (4 if row["name"] == "adamw-float32" else 2)


def test_the_state_is_the_planned_one_to_the_byte(rows: dict[str, Any]) -> None:
    planned = {row["name"]: row["planned_state_bytes"] for row in rows.values() if row["planned_state_bytes"]}
    assert len(planned) == len(rows) - 3
    for name, nbytes in planned.items():
        assert rows[name]["kept"]["state"] == rows[name]["state_bytes"] == nbytes
    tensors = 3 + 6 * DEPTH - 1
    assert rows["adamw-float32"]["kept"]["state"] == 8 * PARAMETERS + 4 * tensors
    assert rows["adamw-mixed"]["kept"]["state"] == 12 * PARAMETERS + 4 * tensors
    assert rows["adamw-bfloat16"]["kept"]["state"] == 4 * PARAMETERS + 4 * tensors
    assert rows["24-bit"]["kept"]["state"] - rows["bfloat16"]["kept"]["state"] == PARAMETERS


@pytest.mark.parametrize("mode", [m for m in (*OPTIMIZERS, *LIFETIMES) if m.expected], ids=lambda m: m.name)
def test_a_mode_takes_what_it_promises(mode: Any, rows: dict[str, Any]) -> None:
    row = rows[mode.name]
    measured = row["kept_bytes_per_parameter"]
    if mode.in_backward:
        measured -= row["kept_per_parameter"]["gradients"]
    else:  # a tied embedding's gradient is there three times when it is added up
        measured -= (row["kept"]["gradients"] - row["kept"]["weights"]) / PARAMETERS
    assert measured == pytest.approx(mode.expected, rel=0.02)


@pytest.mark.parametrize("name", [mode.name for mode in OPTIMIZERS if not mode.in_backward])
def test_gradients_that_are_kept(name: str, rows: dict[str, Any]) -> None:
    itemsize = 4 if name == "adamw-float32" else 2
    assert rows[name]["kept"]["gradients"] == itemsize * (PARAMETERS + 2 * EMBEDDING)


@pytest.mark.parametrize("name", [mode.name for mode in OPTIMIZERS if mode.in_backward])
def test_with_the_step_in_backward_one_gradient_is_alive(name: str, rows: dict[str, Any]) -> None:
    # And the output layer's, which is a part of the tied embedding's.
    assert rows[name]["kept"]["gradients"] == 2 * (LARGEST + EMBEDDING)


def test_compiled_by_block_the_gradients_of_a_block_are_alive_and_compiled_whole_all(rows: dict[str, Any]) -> None:
    assert rows["compiled-blocks"]["kept"]["gradients"] == 2 * (BLOCK + EMBEDDING)
    assert rows["compiled-whole"]["kept"]["gradients"] >= 2 * PARAMETERS


def test_a_tied_embedding_has_three_gradients_at_the_end(rows: dict[str, Any]) -> None:
    row = rows["tied-embedding"]
    assert row["kept"]["gradients"] == 3 * 2 * _bench_memory_modes.LARGE_VOCABULARY * WIDTH


def test_the_buckets_of_ddp_stay(rows: dict[str, Any]) -> None:
    assert rows["ddp"]["kept"]["gradients"] == 2 * (2 * PARAMETERS + 2 * EMBEDDING)
    assert rows["ddp-views"]["kept"]["gradients"] == 2 * (PARAMETERS + LARGEST + EMBEDDING)


def test_of_ddp_s_buckets_a_few_are_alive_with_the_step_in_backward() -> None:
    mode = next(mode for mode in LIFETIMES if mode.name == "ddp-in-backward")
    deep, deeper = (
        measure(mode, Subject(ModelConfig(WIDTH, depth, 4, 8), "cpu", "auto", "aot_eager")) for depth in (4, 6)
    )
    assert deep["kept"]["gradients"] == deeper["kept"]["gradients"] < 5 * 2**20  # a bucket is 1 MiB


# --- the record ---------------------------------------------------------------------------------------------------


def of(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def test_the_record_knows_whose_memory_it_is() -> None:
    def run() -> None:
        weight, state, table = of(1000), of(100), of(10)
        mark("weights", [weight])
        mark("state", [state, None])
        mark("begin")
        activation, passing = of(5000), of(300)
        del passing
        mark("forward")
        gradient = of(2000)
        mark("gradients", [gradient])
        del activation
        another, temporary = of(700), of(40)
        mark("gradients", [another[3:]])
        del gradient, another, temporary
        replaced = of(100)  # a step that makes its state anew
        mark("state", [replaced])
        mark("end")
        del weight, state, table, replaced
        _ = of(10**6)

    found = peaks(run)
    nothing = dict.fromkeys(KINDS, 0)
    assert found.kept == nothing | {"weights": 1000, "state": 100, "other": 10, "gradients": 2700}
    assert found.total == nothing | {
        "weights": 1000, "state": 100, "other": 10, "activations": 5000, "gradients": 2000
    }  # fmt: skip


@pytest.mark.parametrize("mode", [PLAIN, IN_BACKWARD], ids=lambda mode: mode.name)
def test_the_peak_is_that_of_peak_allocated(mode: Any) -> None:
    config = ModelConfig(64, 1, 4, 8)
    found = measure(mode, Subject(config, "cpu", "auto", "aot_eager"))["peak"]
    model = ByteTransformer(config, seed=0).bfloat16()
    optimizer = mode.build(list(model.named_parameters()), "auto")
    tokens = torch.randint(VOCABULARY, (1, 9))

    def step() -> None:
        model.loss(tokens).backward()
        optimizer.step()

    with optimizer.step_in_backward() if mode.in_backward else contextlib.nullcontext():
        step()
        optimizer.zero_grad()
        above = memory.peak_allocated(step)
    assert sum(found.values()) - found["weights"] - found["state"] - found["other"] == above


def test_parts_of_a_sum_are_gradients() -> None:
    def run() -> None:
        p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        mark("weights", [p])
        mark("begin")
        loss = p.mul(2).sum() + p.mul(3).sum()
        mark("forward")
        watch_gradients(loss, [p])
        loss.backward()
        mark("gradients", [p.grad])
        mark("end")

    assert peaks(run).kept["gradients"] in (4000, 6000), "two parts, and their sum where it is not one of them"


def test_mixed_precision_is_adamw_on_master_weights() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 30).bfloat16())
    master = torch.nn.Parameter(p.detach().float())
    ours, theirs = MixedPrecisionAdamW([p], 1e-2), torch.optim.AdamW([master], 1e-2, weight_decay=0.0, fused=True)
    for _ in range(5):
        p.grad = torch.randn(40, 30).bfloat16()
        master.grad = p.grad.float()
        ours.step()
        theirs.step()
        assert torch.equal(ours.state[p]["master"], master)
        assert torch.equal(p, master.bfloat16())


# --- the command --------------------------------------------------------------------------------------------------


def test_the_run_directory_and_the_table(run: Path) -> None:
    found = json.loads((run / "results.json").read_text())
    assert re.fullmatch(
        r"Weights, .* of 1\.6 M parameters take 2\.42 bytes .* mixed precision 16\.16\.", found["headline"]
    )
    assert any("to the byte, in all 12 modes" in note for note in found["notes"])
    assert found["model"] == dataclasses.asdict(ModelConfig(WIDTH, DEPTH, 4, 8))
    with Image.open(run / "memory.png") as picture:
        picture.load()
        assert picture.format == "PNG"
    report = (run / "report.html").read_text()
    assert found["headline"] in report
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|<script|@import""", report), "it must need no other file"
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(_bench_memory_report.table(found["rows"]))
    text = console.export_text()
    assert "…" not in text
    assert re.search(r"bfloat16, in backward +2\.00 \+ g +2\.424 +2\.000 +0\.400 +0\.024 +[\d.]+ MB", text)


@pytest.fixture
def two_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "OPTIMIZERS", (PLAIN, IN_BACKWARD))
    monkeypatch.setattr(bench_module, "LIFETIMES", ())


@pytest.mark.usefixtures("two_modes")
def test_json_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(bench(tmp_path / "run", "--json", "--width", "64")) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == json.loads((tmp_path / "run" / "results.json").read_text())
    assert "Bytes per parameter" in output.err


@pytest.mark.usefixtures("two_modes")
def test_a_mode_that_fails_is_a_note_in_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(named: Any) -> Any:
        raise RuntimeError("no such thing\nand a stack of other lines")

    monkeypatch.setattr(bench_module, "OPTIMIZERS", (dataclasses.replace(PLAIN, make=failing), IN_BACKWARD))
    assert main(bench(tmp_path / "run", "--width", "64")) == 0
    output = capsys.readouterr().out
    assert re.search(r"bfloat16 +failed", output)
    assert "bfloat16: RuntimeError: no such thing\n" in output
    assert "failed: see below" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.usefixtures("two_modes")
def test_state_that_is_not_as_planned_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_bench_memory, "plan", lambda *a, **k: [])
    assert main(bench(tmp_path / "run", "--width", "64")) == 1
    assert "in mode bfloat16, the state takes" in capsys.readouterr().err


@pytest.mark.usefixtures("two_modes")
def test_what_had_finished_survives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return measure(*arguments)

    monkeypatch.setattr(_bench_memory, "measure", interrupted)
    assert main(bench(tmp_path / "run", "--width", "64")) == 130
    assert "the report covers bfloat16\n" in capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["notes"][0] == "Interrupted: not measured are bfloat16, in backward."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "--shapes", "gpt2"], "--shapes is for timing steps, and --memory times none; leave out one"),
        (["--memory", "--dtype", "bfloat16"], "--dtype is for timing steps"),
        (["--memory", "--momentum"], "--momentum is for timing steps"),
        (["--memory", "--repeats", "15"], "--repeats is for timing steps"),
        (["--memory", "--threads", "1,2"], "--threads must be one number with --memory, got 1,2"),
        (["--memory", "--width", "30"], "--width must be a multiple of 2 * heads"),
        (["--memory", "--depth", "0"], "--depth must be at least 1, got 0"),
        (["--memory", "--backend", "fast"], "--backend must be one of 'auto', 'reference'"),
        (["--memory", "--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (["--memory", "--compiler", "eager"], "--compiler must be aot_eager or inductor, got 'eager'"),
        (["--width", "64"], "--width is for --memory, and has no meaning without it; add --memory"),
        (["--compiler", "inductor"], "--compiler is for --memory"),
    ],
)
def test_a_bad_option_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--out", str(tmp_path / "run"), *options]) == 2
    assert_refused(capsys, message, tmp_path / "run")


def test_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_bench_memory, "available", lambda device: 10**7)
    assert main(bench(tmp_path / "run")) == 2
    assert capsys.readouterr().err == (
        f"adafactor: --memory: {PARAMETERS:,} parameters need some 39.4 MB in AdamW's modes, and 10 MB are free; "
        "choose a smaller --width or --depth\n"
    )
    assert not (tmp_path / "run").exists()


def test_on_cuda(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    row = measure(IN_BACKWARD, Subject(ModelConfig(WIDTH, DEPTH, 4, 8), "cuda", "auto", "aot_eager"))
    assert row["kept"]["gradients"] == pytest.approx(2 * (LARGEST + EMBEDDING), abs=4096)
