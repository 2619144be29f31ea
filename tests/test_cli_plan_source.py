"""``adafactor plan``: from any source to the right bytes, and one line where there is no way."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adafactor
from _cli import assert_refused
from _plan import plan, printed, rows
from adafactor.cli import main
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


def config(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    return path


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


# --- what is refused ----------------------------------------------------------------------------------------------


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
