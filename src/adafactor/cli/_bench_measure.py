"""Step times by turns, state and temporary memory: one table of ``adafactor bench``."""

from __future__ import annotations

import gc
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adafactor import Adafactor, memory
from adafactor.cli._bench_case import DTYPES, Case, available, planned, temporaries
from adafactor.cli._bench_entries import ADAMW, BASELINES, SGD, Entry
from adafactor.cli._errors import UserError
from adafactor.cli._loop import StopSignal
from adafactor.cli._results import allocated
from adafactor.cli._screen import size

LEAST_ROUNDS = 3


@dataclass
class _Runner:
    """One optimizer at work; the times of its steps by round."""

    entry: Entry
    optimizer: torch.optim.Optimizer | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    spent: float = 0.0
    state_bytes: int = 0
    temporary_bytes: int = 0
    launches: dict[str, int] | None = None
    note: str | None = None


def measure(
    case: Case,
    entries: list[Entry],
    repeats: int,
    budget: float,
    stop: StopSignal,
    on_turn: Callable[[str, float], None],
) -> dict[str, Any] | None:
    """One table, or None when a signal came before the first round was over.

    All optimizers share the parameters and the gradients and have states of their own. In every round each of them
    takes two steps, of which the second is timed: the first lets it notice that others have changed the weights since.
    The order moves on by one from round to round.

    Args:
        case: what to step.
        entries: the optimizers, baselines included.
        repeats: rounds.
        budget: the seconds after which an optimizer sits out, baselines excepted; not before three rounds.
        stop: looked at after every turn.
        on_turn: called with an optimizer's title and the share that is done.
    """
    torch.set_num_threads(case.threads)
    free = available(case.device)
    room = None if free is None else free - planned(case, entries)
    named = _parameters(case)
    runners, explained = [], []
    for i, entry in enumerate(entries):
        on_turn(f"{entry.title}, warming up", 0.2 * i / len(entries))
        runner = _Runner(entry)
        runners.append(runner)
        _attempt(_warm_up, runner, case, named, room)
        if stop.received:
            return None
        if entry.config and isinstance(runner.optimizer, Adafactor):
            explained.append({"optimizer": entry.title, "backends": _explained(runner.optimizer)})
    gc.collect()
    gc.disable()  # as timeit does
    try:
        rounds = _rounds(case, runners, repeats, budget, stop, on_turn)
    finally:
        gc.enable()
    if not rounds:
        return None
    return {
        "title": case.title,
        "shapes": case.shapes.name,
        "tensors": len(case.shapes.shapes),
        "parameters": case.shapes.parameters,
        "dtype": case.dtype,
        "threads": case.threads,
        "rounds": rounds,
        "copy_bytes_per_second": _copy_rate(case.device),
        "interrupted": bool(stop.received),
        "optimizers": _rows(runners, case),
        "explain": explained,
    }


def _rounds(
    case: Case,
    runners: list[_Runner],
    repeats: int,
    budget: float,
    stop: StopSignal,
    on_turn: Callable[[str, float], None],
) -> int:
    """Take turns; how many rounds were completed."""
    for turn in range(repeats):
        shift = turn % len(runners)
        for i, runner in enumerate(runners[shift:] + runners[:shift]):
            if runner.optimizer is None or (
                turn >= LEAST_ROUNDS and runner.spent >= budget and not _is_baseline(runner)
            ):
                continue
            on_turn(runner.entry.title, 0.2 + 0.8 * (turn + i / len(runners)) / repeats)
            _attempt(_turn, runner, turn, case.device)
            if stop.received:
                for other in runners:
                    other.seconds.pop(turn, None)
                return turn
        going = any(r.optimizer and r.spent < budget and not _is_baseline(r) for r in runners)
        if not going and turn + 1 >= LEAST_ROUNDS:
            return turn + 1
    return repeats


def _announce_writes(optimizer: torch.optim.Optimizer) -> None:
    """The weights may have been written by torch's fused optimizers, which do not tell autograd."""
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


def _is_baseline(runner: _Runner) -> bool:
    """Baselines never sit out: every ratio needs them."""
    return runner.entry in BASELINES


def _turn(runner: _Runner, turn: int, device: str) -> None:
    assert runner.optimizer is not None
    _announce_writes(runner.optimizer)
    began = time.perf_counter()
    runner.optimizer.step()
    _wait(device)
    started = time.perf_counter()
    runner.optimizer.step()
    _wait(device)
    ended = time.perf_counter()
    runner.seconds[turn] = ended - started
    runner.spent += ended - began


def _warm_up(runner: _Runner, case: Case, named: list[tuple[str, torch.nn.Parameter]], room: int | None) -> None:
    """Build it, let it make its state, and measure the temporaries of its second step."""
    entry, needed = runner.entry, temporaries(runner.entry, case.shapes)
    if room is not None and needed > room:
        raise MemoryError(
            f"a step makes some {size(needed)} of temporaries, and {size(max(room, 0))} are left for them"
        )
    runner.optimizer = optimizer = entry.build(named, case.backend)
    optimizer.step()
    runner.temporary_bytes = memory.peak_allocated(optimizer.step, case.device)
    if case.device == "cuda":
        runner.launches = launched(optimizer.step)
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    runner.state_bytes = allocated(tensors)


def launched(run: Callable[[], object]) -> dict[str, int]:
    """How many kernels and copies the device was given while `run()` ran, by torch's profiler."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(path))
        return launches_in(json.loads(path.read_text())["traceEvents"])


def launches_in(events: Iterable[dict[str, Any]]) -> dict[str, int]:
    kinds = Counter(event.get("cat") for event in events)
    return {"kernels": kinds["kernel"] + kinds["gpu_memset"], "copies": kinds["gpu_memcpy"]}


def _attempt(work: Callable[..., None], runner: _Runner, *arguments: Any) -> None:
    """Whatever stops one optimizer becomes a note in its row; the others go on."""
    try:
        work(runner, *arguments)
    except Exception as error:
        text = str(error).strip().splitlines()
        runner.note = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        runner.optimizer = None
        runner.seconds.clear()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _copy_rate(device: str) -> float:
    """Bytes read and written, the median of nine copies of 64 MiB (of 1 GiB on a GPU)."""
    source = torch.zeros(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(9):
        _wait(device)
        began = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() / statistics.median(seconds)


def _parameters(case: Case) -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator(case.device).manual_seed(0)
    named, dtype = [], DTYPES[case.dtype]
    try:
        for i, shape in enumerate(case.shapes.shapes):
            p = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=case.device))
            with torch.no_grad():
                p.normal_(0, 0.02, generator=generator)
            p.grad = torch.empty_like(p).normal_(0, 1e-3, generator=generator)
            named.append((f"param {i}", p))
    except (MemoryError, RuntimeError) as error:
        raise UserError(f"--shapes {case.shapes.name}: the tensors do not fit; a smaller --scale needs less") from error
    return named


def _rows(runners: list[_Runner], case: Case) -> list[dict[str, Any]]:
    times = {runner.entry.name: runner.seconds for runner in runners}
    rows = []
    for runner in runners:
        entry, timed = runner.entry, bool(runner.seconds)
        rows.append(
            {
                "name": entry.name,
                "title": entry.title,
                "description": entry.description,
                "package": entry.package,
                "version": entry.version,
                "note": runner.note,
                "rounds": len(runner.seconds),
                "step_ms": _spread([1e3 * s for s in runner.seconds.values()]),
                "to_adamw": _spread(_ratios(runner.seconds, times.get(ADAMW.name, {}))),
                "to_sgd": _spread(_ratios(runner.seconds, times.get(SGD.name, {}))),
                "state_bytes": runner.state_bytes if timed else None,
                "state_bytes_per_parameter": runner.state_bytes / case.shapes.parameters if timed else None,
                "temporary_bytes": runner.temporary_bytes if timed else None,
                "launches": runner.launches,
                "moved_bytes_per_parameter": entry.passes and entry.passes * DTYPES[case.dtype].itemsize,
            }
        )
    return rows


def _ratios(seconds: dict[int, float], other: dict[int, float]) -> list[float]:
    """Round by round, so that what else the machine does meets both alike."""
    return [seconds[turn] / other[turn] for turn in seconds if turn in other]


def _spread(values: list[float]) -> dict[str, float] | None:
    """The median and the quartiles."""
    if not values:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": middle, "low": low, "high": high}


def _explained(optimizer: Adafactor) -> list[dict[str, Any]]:
    """Which backend serves how much, and why."""
    tensors: Counter[tuple[str, str]] = Counter()
    parameters: Counter[tuple[str, str]] = Counter()
    for row in optimizer.explain():
        tensors[row.backend, row.reason] += 1
        parameters[row.backend, row.reason] += math.prod(row.shape)
    return [
        {"backend": key[0], "reason": key[1], "tensors": tensors[key], "parameters": parameters[key]} for key in tensors
    ]
