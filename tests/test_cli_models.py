"""``adafactor train --model``: what the models learn, and that each trains from scratch on real text."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from _cli import assert_same_run, at_step, losses
from adafactor.cli import _models, _pictures, _text, _tokens, main
from adafactor.cli._contenders import CONTENDERS
from adafactor.cli._errors import UserError
from adafactor.cli._known_models import MODELS
from adafactor.cli._loop import Setup, Trainer
from adafactor.cli._model import ByteTransformer, ModelConfig, PalmBlock, rotary_angles
from adafactor.cli._model_bert import CLS, MASK, SEP, MaskedTokens
from adafactor.cli._model_bert import SPECIAL as BERT_SPECIAL
from adafactor.cli._model_t5 import END, SENTINELS, SpanCorruption

pytestmark = pytest.mark.filterwarnings("ignore")  # what another package warns of while it is imported
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
HOSTED = ["t5", "mt5", "bert"]
SMALL = ["--steps", "30", "--batch-size", "4", "--context", "32", "--threads", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the standard library."""
    directory = tmp_path_factory.mktemp("text")
    for name in ("argparse", "ast", "typing", "inspect", "socket", "tarfile"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"], f"{name}.py"), directory)
    return directory


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a tiny run's time; ``test_cli_compare.py`` draws them."""
    monkeypatch.setattr(_pictures, "draw", lambda results, rows, unit: {})


def options(model: str, text: Path, out: Path, *more: str) -> list[str]:
    needed = [*SMALL, "--width", "32", "--heads", "2"] if model in ("gpt", "palm") else [*SMALL, "--vocabulary", "512"]
    return ["train", "--model", model, "--data", str(text), "--out", str(out), *needed, *more]


def needs(model: str) -> None:
    for package in ("tokenizers", "transformers") if model in HOSTED else ():
        pytest.importorskip(package, reason=f"needs the package {package}")


# --- objectives ---------------------------------------------------------------------------------------------------


def corruption(context: int, pieces: int = 1000) -> SpanCorruption:
    return SpanCorruption("t5", "tiny", 2048, context, pieces)


def test_t5_s_512_tokens_of_input_are_568_of_text_and_114_to_write() -> None:
    task = corruption(512)
    assert (task.window, task.predicted, task.spans) == (568, 114, 28)  # the paper's figures


@pytest.mark.parametrize("context", [8, 9, 31, 128, 512])
def test_writing_the_spans_in_the_place_of_their_sentinels_gives_the_text_back(context: int) -> None:
    task = corruption(context)
    windows = torch.randint(3, 800, (50, task.window), generator=torch.Generator().manual_seed(1))
    rows = task.rows(windows, torch.Generator().manual_seed(2))
    assert rows.shape == (50, context + task.predicted)
    for window, row in zip(windows.tolist(), rows.tolist(), strict=True):
        source, target = row[:context], row[context:]
        assert source[-1] == target[-1] == END
        spans: list[list[int]] = []
        for token in target[:-1]:
            if token == 999 - len(spans):  # the first sentinel is the last piece
                spans.append([])
            else:
                spans[-1].append(token)
        assert len(spans) == task.spans
        assert all(spans)
        restored: list[int] = []
        for token in source[:-1]:
            restored += spans[999 - token] if token > 999 - task.spans else [token]
        assert restored == window
        assert [token for token in source if token > 999 - task.spans] == list(range(999, 999 - task.spans, -1))


def test_spans_are_cut_in_all_ways_alike() -> None:
    task = corruption(33)  # 5 tokens in 2 spans: lengths 1 to 4
    windows = torch.full((8000, task.window), 3)
    targets = task.rows(windows, torch.Generator().manual_seed(0))[:, 33:]
    assert task.predicted == 5 + 2 + 1
    first = Counter((targets == 998).int().argmax(dim=1).sub(1).tolist())
    assert sorted(first) == [1, 2, 3, 4]
    assert all(abs(n - 2000) < 5 * math.sqrt(8000 * 0.25 * 0.75) for n in first.values())


def test_masks_hide_what_they_should_and_nothing_else() -> None:
    task = MaskedTokens("tiny", 2000, 128, 1500)
    windows = torch.randint(len(BERT_SPECIAL), 1500, (2000, task.window), generator=torch.Generator().manual_seed(1))
    rows = task.rows(windows, torch.Generator().manual_seed(2))
    read, places, wanted = rows.split((128, task.predicted, task.predicted), dim=1)
    assert task.predicted == 19  # 15 % of 126
    assert (read[:, 0] == CLS).all()
    assert (read[:, -1] == SEP).all()
    assert torch.equal(windows.gather(1, places - 1), wanted)
    assert all(len(set(row)) == 19 for row in places.tolist())
    assert torch.equal(read.scatter(1, places, wanted)[:, 1:-1], windows), "the others are as they were"
    shown, many = read.gather(1, places), wanted.numel()
    masked, kept = (shown == MASK).sum().item(), (shown == wanted).sum().item()
    for count, share in ((masked, 0.8), (kept, 0.1), (many - masked - kept, 0.1)):
        assert abs(count - share * many) < 5 * math.sqrt(many * share * (1 - share))
    assert shown[shown != MASK].min() >= len(BERT_SPECIAL)
    assert abs(places.double().mean().item() - 63.5) < 5 * 36.4 / math.sqrt(many)


@pytest.mark.parametrize("model", HOSTED)
def test_losses_are_those_that_transformers_computes(model: str) -> None:
    needs(model)
    task = Setup(model=model, vocabulary=600, context=32, device="cpu").task(550)
    module: Any = task.build(0)
    windows = torch.randint(len(BERT_SPECIAL), 400, (3, task.window), generator=torch.Generator().manual_seed(1))
    rows = task.rows(windows, torch.Generator().manual_seed(2))
    if model == "bert":
        read, places, wanted = rows.split((32, task.predicted, task.predicted), dim=1)
        labels = torch.full_like(read, -100).scatter(1, places, wanted)
        expected = module.model(input_ids=read, attention_mask=torch.ones_like(read), labels=labels).loss
    else:
        expected = module.model(input_ids=rows[:, :32], labels=rows[:, 32:].contiguous()).loss
    assert module.loss(rows).item() == pytest.approx(expected.item(), rel=1e-5)
    if model != "t5":  # whose output layer is its embedding, at a standard deviation of 1
        assert module.loss(rows).item() == pytest.approx(math.log(600), abs=0.6), "it knows nothing yet"


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size"),
    [("t5", "small"), ("t5", "base"), ("t5", "v1.1-small"), ("mt5", "small"), ("bert", "base"), ("bert", "tiny")],
)
def test_published_sizes_are_the_known_models(model: str, size: str) -> None:
    needs(model)
    setup = Setup(model=model, size=size, context=512, device="cpu")
    with torch.device("meta"):
        built: Any = setup.task().build(0)
    known = {name: tuple(p.shape) for name, p in MODELS[f"{model}-{size}"]().named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in built.model.named_parameters()}
    if model == "bert":  # a bias that two modules hold goes by the name of the first
        shapes["cls.predictions.decoder.bias"] = shapes.pop("cls.predictions.bias")
    assert shapes == known
    assert (setup.width, setup.depth, setup.vocabulary) == (
        built.model.config.hidden_size,
        setup.depth,
        known[next(iter(known))][0],
    )


@pytest.mark.parametrize("model", HOSTED)
def test_hosted_models_start_from_their_seed_alone(model: str) -> None:
    needs(model)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    task = Setup(model=model, vocabulary=300, context=32, device="cpu").task()
    a, b, c = (task.build(seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state()), "the global generator is the caller's"
    pairs = [(p, q, r) for p, q, r in zip(a.parameters(), b.parameters(), c.parameters(), strict=True) if p.std() > 0]
    assert all(torch.equal(p, q) and not torch.equal(p, r) for p, q, r in pairs)


def test_in_mt5_the_embedding_dominates() -> None:
    needs("mt5")
    sizes = {n: p.numel() for n, p in Setup(model="mt5", device="cpu").task().build(0).named_parameters()}
    ends = sum(size for name, size in sizes.items() if name.endswith(("shared.weight", "lm_head.weight")))
    assert ends > 0.8 * sum(sizes.values())


def test_a_block_of_palm_is_that_of_its_equations() -> None:
    config = ModelConfig(width=24, depth=1, heads=3, context=7, form="palm")
    block = PalmBlock(config).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = (t.double() for t in rotary_angles(7, 8))
    found = block(x, cos, sin).detach().numpy()

    w = {name: p.detach().numpy() for name, p in block.named_parameters()}
    x = x.numpy()
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w["norm.weight"]

    def turned(heads: np.ndarray) -> np.ndarray:  # pairs as complex numbers, [B, T, H, 4]
        turn = np.exp(1j * np.arange(7)[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8))
        return (heads[..., :4] + 1j * heads[..., 4:]) * turn[None, :, None]

    q = turned((y @ w["q.weight"].T).reshape(2, 7, 3, 8))
    k = turned((y @ w["k.weight"].T).reshape(2, 7, 1, 8))
    scores = np.einsum("bthc,bsgc->bhts", q, k.conj()).real / math.sqrt(8)
    scores[:, :, ~np.tril(np.ones((7, 7), dtype=bool))] = -np.inf
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bsc->bthc", chances, y @ w["v.weight"].T).reshape(2, 7, 24)
    gate = y @ w["gate.weight"].T
    swiglu = gate / (1 + np.exp(-gate)) * (y @ w["mlp_in.weight"].T)
    expected = x + mixed @ w["attention_out.weight"].T + swiglu @ w["mlp_out.weight"].T
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)  # angles are float32


def test_palm_s_form_starts_as_published_and_is_trained_with_its_z_loss() -> None:
    model = ByteTransformer(ModelConfig(width=96, depth=2, heads=3, context=32, form="palm"), seed=0)
    for name, p in model.named_parameters():
        assert "bias" not in name
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(1.0 if name == "embedding.weight" else p.shape[1] ** -0.5, rel=0.05)
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    trained = model.loss(tokens)
    measured = model.eval().loss(tokens)
    z = model(tokens[:, :-1]).logsumexp(-1)
    assert (trained - measured).item() == pytest.approx(1e-4 * z.square().mean().item(), rel=1e-3)
    tokens = tokens[:, :-1]
    changed = tokens.clone()
    changed[:, 20] += 1
    changed %= 256
    assert torch.equal(model(tokens)[:, :20], model(changed)[:, :20])
    assert not torch.equal(model(tokens)[:, 20:], model(changed)[:, 20:])


# --- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["t5", "bert"])
def test_a_tokenizer_is_the_same_every_time_and_gives_the_text_back(model: str, text: Path) -> None:
    needs(model)
    from tokenizers import Tokenizer

    corpus, family = _text.load(text), _models.FAMILIES[model]
    first, again = (_tokens.train(family, 600, corpus) for _ in range(2))
    assert first == again
    made = Tokenizer.from_str(first)
    assert made.get_vocab_size() == 600
    tokens = _tokens.tokenized(corpus, first)
    assert (tokens.pieces, tokens.unit, tokens.train.bytes) == (600, "token", corpus.train.bytes)
    assert tokens.train.data.max() < 600 - (SENTINELS if model == "t5" else 0)
    before = bytes(corpus.train.data[:3000].numpy()).decode()
    after = made.decode(tokens.train.data[:300].tolist())
    squeezed = [re.sub(r"\s", "", side if model == "t5" else side.lower())[:200] for side in (before, after)]
    assert squeezed[0] == squeezed[1]


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", list(_models.FAMILIES))
def test_each_model_trains_from_scratch(model: str, text: Path, tmp_path: Path, no_pictures: None) -> None:
    needs(model)
    lr = ["--lr", "1e-3"] if model == "bert" else []  # the published one is for a million steps
    assert main(options(model, text, tmp_path / "run", "--steps", "60", *lr)) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (found,) = results["optimizers"]
    assert found["name"] == _models.FAMILIES[model].optimizer
    uniform = math.log(256 if model in ("gpt", "palm") else 512)
    evaluated = [row[3] for row in losses(tmp_path / "run") if row[3] is not None]
    assert evaluated[-1] < evaluated[0] - 0.15
    assert evaluated[-1] < uniform - 0.5
    assert (results["data"]["unit"], results["setup"]["model"]) == ("token" if model in HOSTED else "byte", model)


@pytest.mark.parametrize("model", ["palm", "t5", "bert"])
def test_a_stopped_run_of_each_kind_resumes_to_the_same_bits(
    model: str, text: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(model)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = ["--dtype", "bfloat16", "--steps", "12"]
    assert main(options(model, text, whole, *more)) == 0
    with monkeypatch.context() as patched:
        at_step(5, lambda: signal.raise_signal(signal.SIGINT), patched)
        assert main(options(model, text, stopped, *more)) == 130
    assert main(["train", "--out", str(stopped), "--resume", "--model", model]) == 0
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("model", HOSTED)
def test_what_was_trained_loads_in_transformers(model: str, text: Path, tmp_path: Path, no_pictures: None) -> None:
    needs(model)
    import transformers

    out = tmp_path / "run"
    assert main(options(model, text, out, "--steps", "3")) == 0
    kind = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration", "bert": "BertForMaskedLM"}[model]
    loaded = getattr(transformers, kind).from_pretrained(out / "model")
    stored = torch.load(out / "checkpoint.pt", weights_only=True)
    for name, p in loaded.state_dict().items():
        assert torch.equal(p, stored["trainer"]["model"][f"model.{name}"]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer("def factored(self):")["input_ids"]
    plain = tokenizer("def factored(self):", add_special_tokens=False)["input_ids"]
    assert ids == ([CLS, *plain, SEP] if model == "bert" else [*plain, END])
    corpus = _tokens.tokenized(_text.load(text), stored["run"]["tokenizer"])
    setup = Setup(**stored["run"]["setup"])
    trainer = Trainer(setup, CONTENDERS["adafactor"], 1e-3, corpus)
    trainer.model.model.load_state_dict(loaded.state_dict())  # type: ignore[union-attr]
    assert trainer.evaluate() == pytest.approx(losses(out)[-1][3], rel=1e-6)


BLOCKS = re.findall(r"^```python models\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_page_s_code_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None) -> None:
    needs("bert")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/models.md", "exec"), {"__name__": "documentation"})


def test_the_page_has_the_table_of_the_recorded_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / "benchmarks").exists():
        pytest.skip("benchmarks/ is not part of the sdist")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import from_scratch

    rows = json.loads(from_scratch.RESULTS.read_text())
    assert from_scratch.table(rows) in PAGE.read_text()
    assert [row["run"] for row in rows] == list(from_scratch.RUNS)
    assert all(row["curve"][-1][2] < row["curve"][0][1] - 1 for row in rows), "every loss falls by more than a nat"


def test_settings_are_those_that_were_published(text: Path) -> None:
    """What the optimizers of the recipes do in their first step, and which gradient's norm is clipped."""
    corpus = _text.load(text)
    setup = Setup(steps=1000, width=16, depth=1, heads=2, context=16, device="cpu", threads=1)
    groups = {}
    for name in ("adafactor-t5", "adafactor-bert", "adafactor-palm"):
        trainer = Trainer(setup, CONTENDERS[name], CONTENDERS[name].lr, corpus)
        trainer.step()
        groups[name] = trainer.optimizer.param_groups
    assert groups["adafactor-t5"][0]["lr"] == groups["adafactor-palm"][0]["lr"] == 1e-2
    assert [g["lr"] for g in groups["adafactor-bert"]] == [1e-5, 1e-5], "a tenth of 1e-4: ten steps of warm-up"
    assert [g["weight_decay"] for g in groups["adafactor-bert"]] == [0.01, 0.0]
    assert all(p.ndim == 1 for p in groups["adafactor-bert"][1]["params"])
    palm = groups["adafactor-palm"][0]
    assert (palm["weight_decay"], palm["weight_decay_mode"], palm["beta1"], palm["clip_threshold"]) == (
        1.0,
        "lr_squared",
        0.9,
        None,
    )
    assert [CONTENDERS[name].clip_norm for name in groups] == [None, 1.0, 1.0]
    linear = CONTENDERS["adafactor-bert"].schedule.factor
    assert [linear(10, 1000), linear(505, 1000)] == pytest.approx([1.0, 1 - 495 / 991])


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "t6"], "--model must be one of gpt, palm, t5, mt5, bert, got 't6'"),
        (["--model", "t5", "--size", "huge"], "--size must be one of tiny, small, base, large, 3b, 11b, v1.1-small"),
        (["--model", "bert", "--width", "64"], "--width is for models without sizes; bert has --size tiny, mini"),
        (["--size", "base"], "--size base is for t5, mt5, bert; the size of gpt is --width, --depth and --heads"),
        (["--model", "palm", "--vocabulary", "500"], "--vocabulary 500 is for t5, mt5, bert"),
        (["--model", "palm", "--width", "17"], "--width must be a multiple of 2 * heads"),
        (["--model", "t5", "--vocabulary", "100"], "--vocabulary must be from 256 to"),
        (["--model", "bert", "--vocabulary", "0"], "--vocabulary must be from 256 to"),
        (["--model", "bert", "--context", "513"], "--context must be from 4 to 512 for bert, got 513"),
        (
            ["--model", "t5", "--context", "4000"],
            "--context must take out at most 100 spans, for which there are sentinels; 4000",
        ),
        (["--model", "t5", "--context", "0"], "--context must be at least 8 for t5, got 0"),
        (["--model", "t5", "--lr", "1e-3"], "adafactor-t5 makes its own learning rate; leave --lr out for it"),
        (["--model", "bert", "--context", "512", "--data", "SHORT"], "is too small: it leaves"),
        (["--model", "t5", "--data", "MANY"], "--vocabulary 2048: no tokenizer of that size can be trained on"),
        (["--model", "bert", "--vocabulary", "256", "--data", "MANY"], "alone make 2003 tokens; give a larger one"),
    ],
)
def test_a_bad_option_is_one_line(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("t5")
    (tmp_path / "SHORT").write_text("a few words " * 100)
    (tmp_path / "MANY").write_text("".join(chr(0x4E00 + i) + " " for i in range(3000)))
    given = [str(tmp_path / word) if word.isupper() else word for word in given]
    assert main(["train", "--out", str(tmp_path / "run"), "--threads", "1", *given]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert sum(line.startswith("adafactor: ") for line in lines) == 1
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_resumed_run_keeps_its_model(text: Path, tmp_path: Path, no_pictures: None, capsys: Any) -> None:
    needs("t5")
    assert main(options("t5", text, tmp_path / "run", "--steps", "2")) == 0
    capsys.readouterr()
    asked_for = (("--model", "t5", "gpt"), ("--vocabulary", "512", "600"), ("--size", "tiny", "small"))
    for option, has, asked in (*asked_for, ("--model", "t5", "mt5"), ("--width", "128", "64")):
        assert main(["train", "--out", str(tmp_path / "run"), "--resume", option, asked]) == 2
        assert f"has {option} {has}, not {asked}" in capsys.readouterr().err


def test_without_transformers_one_line_says_what_to_install() -> None:
    """In a process in which neither package can be found."""
    script = """
import sys
from importlib.abc import MetaPathFinder
class Nowhere(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("transformers", "tokenizers"):
            raise ModuleNotFoundError(name)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("transformers", "tokenizers") else find(name, *rest)
sys.meta_path.insert(0, Nowhere())
from adafactor.cli import main
sys.exit(main(["train", "--model", "t5", "--out", "/nowhere"]))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "adafactor: --model t5 needs tokenizers and transformers: pip install 'adafactor[models]'\n"


def test_every_setup_says_what_it_is() -> None:
    with pytest.raises(UserError, match="--size must be one of"):
        replace(Setup(model="gpt", device="cpu"), model="bert", size="giant")
