"""``benchmarks/gpu.py``: it refuses before it misleads, and its way is open from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adafactor.backends import triton
from adafactor.cli._bench_measure import launched, launches_in

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").exists():
    pytest.skip("benchmarks/ is not part of the sdist", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no GPU" in line
    assert "--rehearse" in line


def test_there_are_no_times_where_a_test_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(gpu, "TESTS", (str(tmp_path / "test_red.py"),))
    with pytest.raises(SystemExit) as stopped:
        gpu.tested(rehearse=False)
    assert stopped.value.code == 1
    assert "no times" in capsys.readouterr().err


def test_adamw_with_float32_moments_is_adamw():
    """The function that is compiled, beside torch's optimizer, in float32."""
    p = torch.randn(50)
    q, t = torch.nn.Parameter(p.clone()), torch.zeros(())
    theirs, m, v = torch.optim.AdamW([q], lr=1e-3, weight_decay=0.0), torch.zeros(50), torch.zeros(50)
    for _ in range(5):
        g = torch.randn(50)
        q.grad = g
        theirs.step()
        t += 1
        gpu.adamw(p, g, m, v, t, 1e-3)
    torch.testing.assert_close(p, q.detach(), rtol=1e-6, atol=1e-7)
    narrow = p.bfloat16()
    gpu.adamw(narrow, g.bfloat16(), m, v, t, 1e-3)
    assert narrow.dtype == torch.bfloat16
    assert m.dtype == torch.float32


def test_launches_are_counted_by_what_the_profiler_calls_them():
    events = [
        {"cat": kind} for kind in ("kernel", "kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "cpu_op")
    ]
    assert launches_in([*events, {}]) == {"kernels": 3, "copies": 1}
    if not torch.cuda.is_available():
        assert launched(lambda: torch.ones(2) + 1) == {"kernels": 0, "copies": 0}


@pytest.mark.slow
@pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
def test_a_rehearsal_goes_all_the_way(tmp_path: Path):
    out = tmp_path / "rehearsal.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--rehearse", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "None of these times means anything" in done.stdout
    results = json.loads(out.read_text())
    assert results["settings"]["rehearsal"]
    assert "passed" in results["tests"]
    assert len(results["cases"]) == 2 * len(gpu.MODELS)
    for case in results["cases"]:
        rows = {row["name"]: row for row in case["optimizers"]}
        assert {row["name"] for row in rows.values() if row["note"]} <= {"adamw-8bit", "flash-adamw"}
        assert ("adamw-float32-moments" in rows) == (case["dtype"] == "bfloat16")
