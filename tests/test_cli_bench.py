"""``adafactor bench``: its shapes, its gate, its table, and what it says when something fails."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from _cli import assert_refused
from adafactor import Adafactor
from adafactor.cli import _bench_case, _bench_entries, _bench_gate, _bench_measure, _bench_report, main
from adafactor.cli._bench_entries import ADAFACTOR, ENTRIES, MOMENTUM, OURS, Entry
from adafactor.cli._bench_gate import check, spacing
from adafactor.cli._bench_shapes import PRESETS, ShapeSet, parse

TINY = ["--shapes", "40x36,9", "--dtype", "float32", "--threads", "1", "--repeats", "2", "--optimizers", "adafactor"]


def bench(out: Path, *options: str) -> list[str]:
    """The arguments of a tiny run; later options win."""
    return ["bench", "--out", str(out), *TINY, *options]


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before, "the caller's threads are the caller's"


# --- the answer ---------------------------------------------------------------------------------------------------


def test_bench_answers_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    wanted = ["--shapes", "40x36,9,40x36", "--dtype", "both", "--threads", "1,2", "--optimizers", "adafactor,torch"]
    assert main(bench(out, *wanted, "--momentum", "--json")) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((out / "results.json").read_text())
    assert [case["title"] for case in results["cases"]] == [
        f"40x36,9,40x36, {dtype}, {threads}"
        for dtype in ("float32", "bfloat16")
        for threads in ("1 thread", "2 threads")
    ]
    for case in results["cases"]:
        itemsize = 4 if case["dtype"] == "float32" else 2
        assert (case["tensors"], case["parameters"], case["rounds"]) == (3, 2889, 2)
        rows = {row["name"]: row for row in case["optimizers"]}
        assert list(rows) == ["adafactor", "adafactor-momentum", "torch", "adamw", "sgd"]
        for row in rows.values():
            assert row["note"] is None
            assert row["rounds"] == 2
            for column in ("step_ms", "to_adamw", "to_sgd"):
                assert 0 < row[column]["low"] <= row[column]["median"] <= row[column]["high"]
        assert rows["adamw"]["to_adamw"] == rows["sgd"]["to_sgd"] == {"median": 1, "low": 1, "high": 1}
        # R, C and the vector's V in float32, and the step of three tensors.
        assert rows["adafactor"]["state_bytes"] == 4 * (2 * (40 + 36) + 9) + 3 * 4
        momentum = rows["adafactor-momentum"]["state_bytes"] - rows["adafactor"]["state_bytes"]
        assert momentum == 2 * case["parameters"]
        assert rows["adamw"]["state_bytes"] == 2 * itemsize * case["parameters"] + 3 * 4
        assert rows["sgd"]["state_bytes"] == 0
        assert rows["torch"]["temporary_bytes"] >= itemsize * 40 * 36
        for explained in case["explain"]:
            assert sum(part["parameters"] for part in explained["backends"]) == case["parameters"]
            assert all(part["backend"] and part["reason"] for part in explained["backends"])

    gate = {(v["title"], v["dtype"], v["threads"]) for v in results["gate"]}
    assert len(gate) == 2 * 2 * 2
    assert all(0 < v["worst"] <= 1 and not v["differences"] for v in results["gate"])
    assert results["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]

    with Image.open(out / "bench.png") as picture:
        picture.load()
        assert picture.format == "PNG"
    report = (out / "report.html").read_text()
    assert results["headline"] in report
    fetches = re.search(r"""(src|href)=["'](?!data:)|url\(|<script|@import""", report)
    assert not fetches, "the report must need no other file"


def test_the_table_fits_a_terminal_of_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(bench(tmp_path / "run", "--momentum")) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("adafactor, momentum "))
    assert max(len(line) for line in lines if not line.startswith(("On ", "Report"))) <= 80
    assert "…" not in row


def test_the_order_moves_on_and_only_the_second_step_of_a_turn_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name, kind in (("ours", Adafactor), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        step = kind.step

        def noted(self: Any, *args: Any, name: str = name, step: Any = step) -> Any:
            steps.append(name)
            return step(self, *args)

        monkeypatch.setattr(kind, "step", noted)
    monkeypatch.setattr(_bench_gate, "RATES", ())
    assert main(bench(tmp_path / "run", "--repeats", "3")) == 0
    warm, turns = steps[:6], steps[6:]
    assert warm == ["ours", "ours", "adamw", "adamw", "sgd", "sgd"]
    assert turns[::2] == turns[1::2]
    assert turns[::2] == ["ours", "adamw", "sgd", "adamw", "sgd", "ours", "sgd", "ours", "adamw"]


def test_a_slow_optimizer_sits_out_the_later_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(bench(tmp_path / "run", "--repeats", "9", "--budget", "1e-9", "--json")) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert {row["rounds"] for row in case["optimizers"]} == {3}
    assert case["rounds"] == 3, "nobody but baselines was left"


def test_every_foreign_optimizer_that_is_installed_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen, missing = _bench_entries.choose(None, momentum=False)
    arguments = [a for a in bench(tmp_path / "run") if a not in ("--optimizers", "adafactor")]
    assert main([*arguments, "--json", "--repeats", "1", "--shapes", "40x36,64x3x3x3,9"]) == 0
    results = json.loads(capsys.readouterr().out)
    (case,) = results["cases"]
    assert [row["name"] for row in case["optimizers"]] == [entry.name for entry in chosen]
    for row in case["optimizers"]:
        # timm cannot be imported beside a torchvision that does not fit torch; that is a note, not a crash.
        assert (row["note"] is None) == (row["rounds"] == 1)
        assert row["note"] is None or row["package"] == "timm"
    assert any(note.startswith("Not installed") for note in results["notes"]) == bool(missing)


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("t5-encoder", 109_627_392, 97),
        ("t5-base", 222_903_552, 257),
        ("t5-large", 737_668_096, 509),
        ("gpt2", 124_439_808, 148),
        ("llama-3-8b", 8_030_261_248, 291),
        ("resnet", 25_557_032, 161),
        ("sdxl-unet", 2_567_463_684, 1680),
        ("many-small", 5_000 * 64 * 64, 5_000),
        ("one-huge", 32128 * 4096, 1),
    ],
)
def test_presets_have_the_size_of_the_real_model(name: str, parameters: int, tensors: int) -> None:
    (found,) = parse(name, 1.0)
    assert (found.name, found.parameters, len(found.shapes)) == (name, parameters, tensors)


def test_presets_cover_the_table_above() -> None:
    [mark] = [mark for mark in test_presets_have_the_size_of_the_real_model.pytestmark if mark.name == "parametrize"]
    assert set(PRESETS) == {case[0] for case in mark.args[1]}


def test_sizes_and_presets_mix() -> None:
    sets = parse("4096x4096, gpt2 ,768,gpt2", 1.0)
    assert [found.name for found in sets] == ["gpt2", "4096x4096,768"]
    assert sets[1].shapes == ((4096, 4096), (768,))
    assert parse("1,2,3,4", 1.0)[0].name == "4 tensors"


def test_a_scaled_model_keeps_its_mixture_of_sizes() -> None:
    whole, part = parse("sdxl-unet", 1.0)[0], parse("sdxl-unet", 0.25)[0]
    assert len(part.shapes) == len(whole.shapes) // 4
    assert part.parameters == pytest.approx(0.25 * whole.parameters, rel=0.05)
    assert part.name == "0.25 of sdxl-unet"
    (few,) = parse("9,8,1,2,7,3,6,4,5,10", 0.3)
    assert few.shapes == ((9,), (2,), (6,)), "the middle of each third by size, in their order"


# --- the gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [ADAFACTOR, MOMENTUM], ids=lambda entry: entry.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gate_lets_ours_pass(entry: Entry, dtype: torch.dtype) -> None:
    verdict = check(entry, "auto", dtype, "cpu")
    assert verdict.differences == ()
    assert verdict.worst is not None
    assert 0.1 < verdict.worst <= 1


def wrong(**changes: Any) -> Entry:
    """Ours with another setting than it says."""
    return dataclasses.replace(ADAFACTOR, make=lambda named, backend: Adafactor(named, **OURS | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"scale_parameter": False}, "weights"),
        ({"clip_threshold": 1.001}, "weights"),
        ({"decay_rate": -0.801}, "exp_avg_sq_row"),
        ({"eps": (1e-30, 2e-3)}, "weights"),
        ({"eps": (1e-9, 1e-3)}, "exp_avg_sq_col"),
        ({"weight_decay": 1e-2}, "weights"),
        ({"maximize": True}, "weights"),
        ({"factor": "none"}, "exp_avg_sq_row is missing"),
    ],
)
def test_the_gate_stops_an_optimizer_that_is_a_little_wrong(
    changes: dict[str, Any], what: str, dtype: torch.dtype
) -> None:
    assert what in {difference.what for difference in check(wrong(**changes), "auto", dtype, "cpu").differences}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gate_notices_updates_that_rounding_loses(dtype: torch.dtype) -> None:
    # Every weight stays within one spacing of the right one; only the mean along the steps gives it away.
    verdict = check(wrong(rounding="nearest"), "auto", dtype, "cpu")
    assert [difference.what for difference in verdict.differences] == ["rounding's bias"]


def test_the_gate_notices_what_is_not_a_number() -> None:
    class Poisoned(Adafactor):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][3][5] = math.nan

    entry = dataclasses.replace(ADAFACTOR, make=lambda named, backend: Poisoned(named, **OURS))
    verdict = check(entry, "auto", torch.float32, "cpu")
    assert verdict.worst is None
    assert {d.shape for d in verdict.differences} >= {"127"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1e-6, 0.9999, 1.0, 1.5, 2.0, 1000.0], dtype=dtype)
    above = torch.nextafter(x, torch.tensor(math.inf, dtype=dtype))
    assert torch.equal(spacing(-x, dtype), above.double() - x.double())


def test_no_times_are_printed_when_the_gate_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENTRIES, "adafactor", wrong(clip_threshold=1.01))
    out = tmp_path / "run"
    assert main(bench(out, "--json")) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "weights" in output.err
    assert re.search(r"weights +300x130 +1 ", output.err)
    last = output.err.splitlines()[-1]
    assert last.endswith(
        "no times: ours differs from the same steps in float64, as listed above (adafactor in float32)"
    )
    assert "…" not in output.err
    assert max(map(len, output.err.splitlines()[:-1])) <= 80
    assert list(out.iterdir()) == []


# --- what fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "gpt3"], "'gpt3' is neither a size such as 4096x4096 nor one of t5-encoder, t5-base,"),
        (["--shapes", "4096x"], "'4096x' is neither a size"),
        (["--shapes", "0x5"], "'0x5' is neither a size"),
        (["--shapes", ","], "--shapes names none"),
        (["--scale", "0"], "--scale must be above 0 and at most 1, got 0"),
        (["--scale", "nan"], "--scale must be above 0 and at most 1, got nan"),
        (["--scale", "0.1"], "--scale 0.1 leaves no tensor of 40x36,9, which has 2; raise it"),
        (["--dtype", "float64"], "--dtype must be out of float32, bfloat16, float16 or both, got 'float64'"),
        (["--dtype", ","], "--dtype names none"),
        (["--threads", "0"], "--threads must be numbers from 1 to 512, such as 4 or 1,2,4, got '0'"),
        (["--threads", "two"], "--threads must be numbers"),
        (["--repeats", "0"], "--repeats must be from 1 to 1000000, got 0"),
        (["--budget", "0"], "--budget must be a positive number of seconds, got 0"),
        (["--optimizers", "adamw"], "there is no optimizer called 'adamw'; choose from adafactor, torch,"),
        (["--optimizers", "torch,torch"], "--optimizers names one twice"),
        (["--optimizers", ","], "--optimizers names none"),
        (["--backend", "fast"], "--backend must be one of 'auto', 'reference'"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_a_bad_option_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(bench(tmp_path / "run", *options)) == 2
    assert_refused(capsys, message, tmp_path / "run")


def test_an_optimizer_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = dataclasses.replace(ENTRIES["timm"], package="no-such-package")
    monkeypatch.setitem(ENTRIES, "timm", absent)
    assert main(bench(tmp_path / "run", "--optimizers", "adafactor,timm")) == 2
    assert "timm is not installed; pip install no-such-package" in capsys.readouterr().err
    chosen, missing = _bench_entries.choose(None, momentum=False)
    assert "no-such-package" in missing
    assert absent not in chosen


def test_a_model_that_does_not_fit_is_refused_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_bench_case, "available", lambda device: 20_000_000_000)
    assert main(bench(tmp_path / "run", "--shapes", "sdxl-unet")) == 2
    assert capsys.readouterr().err == (
        "adafactor: --shapes: sdxl-unet in float32 needs 43.1 GB for weights, gradients and AdamW's state, and 20 GB "
        "are free; choose --scale 0.46 or --dtype bfloat16\n"
    )
    assert main(bench(tmp_path / "run", "--shapes", "sdxl-unet", "--scale", "0.5", "--dtype", "float32")) == 2
    assert "choose --scale 0.46 or" in capsys.readouterr().err, "of the whole model, not of its half"
    assert main(bench(tmp_path / "run", "--shapes", "99999999x999999", "--dtype", "bfloat16")) == 2
    assert capsys.readouterr().err.endswith("are free; choose smaller --shapes\n")
    assert not (tmp_path / "run").exists()


def test_the_memory_check_counts_what_is_kept() -> None:
    shapes = ShapeSet("x", ((1000, 1000),))
    entries = [ADAFACTOR, MOMENTUM, *_bench_entries.BASELINES]
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        case = _bench_case.Case(shapes, dtype, 1, "cpu", "auto")
        assert _bench_case.planned(case, entries) == pytest.approx(1.05 * (4 * itemsize + 2) * 10**6)
        assert _bench_case.planned(case, [ADAFACTOR]) == pytest.approx(1.05 * 2 * itemsize * 10**6)
    free = _bench_case.available("cpu")
    assert free is None or free > 10**6


def failing(error: Exception) -> Entry:
    def make(named: Any, backend: str) -> Any:
        raise error

    return dataclasses.replace(ENTRIES["torch"], make=make)


@pytest.mark.parametrize("name", ["torch", "adamw"])
def test_a_failure_of_one_optimizer_is_a_note_in_its_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("not for Half\nand a stack of other lines")
    if name == "torch":
        monkeypatch.setitem(ENTRIES, "torch", failing(error))
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (_ for _ in ()).throw(error))
    assert main(bench(tmp_path / "run", "--optimizers", "adafactor,torch", "--json")) == 0
    results = json.loads(capsys.readouterr().out)
    (case,) = results["cases"]
    rows = {row["name"]: row for row in case["optimizers"]}
    assert rows[name]["note"] == "RuntimeError: not for Half"
    assert rows[name]["step_ms"] is rows[name]["to_adamw"] is rows[name]["state_bytes"] is None
    assert rows["adafactor"]["note"] is None
    assert rows["adafactor"]["to_sgd"]["median"] > 0
    assert (rows["adafactor"]["to_adamw"] is None) == (name == "adamw")
    assert any("not for Half" in note for note in results["notes"])
    assert "failed: see below" in (tmp_path / "run" / "report.html").read_text()


def test_an_optimizer_whose_temporaries_do_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = dataclasses.replace(ENTRIES["torch"], whole_copies=10**9)
    monkeypatch.setitem(ENTRIES, "torch", greedy)
    monkeypatch.setattr(_bench_measure, "available", lambda device: 10**9)
    assert main(bench(tmp_path / "run", "--optimizers", "adafactor,torch", "--json")) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert "of temporaries, and 1e+03 MB" in case["optimizers"][1]["note"] or "GB" in case["optimizers"][1]["note"]


def test_what_had_finished_survives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turn = _bench_measure._turn
    turns = []

    def interrupted(runner: Any, number: int, device: str) -> None:
        turn(runner, number, device)
        turns.append(number)
        if len(turns) == 3 * 3 + 3 + 2:  # the second table's second round is incomplete
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_bench_measure, "_turn", interrupted)
    out = tmp_path / "run"
    assert main(bench(out, "--dtype", "both,float16", "--repeats", "3")) == 130
    output = capsys.readouterr()
    assert "interrupted; the report covers 40x36,9, float32, 1 thread; 40x36,9, bfloat16, 1 thread" in output.err
    results = json.loads((out / "results.json").read_text())
    assert [case["rounds"] for case in results["cases"]] == [3, 1]
    assert {row["rounds"] for row in results["cases"][1]["optimizers"]} == {1}
    assert results["notes"][:2] == [
        "Interrupted: 40x36,9, bfloat16, 1 thread has 1 of 3 rounds.",
        "Interrupted: not measured are 40x36,9, float16, 1 thread.",
    ]
    assert (out / "report.html").exists()


def test_an_interruption_before_anything_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turn = _bench_measure._turn
    monkeypatch.setattr(_bench_measure, "_turn", lambda *a: (turn(*a), signal.raise_signal(signal.SIGTERM)))
    assert main(bench(tmp_path / "run")) == 128 + signal.SIGTERM
    assert "nothing to report" in capsys.readouterr().err


def test_another_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    assert main(bench(tmp_path / "run")) == 2
    assert "is not empty (it holds precious); choose another --out" in capsys.readouterr().err


# --- the sentences ------------------------------------------------------------------------------------------------


def row(name: str, ratio: float | None, to_sgd: float | None = None) -> dict[str, Any]:
    def spread(value: float | None) -> Any:
        return None if value is None else {"median": value, "low": 0.9 * value, "high": 1.1 * value}

    return {
        "name": name,
        "title": name,
        "note": None,
        "rounds": 3,
        "step_ms": spread(12.0),
        "to_adamw": spread(ratio),
        "to_sgd": spread(to_sgd),
        "state_bytes": 10**6,
        "state_bytes_per_parameter": 0.01,
        "temporary_bytes": 2**20,
        "moved_bytes_per_parameter": {"adafactor": 16, "adamw": 28, "sgd": 12}.get(name),
    }


def case(*rows: dict[str, Any]) -> dict[str, Any]:
    same = {"title": "x, float32, 1 thread", "dtype": "float32", "rounds": 3, "interrupted": False}
    same["copy_bytes_per_second"] = 5e11
    return {**same, "parameters": 10**8, "tensors": 7, "optimizers": list(rows)}


BASE = (row("adamw", 1.0, 2.0), row("sgd", 0.5, 1.0))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            (row("adafactor", 0.9, 1.8), row("torch", 7.0), row("timm", 3.04), *BASE),
            "On x, float32, 1 thread: a step of adafactor takes 0.90 times as long as one of fused AdamW and 1.80 "
            "times as long as one of fused SGD; the fastest other Adafactor here, timm, takes 3.04 times as long as "
            "AdamW.",
        ),
        (
            (row("torch", 104.4), *BASE),
            "On x, float32, 1 thread: another Adafactor, torch, takes 104 times as long as AdamW.",
        ),
        (
            (row("adafactor", 19.25), row("adamw", 1.0)),
            "On x, float32, 1 thread: a step of adafactor takes 19.2 times as long as one of fused AdamW.",
        ),
        ((row("adafactor", None, 1.5),), "On x, float32, 1 thread: no ratio to fused AdamW."),
    ],
)
def test_the_headline_follows_from_the_numbers(rows: Any, sentence: str) -> None:
    assert _bench_report.headline([case(*rows)]) == sentence


def test_notes_name_who_sat_out_and_who_is_missing() -> None:
    slow = row("torch", 30.0) | {"rounds": 2}
    said = _bench_report.notes([case(row("adafactor", 1.0), slow, *BASE)], ["timm"], [], 3)
    assert said == [
        "On x, float32, 1 thread the slow ones sat out the later rounds: torch after 2 of 3.",
        "On x, float32, 1 thread a plain copy moves 500 GB/s; adafactor moves 16 bytes per parameter at 27% of that, "
        "adamw moves 28 bytes per parameter at 47% of that, sgd moves 12 bytes per parameter at 20% of that.",
        "Not installed, so not timed: timm (pip install timm).",
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pictures_of_one_table_and_of_several(count: int) -> None:
    empty = case(row("adafactor", None), row("sgd", None))
    drawn = _bench_report.draw([case(row("adafactor", 0.7), row("torch", 9.0), *BASE), empty, empty][:count])
    with Image.open(io.BytesIO(drawn)) as picture:
        assert picture.size[0] == (1440 if count == 1 else 2080)


def test_the_table_shows_what_failed() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(_bench_report.table(case(row("adafactor", 1.5, 3.0), row("torch", None) | {"step_ms": None}, *BASE)))
    text = console.export_text()
    assert re.search(r"adafactor +1\.50 1\.35-1\.65 +3\.00 +12 ms +1 MB +0\.01 +1\.05 MB", text)
    assert re.search(r"torch +failed", text)
