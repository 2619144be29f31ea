"""``adafactor plan``: the bytes, the answer, the files, and one line where an argument is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

import adafactor
from _cli import assert_refused
from _plan import plan, printed, rows
from adafactor.cli import main
from adafactor.cli._known_models import MODELS
from adafactor.cli._plan_modes import MODES

# --- the numbers --------------------------------------------------------------------------------------------------


def test_the_rows_are_those_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "gpt2", "--ranks", "1,8")
    assert found["parameters"] == 124_439_808
    for case in found["cases"]:
        for mode, row in zip(MODES, case["rows"], strict=True):
            assert row["name"] == mode.name
            model = MODELS["gpt2"]().to(mode.dtype)
            report = adafactor.memory.report(model, ranks=case["ranks"], in_backward=mode.in_backward, **mode.config)
            expected = next(each for each in report.rows if each.optimizer == mode.optimizer)
            for kind in ("weights", "gradients", "state", "temporaries", "unsharded", "total"):
                assert row[kind] == getattr(expected, kind)
            assert row["left"] == 24 * 10**9 - row["total"]
            assert row["fits"] is (row["left"] >= 0)


def test_a_mode_of_ours_has_the_state_that_adafactor_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(plan(capsys, "t5-small"))
    for mode in MODES:
        if mode.ours:
            planned = adafactor.plan(MODELS["t5-small"]().to(mode.dtype), **mode.config)
            assert found[mode.name]["state"] == sum(tensor.nbytes for tensor in planned)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (
            ["llama-3-8b"],
            "llama-3-8b on 24 GB: yes, with Adafactor's 'bfloat16, in backward' (17.1 GB, which leaves 6.87 GB for "
            "activations). The least of AdamW and Lion is 'Lion, bfloat16', 48.2 GB.",
        ),
        (
            ["llama-3-8b", "--device-memory", "80", "--activations", "10"],
            "llama-3-8b on 80 GB, 10 GB of them for activations: yes, with 14 of Adafactor's 14 modes, from 'float32' "
            "(64.3 GB) down to 'bfloat16, in backward' (17.1 GB, which leaves 52.9 GB). Of AdamW and Lion 'AdamW, "
            "bfloat16', 'AdamW, 8-bit', 'Lion, bfloat16' fit, too.",
        ),
        (
            ["t5-11b", "--device-memory", "48"],
            "t5-11b on 48 GB: yes, with 8 of Adafactor's 14 modes, from '24-bit, int8 momentum, in backward' (45.8 GB) "
            "down to 'bfloat16, in backward' (22.9 GB, which leaves 25.1 GB for activations). The least of AdamW and "
            "Lion is 'Lion, bfloat16', 67.9 GB.",
        ),
        (
            ["gpt2", "--device-memory", "0.4"],
            "gpt2 on 0.4 GB: no; Adafactor's least is 'bfloat16, in backward', 482 MB. The least of AdamW and Lion is "
            "'Lion, bfloat16', 901 MB.",
        ),
        (["gpt2"], "AdamW and Lion fit, too, in every mode."),
    ],
    ids=["one mode", "all", "some", "none", "everything"],
)
def test_the_answer(arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, *arguments)
    assert found["answers"][0].endswith(answer)
    assert found["answers"][0].startswith(found["headline"])


def test_where_it_does_not_fit_it_says_over_how_many_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["t5-small", "--device-memory", "0.15"]
    assert "Over 16 ranks (bfloat16, in backward) it fits." in plan(capsys, *small)["notes"]
    found = plan(capsys, *small, "--ranks", "8,16")
    assert [rows(found, case)["bfloat16-in-backward"]["fits"] for case in (0, 1)] == [False, True]
    notes = plan(capsys, "gpt2", "--device-memory", "0.2")["notes"]
    assert "No number of ranks up to 1,024 makes it fit: FSDP2 holds too much of it whole." in notes


def test_the_model_is_left_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    above = adafactor.memory.peak_allocated(lambda: plan(capsys, "llama-3-8b"))
    assert above < 1 << 20


def test_train_freezes_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "t5-small", "--train", "decoder.block")
    names = [name for name, _ in MODELS["t5-small"]().named_parameters() if name.startswith("decoder.block")]
    trained = sum(p.numel() for name, p in MODELS["t5-small"]().named_parameters() if name in names)
    assert (found["trained"], found["parameters"]) == (trained, 60_506_624)
    row = rows(found)["adamw-float32"]
    assert (row["weights"], row["gradients"]) == (4 * 60_506_624, 4 * trained)
    assert row["state"] == 8 * trained + 4 * len(names)
    assert f"{trained:,} of 60,506,624 parameters are trained" in found["notes"][0]


# --- what is shown ------------------------------------------------------------------------------------------------


def test_the_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3-8b", "--ranks", "1,8", "--out", str(tmp_path / "run"), "--json"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found == json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in output.err
    with Image.open(tmp_path / "run" / "plan.png") as picture:
        picture.load()
        assert picture.format == "PNG"
    report = (tmp_path / "run" / "report.html").read_text()
    for answer in found["answers"]:
        assert answer.replace("'", "&#39;") in report
    assert "On each of 8 ranks, sharded with FSDP2" in report
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|<script|@import""", report), "it must need no other file"
    assert main(["plan", "llama-3-8b", "--out", str(tmp_path / "run")]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["llama-3-8b", "t5-small", "palm-62b"])
def test_the_table_fits_a_terminal(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, source, "--ranks", "1,64")
    for case in found["cases"]:
        text = printed(found, case)
        assert "…" not in text
        assert ("unshar-" in text) is (case["ranks"] == 64)
        assert [line.strip() for line in text.splitlines() if line.startswith(("AdamW", "Adafactor"))] == [
            "AdamW and Lion",
            "Adafactor",
            "Adafactor, stepping in backward",
        ]


def test_the_table_in_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3-8b"]) == 0
    text = capsys.readouterr().out
    assert "llama-3-8b, 8,030,261,248 parameters, GB" in text
    assert re.search(r"AdamW, mixed precision +16\.1 +16\.1 +96\.4 +2\.10 +131 +-107\n", text)
    last = text[text.index("stepping in backward") :]
    assert re.search(r"bfloat16 +16\.1 +1\.05 +0\.0126 +0\.0069 +17\.1 +6\.87\n", last)


@pytest.mark.parametrize("arguments", [["--device-memory", "0.1"], ["--device-memory", "1000"], ["--activations", "2"]])
def test_a_picture_wherever_the_device_ends(arguments: list[str], tmp_path: Path) -> None:
    assert main(["plan", "t5-small", *arguments, "--out", str(tmp_path / "run")]) == 0
    with Image.open(tmp_path / "run" / "plan.png") as picture:
        picture.load()
        assert picture.width == 1600


def test_the_help_names_the_known_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    text = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out))
    for name in MODELS:
        assert name in text.replace("- ", "-")


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t5-bse"], "'t5-bse' is no known model, no file or folder, and no module:function; did you mean t5-base or"),
        (["llama"], "did you mean llama-3-8b or"),
        (["zzz"], f"known models are {', '.join(MODELS)}"),
        (["no/such/config.json"], "there is no file or folder 'no/such/config.json'"),
        (["model.safetensors"], "there is no file or folder 'model.safetensors'"),
        ([], "Missing argument 'SOURCE'"),
        (["gpt2", "--ranks", "0"], "--ranks must be numbers from 1 to 1,048,576, such as 8 or 1,8,64, got '0'"),
        (["gpt2", "--ranks", "2,x"], "got '2,x'"),
        (["gpt2", "--device-memory", "0"], "--device-memory must be a positive number of GB, got 0"),
        (["gpt2", "--device-memory", "nan"], "--device-memory must be a positive number of GB, got nan"),
        (["gpt2", "--activations", "-1"], "--activations must be at least 0 and below --device-memory 24, got -1"),
        (["gpt2", "--activations", "24"], "below --device-memory 24, got 24"),
        (["gpt2", "--train", "h.0"], "--train: no parameter's name begins with 'h.0'; they begin with transformer"),
    ],
)
def test_a_bad_argument_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert_refused(capsys, message, tmp_path / "run")
