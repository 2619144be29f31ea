"""``adafactor compare``: its answer, its report, its text, and the baselines it compares with."""

from __future__ import annotations

import copy
import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from _cli import TINY, assert_refused, write_files
from adafactor.cli import _results, _text, main
from adafactor.cli._baselines import Lion, NesterovAdamW
from adafactor.cli._contenders import CONTENDERS, COSINE, GAP_NOISE, Contender
from adafactor.cli._errors import UserError
from adafactor.cli._loop import Setup, Trainer
from adafactor.cli._model import ByteTransformer, ModelConfig

TUNED = [contender for contender in CONTENDERS.values() if contender.swept_loss is not None]
ALL = ",".join(contender.name for contender in TUNED)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A directory of 20 files that differ."""
    return write_files(tmp_path / "text", 20)


def compare(text: Path, out: Path, *options: str) -> list[str]:
    """The arguments of a tiny run."""
    return ["compare", "--data", str(text), "--out", str(out), "--steps", "12", *TINY, *options]


# --- the answer ---------------------------------------------------------------------------------------------------


def test_compare_answers_and_writes_everything(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(compare(text, out, "--optimizers", ALL, "--json", "--lr", "adamw=0.001")) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((out / "results.json").read_text())
    given = {"steps": 12, "width": 16, "depth": 1, "heads": 2, "context": 16, "batch_size": 4, "threads": 1, "seed": 0}
    assert results["setup"].items() >= given.items()

    by_name = {r["name"]: r for r in results["optimizers"]}
    assert list(by_name) == ALL.split(",")
    for name, r in by_name.items():
        rows = list(map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines()))
        assert [row["step"] for row in rows] == list(range(1, 13))
        assert sum("val_loss" in row for row in rows) == 6
        assert rows[-1]["val_loss"] == r["val_loss"]
        alone = json.loads((out / name / "result.json").read_text())
        assert alone | {k: r[k] for k in ("step_ms", "optimizer_ms", "optimizer_share", "tokens_per_second")} == r
        memory = r["memory"]
        assert memory["weights"] == memory["gradients"] == 4 * r["parameters"]
        assert memory["peak"] == sum(memory[part] for part in ("weights", "gradients", "state", "activations"))
        assert 0 < r["optimizer_share"] < 1
    assert by_name["lion"]["state_bytes"] == 4 * by_name["lion"]["parameters"]
    assert by_name["adamw-nesterov"]["state_bytes"] == 8 * by_name["lion"]["parameters"]
    assert (by_name["adamw"]["lr"], by_name["adamw"]["lr_origin"]) == (0.001, "given on the command line")

    assert results["timing"] == "side by side"

    for picture in ("loss-over-steps", "loss-over-time", "memory"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.html").read_text()
    assert results["headline"].replace("'", "&#39;") in report
    fetches = re.search(r"""(src|href)=["'](?!data:)|url\(|<script|@import""", report)
    assert not fetches, "the report must need no other file"
    assert report.count("data:image/png;base64,") == 3


def test_every_optimizer_starts_from_the_same_weights_and_sees_the_same_batches(text: Path) -> None:
    setup = Setup(steps=3, width=16, depth=1, heads=2, context=16, threads=1)
    corpus = _text.load(text)
    trainers = [Trainer(setup, contender, contender.lr, corpus) for contender in CONTENDERS.values()]
    for trainer in trainers[1:]:
        for p, q in zip(trainers[0].model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(p, q)
    batches = [[t.corpus.batch(4, 17, t.generator) for _ in range(3)] for t in trainers]
    assert all(torch.equal(a, b) for other in batches[1:] for a, b in zip(batches[0], other, strict=True))


def test_the_schedule_is_the_same_for_all_that_were_tuned(text: Path) -> None:
    setup = Setup(steps=40, width=16, depth=1, heads=2, context=16, threads=1)
    rate = [COSINE.factor(step, 40) for step in (1, 2, 21, 40)]
    assert rate == pytest.approx([0.5, 1.0, 0.5 + 0.5 * np.cos(np.pi * 19 / 39), 0.00162], abs=1e-5)
    corpus = _text.load(text)
    for contender in TUNED:
        trainer = Trainer(setup, contender, contender.lr, corpus)
        trainer.step()
        expected = min(1e-2, 1.0) if contender.lr is None else contender.lr / 2
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_what_had_finished_survives_an_interruption(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def interrupted_in_lion(self: Trainer) -> None:
        step(self)
        if self.contender.name == "lion" and self.steps_done == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", interrupted_in_lion)
    out = tmp_path / "run"
    assert main(compare(text, out, "--optimizers", "adamw,lion,adafactor")) == 130
    assert "interrupted; the report covers adamw" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert [r["name"] for r in results["optimizers"]] == ["adamw"]
    assert "lion, adafactor did not finish" in results["notes"][0]
    assert (out / "report.html").exists()


def test_an_interruption_before_anything_finished(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: (step(self), signal.raise_signal(signal.SIGTERM)))
    assert main(compare(text, tmp_path / "run")) == 128 + signal.SIGTERM
    assert "nothing to report" in capsys.readouterr().err


def test_an_optimizer_that_diverges_is_reported_and_the_others_go_on(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(compare(text, out, "--optimizers", "adamw,lion", "--lr", "adamw=1e30")) == 0
    results = json.loads((out / "results.json").read_text())
    adamw, lion = results["optimizers"]
    assert (adamw["val_loss"], lion["diverged_at"]) == (None, None)
    assert adamw["diverged_at"] > 1
    assert f"AdamW diverged: its loss stopped being a number at step {adamw['diverged_at']}." in results["notes"]
    assert "diverged" in (out / "report.html").read_text()


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizers", "adamw,sgd"], "no optimizer called 'sgd'; choose from adafactor,"),
        (["--optimizers", "adamw,adamw"], "--optimizers names one twice"),
        (["--optimizers", ","], "--optimizers names none; choose from adafactor,"),
        (["--lr", "adamw"], "--lr must look like adamw=1e-3, got 'adamw'"),
        (["--lr", "adamw=-1"], "--lr must be a positive number, got -1 for adamw"),
        (["--lr", "adafactor-paper=1e-2"], "adafactor-paper makes its own learning rate"),
        (["--lr", "adamw-nesterov=1"], "adamw-nesterov is not among --optimizers"),
        (["--data", "/nonexistent"], "cannot read /nonexistent: No such file or directory"),
        (["--data", "/dev/zero"], "cannot read /dev/zero: it is neither a file nor a directory"),
    ],
)
def test_a_bad_option_is_one_line(
    options: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(compare(text, tmp_path / "run", *options)) == 2
    assert_refused(capsys, message, tmp_path / "run")


def test_another_run_is_not_overwritten(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    assert main(compare(text, tmp_path / "run")) == 2
    assert "is not empty (it holds precious); choose another --out" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["precious"]


def test_a_missing_optional_dependency_is_one_line_with_the_cure() -> None:
    script = "import sys; sys.modules['typer'] = None; from adafactor.cli import main; sys.exit(main(['compare']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "adafactor: the command line needs typer: pip install 'adafactor[cli]'\n"


def test_importing_adafactor_imports_none_of_the_command_lines_packages() -> None:
    script = "import adafactor, sys; print({'typer', 'rich', 'matplotlib', 'jinja2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["train", "--help"], ["--version"]])
def test_help_and_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "adafactor" in capsys.readouterr().out


# --- the text -----------------------------------------------------------------------------------------------------


def test_no_content_is_on_both_sides_whatever_the_files_are_called(tmp_path: Path) -> None:
    text = write_files(tmp_path / "text", 30)
    for i in range(30):
        (text / f"copy of {i}.txt").write_bytes((text / f"{i}.txt").read_bytes())
    corpus = _text.load(text)
    assert corpus.train.files + corpus.validation.files == 30, "copies count once"
    sides = [bytes(part.data.numpy().tobytes()) for part in (corpus.train, corpus.validation)]
    for i in range(30):
        content = (text / f"{i}.txt").read_bytes()
        assert [content in side for side in sides].count(True) == 1
    assert 0.05 < len(sides[1]) / sum(map(len, sides)) <= 0.1


def test_the_split_does_not_depend_on_names_or_places(tmp_path: Path) -> None:
    text = write_files(tmp_path / "text", 20)
    first = _text.load(text).describe()
    (text / "deep").mkdir()
    (text / "0.txt").rename(text / "deep" / "z.txt")
    moved = _text.load(text).describe()
    assert (first["train"], first["validation"]) == (moved["train"], moved["validation"])


def test_one_file_is_cut_into_disjoint_parts_and_the_report_says_so(tmp_path: Path) -> None:
    path = tmp_path / "one.bin"
    path.write_bytes(bytes(range(256)) * 40)
    corpus = _text.load(path)
    assert corpus.split == "one file cut in two: its first 90 % trains, its last 10 % validates"
    assert corpus.train.data.numel() == 9216
    assert bytes(torch.cat([corpus.train.data, corpus.validation.data]).tolist()) == path.read_bytes()


def test_two_files_give_one_to_each_side(tmp_path: Path) -> None:
    text = write_files(tmp_path / "text", 2)
    (text / "1.txt").write_text("short, but long enough\n" * 20)
    corpus = _text.load(text)
    assert (corpus.train.files, corpus.validation.files) == (1, 1)
    assert corpus.validation.data.numel() == 460, "the smaller one validates"


def test_hidden_and_binary_files_of_a_directory_are_left_out(text: Path) -> None:
    before = _text.load(text).describe()
    (text / ".hidden").write_text("secret " * 100)
    (text / "image.png").write_bytes(b"\x89PNG\0" + bytes(1000))
    (text / ".git").mkdir()
    (text / ".git" / "config").write_text("config " * 100)
    (text / "dangling").symlink_to("/nowhere")
    assert _text.load(text).describe() == before


def test_validation_windows_are_fixed_disjoint_and_spread(text: Path) -> None:
    corpus = _text.load(text)
    windows = corpus.validation_windows(10, 17)
    assert windows.shape == (10, 17)
    assert torch.equal(windows, corpus.validation_windows(10, 17))
    everything = corpus.validation_windows(10**6, 17)
    assert len(everything) == corpus.validation.data.numel() // 17
    assert torch.equal(everything[0], corpus.validation.data[:17].long())


@pytest.mark.parametrize(("content", "message"), [(b"", "holds no text"), (b"tiny", "is too small: it leaves")])
def test_text_that_cannot_be_used(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        _text.load(tmp_path / "a.txt").checked(17)
    with pytest.raises(UserError, match=message):
        _text.load(tmp_path).checked(17)


def test_the_default_text_is_the_standard_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("site-packages/other.py", "test/test_x.py", "data.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("never read\n" * 100)
    (tmp_path / "a.py").write_text("read = 1\n" * 100)
    (tmp_path / "b.py").write_text("read = 2\n" * 50)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = _text.load(None)
    assert (corpus.train.data.numel(), corpus.validation.data.numel()) == (900, 450)


# --- the baselines and the model ----------------------------------------------------------------------------------


def gradients(steps: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(steps, 4, 3)) * np.array([1.0, 1e-3, 10.0])


def run(make: Any) -> np.ndarray:
    p = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    unused = torch.nn.Parameter(torch.ones(2))
    optimizer = make([("p", p), ("unused", unused)])
    for g in gradients():
        p.grad = torch.from_numpy(g)
        optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    return p.detach().numpy()


def test_lion_is_the_papers() -> None:
    p, m = np.ones((4, 3)), np.zeros((4, 3))
    for g in gradients():
        p = p - 0.01 * np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
    np.testing.assert_allclose(run(lambda params: Lion(params, lr=0.01)), p, rtol=1e-14)


def test_nesterov_adamw_is_adam_with_the_look_ahead() -> None:
    p, m, v = np.ones((4, 3)), np.zeros((4, 3)), np.zeros((4, 3))
    for t, g in enumerate(gradients(), 1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        step = (0.9 * m + 0.1 * g) / (1 - 0.9**t)
        p = p - 0.01 * step / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(run(lambda params: NesterovAdamW(params, lr=0.01)), p, rtol=1e-13)


@pytest.mark.parametrize("optimizer", [Lion, NesterovAdamW])
def test_baselines_take_a_closure_and_survive_a_checkpoint(optimizer: Any) -> None:
    def fresh() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        p = torch.nn.Parameter(torch.ones(3))
        return p, optimizer([p], lr=0.1)

    def steps(p: torch.nn.Parameter, opt: Any, count: int) -> None:
        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss = (p - torch.tensor([0.0, 2.0, 5.0])).square().sum()
            loss.backward()
            return loss

        for _ in range(count):
            assert opt.step(closure) >= 0

    p, opt = fresh()
    steps(p, opt, 4)
    q, resumed = fresh()
    q.data.copy_(p.data)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(p, opt, 4)
    steps(q, resumed, 4)
    assert torch.equal(p, q)


def test_the_model_sees_only_the_past() -> None:
    model = ByteTransformer(ModelConfig(width=16, depth=2, heads=2, context=12), seed=0)
    tokens = torch.arange(12)[None]
    changed = tokens.clone()
    changed[0, 7] = 200
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_the_model_starts_from_its_seed_alone_and_knows_nothing() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a, b = (ByteTransformer(ModelConfig(), seed=0) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()), "the global generator is the caller's"
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert sum(p.numel() for p in a.parameters()) == 357_024
    assert a.loss(torch.randint(256, (4, 129))).item() == pytest.approx(np.log(256), abs=0.3)


# --- the sentences ------------------------------------------------------------------------------------------------


def result(name: str, val_loss: float | None, state_bytes: int = 800, step_ms: float | None = 50.0) -> dict[str, Any]:
    return {
        "name": name,
        "title": CONTENDERS[name].title,
        "val_loss": val_loss,
        "state_bytes": state_bytes,
        "state_bytes_per_parameter": state_bytes / 100,
        "step_ms": step_ms,
        "diverged_at": None if val_loss else 3,
    }


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (
            [result("adafactor", 1.6, 400), result("adamw", 1.7234), result("lion", 1.5)],
            "Adafactor with Nesterov momentum ends 0.123 nats per byte below plain AdamW (1.600 and 1.723), "
            "with 50% of its optimizer state.",
        ),
        (
            [result("adafactor", 1.8, 20, step_ms=80), result("adamw", 1.7), result("adamw-nesterov", 1.65)],
            "Adafactor with Nesterov momentum ends 0.150 nats per byte above AdamW with the same Nesterov step "
            "(1.800 and 1.650), with 2.5% of its optimizer state and 1.6 times its time per step.",
        ),
        (
            [result("adamw", 1.7), result("adafactor", 1.699, 1600)],
            "Adafactor with Nesterov momentum is level with plain AdamW (1.699 and 1.700 nats per byte), "
            "with 2.0 times its optimizer state.",
        ),
        (
            [result("adafactor-paper", 1.9, 8), result("adamw", 1.7), result("adamw-nesterov", 1.6)],
            "Adafactor with the paper's defaults ends 0.200 nats per byte above plain AdamW (1.900 and 1.700), "
            "with 1.0% of its optimizer state.",
        ),
        (
            [result("adamw", 1.7), result("lion", 1.65, 400)],
            "Lion is best: it reaches 1.650 nats per byte with 4.00 bytes of optimizer state per parameter.",
        ),
        (
            [result("adafactor", 1.6, 400), result("adamw", None)],
            "Adafactor with Nesterov momentum reaches 1.600 nats per byte with 4.00 bytes of optimizer state per "
            "parameter.",
        ),
        ([result("adamw", None)], "No optimizer finished: every loss stopped being a number."),
    ],
)
def test_the_headline_follows_from_the_numbers(results: list[dict[str, Any]], sentence: str) -> None:
    assert _results.headline(results) == sentence


def test_nesterovs_gain_is_not_credited_to_adafactor() -> None:
    two = [result("adafactor", 1.6), result("adamw", 1.7)]
    assert any("is not Adafactor's merit" in note for note in _results.notes(two, Setup(), []))
    three = [*two, result("adamw-nesterov", 1.61)]
    assert any("takes AdamW from 1.700 to 1.610" in note for note in _results.notes(three, Setup(), []))


def test_defaults_and_sentences_follow_from_the_recorded_sweep() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "sweep.json"
    if not path.exists():
        pytest.skip("benchmarks/ is not part of the sdist")
    losses = {(c["optimizer"], c["lr"], c["seed"]): c["val_loss"] for c in json.loads(path.read_text())["cells"]}

    def mean(contender: Contender, lr: float | None) -> float:
        return sum(losses[contender.name, lr, seed] for seed in range(3)) / 3

    for contender in TUNED:
        assert contender.swept_loss == pytest.approx(mean(contender, contender.lr), abs=5e-4)
        means = {lr: mean(contender, lr) for lr in contender.grid or (None,)}
        assert min(means, key=lambda lr: means[lr]) == contender.lr
        assert contender.lr not in (contender.grid[:1] + contender.grid[-1:]), "the best is not at the grid's edge"

    tuned = [contender for contender in TUNED if contender.lr is not None]
    for a, b in itertools.combinations(tuned, 2):
        gaps = [losses[a.name, a.lr, seed] - losses[b.name, b.lr, seed] for seed in range(3)]
        assert max(gaps) - min(gaps) < GAP_NOISE
