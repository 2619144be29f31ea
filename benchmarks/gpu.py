"""Everything about the GPU kernels that takes a GPU, in one command: their tests first, and no times where one fails.

    pip install '.[test]' && python benchmarks/gpu.py
    python benchmarks/gpu.py --rehearse

The first writes results/bench-gpu.json and prints the table that docs/gpu-kernels.md waits for. The second goes the
same way without a GPU: through a few tiny tensors, in Triton's interpreter.

Times are taken as `adafactor bench` takes them: by turns within one run, the median of the rounds, ours checked against
float64 before. What is not installed is left out, and named: `pip install bitsandbytes flashoptim` for 8-bit AdamW and
FlashAdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from adafactor.backends import triton
from adafactor.cli import _bench_report as report
from adafactor.cli._bench_case import DTYPES, Case, available
from adafactor.cli._bench_entries import ADAFACTOR, ADAMW, EIGHT_BIT, ENTRIES, LR, MOMENTUM, SGD, Entry, Named
from adafactor.cli._bench_gate import check
from adafactor.cli._bench_measure import measure
from adafactor.cli._bench_shapes import PRESETS, ShapeSet
from adafactor.cli._files import write_json
from adafactor.cli._loop import StopSignal

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/bench-gpu.json"
TESTS = ("tests/test_triton.py", "tests/test_gpu.py", "tests/test_few_bits.py")
MODELS = ("llama-3-8b", "t5-large", "sdxl-unet", "many-small")
BYTES = 24  # per parameter: weights, gradients, and the states of all that share them
REHEARSED = 3  # tensors of each model, the smallest of either kind


class Float32Moments(torch.optim.Optimizer):
    """AdamW with float32 moments beside bfloat16 weights, 22 bytes a parameter; torch's fused one takes a single dtype.

    One elementwise function, compiled by torch: a launch for each tensor.

    Args:
        params: parameters.
        lr: the step's size. Range: >= 0.
    """

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self._update = torch.compile(adamw, dynamic=True)
        self._t: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {name: torch.zeros(p.numel(), device=p.device) for name in ("m", "v")}
                if self._t is None:
                    self._t = torch.zeros((), device=p.device)
        assert self._t is not None
        self._t += 1
        for group in self.param_groups:
            for p in group["params"]:
                self._update(p.view(-1), p.grad.view(-1), self.state[p]["m"], self.state[p]["v"], self._t, group["lr"])


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: Tensor, lr: float) -> None:
    """torch.optim.AdamW's step without weight decay, in float32."""
    g = g.float()
    m.lerp_(g, 0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    root = v.sqrt() / (1 - 0.999**t).sqrt() + 1e-8
    p.copy_(p.float() - lr / (1 - 0.9**t) * m / root)


FLOAT32_MOMENTS = Entry(
    "adamw-float32-moments",
    "AdamW, fp32 moments",
    "one elementwise function compiled by torch, a launch for each tensor; bfloat16 weights, rounded to nearest",
    "torch",
    lambda named, backend: Float32Moments([p for _, p in named], LR),
    whole_copies=2,
    passes=11,  # p, g, p again in two bytes; two moments, read and written, in four
)


def _flash(named: Named, backend: str) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW  # pyright: ignore[reportMissingImports]

    return FlashAdamW([p for _, p in named], lr=LR, weight_decay=0.0)


FLASH = Entry("flash-adamw", "FlashAdamW", "flashoptim.FlashAdamW(lr=0.001, weight_decay=0.0)", "flashoptim", _flash)


def entries(dtype: str) -> list[Entry]:
    """What is timed where it is installed, the two baselines last."""
    chosen = [ADAFACTOR, MOMENTUM, ENTRIES["transformers"], ENTRIES["torch"], EIGHT_BIT, FLASH]
    chosen += [FLOAT32_MOMENTS] * (dtype == "bfloat16")
    return [*(entry for entry in chosen if entry.installed), ADAMW, SGD]


def cases(rehearse: bool) -> list[Case]:
    found = []
    for name in MODELS:
        whole = ShapeSet(name, tuple(PRESETS[name]()))
        for dtype in ("bfloat16", "float32"):
            shapes = _smallest(whole) if rehearse else _fitting(whole)
            device, backend = ("cpu", "triton") if rehearse else ("cuda", "auto")
            found.append(Case(shapes, dtype, torch.get_num_threads(), device, backend))
    return found


def _fitting(whole: ShapeSet) -> ShapeSet:
    """All tensors, or a half of them, or a quarter, as memory allows; transformers makes five copies of the largest."""
    free, scale = available("cuda"), 1.0
    assert free is not None
    while True:
        shapes = whole.scaled(scale)
        if BYTES * shapes.parameters + 20 * shapes.largest <= free or len(shapes.shapes) == 1:
            return shapes
        scale /= 2


def _smallest(whole: ShapeSet) -> ShapeSet:
    """Cut to at most 48 a side: the ranks and the mixture of a model's tensors, in no time."""
    cut = sorted({tuple(min(side, 48) for side in shape) for shape in whole.shapes}, key=math.prod)[-REHEARSED:]
    return ShapeSet(f"tiny {whole.name}", tuple(cut))


def tested(rehearse: bool) -> str:
    """The last line of the tests.

    Raises:
        SystemExit: one fails.
    """
    some = ["-m", "not slow", "-k", "three_launches or traffic"] if rehearse else []
    command = [sys.executable, "-m", "pytest", "-q", *TESTS, *some]
    print(shlex.join(command), flush=True)
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            last = line.strip() or last
    if process.returncode:
        _stop("no times: a test above fails here", 1)
    return last


def gate(all_cases: list[Case], console: Console) -> list[Any]:
    """Ours against float64, in both dtypes.

    Raises:
        SystemExit: it differs.
    """
    verdicts = []
    for dtype in dict.fromkeys(case.dtype for case in all_cases):
        for entry in (ADAFACTOR, MOMENTUM):
            verdict = check(entry, all_cases[0].backend, DTYPES[dtype], all_cases[0].device)
            verdicts.append(verdict)
            if verdict.differences:
                console.print(report.differences(verdict))
                _stop(f"no times: {verdict.title} in {dtype} differs from the same steps in float64", 1)
    return verdicts


def aims(found: list[dict[str, Any]]) -> str:
    """The rows of docs/gpu-kernels.md, a column for each table."""
    header = ["", *(case["title"] for case in found)]
    lines: dict[str, list[str]] = {
        "time of a step, in steps of fused AdamW": [],
        "of AdamW with float32 moments": [],
        "of transformers' Adafactor": [],
        "share of a copy's bandwidth": [],
        "launches per step, and copies": [],
        "temporary memory, MiB": [],
    }
    for case in found:
        rows = {row["name"]: row for row in case["optimizers"]}
        ours = rows[ADAFACTOR.name]
        ms = {name: row["step_ms"]["median"] for name, row in rows.items() if row["step_ms"]}
        mine, launched = ms.get(ADAFACTOR.name), ours["launches"]
        ratios = [
            f"{mine / ms[n]:.3g}" if mine and n in ms else "-" for n in ("adamw", FLOAT32_MOMENTS.name, "transformers")
        ]
        rate = ours["moved_bytes_per_parameter"] * case["parameters"] / (mine / 1e3) if mine else 0.0
        values = [
            *ratios,
            f"{rate / case['copy_bytes_per_second']:.0%}",
            f"{launched['kernels']}, {launched['copies']}" if launched else "-",
            f"{ours['temporary_bytes'] / 2**20:.1f}" if mine else "-",
        ]
        for line, value in zip(lines.values(), values, strict=True):
            line.append(value)
    rows = [header, ["---"] * len(header), *([name, *values] for name, values in lines.items())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny; says nothing about speed")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; their median counts")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per table after which a slow one sits out")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/bench-gpu.json; none for a rehearsal")
    options = parser.parse_args(arguments)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    elif not torch.cuda.is_available():
        _stop("there is no GPU here (torch.cuda.is_available() is False); --rehearse goes the same way on the CPU", 2)
    if triton.missing():
        _stop(f"there are no GPU kernels here: {triton.missing()}", 2)

    line, console, all_cases = tested(options.rehearse), Console(highlight=False, width=200), cases(options.rehearse)
    out = options.out or (None if options.rehearse else RESULTS)
    verdicts, found = gate(all_cases, console), []
    with StopSignal() as stop:
        for case in all_cases:
            timed = measure(case, entries(case.dtype), options.repeats, options.budget, stop, lambda title, share: None)
            if timed:
                found.append(timed)
                console.print(report.table(timed))
            if out and found:  # as far as it is
                write_json(out, _results(found, verdicts, all_cases, options, line))
            if stop.received:
                break
    results = _results(found, verdicts, all_cases, options, line)
    for note in results["notes"]:
        console.print(note, soft_wrap=True, markup=False)
    print(f"\n{aims(found)}\n")
    if options.rehearse:
        print("A rehearsal: interpreted, on a CPU. None of these times means anything.")
    elif out:
        print(f"Results: {out}")


def _results(
    found: list[dict[str, Any]], verdicts: list[Any], all_cases: list[Case], options: argparse.Namespace, line: str
) -> dict[str, Any]:
    absent = [entry.package for entry in (ENTRIES["transformers"], EIGHT_BIT, FLASH) if not entry.installed]
    unfinished = [case.title for case in all_cases[len(found) :]]
    settings = {
        "backend": all_cases[0].backend,
        "device": all_cases[0].device,
        "repeats": options.repeats,
        "budget": options.budget,
        "rehearsal": options.rehearse,
    }
    results = report.collect(found, verdicts, absent, unfinished, settings)
    command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    return json.loads(json.dumps(results | {"tests": line, "triton": version("triton"), "command": command}))


def _stop(message: str, code: int) -> None:
    print(f"gpu.py: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
