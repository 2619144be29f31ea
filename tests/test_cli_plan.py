"""``adafactor plan``: from any source to the right bytes, the answer, the files, and one line where it cannot."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

import adafactor
from _cli import assert_refused
from adafactor.cli import _plan_report, main
from adafactor.cli._known_models import MODELS
from adafactor.cli._plan_modes import MODES
from adafactor.cli._plan_source import load

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
CONFIGS = pytest.mark.filterwarnings("ignore")  # what transformers warns of while it is imported


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def config(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    return path


def rows(found: dict[str, Any], case: int = 0) -> dict[str, Any]:
    return {row["name"]: row for row in found["cases"][case]["rows"]}


def printed(found: dict[str, Any], case: dict[str, Any]) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(_plan_report.table(found, case))
    return console.export_text()


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


# --- the sources --------------------------------------------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_config_is_built_by_transformers(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    path = config(tmp_path / "little[bold]", LLAMA)
    found = plan(capsys, str(path if given == "file" else path.parent))
    sizes = {key: value for key, value in LLAMA.items() if isinstance(value, int)}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16()
    assert (found["model"], found["origin"]) == ("little[bold]", "LlamaForCausalLM of transformers")
    assert "little[bold], " in printed(found, found["cases"][0])
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    for mode in MODES:
        if mode.ours and mode.dtype == torch.bfloat16:
            optimizer = adafactor.Adafactor(model.named_parameters(), **mode.config)
            assert rows(found)[mode.name]["state"] == optimizer.explain().state_bytes


@CONFIGS
def test_a_config_without_a_known_architecture_has_no_output_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    for architectures, said in ((None, "names no architectures"), (["Mine"], "names Mine, which transformers does")):
        path = config(tmp_path, LLAMA | {"architectures": architectures})
        found = plan(capsys, str(path))
        assert found["origin"] == "LlamaModel of transformers"
        assert said in found["notes"][0]


@CONFIGS
def test_an_output_layer_that_the_authors_have_not_tied_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    mt5 = {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"], "vocab_size": 250_112}
    found = plan(capsys, str(config(tmp_path, mt5 | {"tie_word_embeddings": False})))
    assert found["parameters"] == 300_176_768
    assert "not tied to the embedding" in found["notes"][0]
    assert rows(found) == rows(plan(capsys, "mt5-small"))


@CONFIGS
def test_models_of_several_parts_are_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    clip = {"model_type": "clip", "architectures": ["CLIPModel"], "tie_word_embeddings": False}
    assert plan(capsys, str(config(tmp_path, clip)))["parameters"] == 151_277_313


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint in two files, with names of methods, buffers, and a scalar."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    first = {
        "h.0.attn.c_attn.weight": torch.zeros(48, 144, dtype=torch.bfloat16),
        "h.0.attn.bias": torch.zeros(1, 1, 16, 16),
        "norm.weight": torch.zeros(48),
        "scale": torch.zeros(()),
    }
    second = {
        "norm.bias": torch.zeros(48, dtype=torch.float16),
        "add.weight": torch.zeros(40, 40).to(torch.float8_e4m3fn),
        "bn.running_mean": torch.zeros(7),
        "position_ids": torch.zeros(5, dtype=torch.int64),
    }
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    index = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    index |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_headers_are_a_model(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, str(shards))
    assert (found["model"], found["origin"]) == ("checkpoint", "headers of 2 safetensors files")
    assert found == plan(capsys, str(shards / "model.safetensors.index.json")) | {"created": found["created"]}
    expected = {"c": (48, 144), "n": (48,), "s": (), "b": (48,), "a": (40, 40)}
    assert found["parameters"] == 48 * 144 + 48 + 1 + 48 + 40 * 40
    row, report = rows(found)["float32"], adafactor.memory.report(expected).rows[0]
    assert row["state"] == report.state
    assert row["weights"] == report.weights + 4 * (16 * 16 + 7) + 8 * 5
    assert "Headers do not say which parameters are tied" in found["notes"][0]
    names = [name for name, _ in load(str(shards)).model.named_parameters()]
    assert sorted(names) == ["add.weight", "h.0.attn.c_attn.weight", "norm.bias", "norm.weight", "scale"]


def test_one_file_alone(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, str(shards / "model-00002-of-00002.safetensors"))
    assert found["parameters"] == 48 + 40 * 40
    assert found["origin"] == "headers of 1 safetensors file"


def test_only_headers_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1 << 18, 1 << 16], "data_offsets": [0, 1 << 35]}}).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 35))  # 34 GB that take no room on the disk
    assert plan(capsys, str(path))["parameters"] == 1 << 34


MODULE = """
import torch
print("noise")

def build():
    import {name}_part
    model = torch.nn.ModuleDict({{"embed": torch.nn.Embedding(600, 40), "head": torch.nn.Linear(40, 600, bias=False)}})
    model["head"].weight = model["embed"].weight
    assert model["head"].weight.is_meta
    return model

class Makers:
    frozen = staticmethod(lambda: build().requires_grad_(False))
    lazy = torch.nn.LazyLinear
    empty = torch.nn.Identity
    number = 3

def raises():
    raise RuntimeError("no such\\nthing")

def leaves():
    raise SystemExit(3)

def needs(size):
    pass

def integers():
    model = torch.nn.Linear(2, 2)
    model.q = torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    return model
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module in the working directory."""
    name = "planned_" + re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
    (tmp_path / f"{name}_part.py").write_text("")
    (tmp_path / f"{name}_broken.py").write_text("import no_such_package_at_all\n")
    monkeypatch.chdir(tmp_path)
    return name


def test_a_function_builds_on_the_meta_device(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = list(sys.path)
    found = plan(capsys, f"{module}:build")
    assert (found["model"], found["parameters"], found["origin"]) == ("build", 24_000, f"{module}:build")
    assert rows(found)["bfloat16"]["gradients"] == 2 * 3 * 24_000, "a tied embedding's parts and their sum"
    assert sys.path == path
    assert rows(plan(capsys, f"{module}:Makers.frozen"))["adamw-float32"]["total"] == 4 * 24_000


def test_train_freezes_the_others(module: str, capsys: pytest.CaptureFixture[str]) -> None:
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


@CONFIGS
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "is not JSON: Expecting property name"),
        ("config.json", "\udcff", "is not JSON"),
        ("config.json", "[]", "holds a JSON list, not an object with a model's settings"),
        ("config.json", "{}", "has no model_type: it describes no model of transformers; give a safetensors file"),
        ("config.json", '{"_class_name": "Net"}', "has no model_type: it describes diffusers' Net"),
        ("config.json", '{"model_type": "nonesuch"}', "transformers cannot build the model of"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "Validation error for field 'hidden_size'"),
        ("config.json", '{"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}', "is code that comes with its"),
        ("x.safetensors", "hello", "is not a complete safetensors file: Error while deserializing header"),
        ("x.safetensors.index.json", '{"a": 1}', "has no weight_map, so it is not the index of a safetensors"),
        ("x.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "of the 1 files that x.safetensors"),
        ("x.bin", "hello", "is neither a config.json nor a safetensors file or index"),
    ],
)
def test_a_bad_file_is_one_line(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "transformers" in message or "Validation" in message or "code" in message:
        pytest.importorskip("transformers")
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert main(["plan", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
    assert_refused(capsys, message, tmp_path / "run")


def test_a_file_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, LLAMA)

    def refused(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refused)
    assert main(["plan", str(path), "--out", str(tmp_path / "run")]) == 2
    assert_refused(capsys, f"cannot read {path}: Permission denied", tmp_path / "run")


def test_a_cut_and_a_quantized_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"qweight": torch.zeros(100, 100, dtype=torch.int32), "scales": torch.zeros(10)}, path)
    assert main(["plan", str(path), "--out", str(tmp_path / "run")]) == 2
    assert_refused(capsys, "most of x.safetensors is I32: a quantized checkpoint", tmp_path / "run")
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["plan", str(path), "--out", str(tmp_path / "run")]) == 2
    assert_refused(capsys, "is not a complete safetensors file", tmp_path / "run")


def test_a_folder_says_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    pipeline = tmp_path / "pipeline"
    config(pipeline / "unet", {"_class_name": "UNet"})
    config(pipeline / "vae", {"_class_name": "VAE"})
    assert main(["plan", str(pipeline), "--out", str(out)]) == 2
    assert_refused(capsys, "holds neither config.json nor safetensors files; give one of its folders: unet, vae", out)
    for name in ("a", "b"):
        save_file({"w": torch.zeros(3)}, pipeline / f"{name}.safetensors")
    assert main(["plan", str(pipeline), "--out", str(out)]) == 2
    assert_refused(capsys, "holds a.safetensors, b.safetensors; name one of them", out)
    save_file({"w": torch.zeros(4, 4)}, pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    found = plan(capsys, str(pipeline / "unet"))
    assert (found["model"], found["parameters"]) == ("unet", 16)
    (tmp_path / "empty").mkdir()
    assert main(["plan", str(tmp_path / "empty"), "--out", str(out)]) == 2
    assert_refused(capsys, "holds neither config.json nor safetensors files\n", out)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("raises", "{0}:raises() raised RuntimeError: no such thing ({0}.py, line 19)"),
        ("leaves", "{0}:leaves() raised SystemExit: 3 ({0}.py, line 22)"),
        ("needs", "{0}:needs() raised TypeError: needs() missing 1 required positional argument: 'size'\n"),
        ("buidl", "{0} has no 'buidl'; did you mean build?"),
        ("Makers.number", "{0}:Makers.number is int, not a function that builds a model"),
        ("Makers.empty", "{0}:Makers.empty has no parameters; there is nothing to train"),
        ("print", "{0} has no 'print'"),
        ("Makers.__len__", "{0} has no 'Makers.__len__'"),
        ("torch.ones", "{0}:torch.ones() raised"),
        ("Makers", "{0}:Makers() returned Makers, not a torch.nn.Module"),
        ("integers", "parameter 'q' has dtype int8; Adafactor takes float32, bfloat16, float16, float64"),
    ],
)
def test_a_function_that_fails_is_one_line(
    attribute: str, message: str, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"{module}:{attribute}", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.replace("noise\n", "").startswith("adafactor: SOURCE: " + message.format(module))
    assert error.replace("noise\n", "").count("\n") == 1


def test_modules_that_cannot_be_imported(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in {
        "no_such_module": "there is no module 'no_such_module' here or among the installed ones",
        "adafactor.nothing": "there is no module 'adafactor.nothing' here",
        f"{module}_broken": "raised ModuleNotFoundError: No module named 'no_such_package_at_all' (",
    }.items():
        assert main(["plan", f"{name}:build", "--out", str(tmp_path / "run")]) == 2
        assert_refused(capsys, message, tmp_path / "run")


def test_without_transformers_a_config_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["plan", str(config(tmp_path, LLAMA)), "--out", str(tmp_path / "run")]) == 2
    assert_refused(capsys, "needs transformers, which is not installed: pip install transformers", tmp_path / "run")
