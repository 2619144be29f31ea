"""`adafactor trace --matrix`: what R and C keep of a matrix of squared gradients, and what they lose, in numbers."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from _trace import run, run_json


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_json(tmp_path_factory.mktemp("matrix"), "--matrix", "--steps", "6", "--data", str(Path(__file__)))


def test_matrix_v_keeps_every_row_and_column_mean(matrix: dict[str, Any]) -> None:
    R, C, V, ema = (np.array(matrix[k]) for k in ("R", "C", "V", "ema"))
    np.testing.assert_allclose(V, np.outer(R, C) / R.mean(), rtol=1e-13)
    np.testing.assert_allclose(R, ema.mean(1), rtol=1e-12)
    np.testing.assert_allclose(C, ema.mean(0), rtol=1e-12)
    np.testing.assert_allclose(V.mean(1), ema.mean(1), rtol=1e-12)
    np.testing.assert_allclose(V.mean(0), ema.mean(0), rtol=1e-12)
    np.testing.assert_allclose(matrix["ratio"], V / ema, rtol=1e-13)


def test_matrix_numbers_are_what_they_say(matrix: dict[str, Any]) -> None:
    V, ema, said = np.array(matrix["V"]), np.array(matrix["ema"]), matrix["numbers"]
    assert said["numbers_full"] == ema.size == 32 * 32
    assert said["numbers_kept"] == 64
    assert said["relative_error"] == pytest.approx(math.sqrt(((V - ema) ** 2).sum() / (ema**2).sum()))
    assert said["variance_kept"] == pytest.approx(1 - ((V - ema) ** 2).mean() / ema.var())
    off = np.sqrt(ema / V)
    assert said["share_of_steps_within_factor_2"] == ((off < 2) & (off > 0.5)).mean()
    assert said["longest_step_ratio"] == pytest.approx(off.max())
    small, large = matrix["extremes"]["too_small"], matrix["extremes"]["too_large"]
    assert small["V_over_ema"] == (V / ema).min() == pytest.approx((V / ema)[small["row"], small["column"]])
    assert large["V_over_ema"] == (V / ema).max()
    assert 0.05 < said["relative_error"] < 1  # the gradient is no rank-1 matrix: there is something to see
    with Image.open(matrix["files"]["picture"]) as picture:
        picture.load()
        assert picture.format == "PNG"


def test_matrix_gradient_is_that_of_a_softmax_regression(tmp_path: Path) -> None:
    # At W = 0 every next byte is equally likely, so a row's gradient sums to 0 and no entry's exceeds its row's share.
    (tmp_path / "text").write_bytes(b"abab" * 500)
    shown = run_json(tmp_path, "--matrix", "--steps", "1", "--data", str(tmp_path / "text"))
    assert sorted(shown["labels"]) == ["a", "b"]
    # One batch has a then b with share s and b then a with 1 - s: the rows of g are (s, -s) / 2 and (1 - s) likewise.
    g2 = np.array(shown["g2"])
    shares = 2 * np.sqrt(g2[:, 0])
    np.testing.assert_allclose(g2, np.column_stack([shares**2, shares**2]) / 4, rtol=1e-12)
    assert shares.sum() == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(shown["ema"], g2 + 1e-30, rtol=1e-12)
    assert shown["loss"] == pytest.approx(math.log(2))


def test_matrix_follows_its_seed(tmp_path: Path, matrix: dict[str, Any]) -> None:
    arguments = ["--matrix", "--steps", "6", "--data", str(Path(__file__))]
    assert run_json(tmp_path, *arguments)["V"] == matrix["V"]
    assert run_json(tmp_path, *arguments, "--seed", "1")["V"] != matrix["V"]


def test_matrix_tells_what_is_kept_and_lost(tmp_path: Path) -> None:
    result = run(tmp_path, "--matrix", "--steps", "2", "--data", str(Path(__file__)))
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "64 numbers instead of 1024: every row mean and every column mean, exactly" in said
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "matrix.csv").read_text(encoding="utf-8"))))
    assert len(rows) == 32 * 32
