"""`adafactor trace`: the numbers it shows are the algorithm's, its files open, its mistakes are one line."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from _trace import run, run_json
from adafactor.cli._errors import UserError
from adafactor.cli._surfaces import SURFACES
from adafactor.cli._trace_animate import FRAMES, POSITIONS, frame_steps
from adafactor.cli._trace_draw import chosen_steps, num, powers_of_ten
from adafactor.cli._trace_walk import walk_both

# --- an independent recomputation, numpy float64, from the boxed math -----------------------------------------------


def numeric_gradient(f: Any, p: np.ndarray) -> np.ndarray:
    """Central differences with a complex step: exact to rounding for polynomials."""
    return np.array([(f(*(p + 1e-30j * np.eye(2)[k]))).imag / 1e-30 for k in range(2)])


def walk_by_hand(
    f: Any, start: tuple[float, float], shape: tuple[int, int], steps: int, lr: float | None, beta1: float | None
) -> list[dict[str, Any]]:
    p, R, C, M, rows = np.array(start), np.zeros(shape[0]), np.zeros(shape[1]), np.zeros(2), []
    for t in range(1, steps + 1):
        g = numeric_gradient(f, p)
        q = g.reshape(shape) ** 2 + 1e-30
        beta2 = 1 - t**-0.8
        R = beta2 * R + (1 - beta2) * q.mean(1)
        C = beta2 * C + (1 - beta2) * q.mean(0)
        V = (np.outer(R, C) / R.mean()).ravel()
        U = g / np.sqrt(V)
        clip = max(1.0, math.sqrt((U**2).mean()))
        alpha = min(1e-2, t**-0.5) * max(1e-3, math.sqrt((p**2).mean())) if lr is None else lr
        step = -alpha * U / clip
        if beta1 is not None:
            M = beta1 * M - (1 - beta1) * step
            step = -M
        rows.append({"t": t, "f": f(*p), "p": p, "g": g, "R": R, "C": C, "V": V, "U": U, "clip": clip, "step": step})
        p = p + step
    return rows


@pytest.mark.parametrize(
    ("surface", "extra", "lr", "beta1", "layout"),
    [
        ("bowl", [], 0.2, None, "1x2"),
        ("himmelblau", ["--beta1", "0.9"], 0.2, 0.9, "2x1"),
        ("beale", ["--relative-step"], None, None, "1x2"),
        ("beale", ["--relative-step", "--beta1", "0.5"], None, 0.5, "2x1"),
        ("rosenbrock", ["--lr", "0.05"], 0.05, None, "2x1"),
    ],
)
def test_the_rows_are_the_algorithm_in_float64(
    tmp_path: Path, surface: str, extra: list[str], lr: float | None, beta1: float | None, layout: str
) -> None:
    shown = run_json(tmp_path, "--surface", surface, "--steps", "25", "--layout", layout, *extra)
    shape = {"1x2": (1, 2), "2x1": (2, 1)}[layout]
    expected = walk_by_hand(SURFACES[surface].f, (4.0, 4.0), shape, 25, lr, beta1)
    assert len(shown["adafactor"]["rows"]) == 25
    for row, by_hand in zip(shown["adafactor"]["rows"], expected, strict=True):
        for name, value in by_hand.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-10, atol=1e-13, err_msg=f"{name} at {row['t']}")


def test_the_first_step_is_what_one_computes_by_hand(tmp_path: Path) -> None:
    # f = (x^2 + 10 y^2) / 2 at (4, 4): g = (4, 40), and at t = 1 the average is g^2 itself, so U = 1 and the step -lr
    row = run_json(tmp_path, "--steps", "1")["adafactor"]["rows"][0]
    assert row["f"] == 88.0
    assert row["g"] == [4.0, 40.0]
    assert row["R"] == [(16.0 + 1600.0) / 2]
    assert row["C"] == [16.0, 1600.0]
    assert row["V"] == pytest.approx([16.0, 1600.0], rel=1e-15)
    assert row["U"] == pytest.approx([1.0, 1.0], rel=1e-15)
    assert row["step"] == pytest.approx([-0.2, -0.2], rel=1e-14)


def test_v_is_the_product_of_the_means_and_loses_nothing_in_two_dimensions(tmp_path: Path) -> None:
    for layout, same in (("1x2", "C"), ("2x1", "R")):
        shown = run_json(tmp_path, "--layout", layout, "--surface", "beale", "--steps", "30")
        for row in shown["adafactor"]["rows"]:
            R, C = np.array(row["R"]), np.array(row["C"])
            np.testing.assert_allclose(row["V"], (np.outer(R, C) / R.mean()).ravel(), rtol=1e-14)
            np.testing.assert_allclose(row["V"], row[same], rtol=1e-14)
            np.testing.assert_allclose(R.mean(), C.mean(), rtol=1e-14)


def test_adam_is_adam(tmp_path: Path) -> None:
    p, m, v = np.array([4.0, 4.0]), np.zeros(2), np.zeros(2)
    for row in run_json(tmp_path, "--surface", "himmelblau", "--steps", "30")["adam"]["rows"]:
        t, g = row["t"], numeric_gradient(SURFACES["himmelblau"].f, p)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        V = v / (1 - 0.999**t)
        U = m / (1 - 0.9**t) / (np.sqrt(V) + 1e-8)
        for name, value in {"p": p, "g": g, "V": V, "U": U, "step": -0.2 * U}.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-10, err_msg=f"{name} at {t}")
        p = p - 0.2 * U


@pytest.mark.parametrize("name", SURFACES)
def test_surfaces_are_zero_and_flat_at_their_minima(name: str) -> None:
    surface = SURFACES[name]
    for m in surface.minima:
        p = torch.tensor(m, dtype=torch.float64, requires_grad=True)
        f = surface.f(*p)
        f.backward()
        assert p.grad is not None
        assert float(f.detach()) <= 1e-20
        assert float(p.grad.abs().max()) <= 1e-9
        assert all(surface.domain[0] < c < surface.domain[1] for c in (*m, 4.0))


@pytest.mark.parametrize(("name", "nearer"), [("bowl", 1e-3), ("himmelblau", 1e-3), ("beale", 1.0)])
def test_default_settings_walk_towards_a_minimum(name: str, nearer: float) -> None:
    s = SURFACES[name]
    ours, _ = walk_both(s, (4.0, 4.0), "1x2", s.steps, s.lr)
    assert min(math.dist(ours.end, m) for m in s.minima) < nearer
    assert ours.f_end < 1e-3 * ours.losses[0]


def test_momentum_mends_the_bounce_on_rosenbrock_as_the_help_says() -> None:
    s = SURFACES["rosenbrock"]
    plain, _ = walk_both(s, (4.0, 4.0), "1x2", s.steps, s.lr)
    damped, _ = walk_both(s, (4.0, 4.0), "1x2", s.steps, s.lr, beta1=0.9)
    assert math.dist(plain.end, s.minima[0]) < 2.5
    assert max(plain.losses[300:]) > 5  # it bounced out of the valley
    assert max(damped.losses[300:]) < 2
    assert damped.f_end < 0.1 * plain.f_end


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_and_the_table_on_the_terminal(tmp_path: Path) -> None:
    result = run(tmp_path, "--steps", "12")
    assert result.exit_code == 0, result.output
    assert "V=RC/mean(R)" in result.stdout
    assert "1×2 matrix" in result.stdout
    assert sum(line.startswith("wrote ") for line in result.stdout.splitlines()) == 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"trace.png", "trace.csv"}
    with Image.open(tmp_path / "out" / "trace.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 1000
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "trace.csv").read_text(encoding="utf-8"))))
    assert [r["optimizer"] for r in rows] == ["Adafactor"] * 12 + ["Adam"] * 12
    shown = run_json(tmp_path, "--steps", "12")
    for line, row in zip(rows, shown["adafactor"]["rows"] + shown["adam"]["rows"], strict=True):
        assert [float(line["step_x"]), float(line["step_y"])] == row["step"]
        assert [float(line["V_x"]), float(line["V_y"])] == row["V"]
        assert [float(line[k]) for k in ("C_1", "C_2") if line[k]] == row["C"]


def test_the_gif_has_a_frame_for_the_start_and_each_step(tmp_path: Path) -> None:
    shown = run_json(tmp_path, "--steps", "5", "--animate", "gif")
    with Image.open(shown["files"]["animation"]) as picture:
        assert picture.format == "GIF"
        assert picture.n_frames == 6  # type: ignore[attr-defined]
        first = np.asarray(picture.convert("RGB")).astype(int)
        picture.seek(5)
        last = np.asarray(picture.convert("RGB")).astype(int)
    assert (first[0, 0] == 255).all()
    assert (np.abs(first - last).sum(-1) > 60).sum() > 100  # the path has grown


class Outside(HTMLParser):
    """Collects what a page would load from elsewhere, and its slider."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.sliders: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag == "input" and given.get("type") == "range":
            self.sliders.append(given)


def test_the_page_has_a_slider_and_needs_no_network(tmp_path: Path) -> None:
    shown = run_json(tmp_path, "--steps", "7", "--animate", "html")
    text = Path(shown["files"]["animation"]).read_text(encoding="utf-8")
    page = Outside()
    page.feed(text)
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert len(page.loads) == 1
    assert [s["max"] for s in page.sliders] == ["7"]
    assert "{{" not in text
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)  # a namespace, not an address
    found = re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert data["at"] == list(range(8))
    assert [len(walk["rows"]) for walk in data["walks"]] == [7, 7]
    paths = [track for track in data["tracks"] if track["path"]]
    assert [len(track["points"]) for track in paths] == [8, 8]
    assert all(len(track["points"]) == 8 - track["first"] for track in data["tracks"])
    # Both optimizers start on the same spot of their panels, and go down and left: y grows downwards in a picture.
    for track in paths:
        (x0, y0), (x1, y1) = track["points"][0], track["points"][-1]
        assert x1 < x0
        assert y1 > y0


def test_long_walks_have_bounded_frames_and_positions() -> None:
    for steps in (1, 2, FRAMES - 1, FRAMES, POSITIONS, 100_000):
        for most in (FRAMES, POSITIONS + 1):
            frames = frame_steps(steps, most)
            assert (frames[0], frames[-1]) == (0, steps)
            assert len(frames) == min(steps + 1, most)
            assert frames == sorted(set(frames))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--start", "0", "0", "--steps", "1"],  # at the minimum: nothing moves, no ring to draw
        ["--start", "1e6", "-3e5", "--surface", "rosenbrock", "--steps", "3"],
        ["--lr", "100", "--surface", "beale", "--steps", "20"],
        ["--relative-step", "--steps", "300", "--layout", "2x1"],
    ],
)
def test_unusual_walks_are_drawn(tmp_path: Path, arguments: list[str]) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "trace.png").stat().st_size > 10_000


# --- numbers as text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (4, "4.00"), (40, "40.0"), (1600, "1600"), (-0.2, "-0.200"), (3.2e-5, "3.2e-5"), (1e10, "1.0e10")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert num(value) == text.replace("-", "\N{MINUS SIGN}")


def test_chosen_steps_begin_at_one_and_end_at_the_last() -> None:
    for n in (1, 2, 6, 7, 8, 60, 1500, 100_000):
        steps = chosen_steps(n, 7)
        assert (steps[0], steps[-1]) == (1, n)
        assert len(steps) <= 7
        assert steps == sorted(set(steps))


def test_powers_of_ten_are_few() -> None:
    assert powers_of_ten(0.1, 1000) == pytest.approx([0.1, 1, 10, 100, 1000])
    assert 3 <= len(powers_of_ten(1e-20, 1e20)) <= 9


# --- mistakes -------------------------------------------------------------------------------------------------------

MISTAKES = [
    (["--surface", "saddle"], "--surface must be one of bowl, rosenbrock, beale, himmelblau, not 'saddle'"),
    (["--steps", "0"], "--steps must be between 1 and 100000, not 0"),
    (["--steps", "100001"], "--steps must be between 1 and 100000, not 100001"),
    (["--start", "nan", "4"], "--start must be two finite numbers, not nan 4.0"),
    (["--start", "4", "inf"], "--start must be two finite numbers, not 4.0 inf"),
    (["--start", "1e200", "4"], "--start 1e+200 4 on bowl: Adafactor must stay where f and its gradient squared"),
    (["--lr", "0"], "--lr must be a finite number above 0, not 0.0"),
    (["--lr", "nan"], "--lr must be a finite number above 0, not nan"),
    (["--lr", "1e300"], "lower --lr"),
    (["--beta1", "1"], "--beta1 must be at least 0 and below 1, not 1.0"),
    (["--matrix", "--seed", "-1"], "--seed must be between 0 and 2**63 - 1, not -1"),
    (["--layout", "3x1"], "--layout must be one of 1x2, 2x1, not '3x1'"),
    (["--animate", "mp4"], "--animate must be one of gif, html, not 'mp4'"),
    (["--matrix", "--animate", "gif"], "--animate must be left out with --matrix, not 'gif'"),
    (["--matrix", "--data", "no/such/file"], "no/such/file"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, arguments: list[str], said: str) -> None:
    result = run(tmp_path, *arguments)
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.stdout == ""


def test_an_out_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    result = run(tmp_path, "--steps", "3")
    assert isinstance(result.exception, UserError)
    assert re.fullmatch(r"--out must be a directory that can be written, not .*out \(.+\); name another",
                        str(result.exception))  # fmt: skip
    assert (tmp_path / "out").read_text(encoding="utf-8") == "a file"


def test_the_installed_command_exits_with_2_and_one_line(tmp_path: Path) -> None:
    code = "import sys; from adafactor.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "trace", "--surface", "saddle", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert "--surface must be one of" in result.stderr
